#!/usr/bin/env bash
# N processes of one ctpd run on this machine, started again together when one of them dies.
#
#   launch/local.sh [--dry-run] N COMMAND --config FILE.py --workdir DIR [--config.key=value ...]
#
#   launch/local.sh 2 run --config configs/micro.py --workdir runs/two          2 processes, a simulated CPU device each
#   LOCAL_DEVICES=4 launch/local.sh 2 run --config ... --workdir ...            the same with 4 devices each
#   launch/local.sh 1 run --config ... --workdir ...                            one process, on what JAX finds
#
# With N > 1 every line of output begins with the number of its process. --dry-run prints the commands and runs none.
#
# Environment
#   LOCAL_DEVICES  simulated CPU devices per process (default: 1; with N = 1 the devices that JAX finds)
#   RESTARTS       how often all are started again after a crash (default: 3); stops with exit code 75 do not count
#   RESTART_DELAY  seconds before they are started again (default: 1)
#   GRACE          seconds that the others have between SIGTERM and SIGKILL when one has crashed (default: 10)
#   PATIENCE       seconds that the others have to save when one has stopped with exit code 75 (default: 300)
#   CTPD           the program (default: ctpd)
#
# Exit code: 0 all ended with 0; 2 one ended with 2 (its message says what to mend; starting again would not help);
# 75 the launcher was sent SIGTERM, passed it on, and what was done is saved: give the same command again;
# 130 the same for SIGINT; otherwise that of the process which died first, after the last restart.
# A second SIGTERM or SIGINT kills.

set -uo pipefail

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
say() { printf 'local.sh: %s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "this needs bash 4.4 or newer, not $BASH_VERSION."

dry_run=
arguments=()
for argument in "$@"; do # wherever it stands: forgotten, it would cost money
  if [[ $argument == --dry-run ]]; then dry_run=yes; else arguments+=("$argument"); fi
done
set -- ${arguments[@]+"${arguments[@]}"}
while [[ ${1-} == -* ]]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    *) fail "what does $1 mean? Options of ctpd come after N and the command." ;;
  esac
  shift
done
[[ ${1-} =~ ^[1-9][0-9]*$ ]] || fail "how many processes? launch/local.sh N COMMAND ...; launch/local.sh --help says more."
processes=$1
shift
(($# > 0)) || fail "what shall they do? launch/local.sh $processes run --config FILE.py --workdir DIR"
arguments=("$@")

restarts=${RESTARTS:-3} delay=${RESTART_DELAY:-1} grace=${GRACE:-10} patience=${PATIENCE:-300}
devices=${LOCAL_DEVICES:-}
if ((processes > 1)); then devices=${devices:-1}; fi
for number in "$restarts" "$delay" "$grace" "$patience" "${devices:-1}"; do
  [[ $number =~ ^[0-9]+$ ]] || fail "RESTARTS, RESTART_DELAY, GRACE, PATIENCE and LOCAL_DEVICES are whole numbers, not '$number'."
done
read -ra program <<<"${CTPD:-ctpd}"
# If this script is killed, the kernel sends its children SIGTERM.
if command -v setpriv >/dev/null && setpriv --pdeathsig TERM true 2>/dev/null; then
  program=(setpriv --pdeathsig TERM "${program[@]}")
fi

# A port on which nothing answers, below those that the kernel gives to outgoing connections.
choose_port() {
  local _
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 12000))
    (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || return 0
  done
  fail "found no free port between 20000 and 32000."
}

# Sets `line` to the command of process $1.
command_of() {
  line=(env PYTHONUNBUFFERED=1)
  if ((processes > 1)); then
    line+=("CTPD_COORDINATOR=127.0.0.1:$port" "CTPD_PROCESSES=$processes" "CTPD_PROCESS=$1")
  fi
  if [[ $devices ]]; then
    line+=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
  fi
  line+=("${program[@]}" "${arguments[@]}")
}

prefix() {
  local text
  while IFS= read -r text || [[ $text ]]; do printf '[%s] %s\n' "$1" "$text"; done
}

start_all() {
  local k out
  pids=() readers=() told=()
  for ((k = 0; k < processes; k++)); do
    command_of "$k"
    # Each in a process group of its own: it takes what it has started along when it is killed, and Ctrl-C comes here.
    if ((processes == 1)); then
      set -m
      "${line[@]}" </dev/null &
      pids[k]=$!
      set +m
    else
      exec {out}> >(trap '' INT TERM HUP; prefix "$k")
      readers+=($!)
      set -m
      "${line[@]}" </dev/null >&"$out" 2>&1 {out}>&- &
      pids[k]=$!
      set +m
      exec {out}>&-
    fi
    if [[ $asked ]]; then pass_on; fi # the signal came while they were being started
  done
}

signal_all() {
  local pid
  for pid in "${pids[@]}"; do kill -s "$1" -- "-$pid" 2>/dev/null; done
}

# Once to each: a process that is alone is killed by the second SIGTERM.
pass_on() {
  local k
  for k in "${!pids[@]}"; do
    [[ ${told[k]-} ]] && continue
    told[k]=yes
    kill -s "$asked" -- "-${pids[k]}" 2>/dev/null
  done
}

# Waits until all have ended, and sees to it that they do once one has. Sets `result` to what they ended with together.
watch() {
  local k code deadline=''
  result=0
  while ((${#pids[@]} > 0)); do
    for k in "${!pids[@]}"; do
      kill -0 "${pids[k]}" 2>/dev/null && continue
      wait "${pids[k]}" 2>/dev/null
      code=$?
      kill -s KILL -- "-${pids[k]}" 2>/dev/null # what it has started and left behind
      unset "pids[k]"
      ((code == 0)) && continue
      if ((result == 0)); then # what follows may be the consequence
        say "process $k ended with exit code $code"
        result=$code
        if ((code == 75)) || [[ $asked ]]; then
          deadline=$((SECONDS + patience))
        else
          signal_all TERM
          deadline=$((SECONDS + grace))
        fi
      elif ((code == 2)); then
        result=2
      fi
    done
    ((${#pids[@]} > 0)) || break
    if [[ $deadline ]] && ((SECONDS >= deadline)); then
      say "killing those that are left: ${!pids[*]}"
      signal_all KILL
      deadline=
    fi
    sleep 0.1
  done
  ((${#readers[@]} == 0)) || wait "${readers[@]}" # the last lines are out
}

on_signal() {
  if [[ $asked ]]; then
    say "SIG$1 again: killing all processes"
    signal_all KILL
  else
    asked=$1
    say "SIG$1: passed on to all processes"
    pass_on
  fi
}

port=0 asked='' result=0 crashes=0 pids=() readers=() told=() line=()
((processes == 1)) || choose_port
if [[ $dry_run ]]; then
  for ((number = 0; number < processes; number++)); do
    command_of "$number"
    printf '%s\n' "${line[*]@Q}"
  done
  exit 0
fi

trap 'on_signal TERM' TERM HUP
trap 'on_signal INT' INT
trap 'signal_all KILL' EXIT
while :; do
  start_all
  watch
  if [[ $asked ]]; then
    ((result == 0 || result == 2)) && exit "$result"
    [[ $asked == INT ]] && exit 130
    exit 75
  fi
  case $result in
    0 | 2) exit "$result" ;;
    75) say "stopped with everything saved; starting again" ;;
    *)
      ((++crashes > restarts)) && { say "crashed $crashes times; giving up"; exit "$result"; }
      say "starting all again ($crashes of $restarts)"
      ;;
  esac
  for ((until = SECONDS + delay; SECONDS < until && ${#asked} == 0; )); do sleep 0.1; done
  [[ $asked == TERM ]] && exit 75
  [[ $asked == INT ]] && exit 130
  ((processes == 1)) || choose_port # another one: the old one may still be taken
done
