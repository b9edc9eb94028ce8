#!/usr/bin/env bash
# A ctpd run on Cloud TPU VMs: one VM or a whole pod slice, all workers alike.
#
#   launch/tpu_vm.sh [--dry-run] create | wait | install | run COMMAND ... | logs | status | stop | delete | resume COMMAND ...
#
#   export NAME=mine ZONE=us-west4-a ACCELERATOR=v5litepod-16 SHARE=10.0.0.2:/ctpd
#   launch/tpu_vm.sh create
#   launch/tpu_vm.sh wait && launch/tpu_vm.sh install
#   launch/tpu_vm.sh run run --config configs/pair.py --workdir /mnt/ctpd/mine --config.data.train=...
#   launch/tpu_vm.sh logs                 follows worker 0; launch/tpu_vm.sh logs 3 worker 3
#   launch/tpu_vm.sh resume run ...       after a preemption: deletes, creates, waits, installs, and goes on
#
# --dry-run prints the commands and runs none. `run` leaves ctpd running as a service of every worker, under
# launch/local.sh, which starts it again after a crash; `stop` lets it save first.
#
# Environment
#   NAME         of the queued resource and of its node (default: ctpd)
#   ZONE         (default: gcloud's)
#   PROJECT      (default: gcloud's)
#   ACCELERATOR  v5litepod-1 is one chip, v5litepod-16 a slice of 4 workers (default: v5litepod-16)
#   RUNTIME      the VM's software (default: v2-alpha-tpuv5-lite)
#   SPOT         yes: cheaper, and may be taken away (default: no)
#   SHARE        HOST:/PATH of an NFS share, mounted at /mnt/ctpd on all workers. A workdir on a worker's own disk serves
#                one worker only, and goes with it.
#   PYTHON       (default: 3.12)
#
# With a SHARE, models of the hub are kept at /mnt/ctpd/huggingface. For a model that asks for a token put it into the file
# `token` there.

set -euo pipefail

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() { echo "tpu_vm.sh: $*" >&2; exit 2; }

name=${NAME:-ctpd} accelerator=${ACCELERATOR:-v5litepod-16} runtime=${RUNTIME:-v2-alpha-tpuv5-lite}
place=()
[[ -z ${ZONE-} ]] || place+=("--zone=$ZONE")
[[ -z ${PROJECT-} ]] || place+=("--project=$PROJECT")
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "NAME=$name: lower-case letters, digits and dashes only."

dry_run=
arguments=()
for argument in "$@"; do # wherever it stands: forgotten, it would cost money
  if [[ $argument == --dry-run ]]; then dry_run=yes; else arguments+=("$argument"); fi
done
set -- ${arguments[@]+"${arguments[@]}"}
# Prints a command, and runs it unless it is a dry run.
do_it() {
  printf '%s\n' "${*@Q}"
  [[ $dry_run ]] || "$@"
}
on_workers() { # WORKER COMMAND
  do_it gcloud compute tpus tpu-vm ssh "$name" ${place[@]+"${place[@]}"} "--worker=$1" "--command=$2"
}

create() {
  local spot=()
  [[ ${SPOT:-no} != yes ]] || spot=(--spot)
  do_it gcloud compute tpus queued-resources create "$name" ${place[@]+"${place[@]}"} "--node-id=$name" \
    "--accelerator-type=$accelerator" "--runtime-version=$runtime" ${spot[@]+"${spot[@]}"}
}

wait_for() {
  local state=''
  local ask=(gcloud compute tpus queued-resources describe "$name" ${place[@]+"${place[@]}"} "--format=value(state.state)")
  if [[ $dry_run ]]; then
    do_it "${ask[@]}"
    return
  fi
  until [[ $state == ACTIVE ]]; do
    state=$("${ask[@]}")
    echo "$(date +%T) $name: $state"
    case $state in FAILED | SUSPEND*) fail "$name is $state; launch/tpu_vm.sh delete, then create." ;; esac
    [[ $state == ACTIVE ]] || sleep 30
  done
}

install() {
  local root archive
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  archive=ctpd-source.tgz
  (cd "$root" && do_it tar -czf "${TMPDIR:-/tmp}/$archive" setup.py pyproject.toml README.md LICENSE ctpd_jax configs examples launch)
  do_it gcloud compute tpus tpu-vm scp "${TMPDIR:-/tmp}/$archive" "$name:$archive" ${place[@]+"${place[@]}"} --worker=all
  # uv brings a Python of its own: the VM's may be older than ctpd needs.
  on_workers all "set -e; mkdir -p ctpd && tar -xzf $archive -C ctpd && python3 -m pip install --quiet --user uv &&
python3 -m uv venv --quiet --allow-existing --python ${PYTHON:-3.12} ctpd/.venv &&
python3 -m uv pip install --quiet --python ctpd/.venv/bin/python -e 'ctpd[tpu,hub]'"
  if [[ ${SHARE-} ]]; then
    # lookupcache=positive: that a file is not there is asked again, not remembered.
    on_workers all "set -e; sudo apt-get install -y -qq nfs-common >/dev/null; sudo mkdir -p /mnt/ctpd
mountpoint -q /mnt/ctpd || sudo mount -t nfs -o hard,lookupcache=positive $(printf %q "$SHARE") /mnt/ctpd; sudo chown \$(id -u) /mnt/ctpd"
  fi
}

# A service: it outlives the connection, and when the VM is shut down only local.sh is sent SIGTERM, which passes it on
# once. Restarts wait for the workers whose JAX has not yet noticed that one is gone.
run() {
  (($# > 0)) || fail "what shall they run? launch/tpu_vm.sh run run --config FILE.py --workdir DIR"
  on_workers all "cd ctpd || exit 1; sudo systemctl reset-failed ctpd 2>/dev/null; sudo systemd-run --unit=ctpd --uid=\$(id -u) \
--working-directory=\$PWD -p KillMode=mixed -p TimeoutStopSec=300 -E HOME=\$HOME -E CTPD_DISTRIBUTED=detect \
-E CTPD=\$PWD/.venv/bin/ctpd -E RESTARTS=10 -E RESTART_DELAY=45${SHARE:+ -E HF_HOME=/mnt/ctpd/huggingface} \
bash launch/local.sh 1$(printf ' %q' "$@")"
}

delete() {
  do_it gcloud compute tpus queued-resources delete "$name" ${place[@]+"${place[@]}"} --force --quiet
}

while [[ ${1-} == -* ]]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    *) fail "what does $1 mean? launch/tpu_vm.sh --help" ;;
  esac
  shift
done
task=${1-}
(($# == 0)) || shift
case $task in
  create) create ;;
  wait) wait_for ;;
  install) install ;;
  run) run "$@" ;;
  logs) on_workers "${1:-0}" "sudo journalctl --unit=ctpd --follow --lines=200 --output=cat" ;;
  status) on_workers all "systemctl is-active ctpd; sudo journalctl --unit=ctpd --lines=2 --output=cat" ;;
  stop) on_workers all "sudo systemctl stop ctpd" ;;
  delete) delete ;;
  resume)
    (($# > 0)) || fail "what shall go on? launch/tpu_vm.sh resume run --config FILE.py --workdir DIR"
    delete || echo "tpu_vm.sh: nothing to delete"
    create
    wait_for
    install
    run "$@"
    ;;
  *) fail "create, wait, install, run, logs, status, stop, delete or resume? launch/tpu_vm.sh --help" ;;
esac
