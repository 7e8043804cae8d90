#!/usr/bin/env bash
# What a pod does, on one machine: `sami run` in several processes with CPU devices each, which find each other on a free
# port. Ends with the exit code of the first process that failed, and leaves none of them behind.
set -euo pipefail

readonly LAST_WORDS_S=90 # a process whose peer failed ends by itself within 60 s
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
program=launch/local.sh
# shellcheck source=launch/arguments.sh
source "$root/launch/arguments.sh"

usage() {
    cat <<'EOF'
usage: launch/local.sh --processes=N --devices=M [--logs=DIR] -- [arguments of sami run]

  --processes=N  how many processes
  --devices=M    CPU devices of each
  --logs=DIR     gets process-0.log, process-1.log, ..., to which each start appends (default: WORKDIR.logs)

example: launch/local.sh --processes=2 --devices=2 -- --config=configs/miniature.py:smoke --workdir=runs/two \
    --config.mesh.fsdp=4

PYTHON names the interpreter; else it is the active environment's, the checkout's .venv, or python3.
EOF
}

processes='' devices='' logs=''
while (($#)); do
    case "$1" in
        --help | -h) usage && exit 0 ;;
        --) break ;;
        *) take_flag "$1" processes devices logs ;;
    esac
    shift
done
check_number --processes "$processes" 1 999
check_number --devices "$devices" 1 999
[[ "${1-}" == -- ]] || refuse 'the arguments of sami run are missing; they come behind --'
shift
read_workdir "$@"
logs="${logs:-${workdir%/}.logs}"

python="${PYTHON:-}"
find_python 'by PYTHON=...'
mkdir -p "$logs" || exit "$IO_FAILED"
port="$(free_port)"
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$devices" PYTHONUNBUFFERED=1
export SAMI_COORDINATOR="127.0.0.1:$port" SAMI_NUM_PROCESSES="$processes"

scratch="$(mktemp -d)"
pids=() printers=()
end_all() {
    local signal="$1" pid
    for pid in ${pids[@]+"${pids[@]}"}; do
        kill -s "$signal" "$pid" 2>/dev/null || true
    done
}
leave() {
    end_all KILL
    rm -rf "$scratch"
}
trap leave EXIT

show() {
    local line
    tee -a "$2" | while IFS= read -r line || [[ -n "$line" ]]; do printf '[%d] %s\n' "$1" "$line"; done
}

for ((i = 0; i < processes; i++)); do
    log="$logs/process-$i.log"
    printf -- '--- process %d of %d, %s\n' "$i" "$processes" "$(date -u +%FT%TZ)" >>"$log"
    mkfifo "$scratch/$i" # a pipe by name: a process that is part of one would have its last command's status
    show "$i" "$log" <"$scratch/$i" &
    printers+=("$!")
    SAMI_PROCESS_ID="$i" "$python" -m sami_jax run "$@" >"$scratch/$i" 2>&1 &
    pids+=("$!")
done
# Should this script be killed, its end of this pipe closes without a word, and its processes are killed, too.
exec 9> >(
    trap '' INT TERM HUP
    [[ "$(cat)" == over ]] || leave
)
trap 'end_all TERM' INT TERM HUP
first=0 left="$processes" deadline=0
ended=()
while ((left)); do
    for ((i = 0; i < processes; i++)); do
        if [[ -z "${ended[i]-}" ]] && ! kill -0 "${pids[i]}" 2>/dev/null; then
            code=0
            wait "${pids[i]}" || code=$?
            ended[i]=1
            left=$((left - 1))
            if ((code && !first)); then
                first="$code"
                deadline=$((SECONDS + LAST_WORDS_S))
                say "process $i ended with $code; waiting for the others"
            fi
        fi
    done
    if ((deadline && SECONDS > deadline)); then
        end_all KILL
    fi
    sleep 0.2 || true # a signal ends it
done
pids=()
wait "${printers[@]}" || true
printf over >&9
say "all $processes processes ended; exit code $first, logs in $logs"
exit "$first"
