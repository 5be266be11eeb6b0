"""Records in words.json the ids that transformers 4's own SentencePiece tokenizer, the reference's, gives for texts
around added words.

Run by hand, in an environment of its own: `pip install transformers==4.57.6 sentencepiece protobuf && python -m
tests.golden.make_words`.
"""

import json
import tempfile
from pathlib import Path

import transformers

from tests.prompt import layouts

VARIANTS = ("none", "special", "plain", "strips")  # it reads single_word otherwise than its fast ones, and 5


def main() -> None:
    texts, found = layouts.texts(150, seed=3), []
    for legacy in (False, True):
        for name in VARIANTS:
            with tempfile.TemporaryDirectory() as folder:
                place = layouts.directory(Path(folder), layouts.WORDS[name], legacy=legacy)
                tokenizer = transformers.LlamaTokenizer.from_pretrained(place)
            ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
            found.append({"legacy": legacy, "words": name, "ids": ids})
    content = {"transformers": transformers.__version__, "texts": texts, "cases": found}
    path = Path(__file__).parent / "words.json"
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
