#!/usr/bin/env bash
# A ctpd run on GPUs under Slurm: one process per GPU, queued again when it is preempted or its time is over.
#
#   sbatch launch/slurm.sh COMMAND --config FILE.py --workdir DIR [--config.key=value ...]
#   sbatch --nodes=4 --gpus-per-node=4 --ntasks-per-node=4 --partition=P --account=A launch/slurm.sh run --config ...
#   launch/slurm.sh --dry-run run --config ...    prints what the job would do
#
# What stands on sbatch's command line goes before the lines below. As many tasks as GPUs on a node, and every task must
# see all GPUs of its node (no --gpus-per-task, no --gpu-bind): JAX takes the one with the task's number on the node.
# DIR must be on a file system that all nodes see; NFS mounted with lookupcache=positive, so that none remembers a file as
# absent that another has written since.
#
# Environment
#   VENV      the virtual environment that holds ctpd (default: .venv in the folder where sbatch was called)
#   RESTARTS  how often the job is queued again after a crash (default: 3); queueing again after SIGTERM has no limit
#   SAVING    seconds that the other processes have when one has ended (default: 120)
#
#SBATCH --job-name=ctpd
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=ctpd-%j.log
# Every process is sent SIGTERM 120 seconds before the time is over: it saves and ends with exit code 75.
#SBATCH --signal=TERM@120

set -uo pipefail

dry_run=
arguments=()
for argument in "$@"; do # wherever it stands: forgotten, it would cost money
  if [[ $argument == --dry-run ]]; then dry_run=yes; else arguments+=("$argument"); fi
done
set -- ${arguments[@]+"${arguments[@]}"}
if [[ ${1-} == -h || ${1-} == --help ]]; then
  sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit 0
fi
if (($# == 0)); then
  echo "slurm.sh: what shall it do? sbatch launch/slurm.sh run --config FILE.py --workdir DIR" >&2
  exit 2
fi
venv=${VENV:-${SLURM_SUBMIT_DIR:-.}/.venv}
# --kill-on-bad-exit=0 and --wait: the others may finish saving. JAX ends those that wait for a dead one in 30 seconds.
step=(srun --kill-on-bad-exit=0 "--wait=${SAVING:-120}" --label "$venv/bin/ctpd" "$@")
again=(scontrol requeue "${SLURM_JOB_ID:-JOB}")
if [[ $dry_run ]]; then
  grep '^#SBATCH' "${BASH_SOURCE[0]}"
  printf '%s\n' "${step[*]@Q}" "exit code 75, or a crash that is not one too many: ${again[*]@Q}"
  exit 0
fi
[[ ${SLURM_JOB_ID-} ]] || { echo "slurm.sh: to be given to sbatch; --dry-run shows what it would do." >&2; exit 2; }

trap : TERM # the processes get it; this script stays to queue the job again
"${step[@]}"
code=$?
case $code in
  0 | 2) exit "$code" ;; # done; or what the message says must be mended first
  # 143: it was stopped before it could answer. 137 may be that too, or too little memory: it counts as a crash.
  75 | 143) echo "slurm.sh: stopped (exit code $code); queued again" ;;
  *)
    if ((${SLURM_RESTART_COUNT:-0} >= ${RESTARTS:-3})); then
      echo "slurm.sh: crashed (exit code $code); not queued again after ${SLURM_RESTART_COUNT:-0} restarts" >&2
      exit "$code"
    fi
    echo "slurm.sh: crashed (exit code $code); queued again"
    ;;
esac
"${again[@]}"
