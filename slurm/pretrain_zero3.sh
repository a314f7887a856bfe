#!/usr/bin/env bash
# Trains a model whose training state fits into no GPU with ZeRO 3: 72 layers of width 4096, or --preset any other.
#
#   sbatch slurm/pretrain_zero3.sh --preset gpt2-xl data.path=/shared/data/mine
#   sbatch --nodes 2 slurm/pretrain_zero3.sh data.path=/shared/data/mine train.steps=100000 --run-dir /shared/runs/mine
#   bash slurm/pretrain_zero3.sh --dry-run --preset gpt2-xl             the plan, with the layout and what it takes
#   bash slurm/pretrain_zero3.sh --check data.path=/shared/data/mine     the plan, and all that is wrong with it
#
# ZeRO 3 is named here (ds_configs/zero3.json); the planner chooses the rest of the layout for the nodes and GPUs that the
# job gets (parallel.layout=auto). By its estimates for H100 ZeRO 3 is the fastest for this model on 4 nodes and still on
# 32; models that fit into a GPU are faster without (docs/planning.md). train_mlra_72L.sh leaves DeepSpeed's settings to
# the planner.
#
# What is below is for nodes of 8 GPUs; options of sbatch on the command line come before it. docs/slurm.md has the rest.
#SBATCH --job-name=zero3
#SBATCH --nodes=4                   # any number over which the batch divides
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
preset=gpt2-mlra-72l-wide
ds_config=ds_configs/zero3.json
# shellcheck source=slurm/launch.sh
source "${MLRA_SCALE_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}/slurm/launch.sh"
