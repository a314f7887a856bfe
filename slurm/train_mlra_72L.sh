#!/usr/bin/env bash
# Trains the MLRA model of 72 layers, or with --preset any other: gpt2-72l is its dense twin, gpt2-mlra-192l is deeper,
# gpt2-mlra-72l-wide has 72 layers of width 4096.
#
#   sbatch slurm/train_mlra_72L.sh data.path=/shared/data/mine
#   sbatch slurm/train_mlra_72L.sh parallel.tensor=2 parallel.pipeline=4 data.path=/shared/data/mine
#   sbatch --nodes 2 --job-name dense-72l slurm/train_mlra_72L.sh --preset gpt2-72l data.path=/shared/data/mine
#   bash slurm/train_mlra_72L.sh --dry-run                              the plan, with the layout and what it takes
#   bash slurm/train_mlra_72L.sh --check data.path=/shared/data/mine     the plan, and all that is wrong with it
#
# The planner chooses the layout for the nodes and GPUs that the job gets (parallel.layout=auto). A field that is named,
# as in the second line, stays; the planner chooses the others. --dry-run compares a named layout with the planner's
# choice. For the 72 layers of width 1024, which fit into a GPU, that is data parallelism with ZeRO where the batch divides
# over all GPUs (4 nodes), else pipeline parallelism (3 nodes: 3 stages). For those of width 4096 it is data parallelism
# with ZeRO up to 64 nodes of H100, and tensor and pipeline parallelism on 128. All by estimates (docs/planning.md).
#
# What is below is for nodes of 8 GPUs; options of sbatch on the command line come before it. docs/slurm.md has the rest.
#SBATCH --job-name=mlra-72l
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
preset=gpt2-mlra-72l
# shellcheck source=slurm/launch.sh
source "${MLRA_SCALE_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}/slurm/launch.sh"
