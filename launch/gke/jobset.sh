#!/usr/bin/env bash
# A SAMI run on the TPUs of a GKE cluster: a JobSet with a pod on every host of the slice. Prints the manifest and the commands,
# and calls them with --run. docs/launch.md tells the way from nothing.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
program=launch/gke/jobset.sh
# shellcheck source=launch/arguments.sh
source "$root/launch/arguments.sh"

usage() {
    cat <<'USAGE_END'
usage: launch/gke/jobset.sh VERB --name=NAME [flags] [-- arguments of sami run]

  apply      submit the run; a finished or failed JobSet of this name has to be deleted before
  manifest   print what `apply` would submit, and nothing else
  status     the JobSet and its pods
  logs       of one pod, as it runs
  delete     the JobSet; its pods get --grace seconds to save

  --run                 do it; else the commands are printed, and nothing is called
  --name=NAME           of the JobSet
  --image=IMAGE         with sami_jax, made from launch/gke/Dockerfile; for apply and manifest, as all that follows
  --accelerator=NAME    such as tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
  --topology=AxB[xC]    such as 4x4
  --chips=N             of each host (default: 4)
  --claim=NAME          PersistentVolumeClaim (ReadWriteMany) of the disk that all pods share
  --mount=DIR           where they see it, and where a relative --workdir goes (default: /mnt/sami)
  --secret=VAR=NAME/KEY environment variable VAR of the run, from KEY of the cluster's Secret NAME; again for more
  --memory=SIZE         of each pod, such as 100Gi (default: no request)
  --spot                on spot nodes
  --service-account=SA  of the cluster, for the pods
  --namespace=NAME      default: the one that kubectl is set to
  --logs=DIR            process-0.log, process-1.log, ... (default: WORKDIR.logs)
  --max-restarts=N      of the whole JobSet (default: 20)
  --grace=SECONDS       between SIGTERM and SIGKILL; a save has to fit (default: 300)
  --pod=N               for logs (default: 0)

A run that ends is started again by its exit code: 75, a crash, a lost pod up to --max-restarts times; 70 once, 74 three
times, 69 six times; 0, 64, 65, 73, 78, 130 end it (docs/run_directory.md).
USAGE_END
}

verb='' name='' image='' accelerator='' topology='' chips=4 claim='' mount=/mnt/sami memory='' spot=0 service_account=''
namespace='' logs='' max_restarts=20 grace=300 pod=0 dry=1
secrets=() arguments=()
case "${1-}" in
    apply | manifest | status | logs | delete) verb="$1" ;;
    --help | -h) usage && exit 0 ;;
    '') refuse 'a verb is missing' ;;
    *) refuse "unknown verb $1" ;;
esac
shift
while (($#)); do
    case "$1" in
        --secret=*) secrets+=("${1#*=}") ;;
        --spot) spot=1 ;;
        --run) dry=0 ;;
        --help | -h) usage && exit 0 ;;
        --) break ;;
        *)
            take_flag "$1" name image accelerator topology chips claim mount memory \
                service_account namespace logs max_restarts grace pod
            ;;
    esac
    shift
done

readonly LABEL='^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$'
# The names of its pods are longer, and must be names of hosts, too.
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    refuse "--name=$name is no name of a JobSet: up to 40 of a-z, 0-9 and -, a letter first, no - at the end"
[[ -z "$namespace" || "$namespace" =~ $LABEL ]] || refuse "--namespace=$namespace is no name"
check_number --pod "$pod" 0 100000

check_run() {
    local secret
    [[ "${1-}" == -- ]] || refuse 'the arguments of sami run are missing; they come behind --'
    shift
    [[ -n "$image" && "$image" != *[[:space:]]* ]] || refuse "--image=$image is no image"
    [[ "$accelerator" =~ $LABEL ]] || refuse "--accelerator=$accelerator is no accelerator, such as tpu-v5-lite-podslice"
    [[ "$topology" =~ ^[1-9][0-9]{0,3}x[1-9][0-9]{0,3}(x[1-9][0-9]{0,3})?$ ]] ||
        refuse "--topology=$topology is no topology, such as 4x4"
    check_number --chips "$chips" 1 8
    local all=$((${topology//x/*}))
    ((chips <= all && all % chips == 0)) || refuse "--topology=$topology has $all chips, which hosts of --chips=$chips do not make up"
    hosts=$((all / chips))
    [[ "$claim" =~ ^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$ ]] || refuse "--claim=$claim is no name of a PersistentVolumeClaim"
    [[ "$mount" == /?* ]] || refuse "--mount=$mount is no absolute path"
    for secret in ${secrets[@]+"${secrets[@]}"}; do
        [[ "$secret" =~ ^[A-Za-z_][A-Za-z0-9_]*=[a-z0-9.-]+/[A-Za-z0-9._-]+$ ]] ||
            refuse "--secret=${secret%%=*}=... is no VARIABLE=NAME/KEY, KEY of a Secret NAME of the cluster"
    done
    [[ -z "$memory" || "$memory" =~ ^[1-9][0-9]*[KMGT]i?$ ]] || refuse "--memory=$memory is no size, such as 100Gi"
    [[ -z "$service_account" || "$service_account" =~ $LABEL ]] || refuse "--service-account=$service_account is no name"
    check_number --max-restarts "$max_restarts" 0 100000
    check_number --grace "$grace" 30 86400
    read_workdir "$@"
    arguments=("$@")
    place_workdir "$mount"
    logs="${logs:-${workdir%/}.logs}"
}

# json TEXT: as a JSON string, which is one of YAML, too.
json() {
    local text="$1" out='' code i
    text="${text//\\/\\\\}"
    text="${text//\"/\\\"}"
    text="${text//$'\xe2\x80\xa8'/\\u2028}" # what YAML takes for the end of a line
    text="${text//$'\xe2\x80\xa9'/\\u2029}"
    for ((i = 0; i < ${#text}; i++)); do
        case "${text:i:1}" in
            [[:cntrl:]])
                printf -v code '\\u%04x' "'${text:i:1}"
                out+="$code"
                ;;
            *) out+="${text:i:1}" ;;
        esac
    done
    printf '"%s"' "$out"
}

# literal TEXT: as a JSON string in which Kubernetes finds no $(VARIABLE) to fill in.
literal() {
    json "${1//\$/\$\$}"
}

manifest() {
    fill_in | sed '/^$/d' # the lines of what was not given
}

fill_in() {
    local secret argument
    cat <<MANIFEST_END
apiVersion: "jobset.x-k8s.io/v1alpha2"
kind: "JobSet"
metadata:
  name: $(json "$name")
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: "cloud.google.com/gke-nodepool"
spec:
  failurePolicy:
    maxRestarts: $max_restarts
    rules:
      - name: "ends"
        action: "FailJobSet"
        onJobFailureReasons: ["PodFailurePolicy"]
  replicatedJobs:
    - name: "sami"
      replicas: 1
      template:
        spec:
          completions: $hosts
          parallelism: $hosts
          completionMode: "Indexed"
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: "FailJob"
                onExitCodes:
                  containerName: "sami"
                  operator: "In"
                  values: [64, 65, 69, 70, 73, 74, 78, 126, 127, 130]
          template:
            spec:
              restartPolicy: "Never"
              terminationGracePeriodSeconds: $grace
$([[ -z "$service_account" ]] || printf '              serviceAccountName: %s\n' "$(json "$service_account")")
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(json "$accelerator")
                cloud.google.com/gke-tpu-topology: $(json "$topology")
$([[ "$spot" == 0 ]] || printf '                cloud.google.com/gke-spot: "true"\n')
              containers:
                - name: "sami"
                  image: $(json "$image")
                  command: ["bash", "/opt/sami/launch/gke/pod.sh"]
                  args:
$(for argument in "$logs" "$max_restarts" "${arguments[@]}"; do printf '                    - %s\n' "$(literal "$argument")"; done)
                  env:
                    - name: "HF_HOME"
                      value: $(literal "${mount%/}/.sami/huggingface")
                    - name: "JAX_COMPILATION_CACHE_DIR"
                      value: $(literal "${mount%/}/.sami/jax_cache")
                    - name: "SAMI_START"
                      valueFrom:
                        fieldRef:
                          fieldPath: "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"
$(for secret in ${secrets[@]+"${secrets[@]}"}; do
        printf '                    - name: %s\n' "$(json "${secret%%=*}")"
        secret="${secret#*=}"
        printf '                      valueFrom: {secretKeyRef: {name: %s, key: %s}}\n' "$(json "${secret%%/*}")" "$(json "${secret#*/}")"
    done)
                  ports:
                    - containerPort: 8471
                    - containerPort: 8482
                  resources:
                    limits:
                      google.com/tpu: $chips
$([[ -z "$memory" ]] || printf '                      memory: %s\n' "$(json "$memory")")
                  volumeMounts:
                    - name: "shared"
                      mountPath: $(json "$mount")
              volumes:
                - name: "shared"
                  persistentVolumeClaim: {claimName: $(json "$claim")}
MANIFEST_END
}

# call ARGUMENT...: kubectl.
call() {
    local command=(kubectl ${namespace:+"--namespace=$namespace"} "$@")
    if ((dry)); then
        printf '%s\n' "$(quoted "${command[@]}")"
        return
    fi
    "${command[@]}"
}

case "$verb" in
    apply | manifest) check_run "$@" ;;
esac
((dry)) || [[ "$verb" == manifest ]] || command -v kubectl >/dev/null || fail "$USAGE" 'there is no kubectl here; install it'
case "$verb" in
    manifest) manifest ;;
    apply)
        if ((dry)); then
            printf '%s <<%s\n' "$(quoted kubectl ${namespace:+"--namespace=$namespace"} create -f -)" "'MANIFEST'"
            manifest
            echo MANIFEST
        else
            # A second JobSet of the name is refused there, so that no run is disturbed.
            manifest | call create -f - || fail "$BAD_CONFIG" "the cluster does not take the JobSet $name"
        fi
        ;;
    status)
        call get jobset "$name"
        call get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" -o wide
        ;;
    logs) call logs --follow "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=$pod" --tail=100 ;;
    delete) call delete jobset "$name" ;;
esac
