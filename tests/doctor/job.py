"""A job of several processes on this machine, forked from one that has imported everything.

`python -m tests.doctor.job JSON` with {"devices", "folder", "processes": [{"args", "fault"}, ...]} runs `doctor` in
each and prints the exit codes; what a process printed is in FOLDER/NUMBER.out.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.ports import free_port

ROOT = Path(__file__).parents[2]


class ProcessResult(NamedTuple):
    """How one process ended, and what it printed on either stream."""

    code: int
    output: str


def run(folder: Path, processes: Sequence[dict[str, Any]], devices: int = 1, secs: int = 300) -> list[ProcessResult]:
    """Runs a job; its processes are {"args": arguments of doctor, "fault": a name of FAULTS or ""}."""
    job = {"devices": devices, "folder": str(folder), "processes": list(processes)}
    command = [sys.executable, "-m", "tests.doctor.job", json.dumps(job)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    completed = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=secs)
    assert completed.returncode == 0, completed.stderr[-3000:]
    codes = json.loads(completed.stdout.splitlines()[-1])
    return [ProcessResult(code, (folder / f"{number}.out").read_text()) for number, code in enumerate(codes)]


def _breaks() -> None:
    """A check raises while the other process waits inside it."""
    from llava_jax.doctor import session

    def raise_error(machine):
        raise OSError("a link is down")

    _replace(session, "rows", raise_error)


def _hangs() -> None:
    """A process never comes to the end of a check."""
    from llava_jax.doctor import session

    _replace(session, "workdir", lambda machine: time.sleep(600))


def _dies() -> None:
    """A process is killed in a check."""
    from llava_jax.doctor import session

    _replace(session, "workdir", lambda machine: os.kill(os.getpid(), signal.SIGKILL))


def _fails() -> None:
    """A process finds a fault that the other does not have."""
    from llava_jax.doctor import report, session

    _replace(session, "kernels", lambda machine: [report.Line("attention: xla", report.FAIL, "garbage", remedy="none")])


def _replace(session: Any, name: str, run: Any) -> None:
    checks = tuple(check._replace(run=run) if check.name == name else check for check in session.CHECKS)
    session.CHECKS = checks


FAULTS = {"breaks": _breaks, "hangs": _hangs, "dies": _dies, "fails": _fails}


def _child(process: dict[str, Any], number: int, job: dict[str, Any], port: int) -> None:
    from llava_jax.doctor import __main__ as command
    from llava_jax.doctor import session

    output = os.open(Path(job["folder"]) / f"{number}.out", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(
        XLA_FLAGS=f"--xla_force_host_platform_device_count={job['devices']}", LLAVA_JAX_MULTIHOST="1",
        JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES=str(len(job["processes"])),
        JAX_PROCESS_ID=str(number),
    )  # fmt: skip
    session.GRACE_SECS, session.LATE_SECS = 2.0, 60.0
    names = process.get("checks") or [check.name for check in session.CHECKS]
    limit = process.get("limit_secs")
    session.CHECKS = tuple(check._replace(limit_secs=limit or check.limit_secs) for check in session.CHECKS
                           if check.name in names)  # fmt: skip
    if process.get("fault"):
        FAULTS[process["fault"]]()
    code = 70
    try:
        code = command.main(process["args"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        import jax

        if jax.distributed.is_initialized():  # as an interpreter that ends
            jax.distributed.shutdown()
        os._exit(code)


def _main(job: dict[str, Any]) -> None:
    import llava_jax.doctor.session  # noqa: F401 - before the forks

    port = free_port()
    children = []
    for number, process in enumerate(job["processes"]):
        pid = os.fork()
        if pid == 0:
            _child(process, number, job, port)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
