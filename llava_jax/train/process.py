"""How a process trains whose only work is one run: SIGTERM, a watchdog, and one exit code for all processes of a job.

A `Trainer` that is called from other code needs none of this: it changes nothing of its process.
"""

import contextlib
import functools
import logging

from etils import epath

from llava_jax import compilations, distributed, errors, lifecycle
from llava_jax import config as configs
from llava_jax.checkpoint import best
from llava_jax.lifecycle import Sigterm
from llava_jax.train.trainer import Trainer


def run(config: configs.Config, workdir: epath.PathLike, sigterm: Sigterm) -> int:
    """Trains, or resumes; the exit code: 0 done, or 75 where SIGTERM stopped it after a save.

    Of several processes the first to fail ends all of them with its exit code, so an exception gets out of a single
    process only.

    Raises:
      the exceptions of `errors`; any other is a fault, whose traceback is in WORKDIR/error-PROCESS.txt.
    """
    workdir = epath.Path(workdir)
    with contextlib.ExitStack() as stack:
        stack.push(functools.partial(distributed.end_together, workdir))
        distributed.join()
        sigterm.react(functools.partial(distributed.leave, errors.PREEMPTED, "SIGTERM before the first step: nothing "
                                        "is lost; the same command begins again"))  # fmt: skip
        stack.callback(sigterm.react, None)
        stack.enter_context(lifecycle.WATCHDOG.watching(config.train.watchdog_secs, distributed.leave))
        if distributed.index():  # process 0 speaks for all
            logging.getLogger("llava_jax").setLevel(logging.WARNING)
        compilations.keep()
        trainer = Trainer(config, workdir=workdir)
        if not trainer.fit(sigterm):
            return errors.PREEMPTED
        if distributed.index() == 0:
            _conclude(trainer.step, workdir, config.checkpoint.best)
        return errors.DONE


def _conclude(step: int, workdir: epath.Path, keeps_best: bool) -> None:
    found = best.lowest(best.read(workdir).rows) if keeps_best else None
    lowest = f", of which {found[0]} is the best (validation loss {found[1]:.4f}): --step best" if found else ""
    print(f"done after {step} steps{lowest}. Chat: python -m llava_jax.chat --checkpoint {workdir} --image FILE | "
          f"benchmarks: python -m llava_jax.evaluate answer --checkpoint {workdir} --help | "
          f"export: python -m llava_jax.convert export --format hf {workdir} DST", flush=True)  # fmt: skip
