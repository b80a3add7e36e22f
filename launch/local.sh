#!/usr/bin/env bash
# Runs maestro.main as several processes of one machine, and ends as they do.
set -uo pipefail # no -e: this script outlives the processes that fail

usage() {
  cat <<'END'
launch/local.sh [options] -- <arguments of maestro.main>

Runs maestro.main as several processes of this machine, one on each GPU or all
on CPUs, and exits with the code of the first one that failed. Process 0 writes
to the terminal, the others to files. SIGTERM and Ctrl-C go to all of them.

  --processes=N   how many; with --gpus the default is one for each GPU
  --gpus          process i gets GPU i, or the i-th of CUDA_VISIBLE_DEVICES
  --retries=R     runs again, up to R times, after code 69 or 75 or a signal
  --grace=SEC     how long after a failure the others may live (300)
  --log-dir=DIR   what the others say; the default is a temporary directory,
                  which is named at the end if something failed
  --dry-run       prints what would be run
  --help          prints this

PYTHON names the interpreter; the default is python3.
  launch/local.sh --processes=2 -- --config=configs/digits_od.py:smoke
END
}

say() { printf 'local.sh: %s\n' "$*" >&3; }
die() {
  say "$*"
  exit 2
}
# Bash itself would report each killed process; ours are the better words.
exec 3>&2

processes='' gpus='' retries=0 grace=300 log_dir='' dry_run=''
while (($#)); do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --gpus) gpus=yes ;;
    --retries=*) retries=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --log-dir=*) log_dir=${1#*=} ;;
    --dry-run) dry_run=yes ;;
    --help | -h) usage && exit 0 ;;
    --) shift && break ;;
    *) die "$1 is no option; those of maestro.main stand behind --" ;;
  esac
  shift
done
(($#)) || die "nothing to run; give arguments of maestro.main behind --"

devices=()
if [[ $gpus ]]; then
  if [[ ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
  elif [[ -z $processes ]]; then
    processes=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
    [[ $processes != 0 ]] || die "nvidia-smi finds no GPU; give --processes=N"
  fi
  processes=${processes:-${#devices[@]}}
fi
number='^(0|[1-9][0-9]{0,5})$'
[[ $processes =~ $number && $processes != 0 ]] \
  || die "--processes='$processes' is no number from 1; give --processes=N"
[[ $retries =~ $number ]] || die "--retries='$retries' is no number"
[[ $grace =~ $number ]] || die "--grace='$grace' is no number of seconds"
if ((${#devices[@]} && processes > ${#devices[@]})); then
  die "--processes=$processes, but CUDA_VISIBLE_DEVICES has ${#devices[@]}"
fi

# The command of process $1 of the run that meets at port $2.
command_of() {
  if [[ $gpus ]]; then
    command=(env "CUDA_VISIBLE_DEVICES=${devices[$1]:-$1}")
  else
    command=(env JAX_PLATFORMS=cpu)
  fi
  command+=("${PYTHON:-python3}" -m maestro.main "${arguments[@]}"
    "--coordinator=127.0.0.1:$2" "--num_processes=$processes"
    "--process_id=$1")
}
arguments=("$@")

if [[ $dry_run ]]; then
  for ((i = 0; i < processes; i++)); do
    command_of "$i" PORT
    printf '%q ' "${command[@]}" | sed 's/ $//'
    ((i == 0)) && echo ' &' && continue
    printf ' >>%q 2>&1 &\n' "${log_dir:-TEMPORARY}/process_$i.log"
  done
  exit 0
fi

type -P "${PYTHON:-python3}" >/dev/null \
  || die "${PYTHON:-python3} is not there; name an interpreter in PYTHON"
own_logs=''
if [[ -z $log_dir ]]; then
  log_dir=$(mktemp -d) || die "no temporary directory; give --log-dir=DIR"
  own_logs=$log_dir
fi
mkdir -p "$log_dir" || die "--log-dir=$log_dir cannot be made"

# Sets `port` to one that is free, and not that of the attempt before, which may
# be held for a while. Taken from below those that the system gives out itself.
new_port() {
  local last=$port
  while true; do
    port=$((20000 + RANDOM % 12000))
    ((port != last)) || continue
    (exec 4<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || return 0
  done
}

asked='' # whether this launcher was told to stop
pids=()
forward() {
  asked=$1
  local pid
  for pid in "${pids[@]}"; do kill -s "$1" "$pid" 2>/dev/null; done
}
trap 'forward TERM' TERM HUP # HUP: the terminal is gone
trap 'forward INT' INT

describe() {
  case $2 in
    130) say "process $1 was stopped by Ctrl-C" ;;
    137) say "process $1 was killed by SIGKILL; the kernel's log says whether" \
      "memory was short" ;;
    129 | 1[3-8]? | 19[0-2])
      say "process $1 was killed by SIG$(kill -l "$2")"
      ;;
    75) say "process $1 was asked to stop and has saved (code 75)" ;;
    69) say "process $1 ended as another one was lost (code 69)" ;;
    *) say "process $1 exited with code $2" ;;
  esac
}

# Whether a process that ended with $1 is the cause of `code`: 69 says that
# another one failed, and so may SIGABRT, if both are found in the same look.
causes() {
  (($1 != 69 && $1 != 134)) && ((code == 69 || (code == 134 && now)))
}

# Waits for all; sets `failed` and `code` to the first process that failed. It
# looks, as `wait -n` of Bash before 5.3 misses processes killed by a signal.
wait_for_all() {
  local i status now left=$processes deadline='' late
  failed='' code=0
  while ((left)); do
    now=0
    for i in "${!pids[@]}"; do
      kill -0 "${pids[i]}" 2>/dev/null && continue
      wait "${pids[i]}"
      status=$?
      unset "pids[$i]"
      ((left -= 1))
      ((status)) || continue
      describe "$i" "$status"
      deadline=${deadline:-$((SECONDS + grace))}
      if [[ -z $failed ]] || causes "$status"; then
        failed=$i code=$status now=1
      fi
    done
    ((left)) || break
    if [[ $deadline ]] && ((SECONDS > deadline)); then
      late=${!pids[*]}
      say "process ${late// /, } did not end within $grace s: killed"
      kill -s KILL "${pids[@]}" 2>/dev/null
      deadline=$((SECONDS + grace + 10))
    fi
    sleep 0.1
  done
}

run() {
  local i
  new_port
  # With job control, processes in the background are not deaf to SIGINT, and
  # Ctrl-C reaches them through this launcher only: once.
  set -m
  for ((i = 0; i < processes; i++)); do
    [[ $asked ]] && break
    command_of "$i" "$port"
    if ((i)); then
      "${command[@]}" >>"$log_dir/process_$i.log" 2>&1 </dev/null 3>&- &
    else
      "${command[@]}" 2>&3 </dev/null 3>&- &
    fi
    pids[i]=$!
  done
  set +m
  # A signal that came between is told to all that were started since.
  if [[ $asked ]]; then forward "$asked"; fi
  if ((i < processes)); then
    ((${#pids[@]})) && wait "${pids[@]}"
    failed=0 code=$([[ $asked == INT ]] && echo 130 || echo 75)
    return
  fi
  wait_for_all
}

port=0 attempt=0
while true; do
  run 2>/dev/null
  ((code)) || break
  if ((failed && code != 75)) && [[ -s $log_dir/process_$failed.log ]]; then
    say "the end of $log_dir/process_$failed.log:"
    tail -n 12 "$log_dir/process_$failed.log" >&3
  fi
  if [[ $asked ]] || ((attempt >= retries)); then break; fi
  ((code == 69 || code == 75 || (code > 128 && code != 130))) || break
  ((attempt += 1))
  say "runs again, $attempt of at most $retries"
done
if ((code)); then
  ((processes > 1)) && say "what the other processes said: $log_dir"
elif [[ $own_logs ]]; then
  rm -rf -- "$own_logs" # made above, and nobody was told of it
fi
exit "$code"
