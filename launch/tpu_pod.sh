#!/usr/bin/env bash
# Runs maestro.main on a Cloud TPU: creates it, installs, runs, retries.
set -uo pipefail # no -e: what fails is looked at

usage() {
  cat <<'END'
launch/tpu_pod.sh --name=NAME --zone=ZONE --type=TYPE --version=VERSION
                  [options] -- <arguments of maestro.main>
launch/tpu_pod.sh --name=NAME --zone=ZONE --delete

Creates a TPU as a queued resource, or takes the one of that name, whatever its
type; copies the last commit of this repository to all of its hosts, installs
it, runs it, and follows the output of process 0. After a preemption it does so
again. Ctrl-C leaves the run alone: the same command follows it again.

  --name=NAME       of the queued resource and of its node
  --zone=ZONE       e.g. us-central2-b
  --type=TYPE       accelerator, e.g. v5litepod-8, v4-32, v6e-16
  --version=VERSION runtime, e.g. v2-alpha-tpuv5-lite, tpu-ubuntu2204-base,
                    v2-alpha-tpuv6e
  --project=ID      the default is gcloud's own
  --spot            cheaper, and may be preempted
  --setup=COMMAND   on every host before each run, e.g. to mount what --workdir
                    is on; all hosts have to share it
  --retries=R       how often to go on after a preemption or a loss (5)
  --queue-hours=H   how long to wait for the TPU (24)
  --delete-after    deletes the TPU at the end, whatever the end is
  --delete          only deletes it
  --dry-run         prints the commands
  --help            prints this

WITHOUT --delete-after THE TPU STAYS, and costs money until it is deleted; the
last lines of the output are the command for that.
END
}

say() { printf 'tpu_pod.sh: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 2
}

name='' zone='' type='' version='' setup='' retries=5 queue_hours=24
location=() create_options=() delete_after='' only_delete='' dry_run=''
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) location+=("$1") ;;
    --spot) create_options+=(--spot) ;;
    --setup=*) setup=${1#*=} ;;
    --retries=*) retries=${1#*=} ;;
    --queue-hours=*) queue_hours=${1#*=} ;;
    --delete-after) delete_after=yes ;;
    --delete) only_delete=yes ;;
    --dry-run) dry_run=yes ;;
    --help | -h) usage && exit 0 ;;
    --) shift && break ;;
    *) die "$1 is no option; those of maestro.main stand behind --" ;;
  esac
  shift
done
[[ $name && $zone ]] || die "--name and --zone are needed; see --help"
if [[ -z $only_delete ]]; then
  [[ $type && $version ]] || die "--type and --version are needed; see --help"
  (($#)) || die "nothing to run; give arguments of maestro.main behind --"
fi
number='^(0|[1-9][0-9]{0,3})$'
[[ $retries =~ $number ]] || die "--retries='$retries' is no number"
[[ $queue_hours =~ $number ]] \
  || die "--queue-hours='$queue_hours' is no number"
location=("--zone=$zone" "${location[@]}")
arguments=("$@")
poll=${POLL_SECONDS:-30}

queued=(gcloud compute tpus queued-resources)
delete=("${queued[@]}" delete "$name" "${location[@]}" --force --quiet)
if [[ $dry_run ]]; then
  work=TEMPORARY
else
  type -P gcloud >/dev/null \
    || die "gcloud is not on PATH: install Google Cloud's command line"
  work=$(mktemp -d) || exit 1
fi

# Runs a command, or prints it.
run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@" </dev/null
  fi
}
on() { # a command on worker $1 (or all)
  run gcloud compute tpus tpu-vm ssh "$name" "${location[@]}" \
    "--worker=$1" "--command=$2"
}

# Prints the state; NONE where there is no such resource, UNKNOWN where gcloud
# does not tell (no network, no permission): then nothing may be concluded.
state() {
  local text
  if text=$("${queued[@]}" describe "$name" "${location[@]}" \
    '--format=value(state.state)' 2>"$work/error" </dev/null); then
    echo "$text"
  elif grep -qi 'not[ _]found' "$work/error"; then
    echo NONE
  else
    cat "$work/error" >&2
    echo UNKNOWN
  fi
}

touched='' # whether the resource may be there by now
ending() {
  local code=$? now
  trap - EXIT
  trap '' INT TERM # the deletion is not to be stopped half-way
  [[ ${listener:-} ]] && kill -s TERM -- "-$listener" 2>/dev/null
  if [[ $touched && $dry_run ]]; then
    [[ $delete_after ]] && run "${delete[@]}"
  elif [[ $touched ]]; then
    now=$(state)
    if [[ $now == NONE ]]; then
      say "no TPU named $name is left"
    elif [[ $delete_after ]] && run "${delete[@]}"; then
      say "$name is deleted"
    else
      [[ $delete_after ]] && say "THE DELETION FAILED"
      say "STILL THERE, AND MAY COST MONEY: $name in $zone ($now)." \
        "To delete it:"
      printf '  %s\n' "${delete[*]}" >&2
    fi
  fi
  [[ $dry_run ]] || rm -rf -- "$work"
  exit "$code"
}
trap ending EXIT
trap 'say "stopped; a run that was started goes on"; exit 130' INT
trap 'say "stopped; a run that was started goes on"; exit 143' TERM

if [[ $only_delete ]]; then
  run "${delete[@]}"
  exit
fi

create() {
  touched=yes # even if it fails half-way
  run "${queued[@]}" create "$name" "${location[@]}" "--node-id=$name" \
    "--accelerator-type=$type" "--runtime-version=$version" \
    "${create_options[@]}" && return
  say "it could not be created"
  exit 1
}

# Comes back when the TPU is there; creates it where it is not.
get_tpu() {
  local now last='' silent=0 created=''
  local deadline=$((SECONDS + queue_hours * 3600))
  if [[ $dry_run ]]; then
    run "${queued[@]}" describe "$name" "${location[@]}" \
      '--format=value(state.state)'
    echo "# if it is not there:"
    create
    echo "# asks for its state until it is ACTIVE"
    return
  fi
  while true; do
    now=$(state)
    [[ $now == "$last" ]] || say "$name: $now"
    last=$now
    [[ $now == NONE ]] || touched=yes
    if [[ $now == UNKNOWN ]]; then ((silent += 1)); else silent=0; fi
    case $now in
      ACTIVE) return ;;
      NONE) # just after its creation, too, it may not be known yet
        [[ $created ]] || create
        created=yes
        ;;
      SUSPENDED | FAILED)
        if [[ $created && $now == FAILED ]]; then
          say "it was not granted; gcloud says why: ${queued[*]} describe" \
            "$name ${location[*]}"
          exit 1
        fi
        # What was preempted has no hosts and costs nothing, but has the name.
        run "${delete[@]}" || exit 1
        create
        created=yes
        ;;
    esac
    if ((SECONDS >= deadline || silent == 5)); then
      say "no TPU within $queue_hours hours, or no answer"
      exit 1
    fi
    sleep "$poll"
  done
}

worker='bash maestro/launch/tpu_worker.sh'

# Under a run that is there already nothing is changed.
install() {
  local archive=$work/maestro.tar.gz root
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  if [[ $dry_run ]]; then
    root=.
  elif [[ $(git -C "$root" status --porcelain 2>/dev/null) ]]; then
    say "changes that are not committed do not go to the TPU"
  fi
  run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD \
    && run gcloud compute tpus tpu-vm scp "$archive" "$name:maestro.tar.gz" \
      "${location[@]}" --worker=all \
    && on all "$worker running 2>/dev/null || { mkdir -p maestro && \
tar -xzf maestro.tar.gz -C maestro && $worker install; }"
}

# What the hosts say of the code, as gcloud's own code is not that of a remote
# command; nothing where the connection broke.
said_code() {
  sed -n 's/^maestro ended with code \([0-9]*\)\r*$/\1/p' "$work/output" \
    | tail -n 1
}

listen() { on 0 "$worker follow" | tee "$work/output"; }
listener='' # the process group that follows the run

# Starts the run on all hosts, or finds it there, and follows it; sets `code`.
follow() {
  code=''
  if [[ $setup ]]; then on all "$setup" || return; fi
  local start
  start="$worker start$(printf ' %q' "${arguments[@]}")"
  if [[ $dry_run ]]; then
    on all "$start"
    on 0 "$worker follow"
    return
  fi
  on all "$start" | tee "$work/output" || return
  code=$(said_code) # it refused
  [[ $code ]] && return
  if [[ -t 0 ]]; then # ssh may ask for a passphrase
    listen
  else # Bash acts on SIGTERM only once a command in the foreground ends
    set -m
    listen &
    listener=$!
    set +m
    wait "$listener"
    listener=''
  fi
  code=$(said_code)
}

# Waits until the hosts answer, or are known to be gone; sets `now`. gcloud may
# take minutes to say that a TPU was preempted.
look_again() {
  local try
  for try in {1..20}; do
    now=$(state)
    case $now in
      ACTIVE | UNKNOWN) on all true && return ;;
      *) return ;;
    esac
    sleep "$poll"
  done
  say "the hosts do not answer, after $try tries"
  exit 1
}

attempt=0 installed=''
while true; do
  get_tpu
  if [[ $installed ]] || install; then
    installed=yes
    follow
  else
    code=''
  fi
  [[ $dry_run ]] && exit 0
  case $code in
    '' | 69 | 75 | 134 | 137) ;;
    0)
      say "done"
      exit 0
      ;;
    *) exit "$code" ;;
  esac
  look_again
  if [[ $now != ACTIVE && $now != UNKNOWN ]]; then
    say "$name was preempted ($now)"
    installed=''
  elif [[ -z $installed ]]; then
    say "the installation failed"
    exit 1
  elif [[ -z $code ]]; then
    say "the connection broke; the run may still be there"
  fi
  if ((attempt >= retries)); then
    say "no more than $retries retries; the same command goes on"
    exit "${code:-1}"
  fi
  ((attempt += 1))
  say "goes on, $attempt of at most $retries"
  # Before all start again, none may be left of those that were lost.
  if [[ $installed && $code ]]; then on all "$worker stop"; fi
  sleep "$poll"
done
