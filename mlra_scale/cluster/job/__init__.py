"""The process of a job, on the first node of its allocation.

__main__.py  starts attempts until the run is done, fails, or goes back to the queue
attempt.py   one start of all ranks: srun, what is heard of the nodes, how it ended
policy.py    the decisions as pure functions: is this a hang, who causes it, what follows an end
"""
