#!/usr/bin/env bash
# What a pod of launch/gke/jobset.sh runs, as process 1, which SIGTERM goes to:
#
#   pod.sh LOGS MAX_RESTARTS [arguments of sami run]
#
# Its exit code says to the JobSet whether the run starts again: 75 yes, another one no, as launch/restarts.sh has it. For that
# it keeps the codes of this run beside the logs; a JobSet knows how often it has started, and not why.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
program=launch/gke/pod.sh
# shellcheck source=launch/arguments.sh
source "$root/launch/arguments.sh"
# shellcheck source=launch/restarts.sh
source "$root/launch/restarts.sh"

logs="$1" max_restarts="$2"
shift 2
number="${JOB_COMPLETION_INDEX:-0}"
log="$logs/process-$number.log" ends="$logs/process-$number.codes"
mkdir -p "$logs" || fail "$IO_FAILED" "cannot make $logs"
[[ "${SAMI_START:-0}" != 0 ]] || rm -f "$ends" # of an earlier JobSet
printf -- '--- process %s, start %s, %s\n' "$number" "${SAMI_START:-0}" "$(date -u +%FT%TZ)" >>"$log"
set_environment tpu,cpu

# To the log on the shared disk, and to the pod's own, which is gone with it; by a pipe that has no part in the exit code.
exec 3>&1
exec > >(trap '' TERM INT && exec tee -a "$log" >&3) 2>&1
printer="$!"
leave() { # CODE: when all is printed
    local i
    exec >&3 2>&1
    for ((i = 0; i < 100; i++)); do
        kill -0 "$printer" 2>/dev/null || break
        sleep 0.1
    done
    exit "$1"
}
cd "$root"
supervise "${PYTHON:-python3}" -m sami_jax run --distributed=auto "$@"
after_exit "$code" "$ends" "$max_restarts"
say "$code: $why"
if [[ -z "$pause" ]]; then
    rm -f "$ends"
    leave "$code"
fi
((code != 69)) || sleep "$pause" # the others are quick enough as they come
leave "$AGAIN"
