"""The process of a rank: sends heartbeats, checks its node and trains.

__main__.py   joins the parts around mlra_scale.train
heartbeat.py  what a rank sends its node each second, and the node's socket for it
latch.py      where ranks wait until their attempt begins
preflight.py  checks of the nodes before the first step
"""

# What the node's agent passes to its ranks in the environment.
AGENT_VARIABLE = "MLRA_SCALE_AGENT"  # its process
NODE_VARIABLE = "MLRA_SCALE_NODE"  # its name
DEVICE_VARIABLE = "MLRA_SCALE_DEVICE"  # what every rank needs: cpu or cuda
SPARE_VARIABLE = "MLRA_SCALE_SPARE"  # not empty: others train here until these ranks begin
HEARTBEAT_VARIABLE = "MLRA_SCALE_HEARTBEAT_SOCKET"
LOGS_VARIABLE = "MLRA_SCALE_LOGS"  # folder of the attempt, which all nodes share
