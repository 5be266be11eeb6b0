"""Templates are data, found by name only."""

import pytest

from llava_jax.prompt import templates


def test_all_templates_of_the_references_are_there():
    assert set(templates.TEMPLATES) == {
        "v0", "llava_v0", "v0_mmtag", "v1", "llava_v1", "v1_mmtag", "llama_2", "llava_llama_2", "mistral_instruct",
        "mpt", "chatml_direct", "plain", "minigpt4", "minigpt4_chat", "minigpt4_llama_2", "minigpt4_llama_2_chat",
        "minigptv2", "llama_3", "qwen", "qwen_2", "qwen_3", "mistral",
    }  # fmt: skip
    assert all(templates.get(name).name == name for name in templates.TEMPLATES)


def test_an_unknown_template_names_the_nearest_and_all():
    with pytest.raises(ValueError, match="'lava_v1' is unknown: did you mean 'llava_v1'.*choose one of v0, .*plain, "):
        templates.get("lava_v1")


@pytest.mark.parametrize("name, ours", [
    ("qwen_1_5", "qwen_2"), ("qwen_2_5", "qwen"), ("llava_llama_3", "llama_3"), ("llama3", "llama_3"),
    ("llava_mistral_instruct", "mistral_instruct"),
])  # fmt: skip
def test_a_name_of_llava_next_is_told_ours(name, ours):
    with pytest.raises(ValueError, match=f"template {name!r} is unknown: did you mean {ours!r}"):
        templates.get(name)


def test_every_stop_is_learned_text():
    for template in templates.TEMPLATES.values():
        learned = [part.text for part in (*template.assistant.after, *template.ending) if part.learned]
        assert any(stop in text for stop in template.stops for text in learned), template.name
