"""A training run as a job on a Slurm cluster, from its batch script to its ranks.

    slurm/*.sh -> launch.sh -> job/    one process per job, on its first node: attempts, and what follows when one ends
                     srun   -> node/   one per node: torchrun's agent in its Python form; watches its ranks
                               rank/   one per rank: checks the node, then trains

Upwards, a rank sends its node a heartbeat each second over a local socket (rank/heartbeat.py), and a node reports to
the job over TCP (channel.py); messages.py checks both. The job names what is silent, decides (job/policy.py), and
writes job.json (job_file.py).

Ranks begin when the job says so: those of the next attempt may have loaded their libraries and wait (job/spare.py,
rank/latch.py).

Downwards, a stop takes this way: Slurm's signal reaches job/__main__.py; job/attempt.py sends an order (channel.py);
node/watch.py sends SIGUSR1 to each rank; training saves after its step and ends with ExitCode.PREEMPTED, which
node/__main__.py reports; the job puts itself back into the queue (slurm.py).
"""
