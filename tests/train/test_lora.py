"""LoRA runs: what moves, what a checkpoint holds and needs, int8 under adapters, and starts that lose something."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from llava_jax import config as configs
from llava_jax import params
from llava_jax.batch import Batch
from llava_jax.checkpoint import model_json, reader
from llava_jax.convert import reports
from llava_jax.generate.assistant import Assistant
from llava_jax.models import lora, presets
from llava_jax.models.llava import abstract_params
from llava_jax.prompt.conversation import Conversation, Turn
from llava_jax.train import init, metrics
from llava_jax.train import program as programs
from llava_jax.train import step as steps
from llava_jax.train.__main__ import main
from tests.train import tiny

ALL = (("llm/blocks/.*", configs.Lora(4, 6.0)), (".*", None))
RATES = ((".*/lora_[ab]", 1e-2), ("projector/.*", 1e-3), (".*", None))
FRESH = (".*/lora_.*", "random")
DECODER = [f"llm/blocks/{part}/kernel" for part in ("q", "k", "v", "o", "gate", "up", "down")]

TABLES = """
    from llava_jax.config import Lora
    config.train.update(lr=1e-2, projector_lr=1e-3, lora_dropout=0.1)
    config.lora = (("llm/blocks/.*", Lora(4, 6.0)), (".*", None))
    config.rates = ((".*/lora_[ab]", config.train.get_ref("lr")),
                    ("projector/.*", config.train.get_ref("projector_lr")), (".*", None))
    config.init = ((".*/lora_.*", "random"), (".*", config.model.get_ref("base")))
    return config
"""


def write_config(config: Path) -> Path:
    """The small run's config with the tables of LoRA."""
    text = config.read_text()
    config.with_name("lora.py").write_text(text[: text.rindex("    return config")] + TABLES)
    return config.with_name("lora.py")


def train(config, workdir, **changes):
    return main(["--config", str(config), "--workdir", str(workdir),
                 *[f"--config.{key}={value}" for key, value in changes.items()]])  # fmt: skip


def losses(workdir):
    return [row["loss"] for row in metrics.read(workdir)]


def build(base, table=ALL, rates=RATES, places=(FRESH,), frozen_dtype="compute", dtype="float32", **train):
    """A program over the preset "tiny" with every leaf from `base` that no row of `places` names."""
    config = configs.Config(
        data=configs.Data(sources=(configs.Source("unused"),), batch_samples=4, row_tokens=24),
        train=configs.Train(**{"lr": 1e-2, "steps": 10, "warmup_ratio": 0.0} | train), rates=rates, lora=table,
        model=configs.Model(dtype=dtype, remat="none", frozen_dtype=frozen_dtype), init=(*places, (".*", str(base))),
    )  # fmt: skip
    return config, programs.build(config, presets.get("tiny"), 10)


def begin(built, workdir):
    config, program = built
    sources = init.resolve(program, config.init, workdir, 0)
    return sources, init.state(program, sources, 0), init.frozen(program, sources)


def batch(seed=1):
    return Batch(**tiny.inputs(presets.get("tiny"), rows=4, tokens=24, seed=seed))


def flat(tree):
    return {name: np.asarray(leaf) for name, leaf in params.flatten(tree).items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora_base") / "base"
    tiny.write_base(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled):
    """(config, workdir) of a whole LoRA run with dropout: 12 steps, checkpoints every 3."""
    folder = tmp_path_factory.mktemp("lora")
    config = write_config(tiny.write_run(folder / "run"))
    assert train(config, folder / "out") == 0
    return config, folder / "out"


def test_a_checkpoint_holds_adapters_and_projector_and_its_scales_travel_with_it(finished, tmp_path):
    config, workdir = finished
    own = set(reader.own_specs(workdir))
    adapters = {lora.beside(kernel, leaf) for kernel in DECODER for leaf in (lora.A, lora.B)}
    model = set(params.flatten(abstract_params(presets.get("tiny"))))
    assert own == adapters | {name for name in model if name.startswith("projector/")}
    scales = {lora.beside(kernel, lora.SCALE) for kernel in DECODER}
    assert set(reader.tensor_specs(workdir)) == model | adapters | scales
    assert {base.path for base in model_json.read(workdir).base} == {"random", "../run/base"}
    moved = shutil.copytree(workdir, tmp_path / "moved")
    shutil.move(workdir / "random", tmp_path / "away")  # so that nothing of the old place is read
    try:
        np.testing.assert_array_equal(reader.read_tensor(moved, None, "llm/blocks/q/lora_scale"), np.full(3, 1.5, "f4"))
    finally:
        shutil.move(tmp_path / "away", workdir / "random")


def test_the_loss_falls_and_going_on_repeats_it_bit_for_bit_dropout_included(finished, tmp_path):
    config, workdir = finished
    before = losses(workdir)
    assert np.mean(before[-3:]) < np.mean(before[:3]) - 0.1
    copy = shutil.copytree(workdir, tmp_path / "copy")
    shutil.rmtree(copy / "12")
    assert train(config, copy) == 0
    assert losses(copy) == before


def test_chat_answers_with_a_lora_checkpoint_as_with_the_merged_one(finished, tmp_path):
    _, workdir = finished
    reports.merge(workdir, tmp_path / "merged")
    picture = Image.fromarray(np.full((28, 28, 3), 99, np.uint8))
    asked = Conversation((Turn("user", "<image>\nWhat is it?"),), (picture,), id="chat")
    one, two = (Assistant.open(place).reply(asked, 6) for place in (workdir, tmp_path / "merged"))
    assert one.ids == two.ids
    kept = Assistant.open(workdir, dtype="bfloat16").params["llm"]["blocks"]["q"]
    assert kept["lora_a"][0].dtype == jnp.bfloat16 and kept["lora_scale"][0].dtype == jnp.float32


def test_a_run_begins_exactly_at_its_base(base, tmp_path):
    built, plain = build(base), build(base, table=(), rates=RATES[1:], places=())
    _, state, frozen = begin(built, tmp_path / "one")
    _, other, rest = begin(plain, tmp_path / "two")
    one, two = (run[1].evaluate(s.params, f, batch()) for run, s, f in ((built, state, frozen), (plain, other, rest)))
    assert float(one[0]) == float(two[0])
    assert float(frozen["llm"]["blocks"]["q"]["lora_scale"][0]) == 1.5
    a = flat(state.params)["llm/blocks/q/lora_a"]
    assert 0.9 * a.shape[1] ** -0.5 < np.abs(a).max() <= a.shape[1] ** -0.5


def test_only_what_has_a_rate_moves(base, tmp_path):
    built = build(base, rates=((".*/q/lora_[ab]", 1e-2), (".*", None)))
    sources, state, frozen = begin(built, tmp_path)
    before, still = flat(state.params), flat(frozen)
    for _ in range(2):  # the first moves B alone, as B is zero where A's gradient would come through
        state, _ = built[1].step(state, frozen, batch())
    assert set(before) == {"llm/blocks/q/lora_a", "llm/blocks/q/lora_b"}
    assert all((flat(state.params)[name] != leaf).any() for name, leaf in before.items())
    for name, leaf in flat(frozen).items():
        np.testing.assert_array_equal(leaf, still[name])
    assert sources["llm/blocks/k/lora_a"] == str(tmp_path / "random")  # frozen and fresh: kept beside the run


def test_the_mask_is_a_function_of_seed_step_and_micro_batch(base, tmp_path):
    config, program = build(base, accumulate=2, lora_dropout=0.5)
    _, state, frozen = begin((config, program), tmp_path)
    state = state._replace(step=jnp.int32(3), params=jax.tree.map(lambda x: x + 0.1, state.params))  # B counts
    whole, fields = params.merge(state.params, frozen), batch()
    weights = fields.weights / fields.weights.sum()
    key = jax.random.fold_in(jax.random.key(config.train.seed), 3)
    loss = jax.jit(steps.weighted_loss, static_argnums=(0, 4))
    parts = [(Batch(*(x[i::2] for x in fields)), weights[i::2], jax.random.fold_in(key, i)) for i in range(2)]
    expected = [loss(program.model, whole, some, share, False, own) for some, share, own in parts]
    swapped = loss(program.model, whole, *parts[0][:2], False, parts[1][2])
    _, found = program.step(state, frozen, fields)
    np.testing.assert_allclose(found.loss, sum(expected), rtol=1e-6)
    assert abs(swapped - expected[0]) > 1e-4


def test_int8_weights_are_frozen_and_the_adapters_learn_on_them(base, tmp_path):
    built = build(base, frozen_dtype="int8", rates=((".*/lora_[ab]", 1e-2), (".*", None)))
    _, state, frozen = begin(built, tmp_path)
    leaves = flat(frozen)
    plain = params.flatten(reader.load_params(base))
    assert {name for name, leaf in leaves.items() if leaf.dtype == np.int8} == set(DECODER)
    for name in DECODER:
        wide = leaves[name] * leaves[lora.beside(name, lora.KERNEL_SCALE)][:, None]
        step = np.abs(plain[name]).max(axis=1, keepdims=True) / 127
        assert (np.abs(wide - plain[name]) <= 0.5001 * step).all()
    first, _ = built[1].evaluate(state.params, frozen, batch())
    before = flat(state.params)
    for _ in range(10):
        state, _ = built[1].step(state, frozen, batch())
    last, _ = built[1].evaluate(state.params, frozen, batch())
    assert last < 0.9 * first and {name.rpartition("/")[2] for name in before} == {lora.A, lora.B}
    for name, leaf in flat(frozen).items():
        np.testing.assert_array_equal(leaf, leaves[name])


def test_an_int8_run_goes_on_as_if_it_had_not_stopped(run, tmp_path):
    config = write_config(run)
    assert train(config, tmp_path / "out", **{"model.frozen_dtype": "int8"}) == 0
    before = losses(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "12")
    assert train(config, tmp_path / "out", **{"model.frozen_dtype": "int8"}) == 0
    assert losses(tmp_path / "out") == before
    kernel = reader.tensor_specs(tmp_path / "out")["llm/blocks/q/kernel"]
    assert kernel.dtype == np.float32  # on disk nothing is rounded


def test_bfloat16_programs_keep_scales_and_moving_leaves_in_float32(base):
    _, program = build(base, dtype="bfloat16", frozen_dtype="int8")
    kinds = {name: leaf.dtype for name, leaf in params.flatten(program.frozen).items()}
    q = {name: kinds[f"llm/blocks/q/{name}"] for name in ("kernel", "kernel_scale", "lora_scale")}
    assert q == {"kernel": jnp.int8, "kernel_scale": jnp.float32, "lora_scale": jnp.float32}
    assert kinds["vision/blocks/q/kernel"] == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(program.state.params)} == {jnp.dtype("float32")}


def test_frozen_random_kernels_become_int8_only_when_they_are_read(base, tmp_path):
    built = build(base, frozen_dtype="int8", places=(("llm/.*", "random"),))
    sources, _, frozen = begin(built, tmp_path)
    assert reader.tensor_specs(tmp_path / "random")["llm/blocks/q/kernel"].dtype == np.float32
    assert frozen["llm"]["blocks"]["q"]["kernel"].dtype == jnp.int8


def test_a_start_that_saved_nothing_leaves_nothing_behind(base, tmp_path):
    begin(build(base), tmp_path)
    _, _, frozen = begin(build(base, table=(("llm/blocks/.*", configs.Lora(4, 12.0)), (".*", None))), tmp_path)
    assert float(frozen["llm"]["blocks"]["q"]["lora_scale"][0]) == 3.0


def test_adapters_are_trained_on_from_where_they_lie(finished, tmp_path):
    _, workdir = finished
    sources, state, frozen = begin(build(workdir, places=()), tmp_path)
    held = params.flatten(reader.load_params(workdir))
    np.testing.assert_array_equal(flat(state.params)["llm/blocks/up/lora_b"], held["llm/blocks/up/lora_b"])
    assert set(sources.values()) == {str(workdir)} and not (tmp_path / "random").exists()


@pytest.mark.parametrize("changes, message", [
    ({"table": (), "rates": RATES[1:], "places": ()}, r"has an adapter beside llm/blocks/down/kernel, .*merge .* OUT"),
    ({}, r"has an adapter beside llm/blocks/down/kernel, which this run would leave behind"),
    ({"table": (("llm/blocks/.*", configs.Lora(4, 8.0)), (".*", None)), "places": ()},
     r"trained at alpha / rank = 1.5, table `lora` says 8 / 4"),
    ({"table": (("llm/blocks/.*", configs.Lora(8, 12.0)), (".*", None)), "places": ()},
     r"down/lora_a has shape \(3, 96, 4\), wanted \(3, 96, 8\)"),
], ids=["no adapters", "fresh ones", "another alpha", "another rank"])  # fmt: skip
def test_a_start_that_would_change_the_model_in_silence_is_refused(finished, tmp_path, changes, message):
    config, program = build(finished[1], **changes)
    with pytest.raises(ValueError, match=message):
        init.resolve(program, config.init, tmp_path, 0)


def test_a_base_without_adapters_is_told_from_one_with(base, tmp_path):
    config, program = build(base, places=())
    with pytest.raises(model_json.UnusableCheckpoint, match='has no llm/blocks/down/lora_a; .* "random"'):
        init.resolve(program, config.init, tmp_path, 0)


def test_the_constants_of_adapters_take_no_rate(base):
    with pytest.raises(ValueError, match="lora_scale is a constant"):
        build(base, rates=((".*/lora_.*", 1e-2), (".*", None)))


def test_a_lora_table_over_a_kernel_that_can_have_none_is_refused(base):
    with pytest.raises(ValueError, match="table `lora`: pattern 'llm/head/kernel' matches no parameter"):
        build(base, table=(("llm/head/kernel", configs.Lora(4, 4.0)), *ALL))


def test_every_field_of_the_published_recipe_is_there():
    config = configs.load(tiny.ROOT / "configs" / "llava15_7b_lora.py")
    table = params.lookup(lora.targets(params.flatten(abstract_params(presets.get("llava15_7b")))), config.lora, "lora")
    assert {name for name, row in table.items() if row} == set(DECODER)
    assert {row for row in table.values() if row} == {configs.Lora(128, 256.0)}
    assert (config.train.lr, config.train.projector_lr, config.train.lora_dropout) == (2e-4, 2e-5, 0.05)
    other = configs.load(tiny.ROOT / "configs" / "llava15_7b_finetune.py")
    assert dataclasses.replace(config.train, lr=2e-5, projector_lr=2e-5, lora_dropout=0.0) == other.train
