# shellcheck shell=bash
# What the launchers say, and read from their arguments. Sourced; reads `program` and calls `usage` of the script that does.

# shellcheck disable=SC2034 # read where this file is sourced
readonly USAGE=64 IO_FAILED=74 AGAIN=75 BAD_CONFIG=78

say() {
    printf '%s: %s\n' "${program:?}" "$1" >&2
}

fail() { # CODE SENTENCE
    say "$2"
    exit "$1"
}

refuse() {
    say "$1"
    usage >&2
    exit "$USAGE"
}

comment() {
    printf '# %s\n' "$1"
}

# quoted ARGUMENT...: one line that any shell reads back as these arguments.
quoted() {
    local argument line='' quote="'" escaped="'\\''"
    for argument in "$@"; do
        case "$argument" in
            '' | *[!A-Za-z0-9_@%+=:,./-]*) argument="'${argument//$quote/$escaped}'" ;;
        esac
        line="$line${line:+ }$argument"
    done
    printf '%s' "$line"
}

# take_flag ARGUMENT VARIABLE...: sets the one of these variables that --its-name=value names; refuses what names none.
take_flag() {
    local _flag="${1%%=*}" _variable
    _flag="${_flag#--}"
    for _variable in "${@:2}"; do
        if [[ "$1" == --*=* && "$_flag" == "${_variable//_/-}" ]]; then
            printf -v "$_variable" '%s' "${1#*=}"
            return
        fi
    done
    refuse "unknown argument $1; flags have the form --flag=value, the arguments of sami run come behind --"
}

# check_number FLAG VALUE LEAST MOST
check_number() {
    if [[ ! "$2" =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3 || $2 > $4)); then
        refuse "$1=$2 is no number from $3 to $4"
    fi
}

# check_env_file FILE: of VAR=VALUE lines; nothing where it is empty.
check_env_file() {
    [[ -n "$1" ]] || return 0
    [[ -f "$1" && -r "$1" ]] || refuse "--env-file=$1 is no file that can be read"
    [[ -z "$(find -L "$1" -perm -004 -o -perm -040)" ]] || refuse "others can read --env-file=$1; chmod 600 it"
}

# find_python: sets `python` where it is empty, and ends where it has no sami_jax.
find_python() {
    local candidate
    for candidate in "${python:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${root:?}/.venv/bin/python" python3; do
        [[ -z "$candidate" ]] || ! command -v "$candidate" >/dev/null || break
    done
    python="$candidate"
    "$python" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("sami_jax") and u.find_spec("orbax")))' ||
        fail "$BAD_CONFIG" "$python has no sami_jax; install it there, or name another ${1-}"
}

# free_port: prints a port of this machine that nobody uses.
free_port() {
    "${python:?}" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# read_workdir ARGUMENT...: sets `workdir` to what the arguments of sami run name; refuses what a launcher decides.
read_workdir() {
    local argument previous=''
    workdir=''
    for argument in "$@"; do
        case "$argument" in
            --workdir=*) workdir="${argument#*=}" ;;
            --distributed | --distributed=*) refuse "$argument is what this script is for; leave it out" ;;
        esac
        [[ "$previous" != --workdir ]] || workdir="$argument"
        previous="$argument"
    done
    [[ -n "$workdir" ]] || refuse 'sami run needs --workdir=DIR'
}

# place_workdir DISK: has a relative workdir of `arguments` mean one on that disk, for there is no other place that lasts; an
# absolute one has to be there already.
place_workdir() {
    local i
    if [[ "$workdir" != /* ]]; then
        workdir="${1%/}/$workdir"
        for ((i = 0; i < ${#arguments[@]}; i++)); do
            case "${arguments[i]}" in
                --workdir=*) arguments[i]="--workdir=$workdir" ;;
                --workdir) arguments[i + 1]="$workdir" ;;
            esac
        done
    fi
    [[ "$workdir" == "${1%/}"/?* && "/$workdir/" != */../* ]] ||
        refuse "--workdir=$workdir is not on the shared disk at $1, and would be lost with the machine"
}
