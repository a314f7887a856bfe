#!/usr/bin/env bash
# Runs a study (docs/studies/README.md), one cell per task of a Slurm array: the task's number is that of the cell.
#
#   mlra-scale sweep docs/studies/depth.yaml --dry-run                    the cells with their numbers
#   sbatch --array=0-143 slurm/sweep.sh docs/studies/depth.yaml
#   sbatch --array=0-143%8 slurm/sweep.sh docs/studies/depth.yaml --output /shared/runs/depth data.path=/shared/data/mine
#
# Everything after the study goes to `mlra-scale sweep`. A task whose time ran out has saved: submit the same line again,
# and tasks whose cells are done end at once. Options of sbatch on the command line come before those below.
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1           # as many as the study has `ranks`
#SBATCH --cpus-per-task=8
#SBATCH --time=8:00:00
#SBATCH --signal=B:USR1@300         # seconds before that in which the last step ends and is saved
#SBATCH --requeue                   # after a preemption or a lost node
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A-%a.out
# Take out one # where your cluster wants these. Memory: where none is asked for, the partition's default is given;
# --mem-per-cpu on the command line goes before.
##SBATCH --mem=32G
##SBATCH --account=...
##SBATCH --partition=...
set -euo pipefail
# shellcheck source=slurm/environment.sh
source "${MLRA_SCALE_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}/slurm/environment.sh"

if [[ -z ${SLURM_ARRAY_TASK_ID:-} || $# -eq 0 ]]; then
    echo "$0: this is no task of a Slurm array. See the cells (mlra-scale sweep STUDY.yaml --dry-run) and submit" \
        "them: sbatch --array=0-N $0 STUDY.yaml" >&2
    exit 2
fi

# Slurm's signals reach the batch script's process, which becomes the sweep's. Until it listens they must not end it.
trap '' USR1
exec python -u -m mlra_scale.cli.main sweep "$1" --cell "$SLURM_ARRAY_TASK_ID" "${@:2}"
