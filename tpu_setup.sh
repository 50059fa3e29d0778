#!/usr/bin/env bash
# Cloud TPUs for scaling-jax, through gcloud; `tpu_setup.sh help` shows how.
set -euo pipefail

PYTHON_VERSION=3.11
UV_VERSION=0.13.9
REFUSED=9 # exit code of what is said on a worker and another attempt won't change

attempts=${TPU_SETUP_ATTEMPTS:-5}
backoff_seconds=${TPU_SETUP_BACKOFF_SECONDS:-5} # doubles from attempt to attempt
poll_seconds=${TPU_SETUP_POLL_SECONDS:-60}
wait_seconds=${TPU_SETUP_WAIT_SECONDS:-86400} # for a machine to come up; in a queue that can take hours

usage() {
  cat <<'EOF'
usage: tpu_setup.sh COMMAND NAME [options] [-- scaling-jax arguments]

One TPU machine, from nothing to results:

  tpu_setup.sh create my-tpu --zone us-west4-a --type v5litepod-8
  tpu_setup.sh setup  my-tpu --zone us-west4-a
  tpu_setup.sh check  my-tpu --zone us-west4-a
  tpu_setup.sh run    my-tpu --zone us-west4-a -- scan experiments/demo.py
  tpu_setup.sh logs   my-tpu --zone us-west4-a --follow
  tpu_setup.sh delete my-tpu --zone us-west4-a --yes

A spot pod from the queue, made again whenever it is preempted, until the command is done:

  tpu_setup.sh babysit my-pod --zone us-east5-b --type v6e-32 --queued --spot --recreate \
      -- train gpt.py --results gs://my-bucket/gpt

gpt.py is a file of this checkout that defines the run; docs/running.md has one.

Commands; each may be repeated, and goes on where it was:
  create   a TPU of --type, on demand or --spot, at once or --queued; waits until it is ready
  setup    copies this checkout to every worker, installs Python and the versions of tpu_requirements.txt
  check    every worker prints its processes and devices and joins a psum; fails unless they are TPUs
  run      starts `scaling-jax …` on every worker and returns; several workers take --results gs://bucket/folder, or /mnt/…
  logs     the last --lines of each worker's log (50), or one worker's as it grows with --follow
  status   of the TPU, and of the run on every worker
  stop     tells the run to save and end; ends it after a minute
  babysit  create, setup, check, run, then watches: starts what ended early again, --max-restarts times (20)
  delete   the TPU and its disks; only with --yes

Options:
  --zone ZONE, --project PROJECT  gcloud's own defaults unless given
  --type TYPE          such as v4-8, v5p-8, v5litepod-16 (v5e), v6e-8
  --runtime VERSION    of the machine's software; by the type unless given
  --spot               cheaper, and taken away at any time
  --queued             through a queued resource of the same name; give it to status, babysit and delete, too
  --create-flag=FLAG   for gcloud's create, such as --create-flag=--reserved; may be repeated
  --connect-flag=FLAG  for gcloud's ssh and scp, such as --connect-flag=--internal-ip; may be repeated
  --run-id ID          one name of a run on all workers, in SCALING_JAX_RUN_ID and of its logs' folder
  --worker N           of logs, status and stop; all unless given
  --recreate           lets babysit delete a TPU that was preempted or failed, and make it again
  --yes                lets delete delete
  --dry-run            prints the commands and runs nothing
EOF
}

say() { printf 'tpu_setup: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}
wrong() {
  say "$*; see tpu_setup.sh help"
  exit 2
}

# One word of any POSIX shell, whatever is in it.
quote() {
  local escaped="'\\''"
  printf "'%s'" "${1//\'/$escaped}"
}

# Bash's arithmetic runs what stands in a text, such as attempts[$(reboot)]. So it only gets what passed this.
is_number() { [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]]; }

# --- gcloud, with time limits and bounded retries -----------------------------------------------------------------

call() { # SECONDS gcloud-argument…
  local limit=${TPU_SETUP_TIMEOUT_SECONDS:-$1} word
  shift
  if ((dry_run)); then
    printf 'gcloud' >&3
    for word in "$@"; do
      if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then word=$(quote "$word"); fi
      printf ' %s' "$word" >&3
    done
    printf '\n' >&3
  elif command -v timeout >/dev/null; then
    timeout --kill-after=10 "$limit" gcloud "$@" </dev/null
  else
    gcloud "$@" </dev/null
  fi
}

retry() { # [done_if=FUNCTION] retry SECONDS gcloud-argument…
  local attempt code delay=$backoff_seconds
  for ((attempt = 1; ; attempt++)); do
    code=0
    call "$@" || code=$?
    if ((code == 0 || code == REFUSED)); then return "$code"; fi
    if [[ -n ${done_if:-} ]] && "$done_if"; then return 0; fi
    if ((attempt >= attempts)); then
      say "gave up after $attempts attempts: gcloud ${*:2:5} …"
      return "$code"
    fi
    say "attempt $attempt of $attempts failed (exit code $code), next in $delay s: gcloud ${*:2:5} …"
    sleep "$delay"
    delay=$((delay * 2))
  done
}

describe() { # KIND FORMAT: one value, or NOT_FOUND
  local attempt value delay=$backoff_seconds
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    if value=$(call 60 compute tpus "$1" describe "$name" "${where[@]}" --format="$2" 2>"$scratch/errors"); then
      if ((dry_run)); then value=$dry_state; fi
      printf '%s\n' "$value"
      return
    fi
    if grep -qi 'NOT_FOUND\|not found' "$scratch/errors"; then
      echo NOT_FOUND
      return
    fi
    sleep "$delay"
    delay=$((delay * 2))
  done
  cat "$scratch/errors" >&2
  say "gave up after $attempts attempts to describe $name"
  return 1
}

# READY, PREEMPTED, WAITING_FOR_RESOURCES, …; NODE_LOST if only the queued resource is left; NOT_FOUND.
tpu_state() {
  local state
  if ((queued)); then
    state=$(describe queued-resources 'value(state.state)') || return
    if [[ $state != ACTIVE ]]; then
      echo "$state"
      return
    fi
  fi
  state=$(describe tpu-vm 'value(state)') || return
  if ((queued)) && [[ $state == NOT_FOUND ]]; then state=NODE_LOST; fi
  echo "$state"
}

is_dead() { [[ $1 == PREEMPTED || $1 == TERMINATED || $1 == SUSPENDED || $1 == FAILED || $1 == NODE_LOST ]]; }

num_workers() {
  local dry_state=1 count
  count=$(describe tpu-vm 'value(networkEndpoints.len())') || return
  is_number "$count" || die "gcloud names no number of workers of $name but $count: see tpu_setup.sh status $name"
  echo "$count"
}

on_workers() { # SECONDS SCRIPT ARGUMENT…: a bash script on --worker, its arguments as they are here
  local limit=$1 command word
  shift
  command="bash -c $(quote "$1") tpu_setup"
  shift
  for word in "$@"; do command+=" $(quote "$word")"; done
  retry "$limit" compute tpus tpu-vm ssh "$name" "${where[@]}" ${connect_flags[@]+"${connect_flags[@]}"} \
    --worker="$worker" --command="$command"
}

# --- what runs on the workers -------------------------------------------------------------------------------------
# A run holds a lock for as long as any of its processes lives: a reboot frees it, a process number used again doesn't
# look like it.

read -r -d '' SETUP <<'EOF' || true
set -euo pipefail
runs=$HOME/scaling_jax_runs
mkdir -p "$runs" "$HOME/scaling_jax"
exec 9>>"$runs/lock"
flock -n 9 || { echo "run $(cat "$runs/current") is running on $(hostname): stop it first" >&2; exit 9; }
tar -xzf "$HOME/scaling_jax.tar.gz" -C "$HOME/scaling_jax"
uv=$HOME/.local/bin/uv
if ! "$uv" --version 2>/dev/null | grep -qF "uv $1 "; then
  curl -LsSf "https://astral.sh/uv/$1/install.sh" | UV_NO_MODIFY_PATH=1 sh
fi
cd "$HOME/scaling_jax"
"$uv" venv --quiet --allow-existing --python "$2" .venv
"$uv" pip sync --quiet tpu_requirements.txt
"$uv" pip install --quiet --no-deps --editable .
echo "$(hostname): $(.venv/bin/python --version), $("$uv" pip list 2>/dev/null | wc -l) packages"
EOF

read -r -d '' CHECK <<'EOF' || true
cd "$HOME/scaling_jax" && exec .venv/bin/python -c "$1" "$2"
EOF

read -r -d '' CHECK_PYTHON <<'EOF' || true
import socket, sys
import jax, numpy
workers = int(sys.argv[1])
if workers > 1:
    jax.distributed.initialize()
backend, local, devices = jax.default_backend(), jax.local_device_count(), jax.device_count()
psum = jax.pmap(lambda x: jax.lax.psum(x, "all"), axis_name="all", out_axes=None)(numpy.ones(local))
print(f"{socket.gethostname()}: process {jax.process_index()} of {jax.process_count()}, "
      f"{local} of {devices} {backend} devices ({jax.devices()[0].device_kind}), psum of ones {float(psum):g}")
wrong = None
if backend != "tpu":
    wrong = f"the backend is {backend}, not tpu"
elif jax.process_count() != workers or float(psum) != devices:
    wrong = f"not all of {workers} workers and {devices} devices take part"
if wrong:
    print(wrong, file=sys.stderr)
    sys.exit(9)
EOF

read -r -d '' START <<'EOF' || true
set -euo pipefail
runs=$HOME/scaling_jax_runs id=$1 wrapper=$2
shift 2
mkdir -p "$runs/$id"
exec 9>>"$runs/lock"
if ! flock -n 9; then
  if [ "$(cat "$runs/current")" = "$id" ]; then echo "$(hostname): run $id is running"; exit 0; fi
  echo "run $(cat "$runs/current") is running on $(hostname): stop it first" >&2
  exit 9
fi
echo "$id" >"$runs/current"
rm -f "$runs/$id/exit"
cd "$HOME/scaling_jax"
SCALING_JAX_RUN_ID=$id nohup setsid bash -c "$wrapper" scaling_jax "$runs/$id" .venv/bin/scaling-jax "$@" \
  </dev/null >>"$runs/$id/$(hostname).log" 2>&1 &
echo $! >"$runs/$id/pid"
echo "$(hostname): run $id started"
EOF

# A run that was saved because its machine goes away leaves with exit code 0, and isn't done.
read -r -d '' WRAPPER <<'EOF' || true
exit=$1/exit
export SCALING_JAX_SAVED=$1/saved
rm -f "$SCALING_JAX_SAVED"
shift
"$@"
echo $? >"$exit.new"
if [ ! -e "$SCALING_JAX_SAVED" ]; then mv "$exit.new" "$exit"; fi
EOF

read -r -d '' STATUS <<'EOF' || true
runs=$HOME/scaling_jax_runs
mkdir -p "$runs"
current=$(cat "$runs/current" 2>/dev/null)
id=${1:-$current}
if [ -n "$id" ] && [ "$id" = "$current" ] && ! flock -n "$runs/lock" true; then state=running
elif [ -n "$id" ] && [ -f "$runs/$id/exit" ]; then state="exit $(cat "$runs/$id/exit")"
elif [ -n "$id" ] && [ -d "$runs/$id" ]; then state=lost
else state=none; fi
echo "worker $(hostname): run ${id:--}: $state"
EOF

read -r -d '' LOGS <<'EOF' || true
runs=$HOME/scaling_jax_runs
log=$runs/${1:-$(cat "$runs/current")}/$(hostname).log
if [ "$3" = follow ]; then exec tail -n "$2" -F "$log"; fi
tail -n "$2" "$log" | sed "s/^/$(hostname): /"
EOF

read -r -d '' STOP <<'EOF' || true
runs=$HOME/scaling_jax_runs
mkdir -p "$runs"
exec 9>>"$runs/lock"
if flock -n 9; then echo "$(hostname): nothing is running"; exit 0; fi
run=$runs/$(cat "$runs/current")
group=$(cat "$run/pid")
kill -TERM -- "-$group"
flock -w "$1" 9 || { kill -KILL -- "-$group"; flock -w 10 9; }
echo stopped >"$run/exit"
echo "$(hostname): stopped"
EOF

# --- commands -----------------------------------------------------------------------------------------------------

exists() {
  local state
  state=$(tpu_state) && [[ $state != NOT_FOUND ]]
}

create() {
  local dry_state=NOT_FOUND state
  state=$(tpu_state)
  if [[ $state == NOT_FOUND ]]; then request; else say "$name exists already and is $state"; fi
  dry_state=READY
  wait_until_ready
}

request() {
  local kind=tpu-vm flags=(--version="$runtime")
  if ((queued)); then kind=queued-resources flags=(--node-id="$name" --runtime-version="$runtime"); fi
  if ((spot)); then flags+=(--spot); fi
  # An attempt that failed here may have come through there.
  done_if=exists retry 1800 compute tpus "$kind" create "$name" "${where[@]}" --accelerator-type="$type" \
    "${flags[@]}" ${create_flags[@]+"${create_flags[@]}"}
}

wait_until_ready() {
  local state deadline=$((SECONDS + wait_seconds))
  while state=$(tpu_state) && [[ $state != READY ]]; do
    if is_dead "$state"; then die "$name is $state: delete it and create it again"; fi
    if ((SECONDS >= deadline)); then die "$name is still $state after $wait_seconds s; the same command waits on"; fi
    say "$name is $state"
    sleep "$poll_seconds"
  done
  [[ $state == READY ]]
}

setup() {
  local package=$scratch/scaling_jax.tar.gz file
  if ((!dry_run)); then
    (
      cd "$root"
      git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
        if [[ -e $file ]]; then printf '%s\0' "$file"; fi
      done | tar --null -T - -czf "$package"
    )
  fi
  retry 600 compute tpus tpu-vm scp "$package" "$name:scaling_jax.tar.gz" "${where[@]}" \
    ${connect_flags[@]+"${connect_flags[@]}"} --worker=all
  on_workers 1800 "$SETUP" "$UV_VERSION" "$PYTHON_VERSION"
}

check() {
  local workers
  workers=$(num_workers)
  on_workers 600 "$CHECK" "$CHECK_PYTHON" "$workers"
}

run() {
  [[ ${#arguments[@]} -gt 0 ]] || wrong "run needs scaling-jax's arguments after --, as in -- scan x.py"
  local workers
  workers=$(num_workers)
  if ((workers > 1)) && [[ $(results_of "${arguments[@]}") != @(gs://*|/mnt/*) ]]; then
    wrong "$name has $workers workers, which share no disk: add --results gs://bucket/folder, or /mnt/… (a file system mounted on each), to scaling-jax's arguments"
  fi
  on_workers 120 "$START" "$run_id" "$WRAPPER" "${arguments[@]}"
}

results_of() {
  local word before=
  for word in "$@"; do
    if [[ $before == --results ]]; then echo "$word"; fi
    if [[ $word == --results=* ]]; then echo "${word#*=}"; fi
    before=$word
  done | tail -n 1
}

logs() {
  if ((follow)); then
    if [[ $worker == all ]]; then worker=0; fi
    TPU_SETUP_TIMEOUT_SECONDS=0 on_workers 0 "$LOGS" "$run_id" "$lines" follow
  else
    on_workers 60 "$LOGS" "$run_id" "$lines" ''
  fi
}

status() {
  local state
  state=$(tpu_state)
  if ((!dry_run)); then echo "$name: $state"; fi
  if [[ $state == READY ]]; then on_workers 60 "$STATUS" "$run_id"; fi
}

stop() { on_workers 180 "$STOP" 60; }

delete() {
  if ((queued)); then
    retry 900 compute tpus queued-resources delete "$name" "${where[@]}" --force
  else
    retry 900 compute tpus tpu-vm delete "$name" "${where[@]}"
  fi
}

babysit() {
  local state created=0 started=0 unclear=0 progress
  if ((dry_run)); then
    create
    setup
    check
    run
    status
    if ((recreate)); then
      say "after a preemption, before all this again:"
      delete
    fi
    return
  fi
  while true; do
    state=$(tpu_state)
    if [[ $state == NOT_FOUND ]]; then
      ((created++ <= max_restarts)) || die "$name was taken away $max_restarts times; the same command goes on"
      request
    elif is_dead "$state"; then
      ((recreate)) || die "$name is $state; --recreate lets babysit delete it and make it again"
      say "$name is $state: deleting it, to make it again"
      delete
    elif [[ $state != READY ]]; then
      say "$name is $state"
    else
      progress=$(run_progress)
      case $progress in
        done)
          say "run $run_id is done"
          return
          ;;
        refused) die "scaling-jax refused run $run_id: see tpu_setup.sh logs $name --run-id $run_id" ;;
        running) unclear=0 ;;
        unclear) ((++unclear < attempts)) || die "not all workers of $name answer: see tpu_setup.sh status $name" ;;
        new | ended)
          ((started++ <= max_restarts)) || die "run $run_id ended early $started times: see tpu_setup.sh logs $name"
          stop
          if [[ $progress == new ]]; then
            setup
            check
          fi
          run
          ;;
      esac
    fi
    sleep "$poll_seconds"
  done
}

# done, running, refused (exit code 2), new (to a worker), ended (otherwise, on any), or unclear.
run_progress() {
  local said workers answers
  workers=$(num_workers) || return
  said=$(on_workers 60 "$STATUS" "$run_id" | grep "^worker .*: run $run_id: ") || true
  answers=$(printf '%s' "$said" | grep -c '') || true
  said=$(printf '%s\n' "$said" | sed 's/.*: run [^:]*: //' | sort -u)
  if ((answers != workers)); then
    echo unclear
  elif [[ $said == 'exit 0' ]]; then
    echo 'done'
  elif [[ $said == running || $said == $'exit 0\nrunning' ]]; then
    echo running
  elif grep -qx none <<<"$said"; then
    echo new
  elif grep -qx 'exit 2' <<<"$said"; then
    echo refused
  else
    echo ended
  fi
}

# --- the command line ---------------------------------------------------------------------------------------------

command=${1:-help}
case $command in
  help | -h | --help)
    usage
    exit 0
    ;;
  create | setup | check | run | logs | status | stop | babysit | delete) ;;
  *) wrong "no command $command" ;;
esac
name=${2:-}
[[ -n $name && $name != -* ]] || wrong "$command needs the TPU's name"
shift 2

where=(--quiet) create_flags=() connect_flags=() arguments=()
type='' runtime='' run_id='' worker=all lines=50
spot=0 queued=0 recreate=0 yes=0 follow=0 dry_run=0 dry_state=READY max_restarts=20
while (($#)); do
  option=$1
  shift
  case $option in
    --)
      arguments=("$@")
      break
      ;;
    --spot) spot=1 && continue ;;
    --queued) queued=1 && continue ;;
    --recreate) recreate=1 && continue ;;
    --yes) yes=1 && continue ;;
    --follow) follow=1 && continue ;;
    --dry-run) dry_run=1 && continue ;;
    --*=*) value=${option#*=} option=${option%%=*} ;;
    *)
      [[ $# -gt 0 ]] || wrong "$option needs a value, or is unknown"
      value=$1
      shift
      ;;
  esac
  case $option in
    --zone | --project) where+=("$option=$value") ;;
    --type) type=$value ;;
    --runtime) runtime=$value ;;
    --run-id) run_id=$value ;;
    --worker) worker=$value ;;
    --lines) lines=$value ;;
    --max-restarts) max_restarts=$value ;;
    --create-flag) create_flags+=("$value") ;;
    --connect-flag) connect_flags+=("$value") ;;
    *) wrong "unknown option $option" ;;
  esac
done
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || wrong "no TPU can have the name $name: use letters, digits, dashes"
is_number "$max_restarts" || wrong "--max-restarts $max_restarts: give a number"
is_number "$lines" || wrong "--lines $lines: give a number"
if [[ $worker != all ]]; then is_number "$worker" || wrong "--worker $worker: give a number or all"; fi
is_number "$attempts" || wrong "TPU_SETUP_ATTEMPTS=$attempts: give a whole number"
is_number "$backoff_seconds" || wrong "TPU_SETUP_BACKOFF_SECONDS=$backoff_seconds: give a whole number"
is_number "$wait_seconds" || wrong "TPU_SETUP_WAIT_SECONDS=$wait_seconds: give a whole number"
[[ $poll_seconds =~ ^[0-9]+(\.[0-9]+)?$ ]] || wrong "TPU_SETUP_POLL_SECONDS=$poll_seconds: give a number"
[[ ${TPU_SETUP_TIMEOUT_SECONDS:-0} =~ ^[0-9]+(\.[0-9]+)?$ ]] ||
  wrong "TPU_SETUP_TIMEOUT_SECONDS=$TPU_SETUP_TIMEOUT_SECONDS: give a number"
if [[ $command == run && -z $run_id ]]; then run_id=$name-$(date -u +%Y%m%dT%H%M%SZ); fi
if [[ $command == babysit && -z $run_id ]]; then run_id=$name; fi # the same command watches the same run
[[ $run_id =~ ^([A-Za-z0-9_][A-Za-z0-9._-]*)?$ ]] || wrong "--run-id $run_id: use letters, digits, dots, dashes"
if [[ $command == delete ]] && ((!yes && !dry_run)); then wrong "delete removes $name and its disks: add --yes"; fi
if [[ $command == babysit && ${#arguments[@]} -eq 0 ]]; then wrong "babysit needs scaling-jax's arguments after --"; fi
if ((!dry_run)) && ! command -v gcloud >/dev/null; then die "no gcloud: install the Google Cloud CLI and log in"; fi

if [[ $command == create || $command == babysit ]]; then
  [[ -n $type ]] || wrong "$command needs --type, such as --type v5litepod-8"
  if [[ -z $runtime ]]; then
    case $type in
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      *) runtime=tpu-ubuntu2204-base ;;
    esac
  fi
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
exec 3>&1 # for dry runs, also where standard output is captured
"$command"
