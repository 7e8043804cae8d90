#!/usr/bin/env bash
# Submits a SAMI run to SLURM: launch/slurm.sbatch with the flags that it needs. Prints the command, and calls it with --run.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
program=launch/slurm.sh
# shellcheck source=launch/arguments.sh
source "$root/launch/arguments.sh"

usage() {
    cat <<'USAGE_END'
usage: launch/slurm.sh --nodes=N --gpus=M [flags] -- [arguments of sami run]

  --run              submit it; else the commands are printed, and nothing is called
  --nodes=N          how many
  --gpus=M           of each node; 0 computes on CPUs
  --per=gpu|node     a process for each GPU, or one for all of a node (default: gpu)
  --time=LIMIT       of one start, as sbatch reads it, such as 12:00:00 (default: the partition's)
  --term-ahead=S     seconds before that limit, in which the run saves and is put into the queue again (default: 300)
  --job-name=NAME    default: the last part of the workdir
  --max-restarts=N   how often the run is put into the queue again (default: 20)
  --env-file=FILE    VAR=VALUE lines for the run, such as keys; readable for you alone (chmod 600)
  --logs=DIR         slurm-JOB.log, process-0.log, process-1.log, ... (default: WORKDIR.logs)
  --python=PATH      interpreter that has sami_jax (default: the active environment's, the checkout's .venv, python3)
  --sbatch-flag=FLAG one more flag for sbatch, such as --partition=NAME or --account=NAME; again for more

Checkout, environment, workdir, model and data lie on a disk that all nodes share. Stopped, preempted or crashed, the job
puts itself into the queue again by the exit code of the run (docs/run_directory.md); cancelled by scancel, it does not.
USAGE_END
}

nodes='' gpus='' per=gpu time='' term_ahead=300 job_name='' max_restarts=20 env_file='' logs='' python='' dry=1
sbatch_flags=()
while (($#)); do
    case "$1" in
        --sbatch-flag=*) sbatch_flags+=("${1#*=}") ;;
        --run) dry=0 ;;
        --help | -h) usage && exit 0 ;;
        --) break ;;
        *) take_flag "$1" nodes gpus per time term_ahead job_name max_restarts env_file logs python ;;
    esac
    shift
done
[[ "${1-}" == -- ]] || refuse 'the arguments of sami run are missing; they come behind --'
shift
check_number --nodes "$nodes" 1 100000
check_number --gpus "$gpus" 0 1024
check_number --term-ahead "$term_ahead" 60 65535
check_number --max-restarts "$max_restarts" 0 100000
[[ "$per" == gpu || "$per" == node ]] || refuse "--per=$per is neither gpu nor node"
[[ -z "$time" || "$time" =~ ^[0-9:-]+$ ]] || refuse "--time=$time is no time limit, such as 12:00:00 or 1-00:00:00"
check_env_file "$env_file"
read_workdir "$@"
absolute() {
    [[ "$1" == /* ]] || printf '%s/' "$PWD"
    printf '%s' "$1"
}
logs="$(absolute "${logs:-${workdir%/}.logs}")"
job_name="${job_name:-$(basename "$workdir")}"
((dry)) || command -v sbatch >/dev/null || fail "$USAGE" 'there is no sbatch here; run this where jobs are submitted'

tasks=1
[[ "$per" == node ]] || ((!gpus)) || tasks="$gpus"
job=(sbatch "--job-name=$job_name" "--nodes=$nodes" "--ntasks-per-node=$tasks" "--chdir=$PWD")
((!gpus)) || job+=("--gpus-per-node=$gpus")
[[ -z "$time" ]] || job+=("--time=$time")
# To the processes, not to the script; --open-mode: what an earlier start said stays.
job+=(--requeue "--signal=TERM@$term_ahead" "--output=${logs//%/%%}/slurm-%j.log" --open-mode=append)
job+=(${sbatch_flags[@]+"${sbatch_flags[@]}"} "$root/launch/slurm.sbatch")
job+=("--root=$root" "--gpus=$gpus" "--per=$per" "--logs=$logs" "--max-restarts=$max_restarts")
[[ -z "$env_file" ]] || job+=("--env-file=$(absolute "$env_file")")
[[ -z "$python" ]] || job+=("--python=$python")
job+=(-- "$@")
if ((dry)); then
    printf '%s\n' "$(quoted mkdir -p "$logs")" "$(quoted "${job[@]}")"
    exit
fi
mkdir -p "$logs" || fail "$IO_FAILED" "cannot make $logs"
"${job[@]}"
