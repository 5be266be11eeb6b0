"""How well a run uses its machine: what a batch holds, how fast that was learned from, what compiled, and a trace.

Everything is counted on the host while the device works; nothing here waits for it but the two ends of a trace.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from llava_jax import chips
from llava_jax.batch import AnyBatch
from llava_jax.distributed import WHOLE, Rows
from llava_jax.train.flops import ModelFlops
from llava_jax.train.program import Program

WARM_UPDATES = 3  # before a trace: the first compiles, the next fill the queues
PROFILE = "profile"  # in the workdir
# Of jax 0.10.2's jax/_src/dispatch.py; the public module names no events.
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Counts(NamedTuple):
    """What one update learns from, of the global batch. The first four as in `flops.ModelFlops`."""

    tokens: int
    pairs: int
    supervised: int
    images: int
    fill: float  # the share of positions that are no padding
    image_fill: float  # the share of image slots that hold a picture


def count(batch: AnyBatch, features: int, part: Rows = WHOLE) -> Counts:
    """Counts of a batch by its host arrays.

    Args:
      batch: this process's part, which is `part`. The other rows are taken to hold about as much.
      features: positions that one image takes.
    """
    inside = batch.segments > 0
    tokens = int(inside.sum())
    pairs = int((batch.positions[inside].astype(np.int64) + 1).sum())  # a token at position p sees p + 1 keys
    slots = batch.pixels.shape[0] * batch.pixels.shape[1]
    shown = np.zeros((batch.pixels.shape[0], batch.pixels.shape[1] + 1), bool)  # the last: text, and `image_newline`
    of_group = batch.image_slots.reshape(len(shown), -1) // features
    shown[np.arange(len(shown))[:, None], of_group] = True
    images = int(shown[:, :-1].sum())
    totals = (n * part.of // len(part.places) for n in (tokens, pairs, int((batch.weights > 0).sum()), images))
    return Counts(*totals, round(tokens / inside.size, 4), round(images / slots, 4))


@dataclass(frozen=True)
class FlopsMeter:
    """What the work of an update is measured by. peak_flops: of all devices together; None if nobody knows it."""

    model_flops: ModelFlops
    peak_flops: float | None

    def flops(self, counts: Counts) -> int:
        """Model FLOPs of an update."""
        return self.model_flops.total(
            tokens=counts.tokens, pairs=counts.pairs, supervised=counts.supervised, images=counts.images
        )


def flops_meter(program: Program) -> FlopsMeter:
    """The flops_meter of a program on its own mesh."""
    chip = chips.of_kind(program.mesh.devices.flat[0].device_kind)
    peak = None if chip is None else chip.peak_flops * program.mesh.size
    return FlopsMeter(program.flops, peak)


class Window(NamedTuple):
    """What was done since some moment; times in seconds."""

    begun: float
    waited: float = 0.0  # of that time, for the pipeline
    tokens: int = 0
    supervised: int = 0
    flops: int = 0

    def plus(self, counts: Counts, flops: int) -> "Window":
        """With one update more."""
        return self._replace(tokens=self.tokens + counts.tokens, supervised=self.supervised + counts.supervised,
                             flops=self.flops + flops)  # fmt: skip


def speeds(flops_meter: FlopsMeter, since: Window, now: float) -> dict[str, float | None]:
    """The columns of `metrics.STEPS` that are speeds and shares."""
    secs = max(1e-9, now - since.begun)
    peak = flops_meter.peak_flops
    return {
        "positions_per_sec": round(since.tokens / secs, 1), "tokens_per_sec": round(since.supervised / secs, 1),
        "mfu": None if peak is None else round(since.flops / secs / peak, 4),
        "data_wait": round(since.waited / secs, 4),
    }  # fmt: skip


def hbm_peak_bytes() -> int | None:
    """The most memory that any device of this process has had in use so far; None where the backend does not say."""
    found = [device.memory_stats() for device in jax.local_devices()]
    return max((stats["peak_bytes_in_use"] for stats in found if stats and "peak_bytes_in_use" in stats), default=None)


@contextlib.contextmanager
def compilations() -> Iterator[Callable[[], int]]:
    """`built()`: programs that were compiled, or fetched from the compilation cache, since the context began."""
    seconds: list[float] = []

    def listen(event: str, secs: float, **_: str | int) -> None:
        if event == _COMPILED:
            seconds.append(secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: len(seconds)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class RecompileWatch(NamedTuple):
    """Watches for a training step that compiles again; it says so once."""

    shapes: frozenset[tuple[int, ...]] = frozenset()  # rows and tokens of the batches so far
    told: bool = False

    def after(self, step: int, batch: AnyBatch, built: int) -> "RecompileWatch":
        """What is known after a step that built so many programs. A first batch of some length may build one."""
        again = built > 0 and batch.tokens.shape in self.shapes
        if again and not self.told:
            rows, tokens = batch.tokens.shape
            print(f"step {step}: the training step compiled again, for a batch of {rows} rows of {tokens} tokens as "
                  "there were before; each time costs as long as the first step did (the column `compiles` of "
                  "metrics.jsonl counts them; JAX_EXPLAIN_CACHE_MISSES=1 names the reason)",
                  file=sys.stderr, flush=True)  # fmt: skip
        return RecompileWatch(self.shapes | {batch.tokens.shape}, self.told or again)


class Tracer:
    """Traces `updates` updates for xprof, from the one after this process's first WARM_UPDATES on.

    `before` comes before each update, with the state it will work on, and `close` after the last. Process 0 alone
    traces; at updates=0 nothing happens.
    """

    def __init__(self, workdir: epath.PathLike, updates: int, first: int):
        self.directory = str(epath.Path(workdir) / PROFILE)
        self.updates = updates if jax.process_index() == 0 else 0
        self.begin = first + WARM_UPDATES
        self.last = first - 1  # the last update that began
        self.running = False

    def before(self, step: int, state: Any) -> None:
        """Waits for the device where a trace begins or ends, so that it holds whole updates."""
        if self.updates and step in (self.begin, self.begin + self.updates):
            jax.block_until_ready(state)
            self._stop() if self.running else self._start()
        self.last = step

    def close(self) -> None:
        """Ends a trace that the end of the run cuts short."""
        if self.running:
            self._stop()
        elif self.updates and self.last < self.begin:
            print(f"profile={self.updates}: the run ended before update {self.begin}, so nothing is traced",
                  file=sys.stderr, flush=True)  # fmt: skip

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of the loop and of the pipeline would slow what is measured
        jax.profiler.start_trace(self.directory, profiler_options=options)
        self.running = True

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self.running = False
        print(f"step {self.last}: {self.last - self.begin + 1} updates are traced; to look at them: "
              f"pip install xprof && xprof --port 8791 {self.directory}", flush=True)  # fmt: skip
