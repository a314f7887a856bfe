"""The public face: what other training loops use of this package. docs/library.md explains it.

`mlra_scale` offers its names and loads a module at the first use of one: none needs more than torch, numpy and the
library that it is for.
"""
