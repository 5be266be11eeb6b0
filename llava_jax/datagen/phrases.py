"""Noun phrases of captions, for `filters`: by a rule of thumb, by spaCy where it is installed, or from a file."""

import re
from collections.abc import Callable, Iterable

from etils import epath

from llava_jax.datagen.files import field, read_rows
from llava_jax.errors import DataError, UsageError

# Words that stand between noun phrases of captions: function words, auxiliaries, and the commonest verbs.
_SEPARATORS = frozenset(
    """a an the this that these those his her its their my your our some any each every both all another no of in on at
    by for from with without into onto over under above below behind beside between near next to through during across
    along around against toward towards up down out off inside outside as than like and or but nor so if while when
    where who whom whose which what how why because after before until since he she it they we you i him them us me
    there here is are was were be been being has have had do does did can could will would shall should may might must
    not very too just only also stand stands standing stood sit sits sitting sat lie lies lying lay hold holds holding
    held walk walks walking walked run runs running ran look looks looking looked wear wears wearing wore make makes
    making made take takes taking took get gets getting got go goes going went come comes coming came show shows showing
    shown play plays playing played use uses using used ride rides riding rode eat eats eating ate seen see""".split()
)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]")
_DETERMINER = re.compile(
    r"^(?:(?:a|an|the|this|that|these|those|his|her|its|their|my|your|our|some|any|each|every|both|all|another|no)\s+)+"
)

Phrases = Callable[[str], Iterable[str]]


def runs(caption: str) -> list[str]:
    """Runs of words between function words, common verbs and punctuation: "a black dog on the grass" has two.

    A rule of thumb in place of a tagger: it needs no model, and it is wrong where a verb is not in its list.
    """
    runs_of_words: list[list[str]] = [[]]
    for word in _WORD.findall(caption.lower()):
        if word in _SEPARATORS or not word[0].isalnum():
            runs_of_words.append([])
        else:
            runs_of_words[-1].append(word)
    return [" ".join(words) for words in runs_of_words if words]


def normalised(phrase: str) -> str:
    """Lower case, single blanks, without leading determiners."""
    return _DETERMINER.sub("", " ".join(phrase.lower().split()) + " ").strip()


def spacy_chunks(model: str) -> Phrases:
    """spaCy's noun chunks, as the paper used; model: an installed one, "en_core_web_sm".

    Raises:
      ValueError: spaCy or the model is not installed; names the remedy.
    """
    try:
        import spacy

        language = spacy.load(model, exclude=["ner", "lemmatizer"])
    except (ImportError, OSError) as error:
        raise UsageError(f"phrases spacy:{model}: {error}: pip install spacy, python -m spacy download {model}; "
                         "or use --phrases runs, or a file of phrases made elsewhere") from None  # fmt: skip
    return lambda caption: (chunk.text for chunk in language(caption).noun_chunks)


def from_file(path: epath.PathLike) -> dict[str, tuple[str, ...]]:
    """{id: phrases} of JSON lines {"id", "phrases"} that any tagger may have written.

    Raises:
      FileNotFoundError: no such file. DataError: a row has another shape.
    """
    by_id = {}
    for where, row in read_rows(path):
        phrases = field(row, where, "phrases", list, "a list of texts")
        if not all(isinstance(phrase, str) for phrase in phrases):
            raise DataError(f"{where}: phrases={phrases!r}: want a list of texts")
        by_id[str(field(row, where, "id", str | int, "a text or a number"))] = tuple(phrases)
    return by_id
