#!/usr/bin/env bash
# What tpu_pod.sh runs on each host of a TPU: install, start, follow, stop.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1 # the copy of the repository on this host
pid_file=$HOME/maestro.pid log=$HOME/maestro.log
code_file=$HOME/maestro.code command_file=$HOME/maestro.command

usage() {
  cat <<'END'
launch/tpu_worker.sh install          a virtual environment with jax[tpu]
launch/tpu_worker.sh start ARGUMENTS  maestro.main --distributed, detached
launch/tpu_worker.sh follow           its output until it ends, then its code
launch/tpu_worker.sh running          code 0 if a run is there
launch/tpu_worker.sh stop             SIGTERM: it saves and ends
END
}

say() { echo "tpu_worker.sh: $(hostname): $*" >&2; }

# After the host has started anew, the number may be of another process.
running() {
  [[ -s $pid_file ]] \
    && grep -qa 'maestro\.main' "/proc/$(cat "$pid_file")/cmdline" 2>/dev/null
}

case ${1:-} in
  install)
    # The system's Python may be older than 3.11.
    uv=$HOME/.local/bin/uv
    if python3 -m pip install --quiet --user uv \
      && "$uv" venv --quiet --allow-existing --python 3.12 .venv \
      && "$uv" pip install --quiet --python .venv/bin/python -e '.[tpu]'; then
      exit 0
    fi
    say "the installation failed"
    exit 1
    ;;
  start)
    shift
    command=$(printf '%q ' "$@")
    if running; then
      [[ $command == "$(cat "$command_file")" ]] && exit 0
      say "another run is there: $(cat "$command_file")"
      say "wait, or stop it on all: bash maestro/launch/tpu_worker.sh stop"
      echo "maestro ended with code 2"
      exit 2
    fi
    echo "$command" >"$command_file"
    rm -f "$code_file" "$pid_file"
    # shellcheck disable=SC2016 # variables of the detached shell
    setsid nohup bash -c '.venv/bin/python -m maestro.main "$@" --distributed &
      echo $! >"$0.pid"
      wait $!
      echo $? >"$0.code"' "$HOME/maestro" "$@" \
      >>"$log" 2>&1 </dev/null &
    for _ in {1..50}; do # until its process is known
      if running || [[ -s $code_file ]]; then break; fi
      sleep 0.1
    done
    ;;
  follow)
    if running; then
      tail -n 20 -F --pid="$(cat "$pid_file")" "$log" 2>/dev/null
    else
      tail -n 20 "$log"
    fi
    for _ in {1..50}; do
      [[ -s $code_file ]] && break
      sleep 0.1
    done
    # Spoken, as the code of a remote command does not come through for sure.
    echo "maestro ended with code $(cat "$code_file" 2>/dev/null || echo 137)"
    ;;
  running) running ;;
  stop)
    if running; then kill -s TERM "$(cat "$pid_file")"; fi
    for ((i = 0; i < 600; i++)); do
      running || exit 0
      sleep 0.5
    done
    say "the run does not end within 300 s: killed"
    kill -s KILL "$(cat "$pid_file")"
    ;;
  --help | -h) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
