#!/usr/bin/env bash
# What happens on each worker of a TPU node, as root, called by launch/tpu_vm.sh over ssh and by the node itself as it boots:
#
#   tpu_worker.sh setup NAME FOLDER    takes this file, launch.sh (the settings) and bundle-ID.tar (the code) from FOLDER
#   tpu_worker.sh start|state|stop|halt|boot NAME
#   tpu_worker.sh logs NAME LINES
#
# They come to lie in ~/sami/NAME/. Each verb but `logs` ends with one line on standard output, `sami-worker NUMBER WORKERS WORD CODE`, by which tpu_vm.sh knows how it went with each: the
# status of an ssh to all workers is that of one of them.
set -euo pipefail

export HOME="${HOME:-/root}" # a startup script has none
verb="$1" name="$2" more="${3-}"
here="$HOME/sami/$name"
(umask 077 && mkdir -p "$here")
cd "$here"
# What launch.sh sets:
id='' storage='' mount='' mount_options='' python='' logs='' env_file=0 secrets=() arguments=()
settings="$here/launch.sh"
[[ "$verb" != setup ]] || settings="$more/launch.sh"
# shellcheck source=/dev/null
source "$settings"

metadata() {
    curl -sf --max-time 10 -H 'Metadata-Flavor: Google' \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1" 2>/dev/null
}

number="$(metadata agent-worker-number)" || number="${TPU_WORKER_ID:-0}"
endpoints="$(metadata worker-network-endpoints)" || endpoints="${TPU_WORKER_HOSTNAMES:-one}"
workers="$(awk -F, '{ print NF }' <<<"$endpoints")"

answer() { # WORD CODE
    printf 'sami-worker %s %s %s %s\n' "$number" "$workers" "$1" "$2"
}

give_up() { # CODE SENTENCE
    printf 'worker %s: %s\n' "$number" "$2" >&2
    [[ ! -s setup.log ]] || tail -n 20 setup.log >&2
    answer failed "$1"
    exit "$1"
}

running() { # the run, and all that it started, hold this lock; a kill of any kind drops it
    ! flock -n -s run.lock true
}

mounted() {
    [[ -n "$storage" ]] || return 0
    mkdir -p "$mount"
    mountpoint -q "$mount" && return
    case "$storage" in
        gs://*)
            command -v gcsfuse >/dev/null || install_gcsfuse || return
            local bucket="${storage#gs://}" only=()
            [[ "$bucket" != */* ]] || only=(--only-dir "${bucket#*/}")
            gcsfuse --implicit-dirs --rename-dir-limit=100000 ${mount_options:+-o "$mount_options"} \
                ${only[@]+"${only[@]}"} "${bucket%%/*}" "$mount"
            ;;
        *)
            command -v mount.nfs >/dev/null || install_packages nfs-common || return
            mount -t nfs -o "$mount_options" "$storage" "$mount"
            ;;
    esac
}

install_packages() { # a node that boots may be installing something itself
    apt-get -q -o DPkg::Lock::Timeout=600 update &&
        DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=600 install "$@"
}

install_gcsfuse() {
    local key=/usr/share/keyrings/cloud.google.asc release
    release="$(lsb_release -c -s)" &&
        curl -sSf -o "$key" https://packages.cloud.google.com/apt/doc/apt-key.gpg &&
        printf 'deb [signed-by=%s] https://packages.cloud.google.com/apt gcsfuse-%s main\n' "$key" "$release" \
            >/etc/apt/sources.list.d/gcsfuse.list &&
        install_packages gcsfuse
}

install_sami() { # by uv, since the images of TPU VMs have no Python that is new enough
    local uv="$here/uv/uv"
    if [[ ! -x "$uv" ]]; then
        curl -sSfL -o uv-install.sh https://astral.sh/uv/install.sh &&
            UV_UNMANAGED_INSTALL="$here/uv" sh uv-install.sh || return
    fi
    rm -rf venv
    "$uv" venv --python 3.12 venv &&
        "$uv" pip install --python venv/bin/python -c "code-$id/constraints.txt" -e "code-${id}[train,tpu]"
}

unpack() {
    rm -rf "code-$id" && mkdir "code-$id" && tar -xf "bundle-$id.tar" -C "code-$id"
}

leave_bundle() { # for a node in the place of this one
    local shared="$mount/.sami/$name"
    mkdir -p "$shared" && cp "bundle-$id.tar" "$shared/.bundle" && mv "$shared/.bundle" "$shared/bundle-$id.tar"
}

# Of several at once, the others wait: a node that booted may be at it.
take_over() { # FOLDER
    exec 8>setup.lock
    flock 8
    if running && [[ "$(cat running_id 2>/dev/null)" != "$id" ]]; then
        give_up 73 "another run goes on in $here; stop it first"
    fi
    (umask 077 && cp --remove-destination "$1"/* . && rm -rf "$1") || give_up 74 "cannot write into $here"
    rm -f stopped # whoever sets up wants it to run
    install
}

# Does nothing where it was done.
install() {
    if [[ ! -e "ready-$id" ]]; then
        mounted >setup.log 2>&1 </dev/null || give_up 74 "cannot mount $storage at $mount"
        unpack >>setup.log 2>&1 || give_up 74 "cannot unpack bundle-$id.tar into $here"
        if [[ -z "$python" ]]; then
            install_sami >>setup.log 2>&1 </dev/null || give_up 74 "cannot install sami_jax"
        fi
        if [[ -n "$storage" && "$number" == 0 ]]; then
            leave_bundle >>setup.log 2>&1 || give_up 74 "cannot write into $mount"
        fi
        : >"ready-$id"
    fi
    mounted >>setup.log 2>&1 </dev/null || give_up 74 "cannot mount $storage at $mount" # after a boot, once more
}

start() {
    [[ -e "ready-$id" ]] || give_up 78 'is not set up'
    local by_itself=0 # as the node booted; then its end, if it has come already, is that of this start
    [[ ! -e booted ]] || by_itself=1
    rm -f booted
    if ((!by_itself)) && ! running && [[ ! -e stopped ]]; then
        if ((env_file)) && [[ ! -e secrets.env ]]; then
            give_up 78 'has no secrets.env any more; set it up again'
        fi
        rm -f code
        printf '%s\n' "$id" >running_id
        mkdir -p "$logs" || give_up 74 "cannot make $logs"
        printf -- '--- worker %s of %s, %s\n' "$number" "$workers" "$(date -u +%FT%TZ)" >>"$logs/worker-$number.log"
        # Out of the session of ssh, whose connection may be lost.
        setsid nohup bash "$here/tpu_worker.sh" hold "$name" </dev/null >>"$logs/worker-$number.log" 2>&1 8>&- &
        for ((i = 0; i < 100; i++)); do
            ! running && [[ ! -e code ]] || return 0
            sleep 0.1
        done
        give_up 75 'did not start within 10 s'
    fi
}

# Becomes the run, and leaves its exit code in `code`.
hold() {
    exec 9>run.lock
    flock -w 5 9 || exit 0 # somebody was faster
    printf '%s\n' "$$" >holder
    local secret value code=0
    if ((env_file)); then
        set -a
        # shellcheck source=/dev/null
        source ./secrets.env
        set +a
    fi
    for secret in ${secrets[@]+"${secrets[@]}"}; do # VARIABLE=NAME of Secret Manager
        if ! value="$(gcloud secrets versions access latest --secret="${secret#*=}")"; then
            printf 'launch: the secret %s cannot be read: may the service account of this node do that?\n' "${secret#*=}"
            printf '78\n' >code
            exit
        fi
        export "${secret%%=*}=$value"
    done
    if [[ -n "$storage" ]]; then
        export HF_HOME="${HF_HOME:-$mount/.sami/huggingface}"
        export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$mount/.sami/jax_cache}"
    fi
    # shellcheck source=launch/restarts.sh
    source "code-$id/launch/restarts.sh"
    set_environment tpu,cpu
    local interpreter="${python:-$here/venv/bin/python}" into="$here/code"
    cd "code-$id"
    supervise "$interpreter" -m sami_jax run --distributed=auto "${arguments[@]}"
    printf 'launch: ended with %s\n' "$code"
    printf '%s\n' "$code" >"$into.new"
    mv "$into.new" "$into"
}

state() {
    if running; then
        answer running 0
        return
    fi
    rm -f booted
    if [[ -e stopped ]]; then
        answer stopped "$(cat code 2>/dev/null || echo 137)"
    elif [[ -e code ]]; then
        answer ended "$(cat code)"
    elif [[ -e running_id ]]; then
        answer ended 137 # without a last word
    else
        answer idle 0
    fi
}

last_words() { # of the first worker's log
    if [[ "$number" == 0 && -e "$logs/worker-0.log" ]]; then
        printf 'sami-says %s\n' "$(tail -n 1 "$logs/worker-0.log" | tr -d '\r' | cut -c 1-300)"
    fi
}

signal() { # SIGNAL [-]: to the one who holds the run and hands TERM on to it; with - to all processes of his
    if running; then
        kill -s "$1" -- "${2-}$(cat holder)" 2>/dev/null || true
    fi
}

case "$verb" in
    setup) take_over "$more" && answer ready 0 ;;
    start) start && answer running 0 ;;
    hold) hold ;;
    state) state && last_words ;;
    logs) tail -n "$more" "$logs/worker-$number.log" ;;
    stop) # saves at the next safe point, and is not started again
        : >stopped
        signal TERM
        state
        ;;
    halt) # ends, because another worker has
        signal TERM
        for ((i = 0; i < 60; i++)); do
            running || break
            sleep 1
        done
        signal KILL -
        state
        ;;
    boot)
        exec 8>setup.lock
        flock 8
        if [[ -e stopped || -e code ]]; then
            exit 0 # what follows is not this worker's to say
        fi
        mounted >setup.log 2>&1 </dev/null || give_up 74 "cannot mount $storage at $mount"
        if [[ ! -e "bundle-$id.tar" ]]; then
            [[ -n "$storage" && -e "$mount/.sami/$name/bundle-$id.tar" ]] || exit 0 # the first node: tpu_vm.sh sets it up
            cp "$mount/.sami/$name/bundle-$id.tar" "bundle-$id.tar"
        fi
        install && start && : >booted && answer running 0
        ;;
esac
