"""The process of a job, on the first node of its allocation.

__main__.py  starts attempts until the run is done, fails, or goes back to the queue
attempt.py   one start of all ranks: what is heard of the nodes, how it ended
step.py      srun's command line for it
spare.py     the next attempt, whose ranks wait
console.py   what is printed
policy.py    the decisions as pure functions: is this a hang, who causes it, what follows an end
"""
