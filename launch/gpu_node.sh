#!/usr/bin/env bash
# One machine with one GPU or several: trains, and starts again for as long as training ends with 75 (preempted and
# saved) or 69 (a bucket or disk did not answer). One process drives all of the machine's GPUs; CUDA_VISIBLE_DEVICES
# chooses among them.
set -euo pipefail

help() {
    cat <<'EOF'
usage: launch/gpu_node.sh [--dry-run] -- --config configs/X.py --workdir DIR [TRAIN_ARGS]

Runs `python -m llava_jax.train` with what stands after the --, again and again while it ends with 75 or, as a
bucket or disk did not answer, with 69.
Ctrl-C or SIGTERM to this script: training saves, and that is the end (75); the same command goes on from there.
--dry-run prints the command instead of running it. `python` is the one on PATH: activate the environment first.
EOF
}

refuse() { printf 'error: %s\n       launch/gpu_node.sh --help says more\n' "$*" >&2; exit 64; }

dry_run=""
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry_run=1 ;;
        --help | -h) help; exit 0 ;;
        --) shift; break ;;
        *) refuse "'$1' is no option of this script; what train is to be told comes after a --" ;;
    esac
    shift
done
[ $# -gt 0 ] || refuse "what is to be trained is missing: -- --config configs/llava15_7b_lora.py --workdir runs/lora"

# JAX takes 75 % of a GPU's memory unless told otherwise; what is left here is CUDA's and NCCL's own.
export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-0.92}"
set -- python -m llava_jax.train "$@"
if [ "$dry_run" ]; then
    printf 'XLA_CLIENT_MEM_FRACTION=%s' "$XLA_CLIENT_MEM_FRACTION"
    printf ' %q' "$@"
    printf '\n'
    exit 0
fi
command -v python >/dev/null || refuse "there is no python on PATH: . .venv/bin/activate"

told=0 child=""
# A child in the background does not hear Ctrl-C, so both signals reach it as the one that it saves at.
trap 'told=$((told + 1)); [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' INT TERM
while :; do
    "$@" &
    child=$!
    [ "$told" = 0 ] || kill -TERM "$child" 2>/dev/null || true # a signal came before the child had a name
    heard=-1
    while [ "$heard" != "$told" ]; do # a signal ends `wait` before its child has ended: wait again
        heard=$told code=0
        wait "$child" || code=$?
    done
    [ "$told" = 0 ] || exit "$code"
    case $code in
        75) printf 'training was preempted and has saved: it goes on\n' >&2 ;;
        69) printf 'a bucket or disk does not answer: training is tried again in a minute\n' >&2; sleep 60 ;;
        *) exit "$code" ;;
    esac
done
