"""The real engines on `cuda` FakeTensors, without a GPU: what they place, hold, launch, send and wait for.

`layouts.py` says what is traced, `running.py` starts one subprocess per layout, `traced.py` is that subprocess;
`fake_cuda.py`, `cuda_stubs.py` and `fake_ranks.py` stand in for the device and the other ranks, `tracing.py` watches.
"""
