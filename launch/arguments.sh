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

# check_number FLAG VALUE LEAST MOST
check_number() {
    if [[ ! "$2" =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3 || $2 > $4)); then
        refuse "$1=$2 is no number from $3 to $4"
    fi
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
