"""A training run as a job on a Slurm cluster, from its batch script to its ranks.

    slurm/*.sh -> launch.sh -> job.py    one per job, on its first node: attempts, and what to do when one ends
                     srun -> node.py     one per node: torchrun's agent, in its Python form; watches its ranks
                               rank.py   one per rank: checks the node, then trains

The job hears from its nodes over a connection of its own (channel.py), and a node from its ranks over a local socket
(pulse.py): all that is known meets in one place, which names what is silent, decides, and writes job.json.
"""
