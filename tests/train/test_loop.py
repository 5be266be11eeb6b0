"""The loop: its rows, its hooks, and how it ends when losses are not finite or nothing moves any more."""

import contextlib
import dataclasses
import functools
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import config as configs
from llava_jax.batch import Batch
from llava_jax.checkpoint import manager
from llava_jax.distributed import Stop
from llava_jax.errors import NonFinite
from llava_jax.train import loop, metrics
from llava_jax.train.loop import Hook, Run
from tests.train import tiny
from tests.train.test_step import STAGE_1, build, start


class Poisoned:
    """Batches of which some have weights that are no numbers."""

    def __init__(self, *poison):
        self.poison, self.step = poison, 0

    def __iter__(self):
        while True:
            fields = tiny.batch(seed=self.step)
            self.step += 1
            bad = np.float32(np.nan if self.step in self.poison else 1)
            yield Batch(**fields | {"weights": fields["weights"] * bad}), [f"record {self.step}"]

    def state(self):
        return {"step": self.step}


@pytest.fixture(scope="module")
def program():
    return build(STAGE_1)


@contextlib.contextmanager
def running(program, folder, batches, hooks=(), every=100, profile=0):
    config = configs.Config(
        data=configs.Data(sources=(configs.Source("unused"),), batch_samples=4, row_tokens=24),
        train=configs.Train(lr=1e-2, steps=10, warmup_ratio=0.0, max_nonfinite=3), rates=STAGE_1,
        init=((".*", "random"),), checkpoint=configs.Checkpoint(every=every),
        log=configs.Log(every=5, tensorboard=False), profile=profile,
    )  # fmt: skip
    state, frozen = start(program)
    # As a run's own state: left where it happens to be, it would compile the second step anew.
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, program.state))
    checkpoints = manager.open_checkpoints(folder, 2)
    writer = metrics.open_writer(folder, config.log, 0, {})
    yield Run(program, config, frozen, batches, checkpoints, writer, Stop(), hooks), state
    metrics.close(writer)
    manager.close(checkpoints)


def test_every_update_has_its_row_in_order_and_hooks_come_when_they_are_due(program, tmp_path, capsys):
    heard = []
    hooks = [Hook(4, lambda step, state, stop: heard.append((step, int(state.step))), "heard.jsonl")]
    with running(program, tmp_path, Poisoned(), hooks, every=6) as (run, state):
        code, state = loop.train(run, state)
    rows = metrics.read(tmp_path)
    assert code == 0 and int(state.step) == 10 and heard == [(4, 4), (8, 8)]
    assert [row["step"] for row in rows] == list(range(1, 11)) and all(row["loss"] > 0 for row in rows)
    assert rows[0]["lr"] == 1e-2 and rows[-1]["lr"] < 1e-3 and rows[0]["tokens"] == 28
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["10", "6"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["1/10", "5/10", "10/10"] and "ETA 0:00:00" in lines[-1]


def test_every_row_says_what_it_learned_from_and_how_fast(program, tmp_path, capsys):
    with running(program, tmp_path, Slow()) as (run, state):
        loop.train(run, state)
    first, *rows = metrics.read(tmp_path)
    assert first["positions"] == 96 and first["fill"] == 1 and first["image_fill"] == 1 and first["flops"] > 1e6
    assert first["hbm_peak_bytes"] is None and "data_wait" not in first
    for row in rows:
        for name, count in (("positions_per_sec", 96), ("tokens_per_sec", row["tokens"])):
            speed, rounded = count / row["secs"], 1e-4 / row["secs"]  # the last update has hardly any time to itself
            assert row[name] == pytest.approx(speed, abs=0.1 + rounded * speed)
        assert row["mfu"] is None and row["compiles"] == first["compiles"]
    assert np.median([row["data_wait"] for row in rows]) > 0.5  # a step takes a few milliseconds, a batch 200
    out, err = capsys.readouterr()
    assert " tokens/s  data_wait " in out.splitlines()[-1] and "MFU" not in out and not err


class Slow:
    """Batches that come late."""

    def __iter__(self):
        while True:
            time.sleep(0.2)
            yield Batch(**tiny.batch()), ["record"]

    def state(self):
        return {}


def test_a_step_that_compiles_for_a_length_it_had_is_reported(program, tmp_path, capsys):
    class Shifting(Slow):
        def __iter__(self):
            for kind in (np.float32, np.float16) * 5:  # the same shapes, another dtype
                fields = tiny.batch()
                yield Batch(**fields | {"weights": fields["weights"].astype(kind)}), ["record"]

    with running(program, tmp_path, Shifting()) as (run, state):
        loop.train(run, state)
    rows = metrics.read(tmp_path)
    assert rows[-1]["compiles"] >= 1  # of this run; another test may have compiled the step for float32 before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step 2: the training step compiled again, for a batch of 4 rows of 24 tokens")


def test_a_trace_holds_the_updates_after_the_first_three(program, tmp_path, capsys):
    with running(program, tmp_path, Poisoned(), profile=2) as (run, state):
        loop.train(run, state)
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "traced" in line]
    assert line.startswith("step 5: 2 updates are traced") and line.endswith(f"--port 8791 {tmp_path}/profile")


@pytest.mark.parametrize(("begun", "said"), [(4, "step 10: 3 updates are traced"), (8, "before update 12")])
def test_a_trace_that_the_end_of_the_run_cuts_short_says_so(program, tmp_path, capsys, begun, said):
    with running(program, tmp_path, Poisoned(), profile=9) as (run, state):
        loop.train(run, state._replace(step=jnp.int32(begun)))
    assert said in "".join(capsys.readouterr()) and (tmp_path / "profile").exists() == (begun == 4)


def test_a_poisoned_batch_is_skipped_and_its_records_are_named(program, tmp_path, capsys):
    with running(program, tmp_path, Poisoned(3, 4)) as (run, state):
        code, state = loop.train(run, state)
    assert code == 0 and np.isfinite(state.params["projector"]["0"]["kernel"]).all()
    skipped = [row for row in metrics.read(tmp_path) if "skipped" in row]
    assert [(row["step"], row["loss"], row["ids"]) for row in skipped] == [
        (3, None, ["record 3"]), (4, None, ["record 4"]),
    ]  # fmt: skip
    assert "step 3: loss nan" in capsys.readouterr().err


def test_poisoned_batches_in_a_row_end_the_run_and_no_checkpoint_holds_them(program, tmp_path):
    with running(program, tmp_path, Poisoned(3, 5, 6, 7), every=1) as (run, state):
        with pytest.raises(NonFinite, match="step 7: 3 updates in a row"):
            loop.train(run, state)
    rest = {"step": program.state.step, "opt_state": program.state.opt_state}
    checkpoints = manager.open_checkpoints(tmp_path, 2)
    saved = manager.restore(checkpoints, program.state.params, rest)
    manager.close(checkpoints)
    assert saved.step == 6 and all(np.isfinite(x).all() for x in (saved.params["projector"]["0"]["kernel"],))


def test_validation_is_the_mean_over_tokens_not_over_batches():
    sums = iter([(30.0, 10.0), (2.0, 2.0), (0.0, 0.0)])
    program = SimpleNamespace(put=lambda batch: batch, evaluate=lambda *_: tuple(map(jnp.float32, next(sums))))
    assert loop.validate.__wrapped__(program, {}, {}, [(None, ())] * 3, Stop()) == pytest.approx(32 / 12)


def test_a_run_that_is_stopped_calls_what_was_due_when_it_starts_again(program, tmp_path):
    """The stop comes during step 4's validation: the step is saved, and its row is written by the next start."""

    def validate(stop, step, state, heard):
        calls.append(step)
        if stop is not None:
            stop.request()
        if not heard.point():
            with (tmp_path / "validated.jsonl").open("a") as log:
                log.write(json.dumps({"step": step}) + "\n")

    calls = []
    with running(program, tmp_path, Poisoned()) as (run, state):
        hook = Hook(4, functools.partial(validate, run.stop), "validated.jsonl")
        code, state = loop.train(dataclasses.replace(run, hooks=[hook]), state)
    assert code == 75 and calls == [4] and int(state.step) == 4
    assert [path.name for path in tmp_path.iterdir() if path.name.isdigit()] == ["4"]
    with running(program, tmp_path, Poisoned()) as (run, _):
        hook = Hook(4, functools.partial(validate, None), "validated.jsonl")
        assert loop.train(dataclasses.replace(run, hooks=[hook]), state)[0] == 0
    assert calls == [4, 4, 8]


def test_a_run_that_hangs_ends_with_its_stacks():
    code = ("import time\nfrom llava_jax import distributed, lifecycle\n"
            "with lifecycle.WATCHDOG.watching(0.5, distributed.leave): time.sleep(30)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 42 and "nothing has happened for 0 s" in done.stderr and "<string>" in done.stderr
