#!/usr/bin/env bash
# Trains the MLRA model of 192 layers (twin: train_dense_192L.sh) with tensor and pipeline parallelism in a node.
#
#   sbatch slurm/train_mlra_192L.sh data.path=/shared/data/mine
#   sbatch --nodes 2 slurm/train_mlra_192L.sh data.path=/shared/data/mine train.steps=100000 --run-dir /shared/runs/mine
#   bash slurm/train_mlra_192L.sh --check data.path=/shared/data/mine     the plan, and all that is wrong with it
#
# What is below is for nodes of 8 GPUs; options of sbatch on the command line come before it. docs/slurm.md has the rest.
#SBATCH --job-name=mlra-192l
#SBATCH --nodes=8                    # any number over which the batch divides
#SBATCH --gpus-per-node=8           # a rank for each
#SBATCH --cpus-per-task=32          # cores of a node, for loading data and writing checkpoints
#SBATCH --time=24:00:00             # what your partition allows: the job goes back to the queue before it ends
#SBATCH --signal=B:USR1@600         # seconds before that in which the last step ends and is saved
#SBATCH --requeue
#SBATCH --open-mode=append          # one output file over all its starts
#SBATCH --output=slurm-%x-%j.out
# Take out one # where your cluster wants these (or name them on the command line; one option for memory, not two):
##SBATCH --mem=0                   # all memory of a node, where the partition's default is less
##SBATCH --account=...
##SBATCH --partition=...
# shellcheck disable=SC2034  # read by launch.sh
preset=gpt2-mlra-192l
ds_config=ds_configs/zero1_pipeline.json
layout=(parallel.tensor=2 parallel.pipeline=4 guard.enabled=true)
# shellcheck source=slurm/launch.sh
source "${MLRA_SCALE_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}/slurm/launch.sh"
