# shellcheck shell=bash
# Starts a training as a Slurm job; sourced by the sbatch files of this folder, which set
#   preset                    what is trained unless the command line says otherwise
#   ds_config                 DeepSpeed's settings; without it the planner chooses them with the rest of the layout
#
# Everything after the file's name goes to `python -m mlra_scale.train`: flags (--preset, --config, --ds-config,
# --run-dir, --resume) and dotted overrides. Two more, on a login node and for the nodes that the file asks for:
#   --dry-run                 the plan: layout, batch, parameters, memory per rank, time of a step; for other GPUs than
#                             H100 with cluster.device=a100 or h200
#   --check                   the plan, and everything that would make the job refuse to start; exit code 2 if there is
# Choices by environment (docs/slurm.md), beside those of environment.sh:
#   MLRA_PYTHON="..."         interpreter on the nodes, a container's command in front of it:
#                               MLRA_PYTHON="apptainer exec --nv --bind /scratch image.sif python3"
#   MLRA_SRUN_ARGUMENTS="..." further arguments of srun; for enroot with pyxis:
#                               MLRA_SRUN_ARGUMENTS="--container-image=/images/mlra.sqsh --container-mounts=/scratch"
#                               MLRA_PYTHON=python3
#   PROCESSES_PER_NODE=N      ranks on each node (default: its GPUs, or 1)
#   MLRA_NODES=N              nodes that --dry-run and --check assume (default: those of the file)
set -euo pipefail
# shellcheck source=slurm/environment.sh
source "${MLRA_SCALE_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}/slurm/environment.sh"
sbatch_value() { sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$script" | head -n 1; }

wanted='' given=()
for argument in "$@"; do
    if [[ $argument == --check || $argument == --dry-run ]]; then
        wanted=$argument
    else
        given+=("$argument")
    fi
done
arguments=(--preset "$preset" ${ds_config:+--ds-config "$ds_config"} --resume auto)
# With ?= they hold where neither the command line nor a --config file names the field.
arguments+=('parallel.layout?=auto' 'guard.enabled?=true' ${given[@]+"${given[@]}"})

if [[ -n $wanted ]]; then
    # For the job that the file asks for, also from a shell that is inside another one (salloc).
    nodes=${MLRA_NODES:-$(sbatch_value nodes)} gpus=$(sbatch_value gpus-per-node)
    per_node=${PROCESSES_PER_NODE:-$gpus}
    if ! [[ $nodes =~ ^[1-9][0-9]{0,5}$ && $per_node =~ ^[1-9][0-9]{0,5}$ ]]; then
        echo "$0: MLRA_NODES = '$nodes' and PROCESSES_PER_NODE = '$per_node' must be whole numbers from 1 on" >&2
        exit 2
    fi
    if [[ $wanted == --check ]]; then
        # The run directory of a job that has no number yet is a new one.
        arguments=(--run-dir "runs/$(sbatch_value job-name)-check" "${arguments[@]}")
        exec python -m mlra_scale.cluster.check --nodes "$nodes" --gpus-per-node "$gpus" -- "${arguments[@]}"
    fi
    export LOCAL_WORLD_SIZE=$per_node
    ranks=$((nodes * LOCAL_WORLD_SIZE))
    exec python -m mlra_scale.train train.device=cuda "${arguments[@]}" --dry-run "parallel.world_size=$ranks"
fi

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "$0: this is no Slurm job. Submit it: sbatch $0 data.path=... ; before that, check it: bash $0 --check" \
        "data.path=..." >&2
    exit 2
fi

run_dir=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID
# NCCL fails rather than hangs, and then writes what it was doing to the logs of the attempt.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}

# The batch script becomes the job's process: Slurm's signals reach it and nothing else. Until it listens they must not
# end it.
trap '' USR1
exec python -u -m mlra_scale.cluster.job --run-dir "$run_dir" "${arguments[@]}"
