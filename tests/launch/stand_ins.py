"""Stand-ins for gcloud, its hosts and the programs on them; no machine is rented in these tests."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
FINAL = [64, 65, 66, 70]  # exit codes that the same command would end with again
SLICE = ("--name", "llava", "--zone", "us-west4-a", "--type", "v5litepod-16")
TRAINING = ("--config", "configs/x.py", "--workdir", "gs://bucket/my runs/it's $1", "--config.train.lr=1e-4")

# A slice of two hosts that are folders. `state` is what gcloud would list; each line of `fate` is one attempt:
# "CODE CODE" of the two hosts, "held" where it trains until `release` is there and ends with 0, or "gone" where the
# slice is taken away then. `release` comes once the log is followed, or from the test where it makes `hold`; nothing
# here depends on how fast the machine is. Where there is `drop`, the first to follow the log loses the connection.
GCLOUD = r"""#!/usr/bin/env bash
cd "$FAKE" || exit 1
echo "$3 $4" >>calls
for word; do case $word in --command=*) command=${word#*=} ;; esac; done
case "$3 $4" in
    'tpu-vm list') [ ! -e unreachable ] || exit 1; cat state 2>/dev/null || true ;;
    'queued-resources list')
        cat queue 2>/dev/null || true
        if grep -qs WAITING queue; then echo ACTIVE >queue; mkdir -p host0 host1; echo READY >state; fi ;;
    'tpu-vm create') [ ! -e full ] || exit 1; rm -f release; mkdir -p host0 host1; echo READY >state ;;
    'queued-resources create') rm -f release; echo WAITING_FOR_RESOURCES >queue ;;
    *' delete') rm -rf host0 host1 state queue ;;
    'tpu-vm scp') cp "$5" host0; cp "$5" host1 ;;
    'tpu-vm ssh')
        case $command in *--pid*)
            if [ -e drop ]; then mv drop dropped; exit 255; fi
            [ -e hold ] || touch release ;;
        esac
        run() { cd "host$1" && HOME=$PWD HOST=$1 exec bash -c "$command"; }
        run 0 & first=$!
        run 1 & second=$!
        code0=0; wait "$first" || code0=$?
        code1=0; wait "$second" || code1=$?
        [ "$(cat state)" = READY ] || exit 255
        [ "$code0" != 0 ] || code0=$code1
        exit "$code0" ;;
esac
"""

# What `python3 -m uv venv` leaves on a host: an interpreter that trains as `fate` says.
PYTHON3 = r"""#!/usr/bin/env bash
case "$*" in
    '-m uv venv'*) mkdir -p .venv/bin && cp "$FAKE/train" .venv/bin/python ;;
    *pip*) echo "$*" >>"$FAKE/installs" ;;
esac
"""
TRAIN = r"""#!/usr/bin/env bash
attempt=$(ls "$FAKE" | grep -c "^trained$HOST") || true
printf '%s\0' "$LLAVA_JAX_MULTIHOST" "$@" >"$FAKE/trained$HOST.$attempt"
echo "host $HOST, attempt $attempt"
read -r fate0 fate1 <<<"$(sed -n "$((attempt + 1))p" "$FAKE/fate")"
case $fate0 in held | gone)
    for ((i = 0; i < 1000; i++)); do [ ! -e "$FAKE/release" ] || break; perl -e 'select undef, undef, undef, 0.02'; done
    [ "$fate0" = gone ] || exit 0 ;;
esac
if [ "$fate0" = gone ]; then
    echo PREEMPTED >"$FAKE/state"
    [ ! -e "$FAKE/queue" ] || echo SUSPENDED >"$FAKE/queue"
    exit 143
fi
if [ "$HOST" = 0 ]; then exit "$fate0"; else exit "$fate1"; fi
"""
SLEEP = '#!/usr/bin/env bash\necho "$1" >>"$FAKE/slept"\nexec perl -e "select undef, undef, undef, 0.05"\n'
TAIL = f'#!/usr/bin/env bash\nexec {shutil.which("tail")} --sleep-interval=0.02 "$@"\n'


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


class Workplace:
    """The clone, and a PATH that begins with stand-ins."""

    def __init__(self, repository: Path, tmp_path: Path) -> None:
        self.fake, self.repository = tmp_path / "fake", repository
        self.fake.mkdir()
        program(self.fake, "sleep", SLEEP)
        self.environ = {
            "PATH": f"{self.fake}:{os.environ['PATH']}", "FAKE": str(self.fake), "TMPDIR": "/tmp/my files",
            "HOME": str(tmp_path),
        }  # fmt: skip

    def run(self, script: str, *words: str, **environ: str) -> subprocess.CompletedProcess:
        command = [str(self.repository / "launch" / script), *words]
        environ = {**self.environ, **environ}
        return subprocess.run(command, env=environ, cwd=self.repository, capture_output=True, text=True, timeout=120)

    def lines(self, name: str) -> list[str]:
        path = self.fake / name
        return path.read_text().splitlines() if path.exists() else []
