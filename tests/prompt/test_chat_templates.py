"""Templates of today's chat models: the ids of the model's own chat template, the answers of it supervised."""

from itertools import groupby

import pytest

from llava_jax.errors import UsageError
from llava_jax.prompt import ending, templates, tokenizer
from llava_jax.prompt.encode import Format, encode, with_labels
from tests.prompt import chat_models
from tests.prompt.chat_models import MODELS

IMAGE = -200


class Theirs:
    """A chat model as transformers has it."""

    def __init__(self, name, directory):
        transformers = pytest.importorskip("transformers")
        transformers.logging.set_verbosity_error()
        self.words = transformers.AutoTokenizer.from_pretrained(directory)
        self.name, self.words.chat_template = name, MODELS[name].chat

    def ids(self, text):
        """What stands on the two sides of a picture is made into tokens apart, as LLaVA's tokenizer_image_token does.

        SentencePiece puts a blank before each of these texts; transformers 5 does so only where none is there, unless
        it is written behind a special token.
        """
        first, *rest = text.split("<image>")
        found, begin = self._ids(first), MODELS[self.name].begin
        for part in rest:
            found += [IMAGE, *(self._ids(begin + part)[bool(begin) :] if part else [])]
        return found

    def _ids(self, text):
        return self.words(text, add_special_tokens=False).input_ids

    def talk(self, messages, reply):
        return self.ids(self.words.apply_chat_template(
            messages, add_generation_prompt=reply, tokenize=False, enable_thinking=False
        ))  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(name, ours, theirs) of a chat model."""
    directory = MODELS[request.param].write(tmp_path_factory.mktemp("chat") / "it")
    form = Format(templates.get(request.param), tokenizer.load(directory), 28, 4, "pad")
    return request.param, form, Theirs(request.param, directory)


def runs(example):
    """The ids of each stretch of supervised tokens."""
    pairs = zip(example.learned.tolist(), example.tokens.tolist(), strict=True)
    return [[number for _, number in group] for learned, group in groupby(pairs, lambda pair: pair[0]) if learned]


def test_ids_and_supervised_ids_of_200_talks_are_those_of_the_models_own_chat_template(pair):
    name, form, theirs = pair
    model, ends, shown = MODELS[name], ending.of(form.template, form.tokenizer).ids, 0
    for talk in chat_models.talks(200, blanks=model.trims):
        example = encode(talk.conversation, form, open_images=False)
        ids, labels = with_labels(example)
        assert ids.tolist() == theirs.talk(talk.messages, reply=False), talk
        answers = [text.strip() if model.trims else text for text in talk.texts[1::2]]
        assert runs(example) == [theirs.ids(text + model.end) for text in answers], talk
        assert all(run[-1] == form.tokenizer.ids[model.end] and run[-1] in ends for run in runs(example))
        asked = talk._replace(texts=talk.texts[:-1])
        start, _ = with_labels(encode(asked.conversation, form, reply=True, open_images=False))
        assert start.tolist() == theirs.talk(asked.messages, reply=True), talk
        assert ids[: len(start)].tolist() == start.tolist() and labels[len(start)] != -100
        shown += len(example.image_spans)
    assert shown > 100


def test_an_empty_system_text_leaves_the_models_own_out(pair):
    _, form, _ = pair
    talk = chat_models.Talk(("What is it?", "A cat."), "")
    text = form.tokenizer.decode(encode(talk.conversation, form).tokens.tolist(), skip_special=False)
    assert "system" not in text and "Qwen" not in text and "What is it?" in text


def test_a_template_of_another_model_is_refused(tmp_path):
    words = tokenizer.load(chat_models.write_qwen(tmp_path / "qwen"))
    with pytest.raises(UsageError, match="'qwen_3' is written with </think> and <think>.*one of .*qwen, qwen_2$"):
        ending.check(templates.get("qwen_3"), words, "HERE")
    with pytest.raises(UsageError, match=r"'llama_3' is written with <\|end_header_id\|> and .*ends .*'<\|im_end\|>'"):
        ending.check(templates.get("llama_3"), words, "HERE")


def test_words_of_the_frames_are_letters_in_what_people_write(pair):
    name, form, _ = pair
    end = MODELS[name].end
    example = encode(chat_models.Talk((f"Say {end}", f"I say {end}"), "Be brief.").conversation, form)
    assert runs(example)[0].count(form.tokenizer.ids[end]) == 1
    assert example.tokens.tolist().count(form.tokenizer.ids[end]) < 5
