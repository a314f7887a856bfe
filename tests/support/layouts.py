"""Trains small models in any layout and puts the ranks' fragments together again, for comparison with the oracle."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mlra_scale.config import Config, ModelConfig, batch_plan
from mlra_scale.model.parameters import ParameterTable

VOCABULARY = 121  # odd: with a padding multiple of 16 there are padded rows in every layout
DROPOUT = {"model__embedding_dropout": 0.1, "model__attention_dropout": 0.1, "model__residual_dropout": 0.1}
MASKED = {"data__document_attention": "masked", "data__reset_positions": True}
# Nothing divides by two, so that ZeRO cuts rows and pads the last rank's piece.
ODD = {"model__hidden_size": 36, "model__attention_rank": 11, "model__ffn_hidden_size": 50}
NORMS = {"model__qk_norm": True, "model__sigma_reparam": True, "model__layer_norm_scaling": True}
OPTIONS_OF_THE_MODEL = {**NORMS, "model__embedding_scale": "sqrt_width"}
# ZeRO 3 that gathers every weight for its module alone, and gives it back at once.
RELEASING = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}
OFFLOADED: dict[str, dict[str, Any]] = {
    "zero-2": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero-3": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


@dataclass(frozen=True)
class Layout:
    """One way to spread a model over ranks."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    stage: int = 0
    engine: str = "auto"

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        degrees = f"tp{self.tensor}pp{self.pipeline}dp{self.data}"
        return degrees + f" zero{self.stage}" + (f" {self.engine}" if self.engine != "auto" else "")


@dataclass(frozen=True)
class Batch:
    """A micro-batch (see data.Batch)."""

    tokens_BS: torch.Tensor
    targets_BS: torch.Tensor
    positions_BS: torch.Tensor
    documents_BS: torch.Tensor
    sample_ids_B: torch.Tensor


def layout_config(layout: Layout, **overrides: Any) -> Config:
    """A 4-layer model of width 32 in the given layout; overrides are "section__field=value"."""
    values: dict[str, dict[str, Any]] = {
        "model": {
            "vocab_size": VOCABULARY,
            "vocab_padding_multiple": 16,
            "max_positions": 24,
            "num_layers": 4,
            "hidden_size": 32,
            "num_heads": 4,
            "init_std": 0.1,
        },
        "train": {
            "steps": 5,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "sequence_length": 16,
            "seed": 7,
            "device": "cpu",
        },
        "optim": {"lr": 1e-3, "grad_clip": 1.0},
        "parallel": {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "engine": layout.engine,
            "timeout_minutes": 1.0,
        },
        "data": {},
        "activations": {},
        "qk_clip": {},
        "deepspeed": {"zero_optimization": {"stage": layout.stage}} if layout.stage else {},
    }
    for name, value in overrides.items():
        section, field = name.split("__")
        values.setdefault(section, {})[field] = value
    return Config.from_dict(values)


def sample(config: Config, index: int) -> torch.Tensor:
    """Sequence number `index` of an endless random text: a pure function of the index."""
    generator = torch.Generator().manual_seed(1000 + index)
    return torch.randint(config.model.vocab_size, (config.train.sequence_length + 1,), generator=generator)


def make_batch(config: Config, indices: Sequence[int]) -> Batch:
    """Samples as a micro-batch; with documents of 5 tokens, positions reset if the configuration says so."""
    rows = torch.stack([sample(config, index) for index in indices])
    length = config.train.sequence_length
    documents = (torch.arange(length) // 5).expand(len(indices), -1)
    positions = torch.arange(length) % 5 if config.data.reset_positions else torch.arange(length)
    return Batch(
        rows[:, :-1].contiguous(),
        rows[:, 1:].contiguous(),
        positions.expand(len(indices), -1).contiguous(),
        documents.contiguous(),
        torch.tensor(list(indices)),
    )


def micro_batches(engine: Any, step: int) -> list[Batch]:
    """This rank's micro-batches of a step, in the order that the trainer uses."""
    plan, size = engine.plan, engine.plan.micro_batch_size
    first = step * plan.global_batch_size
    starts = [first + (m * plan.data + engine.topology.data_rank) * size for m in range(plan.accumulation_steps)]
    return [make_batch(engine.config, range(start, start + size)) for start in starts]


def global_batch(config: Config, step: int) -> Batch:
    """All samples of a step at once."""
    size = config.train.global_batch_size
    return make_batch(config, range(step * size, (step + 1) * size))


def initial_state(model: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Every initial global tensor by canonical name (fp32, CPU)."""
    from mlra_scale.model.initialization import fill_initial_values

    state = {}
    for name, info in ParameterTable(model).items():
        state[name] = torch.empty(info.shape)
        fill_initial_values(state[name], model, info, seed)
    return state


@torch.no_grad()
def canonical_weights(model: ModelConfig, seed: int = 3) -> dict[str, torch.Tensor]:
    """Random weights by canonical name, biases and norms included: nothing is zero or one by chance."""
    generator = torch.Generator().manual_seed(seed)
    state = initial_state(model, seed)
    for name, tensor in state.items():
        if tensor.dim() == 1:
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        elif name == "embedding.weight":
            tensor[model.vocab_size :] = 0.0
    return state


def sharp_weights(model: ModelConfig, seed: int = 3) -> dict[str, torch.Tensor]:
    """Weights whose queries and keys are long: some rows of attention weights are nearly one-hot, and some not."""
    weights = canonical_weights(model, seed)
    for projection in ("q", "k"):
        owner, factor = (f"{projection}.up", 6.0) if model.is_factorised(projection) else (projection, 2.0)
        for name in weights:
            if name.endswith(f"attention.{owner}.weight"):
                weights[name] *= factor
    return weights


def start(
    config: Config,
    world_size: int,
    weights: dict[str, torch.Tensor] | None = None,
    adam_begun_at: Mapping[str, int] | None = None,
) -> Any:
    """Builds the engine of this rank; `weights` replace the initial ones; `adam_begun_at`: see build_engine."""
    from mlra_scale.parallel import build_engine, build_topology, initialize_distributed

    plan = batch_plan(config, world_size)
    device = initialize_distributed("cpu", config.parallel.timeout_minutes)
    topology = build_topology(plan, device, config.parallel.timeout_minutes)
    engine = build_engine(config, plan, topology, adam_begun_at)
    if weights is not None:
        overwrite(engine, weights)
    return engine


def overwrite(engine: Any, weights: dict[str, torch.Tensor]) -> None:
    """Gives an engine these global weights, as if it had not trained yet."""
    degree, rank = engine.topology.tensor, engine.topology.tensor_rank

    def fill(fragment: Any) -> None:
        info = engine.table[fragment.name]
        whole = weights[fragment.name]
        shard = whole if info.shard_dim is None else whole.chunk(degree, dim=info.shard_dim)[rank]
        flat = shard.reshape(-1)
        fragment.values.copy_(flat[fragment.start : fragment.start + fragment.values.numel()])

    engine.restore(fill, None, with_moments=False)


Piece = tuple[str, int, int, np.ndarray]


def pieces(engine: Any, fragments: Iterable[Any]) -> list[Piece]:
    """Fragments as picklable (name, tensor rank, start, values)."""
    return [(f.name, engine.topology.tensor_rank, f.start, f.values.detach().cpu().numpy().copy()) for f in fragments]


def assemble(
    config: Config, ranks: Iterable[list[Piece]], names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """Global tensors from every rank's pieces, all or `names`; each element must come from exactly one of them."""
    tensor_parallel, whole = config.parallel.tensor, ParameterTable(config.model)
    table = {name: info for name, info in whole.items() if names is None or name in names}
    parts = {
        name: np.zeros((1 if info.shard_dim is None else tensor_parallel, *info.local_shape(tensor_parallel)))
        for name, info in table.items()
    }
    counts = {name: np.zeros(part.shape, dtype=int) for name, part in parts.items()}
    for rank in ranks:
        for name, tensor_rank, first, values in rank:
            shard = 0 if table[name].shard_dim is None else tensor_rank
            parts[name][shard].reshape(-1)[first : first + values.size] = values
            counts[name][shard].reshape(-1)[first : first + values.size] += 1
    for name, count in counts.items():
        assert (count == 1).all(), f"{name}: elements are owned {sorted(set(count.flat))} times"
    return {
        name: part[0] if table[name].shard_dim is None else np.concatenate(list(part), axis=table[name].shard_dim)
        for name, part in parts.items()
    }
