"""The training loop: `trainer.fit`, its data, its checkpoints and its rollbacks."""
