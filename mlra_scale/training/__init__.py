"""Training: how a run starts (start/), its loop (loop/), what watches a step (watch/) and where numbers go (log/).

The files beside these rooms are what other rooms may use; they import no torch.
"""
