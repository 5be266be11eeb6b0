"""The chat template of an export to today's chat models: transformers renders it to the ids of `prompt.encode`."""

import pytest

from llava_jax.convert import chat_template, tokenizer_files
from llava_jax.data import records
from llava_jax.prompt import templates
from llava_jax.prompt.encode import Format, encode, with_labels
from tests.prompt import chat_models
from tests.prompt.chat_models import MODELS

IMAGE = -200


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """(format, transformers' tokenizer) of what an export holds."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    folder = tmp_path_factory.mktemp("exported")
    made = MODELS[request.param].write(folder / "it")
    words = tokenizer_files.with_image_token(made, None)
    template = templates.get(request.param)
    for name, content in tokenizer_files.files(words, "LlavaProcessor").items():
        (folder / name).write_bytes(content)
    (folder / "chat_template.jinja").write_text(chat_template.render(template, words.tokenizer))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return Format(template, words.tokenizer, 28, 1, "pad"), theirs


def parts(text):
    """A message as typed parts, a picture for each marker."""
    texts = text.split("<image>")
    found = [[{"type": "image", "image": "x.png"}, {"type": "text", "text": one}] for one in texts]
    return [part for both in found for part in both][1:]


def spoken(talk):
    """The talk as messages, its questions as parts; a single picture of all is the first part of its question."""
    if len(talk.conversation.images) == 1:
        front = (f"<image>{text.replace('<image>', '').strip()}" if "<image>" in text else text for text in talk.texts)
        talk = talk._replace(texts=tuple(front))
    return [
        message | ({"content": parts(message["content"])} if message["role"] == "user" else {})
        for message in talk.messages
    ]


def test_an_exports_chat_template_gives_the_ids_of_encode(exported):
    form, theirs = exported
    image, shown = form.tokenizer.ids["<image>"], 0
    for talk in chat_models.talks(100, seed=1):
        for messages, reply in ((spoken(talk), False), (spoken(talk)[:-1], True)):
            conversation = records.Record("it", 0, None, {"messages": messages}).conversation
            ids, _ = with_labels(encode(conversation, form, reply=reply, open_images=False))
            found = theirs.apply_chat_template(messages, add_generation_prompt=reply, return_dict=False)
            assert [IMAGE if number == image else number for number in found] == ids.tolist(), talk
            shown += ids.tolist().count(IMAGE)
    assert shown > 100


def test_messages_of_text_and_their_supervised_ids_are_those_of_encode(exported):
    form, theirs = exported
    for talk in chat_models.talks(100, blanks=form.template.trims, seed=2):
        talk = talk._replace(texts=tuple(text.replace("<image>", "") + "." for text in talk.texts))
        example = encode(talk.conversation, form)
        found = theirs.apply_chat_template(talk.messages, return_dict=True, return_assistant_tokens_mask=True)
        assert found["input_ids"] == example.tokens.tolist(), talk
        assert found["assistant_masks"] == example.learned.astype(int).tolist(), talk
