#!/usr/bin/env bash
#SBATCH --job-name=llava_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=llava_jax-%j.log
#SBATCH --signal=TERM@600
# Several nodes of NVIDIA GPUs under Slurm: trains, and goes back into the queue when the time limit or another job
# cuts it off. Training hears SIGTERM 600 s before the limit, saves, and ends with 75; it ends
# with 69 where the disk or bucket does not answer, which is worth another try too.
#
# One task for each GPU, and each task sees all GPUs of its node: that is how JAX divides them under Slurm, so
# --gpus-per-task and --gpu-bind must not be set, and a node is taken whole (--exclusive).
set -euo pipefail

help() {
    cat <<'EOF'
usage: sbatch [--nodes=N] [--partition=P] [...] launch/slurm.sh -- --config configs/X.py --workdir DIR [TRAIN_ARGS]
       launch/slurm.sh --dry-run -- TRAIN_ARGS

Runs `python -m llava_jax.train` with what stands after the --, one process a GPU, from the root of the repository.
Options of sbatch win over the #SBATCH lines of the file. --workdir and the data lie where all nodes see them.
`python` is the one on PATH when sbatch is called: activate the environment first. --dry-run prints the commands.
EOF
}

refuse() { printf 'error: %s\n       launch/slurm.sh --help says more\n' "$*" >&2; exit 64; }

dry_run=""
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry_run=1 ;;
        --help | -h) help; exit 0 ;;
        --) shift; break ;;
        *) refuse "'$1' is no option of this script (sbatch's own stand before its name); what train is to be told" \
            "comes after a --" ;;
    esac
    shift
done
[ $# -gt 0 ] || refuse "what is to be trained is missing: -- --config configs/llava15_7b_finetune.py --workdir DIR"

[ "$dry_run" ] || [ "${SLURM_JOB_ID:-}" ] || refuse "this is a job: sbatch launch/slurm.sh --$(printf ' %q' "$@")"

# JAX takes 75 % of a GPU's memory unless told otherwise; what is left here is CUDA's and NCCL's own.
export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-0.92}"
export LLAVA_JAX_MULTIHOST=1
# All processes stop at the same step, but not in the same second: the first to end must not take the others with it.
# srun does not take the number of CPUs over from sbatch.
set -- srun --kill-on-bad-exit=0 --wait=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-12}" python -m llava_jax.train "$@"
if [ "$dry_run" ]; then
    printf 'LLAVA_JAX_MULTIHOST=1 XLA_CLIENT_MEM_FRACTION=%s' "$XLA_CLIENT_MEM_FRACTION"
    printf ' %q' "$@"
    # shellcheck disable=SC2016 # the job has no number yet
    printf '\n# where that ended with 75 or 69:\nscontrol requeue "$SLURM_JOB_ID"\n'
    exit 0
fi
# SIGTERM to this script itself means that Slurm is ending the job: cancelled, or preempted.
told=""
trap 'told=1' TERM
code=0
"$@" || code=$?
case $code in 69 | 75) ;; *) exit "$code" ;; esac
if [ "$told" ]; then
    # A preempted job is requeued by Slurm only if it has not ended by itself, a cancelled one must not be: wait for
    # Slurm to decide. Its KILL comes after GraceTime or KillWait.
    sleep 900
    exit "$code"
fi
scontrol requeue "$SLURM_JOB_ID"
