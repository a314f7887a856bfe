#!/usr/bin/env bash
# Says in ten minutes whether these nodes can be trained on: do layouts agree with one process, how fast are the links, do
# memory and time of a step agree with the plan. It writes what it has measured into a file that the planner reads.
#
#   sbatch slurm/check.sh
#   sbatch --nodes 8 slurm/check.sh --preset gpt2-mlra-96l --output /shared/check
#   mlra-scale plan --preset gpt2-mlra-72l --cluster-file runs/check-JOBID/cluster.json --nodes 8
#
# Everything after the file's name goes to `python -m benchmarks.check` (docs/cluster_check.md).
#SBATCH --job-name=check
#SBATCH --nodes=2                   # as many as the training will have, or two for the links between nodes
#SBATCH --gpus-per-node=8           # a rank for each
#SBATCH --cpus-per-task=32
#SBATCH --time=00:15:00             # 10 minutes, and time to start
#SBATCH --output=slurm-%x-%j.out
# Take out one # where your cluster wants these:
##SBATCH --mem=0
##SBATCH --account=...
##SBATCH --partition=...
set -euo pipefail
# shellcheck source=slurm/environment.sh
source "${MLRA_SCALE_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}/slurm/environment.sh"

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "$0: this is no Slurm job. Submit it: sbatch $0 ; on this machine alone: python -m benchmarks.check" >&2
    exit 2
fi
# The batch script's process needs no torch, which may be in a container only; it sets this anew for the others.
export DS_ACCELERATOR=cpu
exec python -u -m benchmarks.check --output "runs/$SLURM_JOB_NAME-$SLURM_JOB_ID" "$@"
