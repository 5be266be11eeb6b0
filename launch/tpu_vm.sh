#!/usr/bin/env bash
# A Cloud TPU slice from nothing to a finished run: made, set up, trained on, and made anew when it is taken away.
# Training runs apart from the connection that shows it, so a lost connection loses nothing.
set -euo pipefail

help() {
    cat <<'EOF'
usage: launch/tpu_vm.sh run    --name NAME --zone ZONE --type TYPE [--spot] [--queued] [--dry-run] -- TRAIN_ARGS
       launch/tpu_vm.sh create --name NAME --zone ZONE --type TYPE [--spot] [--queued] [--dry-run]
       launch/tpu_vm.sh setup | status | delete  --name NAME --zone ZONE [--queued] [--dry-run]

run     all of it, until training is done: makes the slice where there is none, installs this commit on every host,
        runs `python -m llava_jax.train TRAIN_ARGS` on all of them, and starts again where it was preempted.
        The same command attaches to a run that goes on, and resumes one that does not.
create  makes the slice (with --queued: asks for it).     setup   installs this commit on every host.
status  what state it is in, and every host's last words. delete  gives it back.

--type      as gcloud says it: v5litepod-16, v5p-16, v6e-16, v4-16 (v4 and v5p count two cores a chip)
--spot      cheaper, and may be taken away at any time
--queued    waits in Cloud TPU's queue until there is room; say it again for status and delete
--dry-run   prints the commands instead of running them

The project is gcloud's own: `gcloud config set project PROJECT`. Several hosts are reached at once only with the key
in the agent: `ssh-add ~/.ssh/google_compute_engine`.
EOF
}

POLL_SECS=30
CRASHES=3 # in a row that are no preemption; then a person should look

say() { printf '%s\n' "$*" >&2; }
refuse() { say "error: $*"; say "       launch/tpu_vm.sh --help says more"; exit 64; }

# The words as one line that a shell reads back as the same words.
quoted() {
    local word line=""
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=,@%+-]*) word=$(printf '%s' "$word" | sed "s/'/'\\\\''/g; 1s/^/'/; \$s/\$/'/") ;;
        esac
        line="$line ${word:-''}"
    done
    printf '%s\n' "${line# }"
}

call() { if [ "$dry_run" ]; then quoted "$@"; else "$@"; fi; }

# Without keep-alives a host that is gone is noticed after hours.
on_all() {
    call gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
        --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oConnectTimeout=20 --command="$1"
}

# A list tells "there is none" from "gcloud could not ask", which matters: only the first may lead to a new slice.
listed() { call gcloud compute tpus "$1" list --zone="$zone" --filter="name~(^|/)$name\$" --format="value($2)"; }

# The state of the slice, or of its place in the queue; nothing where there is neither.
look() {
    local state=ACTIVE
    [ -z "$queued" ] || state=$(listed queued-resources state.state) || return
    if [ "$state" = ACTIVE ]; then listed tpu-vm state; else printf '%s\n' "$state"; fi
}

create() {
    if [ "$queued" ]; then
        call gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
            --accelerator-type="$type" --runtime-version="$runtime" ${spot:+--spot}
    else
        call gcloud compute tpus tpu-vm create "$name" --zone="$zone" \
            --accelerator-type="$type" --version="$runtime" ${spot:+--spot}
    fi
}

delete() {
    if [ "$queued" ]; then
        call gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet
    else
        call gcloud compute tpus tpu-vm delete "$name" --zone="$zone" --quiet
    fi
}

# On a host all lies in llava_jax_run/, so that a clone of somebody's own beside it is safe: source/, the log, `ended`
# with the exit code once there is one, and a lock that is held while training runs. A lock goes with its process,
# whatever ended it, and is not there after a reboot.
IDLE="mkdir -p llava_jax_run && flock -n llava_jax_run/lock true"

# TPU images bring Python 3.10; uv fetches 3.13, which the newest jax wants. versions.txt lets a slice that is made anew
# weeks later run the same compiler.
setup() {
    call git -C "$root" archive --format=tar.gz --output="$archive" HEAD || return
    call gcloud compute tpus tpu-vm scp "$archive" "$name:llava_jax.tar.gz" --zone="$zone" --worker=all || return
    on_all "if ! { $IDLE; }; then echo 'training runs here: its code is left as it is'; exit 0; fi; \
cd llava_jax_run && rm -rf source && mkdir source && tar -xzf ../llava_jax.tar.gz -C source && cd source && \
python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --python 3.13 .venv && \
python3 -m uv pip install --quiet --python .venv/bin/python -c launch/versions.txt '.[tpu]'"
}

# gcloud repeats a command whose connection broke, up to ten times: all of these may be repeated.
start() {
    local args id
    args=$(quoted "$@")
    id=$(printf '%s' "$args" | cksum | cut -d ' ' -f 1)
    on_all "mkdir -p llava_jax_run && cd llava_jax_run && exec 9>>lock && { flock -n 9 || { \
[ \"\$(cat id)\" = $id ] && exit 0; echo 'another training runs here'; exit 64; }; } && \
rm -f ended && { [ ! -e log ] || mv log log.before; } && echo $id >id && cd source && { (trap '' HUP; code=0; \
LLAVA_JAX_MULTIHOST=1 .venv/bin/python -m llava_jax.train $args || code=\$?; \
echo \$code >../ended) </dev/null >../log 2>&1 & }"
}

# Shows the log until the lock is free, which is when nothing more can come.
follow() {
    on_all "cd llava_jax_run && { flock lock true & tail -n 100 -F --pid=\$! log; exit \$(cat ended || echo 1); }"
}

# `--worker=all` ends with the first host's code that is not 0, which hides why the others ended: ask each.
exit_codes() { on_all "if { $IDLE; }; then cat llava_jax_run/ended || echo lost; else echo running; fi"; }

words() {
    on_all "if { $IDLE; }; then echo idle, the last exit code is \$(cat llava_jax_run/ended || echo unknown); \
else echo training runs here; fi; tail -n 3 llava_jax_run/log"
}

# "again", "crashed", or the exit code that the same command would end with again (usage, data, checkpoint, NaN).
verdict() {
    local code word=crashed
    for code in "$@"; do
        case $code in
            64 | 65 | 66 | 70) printf '%s\n' "$code"; return ;;
            69 | 75 | running) word=again ;; # 69: the bucket did not answer for minutes
        esac
    done
    printf '%s\n' "$word"
}

# Returns once the slice is ready, making it where there is none, anew where it was taken away.
ensure() {
    local state
    while :; do
        # Before anything was ready, what fails is a typing error, a quota or a lack of room: gcloud says which.
        state=$(look) || { [ "$had_one" ] || exit 1; state=unknown; }
        case $state in
            READY) had_one=1; return ;;
            '') say "there is no $name: it is made"; if create; then continue; fi; [ "$had_one" ] || exit 1 ;;
            PREEMPTED | TERMINATED | SUSPENDED) had_one=1; say "$name is $state: it is made anew"; delete || true ;;
            FAILED) [ "$had_one" ] || refuse "$name is FAILED; gcloud compute tpus queued-resources describe $name" \
                "--zone=$zone says why, launch/tpu_vm.sh delete makes room"; delete || true ;;
            STOPPED) refuse "$name is STOPPED; gcloud compute tpus tpu-vm start $name --zone=$zone, then this again" ;;
        esac
        say "$name is ${state:-not there}: looking again in $POLL_SECS s"
        sleep "$POLL_SECS"
    done
}

run() {
    local crashes=0 code codes word
    trap 'say "training goes on without this terminal; the same command attaches to it"; exit 130' INT
    while :; do
        ensure
        code=0
        { setup && start "$@" && follow; } || code=$?
        if [ "$code" = 0 ]; then
            say "done; $name still costs money: launch/tpu_vm.sh delete --name $name --zone $zone${queued:+ --queued}"
            return
        fi
        [ "$(look || echo unknown)" = READY ] || { crashes=0; continue; }
        codes=$(exit_codes | tr '\n' ' ') || codes=""
        # shellcheck disable=SC2086 # one word a host
        word=$(verdict "$code" $codes)
        say "exit codes of the hosts: ${codes:-none, they do not answer}"
        case $word in
            again) crashes=0 ;;
            crashed) crashes=$((crashes + 1)) ;;
            *) say "exit code $word: the same command would end the same way; the lines above say what to mend"
               exit "$word" ;;
        esac
        [ "$crashes" -lt "$CRASHES" ] || { say "$crashes crashes in a row: see the lines above"; exit 1; }
    done
}

# What `run` would do, in order.
rehearse() {
    [ -z "$queued" ] || listed queued-resources state.state
    listed tpu-vm state
    printf '# where there is none:\n'
    create
    printf '# once it is READY:\n'
    setup
    start "$@"
    follow
    printf '# where that did not end with 0: again from the top, unless this shows 64, 65, 66 or 70:\n'
    exit_codes
    printf '# where the state is PREEMPTED, TERMINATED or SUSPENDED: this, then again from the top\n# '
    delete
}

# What would cost a slice and then fail is refused here; all else is train's own to refuse.
check_training() {
    local config="" workdir="" word previous=""
    for word in "$@"; do
        case $previous in
            --config) config=$word ;;
            --workdir) workdir=$word ;;
        esac
        case $word in
            --config=*) config=${word#*=} ;;
            --workdir=*) workdir=${word#*=} ;;
        esac
        previous=$word
    done
    [ "$config" ] && [ "$workdir" ] || refuse "run wants what to train after a --:" \
        "-- --config configs/llava15_7b_finetune.py --workdir gs://BUCKET/runs/finetune"
    git -C "$root" cat-file -e "HEAD:$config" 2>/dev/null || refuse "--config $config: the last commit of $root has" \
        "no such file, and the commit is what the hosts get; name it from there, and commit it"
    case $workdir in
        gs://?*) ;;
        *) refuse "--workdir $workdir: the hosts' disks go with the slice; want gs://BUCKET/..." ;;
    esac
}

root=$(cd "$(dirname "$0")/.." && pwd)
verb=${1:-}
name="" zone="" type="" spot="" queued="" dry_run="" had_one=""
case $verb in
    run | create | setup | status | delete) shift ;;
    --help | -h) help; exit 0 ;;
    *) refuse "'$verb': want run, create, setup, status or delete" ;;
esac
while [ $# -gt 0 ]; do
    case $1 in
        --name | --zone | --type) [ $# -gt 1 ] || refuse "$1 wants a value" ;;
    esac
    case $1 in
        --name) name=$2; shift ;;
        --name=*) name=${1#*=} ;;
        --zone) zone=$2; shift ;;
        --zone=*) zone=${1#*=} ;;
        --type) type=$2; shift ;;
        --type=*) type=${1#*=} ;;
        --spot) spot=1 ;;
        --queued) queued=1 ;;
        --dry-run) dry_run=1 ;;
        --help) help; exit 0 ;;
        --) shift; break ;;
        *) refuse "'$1' is no option of $verb; what train is to be told comes after a --" ;;
    esac
    shift
done
[ "$name" ] || refuse "--name is missing: any name for the slice, --name llava"
[ "$zone" ] || refuse "--zone is missing: gcloud compute tpus locations list shows where there are TPUs"
case $verb:$type in
    setup:* | status:* | delete:*) ;;
    *:) refuse "--type is missing: --type v5litepod-16 (16 chips of v5e), v5p-16, v6e-16" ;;
    *:v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    *:v5p-*) runtime=v2-alpha-tpuv5 ;;
    *:v6e-*) runtime=v2-alpha-tpuv6e ;;
    *:v4-*) runtime=tpu-ubuntu2204-base ;;
    *) refuse "--type $type: want v5litepod-N (v5e), v5p-N, v6e-N or v4-N; which sizes there are:" \
        "gcloud compute tpus accelerator-types list --zone=$zone" ;;
esac
[ "$verb" = run ] || [ $# = 0 ] || refuse "'$1': only run takes what train is to be told"
[ "$verb" != run ] || check_training "$@"
[ "$dry_run" ] || command -v gcloud >/dev/null || refuse "gcloud is not installed: cloud.google.com/sdk/docs/install"

archive=${TMPDIR:-/tmp}/llava_jax.tar.gz
if [ -z "$dry_run" ] && { [ "$verb" = run ] || [ "$verb" = setup ]; }; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    archive=$folder/llava_jax.tar.gz
    [ -z "$(git -C "$root" status --porcelain --untracked-files=no)" ] ||
        say "changes that are not committed stay here: the hosts get $(git -C "$root" rev-parse --short HEAD)"
fi
case $verb in
    run) if [ "$dry_run" ]; then rehearse "$@"; else run "$@"; fi ;;
    create) create ;;
    setup) setup ;;
    status)
        if [ "$dry_run" ]; then [ -z "$queued" ] || listed queued-resources state.state; listed tpu-vm state; words
        else state=$(look); say "$name is ${state:-not there}"; [ "$state" != READY ] || words; fi ;;
    delete) delete ;;
esac
