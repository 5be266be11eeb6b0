"""What we say about 20 pictures is what transformers says with the exported model, id for id."""

import numpy as np
import pytest

from llava_jax.convert import exporting
from llava_jax.generate.assistant import Assistant
from llava_jax.prompt.conversation import Conversation
from llava_jax.prompt.encode import encode
from tests.generate import tiny

NEW = 20
QUESTIONS = ("What is it?", "Describe the picture in a few words.", "Is there a cat?", "Where?")


def theirs(model, assistant: Assistant, conversation: Conversation) -> list[int]:
    """transformers' greedy ids for our prompt."""
    import torch

    example = encode(conversation, assistant.format, reply=True)
    ids = example.tokens.astype(np.int64)
    for start, length in example.image_spans:
        ids[start : start + length] = model.config.image_token_id
    vision = assistant.model.config.vision
    pixels = (np.stack(example.images).astype(np.float32) / 255 - vision.mean) / vision.std
    out = model.generate(
        input_ids=torch.tensor(ids)[None], attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32), max_new_tokens=NEW,
        do_sample=False, eos_token_id=assistant.format.tokenizer.eos_id, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


def test_greedy_ids_are_those_of_the_exported_model_in_transformers(tmp_path):
    pytest.importorskip("torch")
    from transformers import LlavaForConditionalGeneration

    exporting.export("hf", tiny.save(tmp_path / "ours"), tmp_path / "theirs")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    assistant = tiny.assistant()
    asked = [tiny.question(QUESTIONS[seed % 4], seed) for seed in range(20)]
    replies = assistant.replies(asked, NEW)
    assert [list(reply.ids) for reply in replies] == [theirs(model, assistant, one) for one in asked]
    assert len({reply.text for reply in replies}) == 20
