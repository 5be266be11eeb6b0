"""tpu_vm.sh: what it prints, what it refuses, and whole runs on slices that come and go."""

import re
import shlex
import subprocess
import time

import pytest

from tests.launch.stand_ins import GCLOUD, SLICE, TRAINING, Workplace, program


def _trained(cloud: Workplace, host: int = 0) -> list[list[str]]:
    """What each attempt on a host was told: LLAVA_JAX_MULTIHOST, then the words after python."""
    paths = sorted(cloud.fake.glob(f"trained{host}.*"))
    return [path.read_text().split("\0")[:-1] for path in paths]


TO_ALL = ("gcloud compute tpus tpu-vm ssh llava --zone=us-west4-a --worker=all --ssh-flag=-oServerAliveInterval=30 "
          "--ssh-flag=-oConnectTimeout=20")  # fmt: skip
REHEARSAL = r"""gcloud compute tpus tpu-vm list --zone=us-west4-a '--filter=name~(^|/)llava$' '--format=value(state)'
# where there is none:
gcloud compute tpus tpu-vm create llava --zone=us-west4-a --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot
# once it is READY:
git -C '{repository}' archive --format=tar.gz '--output=/tmp/my files/llava_jax.tar.gz' HEAD
gcloud compute tpus tpu-vm scp '/tmp/my files/llava_jax.tar.gz' llava:llava_jax.tar.gz --zone=us-west4-a --worker=all
{to_all} {setup}
{to_all} {start}
{to_all} {follow}
# where that did not end with 0: again from the top, unless this shows 64, 65, 66 or 70:
{to_all} {codes}
# where the state is PREEMPTED, TERMINATED or SUSPENDED: this, then again from the top
# gcloud compute tpus tpu-vm delete llava --zone=us-west4-a --quiet
"""  # noqa: E501
IDLE = "mkdir -p llava_jax_run && flock -n llava_jax_run/lock true"
SETUP = (
    "if ! { " + IDLE + "; }; then echo 'training runs here: its code is left as it is'; exit 0; fi; "
    "cd llava_jax_run && rm -rf source && mkdir source && tar -xzf ../llava_jax.tar.gz -C source && cd source && "
    "python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --python 3.13 .venv && "
    "python3 -m uv pip install --quiet --python .venv/bin/python -c launch/versions.txt '.[tpu]'"
)
START = (
    "mkdir -p llava_jax_run && cd llava_jax_run && exec 9>>lock && { flock -n 9 || { "
    '[ "$(cat id)" = ID ] && exit 0; echo \'another training runs here\'; exit 64; }; } && '
    "rm -f ended && { [ ! -e log ] || mv log log.before; } && echo ID >id && cd source && { (trap '' HUP; code=0; "
    "LLAVA_JAX_MULTIHOST=1 .venv/bin/python -m llava_jax.train --config configs/x.py "
    "--workdir 'gs://bucket/my runs/it'\\''s $1' --config.train.lr=1e-4 || code=$?; "
    "echo $code >../ended) </dev/null >../log 2>&1 & }"
)
FOLLOW = "cd llava_jax_run && { flock lock true & tail -n 100 -F --pid=$! log; exit $(cat ended || echo 1); }"
CODES = "if { " + IDLE + "; }; then cat llava_jax_run/ended || echo lost; else echo running; fi"


def test_a_dry_run_prints_all_that_run_would_do_as_lines_that_can_be_pasted(workplace):
    shown = workplace.run("tpu_vm.sh", "run", *SLICE, "--spot", "--dry-run", "--", *TRAINING)
    assert shown.returncode == 0, shown.stderr
    shown = re.sub(r"(= |echo )\d+( |>)", r"\1ID\2", shown.stdout)  # a checksum of the arguments
    texts = {"setup": SETUP, "start": START, "follow": FOLLOW, "codes": CODES}
    quoted = {name: "'--command=" + text.replace("'", "'\\''") + "'" for name, text in texts.items()}
    assert shown == REHEARSAL.format(repository=workplace.repository, to_all=TO_ALL, **quoted)
    assert shlex.split(quoted["start"]) == ["--command=" + START]


@pytest.mark.parametrize(
    "words, shown",
    [
        (("create", *SLICE), ["gcloud compute tpus tpu-vm create llava --zone=us-west4-a "
                              "--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite"]),
        (("create", *SLICE[:4], "--type=v6e-16", "--spot", "--queued"),
         ["gcloud compute tpus queued-resources create llava --node-id=llava --zone=us-west4-a "
          "--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot"]),
        (("delete", *SLICE[:4]), ["gcloud compute tpus tpu-vm delete llava --zone=us-west4-a --quiet"]),
        (("delete", *SLICE[:4], "--queued"),
         ["gcloud compute tpus queued-resources delete llava --zone=us-west4-a --force --quiet"]),
        (("status", "--name=llava", "--zone=us-west4-a"),
         ["gcloud compute tpus tpu-vm list --zone=us-west4-a '--filter=name~(^|/)llava$' '--format=value(state)'",
          f"{TO_ALL} '--command=if {{ {IDLE}; }}; then echo idle, the last exit code is $(cat llava_jax_run/ended || "
          "echo unknown); else echo training runs here; fi; tail -n 3 llava_jax_run/log'"]),
    ],
)  # fmt: skip
def test_a_dry_run_of_the_other_verbs(workplace, words, shown):
    assert workplace.run("tpu_vm.sh", *words, "--dry-run").stdout.splitlines() == shown


@pytest.mark.parametrize(
    "words, remedy",
    [
        ((), "want run, create, setup, status or delete"),
        (("resume", *SLICE), "'resume': want run, create, setup, status or delete"),
        (("run", *SLICE[2:], "--", *TRAINING), "--name is missing: any name"),
        (("run", "--name"), "--name wants a value"),
        (("status", "--name", "llava"), "--zone is missing: gcloud compute tpus locations list"),
        (("run", *SLICE[:4], "--", *TRAINING), "--type is missing: --type v5litepod-16"),
        (("create", *SLICE[:4], "--type", "v5e-16"), "--type v5e-16: want v5litepod-N (v5e), v5p-N, v6e-N or v4-N"),
        (("run", *SLICE), "-- --config configs/llava15_7b_finetune.py --workdir gs://BUCKET/"),
        (("run", *SLICE, "--config", "configs/x.py"), "what train is to be told comes after a --"),
        (("run", *SLICE, "--", "--config=configs/x.py", "--workdir=runs/x"), "--workdir runs/x: the hosts' disks go"),
        (("run", *SLICE, "--", "--config=configs/y.py", "--workdir=gs://b/x"), "no such file, and the commit is what"),
        (("status", *SLICE[:4], "--", "--config=c"), "'--config=c': only run takes what train is to be told"),
    ],
)
def test_what_is_missing_is_said_with_the_remedy_before_gcloud_is_asked_anything(cloud, words, remedy):
    refused = cloud.run("tpu_vm.sh", *words)
    assert refused.returncode == 64 and remedy in refused.stderr and not cloud.lines("calls")


ATTEMPT = ["tpu-vm list", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh", "tpu-vm ssh"]


def test_a_slice_is_made_lost_made_anew_resumed_and_done(cloud):
    (cloud.fake / "fate").write_text("gone\n75 75\n0 0\n")
    done = cloud.run("tpu_vm.sh", "run", *SLICE, "--spot", "--", *TRAINING)
    assert done.returncode == 0, done.stderr
    assert "llava is PREEMPTED: it is made anew" in done.stderr
    assert "done; llava still costs money: launch/tpu_vm.sh delete --name llava --zone us-west4-a" in done.stderr
    assert cloud.lines("calls") == [
        "tpu-vm list", "tpu-vm create", *ATTEMPT,
        "tpu-vm list", "tpu-vm list", "tpu-vm delete", "tpu-vm list", "tpu-vm create", *ATTEMPT,
        "tpu-vm list", "tpu-vm ssh", *ATTEMPT,
    ]  # fmt: skip
    told = [["1", "-m", "llava_jax.train", *TRAINING]] * 3
    assert _trained(cloud, 0) == told and _trained(cloud, 1) == told
    assert "host 1, attempt 2" in done.stdout  # the last attempt's log was shown, of both hosts
    assert not [path for path in cloud.fake.parent.glob("tmp.*")]  # the archive of the commit is gone again


def test_a_queued_slice_is_waited_for_and_asked_for_again_once_it_is_suspended(cloud):
    (cloud.fake / "fate").write_text("gone\n0 0\n")
    done = cloud.run("tpu_vm.sh", "run", *SLICE, "--queued", "--", *TRAINING)
    assert done.returncode == 0, done.stderr
    calls = cloud.lines("calls")
    assert calls.count("queued-resources create") == 2 and calls.count("queued-resources delete") == 1
    assert cloud.lines("slept") == ["30", "30", "30"]  # waiting twice for a place, and once to have given one back
    assert "tpu-vm create" not in calls and "tpu-vm delete" not in calls
    assert len(_trained(cloud)) == 2 and "delete --name llava --zone us-west4-a --queued" in done.stderr


def test_a_clone_of_somebodys_own_on_a_host_is_left_alone(cloud):
    for host in ("host0", "host1"):
        (cloud.fake / host / "llava_jax").mkdir(parents=True)
        (cloud.fake / host / "llava_jax" / "my.py").write_text("mine")
    (cloud.fake / "state").write_text("READY\n")
    (cloud.fake / "fate").write_text("0 0\n")
    assert cloud.run("tpu_vm.sh", "run", *SLICE, "--", *TRAINING).returncode == 0
    assert [(cloud.fake / host / "llava_jax" / "my.py").read_text() for host in ("host0", "host1")] == ["mine"] * 2
    assert "tpu-vm create" not in cloud.lines("calls")  # a slice that is there is used


def test_bad_data_on_the_second_host_ends_the_run_though_the_first_only_lost_its_peer(cloud):
    (cloud.fake / "fate").write_text("134 65\n0 0\n")
    ended = cloud.run("tpu_vm.sh", "run", *SLICE, "--", *TRAINING)
    assert ended.returncode == 65 and "the same command would end the same way" in ended.stderr
    assert len(_trained(cloud)) == 1


def test_three_crashes_in_a_row_are_left_to_a_person_and_a_preemption_between_them_does_not_count(cloud):
    (cloud.fake / "fate").write_text("1 134\n42 1\n75 75\n1 1\n134 137\n1 1\n0 0\n")
    ended = cloud.run("tpu_vm.sh", "run", *SLICE, "--", *TRAINING)
    assert ended.returncode == 1 and "3 crashes in a row" in ended.stderr
    assert len(_trained(cloud)) == 6


def test_a_connection_that_breaks_finds_the_same_training_again(cloud):
    (cloud.fake / "fate").write_text("held\n")
    (cloud.fake / "drop").touch()
    done = cloud.run("tpu_vm.sh", "run", *SLICE, "--", *TRAINING)
    assert done.returncode == 0, done.stderr
    assert "running running" in done.stderr and "training runs here: its code is left as it is" in done.stdout
    assert len(_trained(cloud, 0)) == len(_trained(cloud, 1)) == 1


def test_another_training_that_runs_there_is_neither_stopped_nor_taken_for_this_one(cloud):
    (cloud.fake / "fate").write_text("held\n")
    (cloud.fake / "hold").touch()
    command = [str(cloud.repository / "launch" / "tpu_vm.sh"), "run", *SLICE, "--", *TRAINING]
    first = subprocess.Popen(command, env=cloud.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(cloud.fake.glob("trained1.*")):
        assert first.poll() is None
        time.sleep(0.01)
    second = cloud.run("tpu_vm.sh", "run", *SLICE, "--", *TRAINING, "--config.train.seed=1")
    assert second.returncode == 64 and "another training runs here" in second.stdout
    (cloud.fake / "release").touch()
    assert first.wait(timeout=120) == 0 and len(_trained(cloud)) == 1


@pytest.mark.parametrize("trouble", ["unreachable", "full"])
def test_what_fails_before_there_ever_was_a_slice_ends_at_once(cloud, trouble):
    (cloud.fake / trouble).touch()
    ended = cloud.run("tpu_vm.sh", "run", *SLICE, "--", *TRAINING)
    assert ended.returncode == 1 and not cloud.lines("slept")
    assert cloud.lines("calls") == ["tpu-vm list"] + ["tpu-vm create"] * (trouble == "full")


def test_a_slice_that_cannot_be_asked_about_is_never_deleted(cloud):
    (cloud.fake / "fate").write_text("held\n")
    (cloud.fake / "drop").touch()
    # The connection is lost with the network: from here on gcloud cannot be asked, until the third try.
    broken = GCLOUD.replace("[ ! -e unreachable ] || exit 1;", (
        'if [ -e dropped ] && [ "$(grep -c . slept)" -lt 2 ]; then exit 1; fi;'))  # fmt: skip
    program(cloud.fake, "gcloud", broken)
    (cloud.fake / "slept").touch()
    done = cloud.run("tpu_vm.sh", "run", *SLICE, "--", *TRAINING)
    assert done.returncode == 0 and "llava is unknown: looking again in 30 s" in done.stderr
    assert "tpu-vm delete" not in cloud.lines("calls") and len(_trained(cloud)) == 1
