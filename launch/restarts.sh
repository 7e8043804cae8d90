# shellcheck shell=bash
# Whether a run that ended is started again: the one place that every launcher asks (docs/run_directory.md has the exit
# codes). Sourced.

# after_exit CODE FILE MOST: appends CODE to FILE, the codes with which this run ended so far, and says what follows: sets
# `pause` to the seconds before the next start, or to nothing, and `why` to a sentence. MOST limits the starts after the first.
after_exit() {
    local code="$1" file="$2" most="$3" times most_of_this=''
    printf '%s\n' "$code" >>"$file"
    times="$(grep -c -x "$code" "$file")"
    pause=''
    case "$code" in
        0) why='done' ;;
        64) why='wrong usage: the same command would end so again' ;;
        65) why='bad data, model or checkpoint: the same command would end so again' ;;
        73) why='another process works in the run directory' ;;
        78) why='bad or changed settings: the same command would end so again' ;;
        126 | 127) why='the command cannot be started' ;;
        130) why='interrupted by hand' ;;
        69) most_of_this=6 pause=600 why='a service is unavailable' ;;
        70) most_of_this=1 pause=10 why='NaN, out of memory or a defect' ;;
        74) most_of_this=3 pause=60 why='a disk or a download failed' ;;
        75) pause=10 why='stopped safely, or a process was lost' ;;
        *) pause=10 why='crashed, was killed, or the connection was lost' ;;
    esac
    [[ -n "$pause" ]] || return 0
    if [[ -n "$most_of_this" ]] && ((times > most_of_this)); then
        pause='' why="$why, $times times"
    elif (($(grep -c '' "$file") > most)); then
        pause='' why="$why; the $most restarts are used up"
    else
        why="$why; starts again in $pause s ($(grep -c '' "$file") of $most restarts)"
    fi
}

# worst CODE...: the code that decides where several processes of one run ended with different ones: what would come again
# before what may pass, and that before a crash, which may be the others' answer to it.
worst() {
    local wanted code first=0
    for wanted in 64 65 73 78 126 127 130 70 74 69; do
        for code in "$@"; do
            if ((code == wanted)); then
                printf '%s' "$code"
                return
            fi
        done
    done
    for code in "$@"; do
        ((first)) || first="$code"
    done
    printf '%s' "$first"
}

# set_environment PLATFORMS: of a run. Where the first of them does not start, JAX shall say so instead of computing on the
# CPU, which stands behind it to make the base of a miniature.
set_environment() {
    ulimit -n 100000 2>/dev/null || true
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-1}"
    export JAX_PLATFORMS="${JAX_PLATFORMS:-$1}"
}

# supervise COMMAND...: runs it, hands TERM and INT on to it, and sets `code` to its exit code. From then on the shell ignores
# both, so that whoever sends them more than once does not keep it from writing the code down.
supervise() {
    local child='' signalled=0
    trap 'signalled=1; [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT
    "$@" &
    child=$!
    ((!signalled)) || kill -TERM "$child" 2>/dev/null || true # it came before there was a child
    # A `wait` that a signal interrupts may lose the code of a child that ends at that moment: wait for what has ended.
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.2 || true
    done
    trap '' TERM INT
    code=0
    wait "$child" || code=$?
}
