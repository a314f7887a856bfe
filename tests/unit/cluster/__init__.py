"""Jobs on a Slurm cluster: versions, hangs, policy, the connection of job and nodes, job.json."""
