"""Exports of checkpoints that real engines trained and saved, against the logits of those engines on their ranks.

`python -m tests.parity.all_exports` runs every layout with every kind of attention and prints the table of
docs/huggingface.md; the tests run a covering subset.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlra_scale.config import Config
from tests.support.layouts import Layout, canonical_weights, layout_config, make_batch, micro_batches, start
from tests.support.pool import Pools

LAYOUTS = {
    "tp1, pipeline of 2 stages": Layout(pipeline=2),
    "tp2, pipeline of 2 stages": Layout(tensor=2, pipeline=2),
    "tp4, pipeline engine": Layout(tensor=4, engine="pipeline"),
    "tp1, ZeRO-3 over 2": Layout(data=2, stage=3),
    "tp2, ZeRO-3 over 2": Layout(tensor=2, data=2, stage=3),
    "tp4, ZeRO-3": Layout(tensor=4, stage=3),
}
LARGE_LAYOUTS = {
    "tp4, pipeline of 2 stages": Layout(tensor=4, pipeline=2),
    "tp4, ZeRO-3 over 2": Layout(tensor=4, data=2, stage=3),
}
ATTENTIONS: dict[str, dict[str, Any]] = {
    "MLRA": {},
    "dense": {"model__attention": "dense"},
    "o factorised": {"model__factorised_projections": ("q", "k", "v", "o")},
}
STEPS = 2


@dataclass
class Shard:
    """What one rank saw of the logits."""

    tensor_rank: int  # which columns
    logits_BSV: np.ndarray | None  # of the fixed batch; None on ranks that have no head


def train_and_save(rank: int, world_size: int, config: Config, folder: Path) -> Shard:
    """Trains a little, saves, and evaluates a fixed batch with an eye on the logits."""
    from mlra_scale.checkpoint.saver import Saver
    from mlra_scale.model.embedding import TokenEmbedding

    seen: list[torch.Tensor] = []
    original = TokenEmbedding.loss

    def recording(self: TokenEmbedding, hidden_BSD: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if not self.training:
            seen.append(self.logits(hidden_BSD).float())  # of which the loss makes a chunk at a time
        return original(self, hidden_BSD, *arguments)

    TokenEmbedding.loss = recording  # type: ignore[method-assign, assignment]
    try:
        engine = start(config, world_size, canonical_weights(config.model))
        for step in range(STEPS):
            engine.train_batch(micro_batches(engine, step), config.optim.lr)
        saver = Saver(folder, engine.topology, keep_last=1, keep_every=0, asynchronous=False)
        state = {"engine": engine.training_state(), "progress": {"step": STEPS}}
        saver.save(engine, STEPS, state, engine.buffers(), config.to_yaml(), None)
        saver.finish()
        engine.eval_batch([fixed_batch(config)])
    finally:
        TokenEmbedding.loss = original  # type: ignore[method-assign]
    assert len(seen) == (1 if engine.topology.is_last_stage else 0)
    return Shard(engine.topology.tensor_rank, seen[0].cpu().numpy() if seen else None)


def fixed_batch(config: Config) -> Any:
    """A micro-batch (a pipeline keeps to the size of the first) that was not trained on: its logits are compared."""
    first = STEPS * config.train.global_batch_size
    return make_batch(config, range(first, first + config.train.micro_batch_size))


def engine_logits(config: Config, shards: list[Shard]) -> torch.Tensor:
    """Puts the columns of the ranks together; what pads the vocabulary is -inf and is cut off."""
    columns = {shard.tensor_rank: shard.logits_BSV for shard in shards if shard.logits_BSV is not None}
    whole = torch.from_numpy(np.concatenate([columns[rank] for rank in sorted(columns)], axis=-1))
    padding = whole[..., config.model.vocab_size :]
    assert padding.shape[-1] > 0 and bool(torch.isinf(padding).all())
    return whole[..., : config.model.vocab_size]


@dataclass
class Outcome:
    """Largest differences between the logits of the engine and those of the exports; generation was equal."""

    gpt2: float
    mlra: float


def run_case(pools: Pools, folder: Path, layout: Layout, **overrides: Any) -> Outcome:
    """Trains and saves in a layout, exports to both formats with verification, and compares."""
    from transformers import GPT2LMHeadModel

    from mlra_scale.checkpoint.huggingface.exporting import ExportOptions, VerificationText, export_checkpoint
    from mlra_scale.checkpoint.reader import Store
    from mlra_scale.checkpoint.retention import checkpoint_at
    from mlra_scale.shipped.modeling_mlra import MlraForCausalLM

    config = layout_config(layout, **overrides)
    shards = pools(layout.world_size).run(train_and_save, config, folder / "checkpoints")
    expected = engine_logits(config, shards)
    store = Store.open(checkpoint_at(folder / "checkpoints"))
    assert store.verify() == [] and store.kind == "training" and store.manifest.tensor == layout.tensor
    batch = fixed_batch(config)
    text = VerificationText(torch.cat([batch.tokens_BS, batch.targets_BS[:, -1:]], dim=1), "a batch")
    models = {}
    for export_format, model_class in (("gpt2", GPT2LMHeadModel), ("mlra", MlraForCausalLM)):
        export_checkpoint(store, folder / export_format, ExportOptions(export_format), text)  # type: ignore[arg-type]
        models[export_format] = model_class.from_pretrained(folder / export_format).eval()
    with torch.no_grad():
        differences = {
            name: float((model(batch.tokens_BS).logits - expected).abs().max()) for name, model in models.items()
        }
    assert_same_generation(models, batch.tokens_BS[:, :6])
    return Outcome(**differences)


def assert_same_generation(models: dict[str, Any], prompts: torch.Tensor) -> None:
    """Greedy texts are equal: both formats, with and without a cache; the batch is padded on the left."""
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    texts = [
        model.generate(prompts, use_cache=has_cache, **settings)
        for model in models.values()
        for has_cache in (True, False)
    ]
    assert all(torch.equal(text, texts[0]) for text in texts[1:])
    assert texts[0].shape[1] == 22
