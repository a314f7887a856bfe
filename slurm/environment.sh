# shellcheck shell=bash
# Goes to the project's root and sets up what every job of this folder needs; sourced by the others. By environment:
#   VENV=DIR                  virtual environment (default: .venv in the project's root, if there is one)
#   CONDA_ENV=NAME            conda environment instead
set -euo pipefail
unset CDPATH  # with it, cd prints where it goes
# shellcheck disable=SC2034  # read by launch.sh, after the change of folder below
script=$(cd "$(dirname "$0")" && pwd)/${0##*/}
root=${MLRA_SCALE_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
cd "$root"

if [[ -n ${CONDA_ENV:-} ]]; then
    # conda's own scripts read variables that may be unset
    set +u
    # shellcheck disable=SC1091
    source "$(conda info --base)/etc/profile.d/conda.sh"
    conda activate "$CONDA_ENV"
    set -u
elif [[ -f ${VENV:-.venv}/bin/activate ]]; then
    # shellcheck disable=SC1091
    source "${VENV:-.venv}/bin/activate"
fi

# No node needs the internet: wandb writes to the run directory (`wandb sync` sends it later), and nothing is looked up.
export WANDB_MODE=${WANDB_MODE:-offline} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
