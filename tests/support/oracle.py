"""The single-process reference run in fp64: ReferenceGPT under the configuration's optimizers, with clipping."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mlra_scale.config import Config, ModelConfig
from mlra_scale.model.parameters import ParameterTable
from mlra_scale.model.randomness import keyed_generator
from mlra_scale.model.spectral import initial_vector
from tests.support.layouts import Batch, global_batch
from tests.support.optimizers import ReferenceOptimizer, treatments
from tests.support.reference import ReferenceGPT, unit

VECTOR = "optimizer_vector"
"""Prefix of the names of Spectron's vectors in `engine.buffers()`."""


@dataclass
class ReferenceRun:
    """What the oracle computed; embedding tensors have no padded rows.

    `momenta` and `vectors` are those of Muon and Spectron after the last step.
    """

    losses: list[float]
    gradient_norms: list[float]
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    validation: float
    momenta: dict[str, np.ndarray] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)


def build_reference(
    config: Config, weights: dict[str, torch.Tensor], vectors: dict[str, torch.Tensor] | None = None
) -> ReferenceGPT:
    """The oracle with these canonical weights, in fp64; vectors of sigmaReparam are by default those of a new run."""
    model = config.model
    reference = ReferenceGPT(
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        ffn_hidden_size=model.ffn_size,
        factorised=tuple(name for name in "qkvo" if model.is_factorised(name)),
        rank=model.rank,
        layer_norm_eps=model.layer_norm_eps,
        qk_norm=model.qk_norm,
        sigma_reparam=model.sigma_reparam,
        layer_norm_scaling=model.layer_norm_scaling,
        embedding_factor=model.hidden_size**0.5 if model.embedding_scale == "sqrt_width" else 1.0,
        branch_factor=model.base_depth / model.num_layers if model.depth_rule == "completep" else 1.0,
    ).double()
    state = {name: tensor.double() for name, tensor in weights.items()}
    state["embedding.weight"] = state["embedding.weight"][: model.vocab_size]
    reference.load_state_dict(state)
    if model.sigma_reparam:
        started = vectors or initial_vectors(model, config.train.seed)
        reference.set_vectors({name: vector.double() for name, vector in started.items()})
    return reference


def initial_vectors(model: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Where the power iterations of a run begin, by name of the map."""
    return {entry.name: initial_vector(model, seed, entry) for entry in ParameterTable(model).normalised.values()}


def optimizer_vectors(config: Config) -> dict[str, torch.Tensor]:
    """Where Spectron's power iterations begin, by name of the factor: unit vectors of (seed, name)."""
    table, vectors = ParameterTable(config.model), {}
    for name, treatment in treatments(config).items():
        if treatment.optimizer == "spectron":
            generator = keyed_generator(config.train.seed, f"{VECTOR}/{name}")
            vectors[name] = unit(torch.randn(table[name].shape[1], generator=generator))
    return vectors


def reference_loss(config: Config, reference: ReferenceGPT, step: int, with_z_loss: bool = True) -> torch.Tensor:
    """Loss of a step's global batch."""
    batch = global_batch(config, step)
    is_masked = config.data.document_attention == "masked"
    logits = reference(batch.tokens_BS, batch.positions_BS, batch.documents_BS if is_masked else None)
    return reference.loss(logits, batch.targets_BS, config.model.z_loss if with_z_loss else 0.0)


def reference_run(config: Config, weights: dict[str, torch.Tensor], steps: int) -> ReferenceRun:
    """Trains the oracle; gradients are those of the first step, before clipping."""
    reference = build_reference(config, weights)
    optimizer = ReferenceOptimizer(config, reference, optimizer_vectors(config))
    run = ReferenceRun([], [], {}, {}, 0.0)
    for step in range(steps):
        reference.zero_grad()
        loss = reference_loss(config, reference, step)
        loss.backward()
        if step == 0:
            run.gradients = {
                name: np.array(p.grad.numpy()) for name, p in reference.named_parameters() if p.grad is not None
            }
        run.losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), config.optim.grad_clip or math.inf)
        run.gradient_norms.append(norm.item())
        optimizer.step()
        reference.advance()
    with torch.no_grad():
        run.validation = reference_loss(config, reference, 0, with_z_loss=False).item()
    run.weights = {name: p.detach().numpy() for name, p in reference.named_parameters()}
    run.momenta = {name: momentum.numpy() for name, momentum in optimizer.momenta().items()}
    run.vectors = {name: vector.numpy() for name, vector in optimizer.vectors.items()}
    return run


@torch.no_grad()
def reference_activations(config: Config, reference: ReferenceGPT, batch: Batch) -> dict[str, Any]:
    """What the oracle's activations are on a batch: the entry that ActivationProbe measures."""
    hidden: list[torch.Tensor] = []
    handles = [reference.blocks[0].register_forward_pre_hook(lambda _, arguments: hidden.append(arguments[0]))]
    handles += [b.register_forward_hook(lambda _, __, output: hidden.append(output[0])) for b in reference.blocks]
    documents = batch.documents_BS if config.data.document_attention == "masked" else None
    logits = reference.attention_logits(batch.tokens_BS, batch.positions_BS, documents)
    for handle in handles:
        handle.remove()
    return activations_of(logits, hidden, config.activations.saturation)


def activations_of(logits: list[torch.Tensor], hidden: list[torch.Tensor], saturation: float) -> dict[str, Any]:
    """The same from each block's masked logits [B, N, S, S] and the residual stream's places [B, S, D], in fp64."""
    entry: dict[str, Any] = {
        "residual_variance": [float(np.var(place.double().numpy(), axis=-1).mean()) for place in hidden],
        "attention_entropy": [],
        "largest_logit": [float(of_block.max()) for of_block in logits],
        "saturated_share": [],
    }
    for of_block in logits:
        weights = of_block.double().softmax(-1).numpy()
        surprise = -np.log(weights, out=np.zeros_like(weights), where=weights > 0)
        is_open = np.isfinite(of_block.numpy()).sum(-1) > 1
        entry["attention_entropy"].append(float((weights * surprise).sum(-1).mean()))
        is_saturated = weights.max(-1)[is_open] > saturation
        entry["saturated_share"].append(float(is_saturated.mean()) if is_open.any() else 0.0)
    return entry | {
        "max_residual_variance": max(entry["residual_variance"]),
        "min_attention_entropy": min(entry["attention_entropy"]),
        "max_logit": max(entry["largest_logit"]),
        "max_saturated_share": max(entry["saturated_share"]),
    }


def assert_gradients_close(gradients: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> float:
    """Compares every gradient: ||g - g_ref|| <= 1e-5 ||g_ref|| + 1e-6 times the norm of its layer's gradient.

    The second term is for the key bias, whose true gradient is zero (softmax is shift-invariant).

    Returns:
        The largest difference as a share of what is allowed.
    """
    layer_square: dict[str, float] = {}
    for name, expected in reference.items():
        layer = name.rsplit(".attention", 1)[0].rsplit(".mlp", 1)[0]
        layer_square[layer] = layer_square.get(layer, 0.0) + float(np.square(expected).sum())
    worst, problems = 0.0, []
    for name, expected in reference.items():
        layer = name.rsplit(".attention", 1)[0].rsplit(".mlp", 1)[0]
        found = gradients[name]
        if name == "embedding.weight":
            assert not found[len(expected) :].any(), "padded rows have a gradient"
            found = found[: len(expected)]
        difference = float(np.linalg.norm(found - expected))
        allowed = 1e-5 * float(np.linalg.norm(expected)) + 1e-6 * layer_square[layer] ** 0.5
        worst = max(worst, difference / allowed)
        if difference > allowed:
            problems.append(f"{name}: off by {difference:.3e}, allowed {allowed:.3e}")
    assert not problems, "\n".join(problems)
    return worst
