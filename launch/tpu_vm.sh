#!/usr/bin/env bash
# A SAMI run on a Cloud TPU VM or a pod slice: the node, what is installed on its workers, the run, and all of that again
# when the node is preempted. Prints the commands, and runs them with --run. docs/launch.md tells the way from nothing.
set -euo pipefail

readonly LOOKS=12 # so many fruitless looks in a row are a lost connection, or the end of one worker that of all
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
program=launch/tpu_vm.sh
# shellcheck source=launch/arguments.sh
source "$root/launch/arguments.sh"
# shellcheck source=launch/restarts.sh
source "$root/launch/restarts.sh"

usage() {
    cat <<'USAGE_END'
usage: launch/tpu_vm.sh VERB --name=NAME --zone=ZONE --type=TYPE [flags] [-- arguments of sami run]

  up        everything until the run is finished: the node, made again when it is preempted, the set-up, the run
  create    the node; waits until it is ready, deletes and makes again one that failed
  setup     code, settings and storage on all workers, and sami_jax installed there
  run       setup, and the run on all workers, once; ends with its exit code
  status    the node, and what each worker does
  logs      the last lines of a worker's log
  stop      has the run save and end; the same `up` or `run` goes on
  delete    the node

  --run                 do it; else the commands are printed, and nothing is called
  --name=NAME           of the node, which is the run's name on the workers, too
  --zone=ZONE           such as us-west4-a
  --type=TYPE           such as v5litepod-16; for up and create
  --spot                cheaper, and preempted at any time
  --queued              wait in the queue of Cloud TPU (queued resources); give it to every verb, or to none
  --project=PROJECT     else the one that gcloud is set to
  --runtime=VERSION     image of the workers (default: by the type)
  --storage=WHERE       what all workers share, HOST:/SHARE (NFS, such as Filestore) or gs://BUCKET[/FOLDER]; without it,
                        the run is lost with the node
  --mount=DIR           where they see it, and where a relative --workdir goes (default: /mnt/sami)
  --mount-options=LIST  default: vers=3,nolock,hard for NFS
  --secret=VAR=NAME     environment variable VAR of the run, from NAME of Secret Manager; again for more
  --env-file=FILE       VAR=VALUE lines for the run, copied to the workers; readable for you alone (chmod 600)
  --logs=DIR            worker-0.log, worker-1.log, ... on the workers (default: WORKDIR.logs)
  --python=PATH         an interpreter of the workers that has sami_jax already; nothing is installed
  --max-restarts=N      of the run, for up (default: 20)
  --wait=SECONDS        for a node to become ready (default: 86400)
  --poll=SECONDS        between two looks (default: 10); 0 waits nowhere
  --worker=N            for logs (default: 0)
  --lines=N             for logs (default: 100)
  --delete-after        delete the node when the run has ended; for up
  --create-flag=FLAG    one more flag for gcloud's create, such as --network=NAME; again for more
  --ssh-flag=FLAG       one more flag for gcloud's ssh and scp, such as --internal-ip; again for more

A run that ends is started again by its exit code: 75, a crash, a lost node or connection up to --max-restarts times; 70
once, 74 three times, 69 six times, ten minutes apart; 0, 64, 65, 73, 78, 130 end it (docs/run_directory.md).
USAGE_END
}

verb='' name='' zone='' type='' project='' runtime='' storage='' mount=/mnt/sami mount_options='' python='' logs=''
spot=0 queued=0 dry=1 delete_after=0 env_file='' max_restarts=20 wait=86400 poll=10 worker=0 lines=100
secrets=() create_flags=() ssh_flags=() arguments=()

read_flags() {
    case "${1-}" in
        up | create | setup | run | status | logs | stop | delete) verb="$1" ;;
        --help | -h) usage && exit 0 ;;
        '') refuse 'a verb is missing' ;;
        *) refuse "unknown verb $1" ;;
    esac
    shift
    while (($#)); do
        case "$1" in
            --secret=*) secrets+=("${1#*=}") ;;
            --create-flag=*) create_flags+=("${1#*=}") ;;
            --ssh-flag=*) ssh_flags+=("${1#*=}") ;;
            --spot) spot=1 ;;
            --queued) queued=1 ;;
            --run) dry=0 ;;
            --delete-after) delete_after=1 ;;
            --help | -h) usage && exit 0 ;;
            --)
                shift
                arguments=("$@")
                break
                ;;
            *)
                take_flag "$1" name zone type project runtime storage mount mount_options python \
                    logs env_file max_restarts wait poll worker lines
                ;;
        esac
        shift
    done
}

check_flags() {
    local secret
    [[ "$name" =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
        refuse "--name=$name is no name of a node: up to 63 of a-z, 0-9 and -, a letter first, no - at the end"
    [[ "$zone" =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || refuse "--zone=$zone is no zone, such as us-west4-a"
    [[ -z "$project" || "$project" =~ ^[a-z0-9.:-]+$ ]] || refuse "--project=$project is no project"
    if [[ -n "$type" || "$verb" == up || "$verb" == create ]]; then
        [[ "$type" =~ ^[a-z0-9]+-[1-9][0-9]*$ ]] || refuse "--type=$type is no type of TPU, such as v5litepod-16"
        runtime="${runtime:-$(runtime_of "$type")}"
        [[ -n "$runtime" ]] || refuse "which image has a $type? give --runtime=VERSION"
    fi
    case "$storage" in
        '') ;;
        gs://[a-z0-9]*) mount_options="${mount_options:-allow_other}" ;;
        ?*:/?*) mount_options="${mount_options:-vers=3,nolock,hard}" ;;
        *) refuse "--storage=$storage is neither HOST:/SHARE nor gs://BUCKET" ;;
    esac
    [[ "$mount" == /?* ]] || refuse "--mount=$mount is no absolute path"
    for secret in ${secrets[@]+"${secrets[@]}"}; do
        [[ "$secret" =~ ^[A-Za-z_][A-Za-z0-9_]*=[A-Za-z0-9_-]+$ ]] ||
            refuse "--secret=${secret%%=*}=... is no VARIABLE=NAME, NAME that of a secret in Secret Manager"
    done
    check_number --max-restarts "$max_restarts" 0 100000
    check_number --wait "$wait" 0 100000000
    check_number --poll "$poll" 0 3600
    check_number --worker "$worker" 0 99999
    check_number --lines "$lines" 1 1000000
    check_env_file "$env_file"
    if ((${#arguments[@]})); then
        read_workdir "${arguments[@]}"
        if [[ -n "$storage" || "$workdir" != /* ]]; then
            place_workdir "$mount"
        fi
        logs="${logs:-${workdir%/}.logs}"
        if [[ -z "$storage" ]]; then
            local alone='without --storage a run is lost with its node, and several hosts cannot share one'
            if ((dry)); then comment "$alone"; else say "$alone"; fi
        fi
    else
        case "$verb" in
            up | setup | run) refuse "the arguments of sami run are missing; they come behind --" ;;
        esac
    fi
    ((dry)) || command -v gcloud >/dev/null || fail "$USAGE" 'there is no gcloud here; install the Google Cloud CLI'
}

runtime_of() {
    case "$1" in
        v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
    esac
}

# What the workers need: files in a folder of this machine, named after all that is in them, so that a node that is made
# again knows whether what lies on the storage is what it shall go on with.
make_bundle() {
    local tree settings
    git -C "$root" rev-parse --git-dir >/dev/null 2>&1 ||
        fail "$BAD_CONFIG" "$root is no git checkout, of which the workers could get the code"
    # The files as they are now, committed or not, without those that git ignores; nothing of it stays in the checkout.
    mkdir "$scratch/objects"
    GIT_ALTERNATE_OBJECT_DIRECTORIES="$(cd "$root" && cd "$(git rev-parse --git-path objects)" && pwd)"
    export GIT_ALTERNATE_OBJECT_DIRECTORIES GIT_OBJECT_DIRECTORY="$scratch/objects" GIT_INDEX_FILE="$scratch/index"
    tree="$(git -C "$root" add -A && git -C "$root" write-tree)" || fail "$IO_FAILED" "git cannot read $root"
    settings="$(
        printf '%s\n' "name=$name" "storage=$(quoted "$storage")" "mount=$(quoted "${mount%/}")" \
            "mount_options=$(quoted "$mount_options")" "python=$(quoted "$python")" "logs=$(quoted "$logs")" \
            "env_file=$((${#env_file} > 0))"
        printf 'secrets=(%s)\n' "$(quoted ${secrets[@]+"${secrets[@]}"})"
        printf 'arguments=(%s)\n' "$(quoted ${arguments[@]+"${arguments[@]}"})"
    )"
    id="$(printf '%s\n%s\n' "$tree" "$settings" | git hash-object --stdin | cut -c 1-16)"
    bundle="${XDG_CACHE_HOME:-$HOME/.cache}/sami_jax/$name-$id"
    if ((dry)); then
        unset GIT_ALTERNATE_OBJECT_DIRECTORIES GIT_OBJECT_DIRECTORY GIT_INDEX_FILE
        comment "writes $bundle/: bundle-$id.tar, the checkout; tpu_worker.sh; startup.sh, for a node that boots;"
        comment 'launch.sh, with'
        while IFS= read -r line; do comment "  $line"; done <<<"$settings"
        return
    fi
    (umask 077 && mkdir -p "$bundle/files") || fail "$IO_FAILED" "cannot make $bundle"
    git -C "$root" archive --output="$bundle/files/bundle-$id.tar" "$tree" || fail "$IO_FAILED" "cannot write $bundle"
    unset GIT_ALTERNATE_OBJECT_DIRECTORIES GIT_OBJECT_DIRECTORY GIT_INDEX_FILE
    [[ -z "$(find "$bundle/files" -name '*.tar' -size +200000k)" ]] ||
        say "the checkout is more than 200 MB, all of which goes to the workers; what git ignores does not"
    printf 'id=%s\n%s\n' "$id" "$settings" >"$bundle/files/launch.sh"
    cp "$root/launch/tpu_worker.sh" "$bundle/files/tpu_worker.sh"
    # Settings that were put on the node since it was made stay.
    cat >"$bundle/startup.sh" <<STARTUP_END
#!/usr/bin/env bash
set -eu
export HOME="\${HOME:-/root}"
umask 077
mkdir -p "\$HOME/sami/$name"
cd "\$HOME/sami/$name"
umask 022
if [ ! -e launch.sh ]; then
    cat >tpu_worker.sh <<'WORKER_$id'
$(cat "$bundle/files/tpu_worker.sh")
WORKER_$id
    cat >launch.sh <<'LAUNCH_$id'
$(cat "$bundle/files/launch.sh")
LAUNCH_$id
fi
exec bash tpu_worker.sh boot $name
STARTUP_END
}

# call GROUP VERB ARGUMENT...: gcloud compute tpus GROUP VERB ..., with its words in $scratch/out and $scratch/err; sets `status`.
call() {
    local command=(gcloud compute tpus "$@" "--zone=$zone" ${project:+"--project=$project"} --quiet)
    status=0
    if ((dry)); then
        printf '%s\n' "$(quoted "${command[@]}")"
        return
    fi
    "${command[@]}" >"$scratch/out" 2>"$scratch/err" </dev/null || status=$?
    return "$status"
}

words_of_gcloud() {
    sed -n '/^ERROR/,$p' "$scratch/err" | grep -v '^ *$' | head -n 5 | grep . || tail -n 5 "$scratch/err"
}

# What says that the next try will not do better.
FOR_GOOD='PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|SERVICE_DISABLED|unrecognized arguments|[Ii]nvalid value'
readonly FOR_GOOD="$FOR_GOOD|have an active account|required property|properly specified|Failed to find attribute"

describe() { # GROUP FORMAT: sets `word` to the state
    if call "$1" describe "$name" "--format=$2"; then
        word="$(head -n 1 "$scratch/out")"
    elif grep -q -i -E 'NOT_FOUND|not found' "$scratch/err"; then
        word=ABSENT
    elif grep -q -E "$FOR_GOOD" "$scratch/err"; then
        fail "$BAD_CONFIG" "gcloud cannot describe $name: $(words_of_gcloud)"
    else
        word=UNREACHABLE
    fi
}

imagined=absent # what a dry run finds: for up and create no node, else one that is ready
last_word=''

# look: sets `state` to absent, coming, ready, halted, broken, going or unknown.
look() {
    local word
    if ((dry)); then
        if ((queued)); then
            call queued-resources describe "$name" '--format=value(state.state)'
        fi
        ((queued)) && [[ "$imagined" == absent ]] || call tpu-vm describe "$name" '--format=value(state)'
        state="$imagined"
        return
    fi
    if ((queued)); then
        describe queued-resources 'value(state.state)'
        if [[ "$word" == ACTIVE ]]; then
            describe tpu-vm 'value(state)'
            [[ "$word" != ABSENT ]] || word=SUSPENDED # deleted under the request
        fi
    else
        describe tpu-vm 'value(state)'
    fi
    case "$word" in
        ABSENT) state=absent ;;
        READY) state=ready ;;
        STOPPED) state=halted ;;
        FAILED | SUSPENDED | PREEMPTED | TERMINATED) state=broken ;;
        DELETING | SUSPENDING | STOPPING) state=going ;;
        UNREACHABLE) state=unknown ;;
        *) state=coming ;;
    esac
    if [[ "$word" != "$last_word" ]]; then
        say "node $name is $word$([[ "$word" != UNREACHABLE ]] || echo ": $(words_of_gcloud)")"
        last_word="$word"
    fi
}

create() {
    local flags=("--accelerator-type=$type")
    ((!spot)) || flags+=(--spot)
    ((!${#arguments[@]})) || flags+=("--metadata-from-file=startup-script=$bundle/startup.sh")
    if [[ "$storage" == gs://* ]] || ((${#secrets[@]})); then
        flags+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
    fi
    flags+=(${create_flags[@]+"${create_flags[@]}"})
    if ((queued)); then
        call queued-resources create "$name" "--node-id=$name" "--runtime-version=$runtime" "${flags[@]}" && return
    else
        call tpu-vm create "$name" "--version=$runtime" "${flags[@]}" && return
    fi
    if grep -q -E "$FOR_GOOD|NOT_FOUND|not found" "$scratch/err"; then
        fail "$BAD_CONFIG" "gcloud cannot create $name: $(words_of_gcloud)"
    fi
    say "not created yet: $(words_of_gcloud)"
    sleep "$((poll * 5))" # the zone may be full for hours
}

# remove: fails where the node is not deleted yet.
remove() {
    if ((queued)); then
        call queued-resources delete "$name" --force && return
    else
        call tpu-vm delete "$name" && return
    fi
    if grep -q -E "$FOR_GOOD" "$scratch/err"; then
        fail "$BAD_CONFIG" "gcloud cannot delete $name: $(words_of_gcloud)"
    fi
    say "not deleted yet: $(words_of_gcloud)"
    return 1
}

# bring_up: returns when the node is ready; ends with 75 when it is not after --wait seconds.
bring_up() {
    local deadline=$((SECONDS + wait)) created=0
    while :; do
        look
        case "$state" in
            ready) return ;;
            absent)
                create
                created=1 imagined=ready
                ;;
            halted) call tpu-vm start "$name" || say "not started yet: $(words_of_gcloud)" ;;
            broken)
                ((!created)) || settle "$AGAIN"
                created=0
                remove || true
                ;;
        esac
        ((dry)) && continue
        ((SECONDS < deadline)) || fail "$AGAIN" "node $name is still not ready after $wait s; run the same command again"
        sleep "$poll"
    done
}

# as_root SCRIPT [ARGUMENT]: the command line for a worker, whose user may be another. ARGUMENT is read by that user's shell.
as_root() {
    # shellcheck disable=SC2016 # for the shell there
    printf 's=; [ "$(id -u)" = 0 ] || s="sudo -H"; $s bash -c %s tpu_worker %s' "$(quoted "$1")" "${2-}"
}

# expect_ready: ends where there is no node that could be set up.
expect_ready() {
    look
    case "$state" in
        ready) ;;
        absent) fail "$BAD_CONFIG" "there is no node $name in $zone; create makes it" ;;
        *) fail "$AGAIN" "node $name is $last_word; create waits for it, or makes it anew" ;;
    esac
}

# on_worker VERB [ARGUMENT]
on_worker() {
    as_root "exec bash \"\$HOME/sami/$name/tpu_worker.sh\" $1 $name ${2-}"
}

# ask COMMAND: runs it on all workers; sets `workers`, and how many of them are `running`, `ended` and `stopped`, with the
# `codes` of those that do not run. Fails where not all of them answered.
ask() {
    local line seen=' '
    workers=0 heard=0 running=0 ended=0 stopped=0 codes=() says=''
    call tpu-vm ssh "$name" --worker=all "--command=$1" ${ssh_flags[@]+"${ssh_flags[@]}"} || true
    ((!dry)) || return 0
    while IFS= read -r line; do
        [[ "$line" != 'sami-says '* ]] || says="${line#* }"
        [[ "$line" =~ ^sami-worker\ ([0-9]+)\ ([0-9]+)\ ([a-z]+)\ ([0-9]+) ]] || continue
        [[ "$seen" != *" ${BASH_REMATCH[1]} "* ]] || continue
        seen="$seen${BASH_REMATCH[1]} "
        workers="${BASH_REMATCH[2]}"
        heard=$((heard + 1))
        case "${BASH_REMATCH[3]}" in
            running) running=$((running + 1)) ;;
            ready) ;;
            stopped) stopped=$((stopped + 1)) codes+=("${BASH_REMATCH[4]}") ;;
            idle) codes+=("$AGAIN") ;; # a worker that was made again, without the others
            *) ended=$((ended + 1)) codes+=("${BASH_REMATCH[4]}") ;;
        esac
    done <"$scratch/out"
    ((heard && heard == workers))
}

# set_up: returns 0, or sets `code` to why not.
set_up() {
    local there="sami-$name" files=("$bundle/files/bundle-$id.tar" "$bundle/files/launch.sh" "$bundle/files/tpu_worker.sh")
    ((dry)) || say "setting up the workers of $name"
    heard=0 ended=0
    if call tpu-vm ssh "$name" --worker=all "--command=umask 077; mkdir -p $there" ${ssh_flags[@]+"${ssh_flags[@]}"} &&
        call tpu-vm scp "${files[@]}" "$name:$there/" --worker=all ${ssh_flags[@]+"${ssh_flags[@]}"} &&
        { [[ -z "$env_file" ]] ||
            call tpu-vm scp "$env_file" "$name:$there/secrets.env" --worker=all ${ssh_flags[@]+"${ssh_flags[@]}"}; } &&
        ask "$(as_root "exec bash \"\$1/tpu_worker.sh\" setup $name \"\$1\"" "\"\$HOME/$there\"")"; then
        ((ended)) || return 0
    fi
    why_not
    return 1
}

# why_not: after an `ask` that did not do, sets `code`, and shows what was said.
why_not() {
    if ! ((heard)) && grep -q -E "$FOR_GOOD" "$scratch/err"; then
        fail "$BAD_CONFIG" "gcloud does not reach the workers of $name: $(words_of_gcloud)"
    fi
    words_of_worker
    if ((ended)); then
        code="$(worst "${codes[@]}")"
    else # what no worker has said is what ssh says; gcloud itself ends with 1 where there is no connection
        code="$((heard || status < 2 ? 255 : status))"
    fi
}

words_of_worker() {
    grep -v -E '^ *$|Attempting to connect' "$scratch/err" | tail -n 30 >&2 || true
}

# start: returns 0 when the run runs on all workers, or sets `code` to why not.
start() {
    if ask "$(on_worker start)"; then
        ((ended)) || return 0
    fi
    why_not
    return 1
}

# watch_run: returns when the run has ended; sets `code`, and `asked` where it was somebody's `stop`.
watch_run() {
    local fruitless=0 apart=0 said=''
    asked=0 code=0
    while :; do
        if ask "$(on_worker state)"; then
            ((!dry)) || return 0
            fruitless=0
            if [[ "$says" != "$said" ]]; then
                printf '[worker 0] %s\n' "$says"
                said="$says"
            fi
            if ((!running)); then
                asked=$((stopped > 0))
                code="$(worst "${codes[@]}")"
                say "the run has ended on all $workers workers: $code"
                return
            fi
            apart=$((running < workers ? apart + 1 : 0))
            if ((apart > LOOKS)); then
                say "$running of $workers workers still run after another has ended; they are ended, too"
                ask "$(on_worker halt)" || true
            fi
        else
            look
            fruitless=$((fruitless + 1))
            case "$state" in
                absent | broken | going | halted) code="$AGAIN" && return ;;
            esac
            if ((fruitless > LOOKS)); then
                say "not all workers answer: $heard of ${workers:-?}"
                words_of_worker
                code=255
                return
            fi
        fi
        sleep "$poll"
    done
}

# settle CODE: returns when the run shall start again; else ends with CODE.
settle() {
    after_exit "$1" "$scratch/codes" "$max_restarts"
    say "$1: $why"
    [[ -n "$pause" ]] || leave "$1"
    sleep "$((poll ? pause : 0))"
}

leave() {
    local how=(delete "--name=$name" "--zone=$zone" ${project:+"--project=$project"})
    ((!queued)) || how+=(--queued)
    if ((delete_after)) && remove; then
        :
    elif ((!dry)); then
        say "node $name may still be there, and be paid for: $program ${how[*]} --run"
    fi
    exit "$(($1 == 255 ? AGAIN : $1))"
}

up() {
    while :; do
        bring_up
        set_up && start && watch_run
        ((!dry)) || leave 0
        if ((asked)); then
            say "stopped; the same command goes on"
            leave "$code"
        fi
        settle "$code"
    done
}

status() {
    look
    ((dry)) || printf 'node %s: %s\n' "$name" "$last_word"
    [[ "$state" == ready ]] || ((dry)) || exit 0
    ask "$(on_worker state)" || say 'not all workers answer; were they set up?'
    ((!dry)) || return 0
    grep '^sami-worker ' "$scratch/out" | sort -n -k 2 | while read -r _ number _ word code; do
        printf 'worker %s: %s%s\n' "$number" "$word" "$([[ "$word" == running || "$word" == idle ]] || echo " $code")"
    done
    [[ -z "$says" ]] || printf 'worker 0 says: %s\n' "$says"
}

read_flags "$@"
check_flags
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
: >"$scratch/codes"
id='' bundle='' asked=0 code=0 heard=0 workers=0 ended=0 status=0
((!${#arguments[@]})) || make_bundle
trap 'say "what runs on the node goes on; the same command follows it, and stop ends it"; exit 130' INT TERM
[[ "$verb" == up || "$verb" == create ]] || imagined=ready
case "$verb" in
    up) up ;;
    create) bring_up ;;
    setup) expect_ready && set_up || exit "$((code == 255 ? AGAIN : code))" ;;
    run)
        expect_ready
        set_up && start && watch_run
        exit "$((code == 255 ? AGAIN : code))"
        ;;
    status) status ;;
    logs)
        call tpu-vm ssh "$name" "--worker=$worker" "--command=$(on_worker logs "$lines")" ${ssh_flags[@]+"${ssh_flags[@]}"} ||
            fail "$AGAIN" "worker $worker does not answer: $(words_of_gcloud)"
        ((dry)) || cat "$scratch/out"
        ;;
    stop)
        ask "$(on_worker stop)" || fail "$AGAIN" 'not all workers answer; try again'
        ((dry)) || say "$running of $workers workers save and end, $stopped have ended"
        ;;
    delete)
        look
        if ((dry)) || [[ "$state" != absent ]]; then
            remove || exit "$AGAIN"
        fi
        ;;
esac
