"""The models that benchmarks compare: one shape, the same weights, one way to do a training step each."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.baseline_gpt2 import BaselineGPT2, decay_groups
from mlra_scale.config import Config, ModelConfig, batch_plan
from mlra_scale.data import Batch
from mlra_scale.model import initialization
from mlra_scale.model.parameters import ParameterInfo, ParameterTable
from mlra_scale.parallel import Engine, Topology, build_engine, build_topology, destroy_topology, initialize_distributed

LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0

COMPILED_BLOCKS: dict[str, dict[str, Any]] = {"train": {"compile": True}}
"""Sections for `config_of` with which our trainer compiles its blocks."""

Step = Callable[[Batch], float]
"""One optimizer step on a batch; returns the loss before the update, which may still be under way on a GPU."""


@dataclass(frozen=True)
class Shape:
    """What is trained."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    batch_size: int
    sequence_length: int = 128
    vocab_size: int = 8192

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one batch."""
        return self.batch_size * self.sequence_length

    def batch(self, index: int) -> Batch:
        """Random tokens that depend on the index alone."""
        generator = torch.Generator().manual_seed(index)
        size = (self.batch_size, self.sequence_length + 1)
        tokens = torch.randint(self.vocab_size, size, generator=generator)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        positions = torch.arange(self.sequence_length).expand_as(inputs).contiguous()
        return Batch(inputs, targets, positions, torch.zeros_like(inputs), torch.arange(self.batch_size))


@contextmanager
def one_process_mesh(device: str) -> Iterator[Topology]:
    """The mesh of a single process, for as long as engines are in use."""
    shape = Shape("mesh", num_layers=1, hidden_size=8, num_heads=1, batch_size=1)
    place = initialize_distributed(device, timeout_minutes=10.0)
    topology = build_topology(batch_plan(config_of(shape, "dense", "fp32"), 1), place, timeout_minutes=10.0)
    try:
        yield topology
    finally:
        destroy_topology(topology)
        dist.destroy_process_group()


def config_of(shape: Shape, attention: str, precision: str, **sections: Mapping[str, Any]) -> Config:
    """The package's configuration of a shape: the only place where benchmarks make one.

    Args:
        shape: What is trained.
        attention: "dense" or "mlra".
        precision: "fp32" or "bf16".
        **sections: Fields beside or in place of those below, by section: `model={"attention_rank": 32}`.
    """
    values: dict[str, dict[str, Any]] = {
        "model": {
            "vocab_size": shape.vocab_size,
            "max_positions": shape.sequence_length,
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "num_heads": shape.num_heads,
            "attention": attention,
        },
        "train": {
            "steps": 1_000,
            "global_batch_size": shape.batch_size,
            "micro_batch_size": shape.batch_size,
            "sequence_length": shape.sequence_length,
            "precision": precision,
        },
        "optim": {
            "lr": LEARNING_RATE,
            "betas": list(BETAS),
            "eps": EPSILON,
            "weight_decay": WEIGHT_DECAY,
            "grad_clip": CLIP,
        },
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    return Config.from_dict(values)


def draw_weights(shape: Shape, attentions: Sequence[str] = ("dense", "mlra")) -> dict[str, Tensor]:
    """Initial weights by canonical name, with as many threads as there are cores.

    Those that models of several kinds of attention have in common are equal.
    """
    drawn: dict[str, Tensor] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        running = []
        for attention in attentions:
            config = config_of(shape, attention, "fp32")
            for name, info in ParameterTable(config.model).items():
                if name not in drawn:
                    drawn[name] = torch.empty(info.shape)
                    arguments = (drawn[name], config.model, info, config.train.seed)
                    running.append(pool.submit(initialization.fill_initial_values, *arguments))
        for task in running:
            task.result()
    return drawn


@contextmanager
def given_weights(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Engines that are built inside start from these weights, of `draw_weights`, and draw none."""

    def fill(tensor: Tensor, model: ModelConfig, info: ParameterInfo, seed: int) -> None:
        with torch.no_grad():
            tensor.copy_(weights[info.name])

    with mock.patch.object(initialization, "fill_initial_values", fill):
        yield


def build_ours(
    shape: Shape, attention: str, precision: str, topology: Topology, **sections: Mapping[str, Any]
) -> Engine:
    """The package's engine, DeepSpeed around it included; `sections` as for `config_of`."""
    config = config_of(shape, attention, precision, **sections)
    return build_engine(config, batch_plan(config, topology.world_size), topology)


def step_of_engine(engine: Engine) -> Step:
    """A step as the training loop does it, with the decision before the update."""
    return lambda batch: engine.train_batch([batch], LEARNING_RATE, lambda proposal: proposal.is_finite).loss


def weights_of(engine: Engine) -> dict[str, Tensor]:
    """The whole fp32 weights of an engine of one process, by canonical name."""
    weights = {name: torch.zeros(info.shape) for name, info in engine.table.items()}
    for fragment in engine.owned_fragments():
        end = fragment.start + fragment.values.numel()
        weights[fragment.name].view(-1)[fragment.start : end] = fragment.values.detach().cpu()
    return weights


def build_plain(shape: Shape, weights: Mapping[str, Tensor]) -> nn.Module:
    """The hand-tuned baseline; called with tokens and targets, returns the loss."""
    model = BaselineGPT2(shape.vocab_size, shape.sequence_length, shape.num_layers, shape.hidden_size, shape.num_heads)
    model.load_weights(weights)
    return model


class TransformersGPT2(nn.Module):
    """transformers' GPT2LMHeadModel with SDPA, without dropout and cache, and with one cross entropy over all tokens.

    Its own loss would shift the labels, drop a token per sample and copy the logits.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        # Here, because processes that measure ours alone would spend a third of their start on it.
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.sequence_length,
            n_embd=shape.hidden_size,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
        )
        self.model = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(input_ids=tokens).logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def build_transformers(shape: Shape, weights: Mapping[str, Tensor]) -> nn.Module:
    """GPT2LMHeadModel with given weights; its Conv1D keeps matrices as [in, out]."""
    module = TransformersGPT2(shape)
    transformer = module.model.transformer
    transformer.wte.weight.copy_(weights["embedding.weight"][: shape.vocab_size])
    transformer.wpe.weight.copy_(weights["positions.weight"])
    pairs = [(transformer.ln_f, ["final_norm"])]
    for index, block in enumerate(transformer.h):
        prefix = f"blocks.{index}"
        pairs += [
            (block.ln_1, [f"{prefix}.attention_norm"]),
            (block.ln_2, [f"{prefix}.mlp_norm"]),
            (block.attn.c_attn, [f"{prefix}.attention.{projection}" for projection in "qkv"]),
            (block.attn.c_proj, [f"{prefix}.attention.o"]),
            (block.mlp.c_fc, [f"{prefix}.mlp.fc_in"]),
            (block.mlp.c_proj, [f"{prefix}.mlp.fc_out"]),
        ]
    for theirs, ours in pairs:
        theirs.weight.copy_(torch.cat([weights[f"{name}.weight"] for name in ours]).t())
        theirs.bias.copy_(torch.cat([weights[f"{name}.bias"] for name in ours]))
    return module


def step_of_module(module: nn.Module, device: torch.device, precision: str, is_compiled: bool = False) -> Step:
    """A tuned training loop around a module: fused AdamW, multi-tensor clipping, autocast for bf16."""
    module.to(device).train()
    groups = decay_groups(module, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)
    parameters = list(module.parameters())
    loss_of = torch.compile(module) if is_compiled else module

    def step(batch: Batch) -> float:
        tokens = batch.tokens_BS.to(device, non_blocking=True)
        targets = batch.targets_BS.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step
