"""Tokens are those of a model's own tokenizer, whatever the layout of its files, and an export gives them back."""

import itertools
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llava_jax.convert import tokenizer_files
from llava_jax.prompt import tokenizer as tokenizers
from llava_jax.prompt.tokenizer import LlamaTokenizer
from tests.prompt import layouts

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TEXTS = layouts.texts(90, seed=1)
# Where a stretch of text begins with a blank, transformers 5 leaves one of SentencePiece's two "▁" out.
BLANK = re.compile(r"(^|</s>|<s>|<unk>|<tool>|<end>|tool)[ ▁]")
COMBINATIONS = list(itertools.product(layouts.WORDS, layouts.PLACES, (True, False), layouts.CLASSES))
QUICK = COMBINATIONS[::11]  # 11 divides none of the factors' sizes, so each value of each is met


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    return library


def fast_of(legacy):
    """tokenizer.json as transformers 4 converts the model: with a normaliser, where it is legacy."""
    found = tokenizers.load(layouts.MODEL, legacy=legacy)
    return json.loads(tokenizer_files.files(tokenizer_files.without_image_token(found), None)["tokenizer.json"])


def new_fast_of(transformers, folder, legacy):
    """tokenizer.json as transformers 5 saves it: never with a normaliser."""
    place = layouts.directory(folder, {}, legacy=legacy)
    return json.loads(transformers.AutoTokenizer.from_pretrained(place).backend_tokenizer.to_str())


def check(transformers, place):
    """Compares `load` of a directory with transformers: with its tokenizer.json to the letter where that counts."""
    ours = tokenizers.load(place)
    driven = isinstance(ours, LlamaTokenizer)
    reader = transformers.AutoTokenizer if driven else transformers.PreTrainedTokenizerFast
    theirs = reader.from_pretrained(place)
    texts = [text for text in TEXTS if not (driven and BLANK.search(text))]
    assert len(texts) > 40
    for text in texts:
        assert ours.encode(text, bos=False) == theirs(text, add_special_tokens=False).input_ids, text
    added = theirs.added_tokens_decoder
    assert set(ours.specials) == {token.content for token in added.values() if token.special}
    assert ours.ids == {token.content: number for number, token in added.items()}
    assert (ours.bos_id, ours.eos_id, ours.size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    assert ours.adds_bos or not driven
    check_again(transformers, ours, place / "again")


def check_again(transformers, ours, folder):
    """What a checkpoint keeps, and an export, are the same tokenizer again: for us and for transformers."""
    tokenizers.save(ours, folder / "kept")
    (folder / "out").mkdir()
    for name, content in tokenizer_files.files(tokenizer_files.without_image_token(ours), None).items():
        (folder / "out" / name).write_bytes(content)
    for name in ("kept", "out"):
        again = tokenizers.load(folder / name)
        assert again.words == ours.words and again.size == ours.size
        assert all(again.encode(text, bos=True) == ours.encode(text, bos=True) for text in TEXTS[:30])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "out")
    first_blank = re.compile(BLANK.pattern if ours.legacy is False else "^$")
    for text in (text for text in TEXTS[:60] if not first_blank.search(text)):
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text, bos=False), text
    flags = {token.content: token.special for token in theirs.added_tokens_decoder.values()}
    assert flags == {word.text: word.special for word in ours.words}


def check_layout(transformers, folder, layout, combination):
    words, place, legacy, kind = combination
    if layout == "model" and place == "json":
        return
    fast = None
    if layout != "model":
        fast = new_fast_of(transformers, folder / "new", legacy) if layout.endswith("new") else fast_of(legacy)
    stated = None if layout.startswith("json") else legacy
    made = layouts.directory(
        folder / "tokenizer", layouts.WORDS[words], place, kind, stated, model=not layout.startswith("json"), fast=fast
    )
    check(transformers, made)


@pytest.mark.parametrize("layout", ["model", "json old", "json new", "both old", "both new"])
def test_ids_are_those_of_the_models_own_tokenizer(transformers, tmp_path, layout):
    for number, combination in enumerate(QUICK):
        check_layout(transformers, tmp_path / str(number), layout, combination)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["model", "json old", "json new", "both old", "both new"])
@pytest.mark.parametrize("words", layouts.WORDS)
def test_ids_are_those_of_the_models_own_tokenizer_in_all_combinations(transformers, tmp_path, layout, words):
    for number, combination in enumerate(one for one in COMBINATIONS if one[0] == words):
        check_layout(transformers, tmp_path / str(number), layout, combination)


def test_a_tokenizer_model_gives_the_ids_of_the_references_own_tokenizer(tmp_path):
    recorded = json.loads((GOLDEN / "words.json").read_text(encoding="utf-8"))
    assert len(recorded["cases"]) == 8
    for number, case in enumerate(recorded["cases"]):
        place = layouts.directory(tmp_path / str(number), layouts.WORDS[case["words"]], legacy=case["legacy"])
        tokenizer, compared = tokenizers.load(place), 0
        for text, ids in zip(recorded["texts"], case["ids"], strict=True):
            # Left out: a "▁" that it alone, and none of transformers' others, leaves before a word at the start; and
            # a "▁" that people write beside a word that takes white space along.
            if re.match(r"\s*(<tool>|<end>)", text) or ("▁" in text and case["words"] == "strips"):
                continue
            assert tokenizer.encode(text, bos=False) == ids, text
            compared += 1
        assert compared > 100


@pytest.mark.parametrize("kind", layouts.CLASSES)
def test_a_tokenizer_json_is_followed_to_the_letter_whatever_class_is_named(tmp_path, kind):
    """LLaMA's class makes transformers 5 rebuild the tokenizer without its normaliser: " Hello" loses a blank."""
    place = layouts.directory(tmp_path / "it", {}, kind=kind, legacy=True, model=False, fast=fast_of(True))
    found = tokenizers.load(place)
    driven = tokenizers.load(layouts.MODEL, legacy=True)
    for text in ("</s> Hello", "USER: hi </s> there", " two", *TEXTS):
        assert found.encode(text, bos=False) == driven.encode(text, bos=False), text


def test_transformers_5_alone_would_change_the_ids_of_a_tokenizer_json(transformers, tmp_path):
    """Why the test above holds ours against the file and not against AutoTokenizer; once this fails, it may change."""
    place = layouts.directory(tmp_path / "it", {}, legacy=True, model=False, fast=fast_of(True))
    theirs = transformers.AutoTokenizer.from_pretrained(place)
    text = "</s> Hello"
    assert theirs(text, add_special_tokens=False).input_ids != tokenizers.load(place).encode(text, bos=False)


@pytest.mark.parametrize("layout", ["model", "json"])
@pytest.mark.parametrize("legacy", [True, False])
def test_words_that_are_not_special_count_in_what_people_write_and_stay_in_answers(tmp_path, layout, legacy):
    fast = fast_of(legacy) if layout == "json" else None
    stated = None if fast else legacy
    place = layouts.directory(tmp_path / "it", layouts.WORDS["plain"], legacy=stated, model=fast is None, fast=fast)
    tokenizer = tokenizers.load(place)
    text = "a <tool> b <end> c</s>"
    ids = [token.id for token in tokenizer.tokenize(text, [(len(text) - 4, len(text))])]  # only the last </s> counts
    assert ids.count(960) == 1 and 961 not in ids and ids[-1] == 2
    # The decoder of a legacy tokenizer.json knows no words: it leaves the blank that its normaliser put after one.
    assert tokenizer.decode(ids, skip_special=False).replace("  ", " ") == text
    assert tokenizer.decode(tokenizer.encode("a<tool><end></s>", bos=True)) == "a<tool>"


@pytest.mark.parametrize("layout", ["model", "json"])
@pytest.mark.parametrize("legacy", [True, False])
def test_letters_that_look_like_a_special_word_leave_all_other_tokens_as_they_are(tmp_path, layout, legacy):
    """The ids are those of a tokenizer that has no such word, and the tokens cover the text in order."""
    fast = fast_of(legacy) if layout == "json" else None
    stated = None if fast else legacy
    with_word, without = (
        tokenizers.load(
            layouts.directory(tmp_path / name, layouts.WORDS[name], legacy=stated, model=fast is None, fast=fast)
        )
        for name in ("special", "none")
    )
    letters = [atom for atom in layouts.ATOMS if atom not in ("</s>", "<s>", "<unk>")]
    for text in layouts.texts(60, seed=2, atoms=letters):
        typed = f"USER: {text} <tool> x"
        fixed = [(0, 5), (len(typed), len(typed) + 4)]
        tokens = with_word.tokenize(typed + "</s>", fixed)
        assert [token.id for token in tokens] == without.encode(typed + "</s>", bos=False), typed
        assert tokens[-1] == (2, len(typed), len(typed) + 4)
        starts = [token.start for token in tokens]
        assert starts == sorted(starts) and all(start <= end <= len(typed) + 4 for _, start, end in tokens)


def test_a_text_of_the_characters_that_stand_for_words_is_read_too(tmp_path):
    place = layouts.directory(tmp_path, {}, model=False, fast=fast_of(True))
    tokenizer = tokenizers.load(place)
    text = "\ufdd0</s>\ufdd1"
    assert tokenizer.decode([t.id for t in tokenizer.tokenize(text, [])], skip_special=False) == text
    every = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    with pytest.raises(ValueError, match="U\\+FDD0 to U\\+FDEF, which are no characters"):
        tokenizer.tokenize(every + "</s>", [])


def test_many_threads_read_one_tokenizer_json_at_once(tmp_path):
    found = tokenizers.load(layouts.directory(tmp_path, layouts.WORDS["plain"], model=False, fast=fast_of(True)))
    found = pickle.loads(pickle.dumps(found))
    wanted = [found.tokenize(text, []) for text in TEXTS]
    with ThreadPoolExecutor(16) as pool:
        for result in pool.map(lambda _: [found.tokenize(text, []) for text in TEXTS], range(32)):
            assert result == wanted


def test_the_files_own_names_decide_what_begins_and_ends_a_text(tmp_path):
    words = {960: layouts.word("<|im_start|>"), 961: layouts.word("<|im_end|>")}
    for fast in (None, fast_of(True)):
        stated = None if fast else True
        place = layouts.directory(tmp_path / str(bool(fast)), words, legacy=stated, model=fast is None, fast=fast,
                                  eos_token="<|im_end|>", pad_token={"content": "<|im_start|>"})  # fmt: skip
        found = tokenizers.load(place)
        assert (found.bos_id, found.eos_id, found.unk_id, found.pad_id) == (1, 961, 0, 960)
        tokenizers.save(found, tmp_path / "again")
        assert tokenizers.load(tmp_path / "again").eos_id == 961


def test_add_prefix_space_false_is_heard_and_kept(transformers, tmp_path):
    place = layouts.directory(tmp_path / "it", {}, legacy=False, add_prefix_space=False)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(place), tokenizers.load(place)
    assert ours.encode("a cat", False) != tokenizers.load(layouts.MODEL, legacy=False).encode("a cat", False)
    for text in (text for text in TEXTS if not BLANK.search(text)):
        assert ours.encode(text, False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ours.encode(text, True), skip_special=False) == "<s>" + text.replace("▁", " ")
    check_again(transformers, ours, tmp_path)
    with pytest.raises(ValueError, match="legacy is true and add_prefix_space false"):
        tokenizers.load(layouts.directory(tmp_path / "other", {}, legacy=True, add_prefix_space=False))


def test_a_word_in_place_of_a_piece_of_the_vocabulary_is_that_token(tmp_path):
    place = layouts.directory(tmp_path, {3: layouts.word("<|pad|>"), 960: layouts.word("<tool>")}, legacy=False)
    found = tokenizers.load(place)
    assert found.encode("a<|pad|>", bos=False)[-1] == 3 and found.piece(3) == "<|pad|>" and found.size == 961
    tokenizers.save(found, tmp_path / "again")
    assert tokenizers.load(tmp_path / "again").words == found.words


def test_special_words_without_an_id_come_after_all_others(transformers, tmp_path):
    for fast in (None, fast_of(False)):
        stated = None if fast else False
        place = layouts.directory(tmp_path / str(bool(fast)), layouts.WORDS["plain"], legacy=stated, model=fast is None,
                                  fast=fast, extra_special_tokens=["<extra>", "<tool>"])  # fmt: skip
        found = tokenizers.load(place)
        assert found.specials["<extra>"] == 962 and found.specials["<tool>"] == 960 and found.size == 963
        assert found.encode("a<extra>", False) == tokenizers.load(place, added=("<x>",)).encode("a<extra>", False)


def test_a_vocabulary_without_tokenizer_json_is_converted_by_transformers(transformers, tmp_path):
    letters = {letter: number for number, letter in enumerate("<|endoftext|>,a,b,c,Ġ,ab,Ġa".split(","))}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ a\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    found = tokenizers.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("ab a", "cab<|endoftext|> a"):
        assert found.encode(text, bos=False) == theirs(text, add_special_tokens=False).input_ids
    assert (found.eos_id, found.adds_bos, found.encode("a", bos=True)[-1]) == (0, False, 1)
