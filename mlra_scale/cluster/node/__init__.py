"""The process of a node: the agent that starts and watches the ranks there.

__main__.py  starts the ranks by torchrun's agent in its Python form, and reports how they ended
watch.py     the thread between the ranks and the job: heartbeats and bad nodes upwards, orders downwards
"""
