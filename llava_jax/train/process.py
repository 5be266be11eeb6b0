"""How a process trains whose only work is one run: SIGTERM, a watchdog, and one exit code for all processes of a job.

A `Trainer` that is called from other code needs none of this: it changes nothing of its process.
"""

import contextlib
import functools
import logging
import os
from pathlib import Path

import jax
from etils import epath

from llava_jax import config as configs
from llava_jax import distributed, errors, lifecycle
from llava_jax.checkpoint import best
from llava_jax.errors import UsageError
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
        keep_compilations()
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


def keep_compilations() -> None:
    """Lets XLA keep what it compiles in the user's cache directory, unless JAX_COMPILATION_CACHE_DIR names another."""
    if jax.config.jax_compilation_cache_dir:
        return
    home = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("HOME") and Path(os.environ["HOME"]) / ".cache")
    if not home:  # a container's user without a home
        return
    folder = Path(home) / "llava_jax" / "compiled"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    # Entries are machine code: who can write here can run code as this user.
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UsageError(f"{folder}: want a directory of your own with mode 700, as compiled code is read from it; "
                         f"`chmod 700 {folder}`, or set JAX_COMPILATION_CACHE_DIR")  # fmt: skip
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
