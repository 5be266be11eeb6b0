"""The shipped base models: small, complete, read like real weights, and able to answer about a caption."""

import json

import jax
import numpy as np
import pytest

from llava_jax.checkpoint import reader
from llava_jax.convert import importing
from llava_jax.convert.files import open_tensors
from llava_jax.data.packing import padded
from llava_jax.demo import bases, records, words, world
from llava_jax.models.llama import Llama
from llava_jax.prompt import tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assembled") / "base"
    importing.assemble(folder, bases.ASSETS / "clip", bases.ASSETS / "llama")
    return folder


def test_the_assets_take_at_most_six_megabytes():
    sizes = [path.stat().st_size for path in bases.ASSETS.rglob("*") if path.is_file()]
    assert sum(sizes) <= 6e6


def test_the_assets_are_float16_in_the_files_that_hugging_face_would_write():
    for name, kind in (("clip", "clip_vision_model"), ("llama", "llama"), ("blip2", "blip-2")):
        assert json.loads((bases.ASSETS / name / "config.json").read_text())["model_type"] == kind
        specs = open_tensors(bases.ASSETS / name).specs
        assert {str(spec.dtype) for spec in specs.values()} == {"float16"}


def test_every_word_of_the_world_is_one_token():
    tokens = tokenizer.load(bases.ASSETS / "llama")
    assert tokens.size == words.VOCABULARY
    for word in (*world.COLOURS, *world.SHAPES, *world.NUMBERS[1:], "yes", "no", "nothing", "USER", *world.PLACES):
        assert len(tokens.encode(word, bos=False)) == 1


def test_transformers_reads_the_assets():
    torch = pytest.importorskip("torch")
    import transformers

    llama = transformers.LlamaForCausalLM.from_pretrained(bases.ASSETS / "llama", dtype=torch.float32)
    tower = transformers.CLIPVisionModel.from_pretrained(bases.ASSETS / "clip", dtype=torch.float32)
    assert llama.config.vocab_size == words.VOCABULARY
    assert tower(torch.zeros(1, 3, 48, 48)).last_hidden_state.shape == (1, 17, 128)


def test_transformers_takes_every_tensor_of_the_blip2():
    torch = pytest.importorskip("torch")
    import transformers

    config = transformers.Blip2Config.from_pretrained(bases.ASSETS / "blip2")
    tensors = open_tensors(bases.ASSETS / "blip2")
    parts = {
        "vision_model.": transformers.Blip2VisionModel(config.vision_config),
        "qformer.": transformers.Blip2QFormerModel(config.qformer_config),
    }
    remaining = set(tensors.specs)
    for prefix, model in parts.items():
        names = {name for name in remaining if name.startswith(prefix)}
        state = {name.removeprefix(prefix): torch.tensor(tensors.read(name).astype(np.float32)) for name in names}
        model.load_state_dict(state)  # strict: none is missing, none is left
        remaining -= names
    assert remaining == {"query_tokens"}


def test_the_base_llama_answers_about_a_caption_given_as_text(checkpoint):
    scores = base_scores(checkpoint, per_kind=40)
    # It has not learned to look a place up (0.5 on "place"), which stage 2 has to make good.
    assert np.mean(list(scores.values())) > 0.85, scores
    assert min(scores[kind] for kind in world.KINDS if kind != "place") > 0.85, scores


def base_scores(checkpoint, per_kind: int) -> dict[str, float]:
    """Share of exact answers by kind about held-out scenes, scanned in words (greedy, so one forward pass tells)."""
    rng = np.random.default_rng(0)
    format = words.text_format(tokenizer.load(bases.ASSETS / "llama"))
    scenes = [world.random_scene(rng, "heldout") for _ in range(100)]
    questions = world.balanced_questions(scenes, per_kind, rng)
    examples = [words.dialogue(world.scan(scenes[q.picture]), [q.turn], format) for q in questions]
    batch, lost_targets = padded(examples, bases.ROW_TOKENS, 1, 1)
    assert lost_targets == 0
    names = [name for name in reader.tensor_specs(checkpoint) if name.startswith("llm/")]
    tree = reader.load_params(checkpoint, names)
    best = np.asarray(_most_likely(jax.tree.map(lambda tensor: tensor.astype(np.float32), tree["llm"]), batch))
    right = ((best == batch.targets) | (batch.weights == 0)).all(axis=1)
    kinds = np.array([question.turn.kind for question in questions])
    return {kind: float(right[kinds == kind].mean()) for kind in world.KINDS}


@jax.jit
def _most_likely(tree, batch):
    model, variables = Llama(bases.LLM), {"params": tree}
    x = model.apply(variables, batch.tokens, method="embed")
    hidden = model.apply(variables, x, batch.positions, batch.segments)
    return model.apply(variables, hidden, method="head").argmax(axis=-1)


@pytest.mark.slow
def test_bases_are_trained_into_a_new_directory_and_read_like_real_weights(tmp_path, capsys):
    plan, sizes = bases.Plan(steps=2, lr=1e-3, rows=2), records.Sizes(4, 40, 40, 4, 2)
    bases.train(tmp_path / "bases", 0, plan, plan, qformer_steps=2, sizes=sizes)
    for tower in ("clip", "blip2"):
        tower_dir = tmp_path / "bases" / tower
        connector = tower_dir if tower == "blip2" else None
        importing.assemble(tmp_path / tower, tower_dir, tmp_path / "bases" / "llama", connector=connector)
        assert reader.latest_step(tmp_path / tower) == 0
    assert "eva: step 2/2" in capsys.readouterr().out
    specs = open_tensors(tmp_path / "bases" / "blip2").specs
    assert specs.keys() == open_tensors(bases.ASSETS / "blip2").specs.keys()
    assert not [name for name in specs if "language" in name]
