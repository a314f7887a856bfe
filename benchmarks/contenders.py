"""The trainers that benchmarks compare: one shape, the same weights, one way to take a training step each."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from mlra_scale.checkpoint.huggingface.gpt2_weights import gpt2_tensors
from mlra_scale.config import Config, ModelConfig, batch_plan
from mlra_scale.data import Batch
from mlra_scale.model import initialization
from mlra_scale.model.parameters import ParameterInfo, ParameterTable
from mlra_scale.parallel import Engine, Topology, build_engine, build_topology, destroy_topology, initialize_distributed

MINUTES = 5.0
"""Of a collective operation, until it fails."""
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0

PLAIN, TRANSFORMERS, ZERO = "plain PyTorch", "transformers", "transformers ZeRO-1"
DENSE = "mlra_scale dense"
MLRA = {parts: f"mlra_scale R=D/{parts}" for parts in (2, 4, 8)}
OURS = (DENSE, *MLRA.values())
COMPILED, AGAIN = ", compiled", " again"
"""Endings of names: through torch.compile; the same once more, whose ratio is the noise."""

Step = Callable[[Batch], float]
"""One optimizer step on a batch; returns the loss before the update."""


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
        """Returns random tokens that depend on the index alone."""
        return random_batch(index, self.batch_size, self.sequence_length, self.vocab_size)

    def samples(self, numbers: Iterable[int]) -> Batch:
        """Returns samples by number as one micro-batch; a sample depends on its number alone."""
        one = replace(self, batch_size=1)
        rows = [one.batch(number) for number in numbers]
        return Batch(**{field.name: torch.cat([getattr(row, field.name) for row in rows]) for field in fields(Batch)})


WIDTH_512 = Shape("D=512 L=12", num_layers=12, hidden_size=512, num_heads=8, batch_size=4)
TINY = Shape("tiny", num_layers=2, hidden_size=32, num_heads=2, batch_size=2, sequence_length=16, vocab_size=256)


def random_batch(seed: int, size: int, length: int, vocab_size: int) -> Batch:
    """Returns `size` samples of random tokens."""
    tokens = torch.randint(vocab_size, (size, length + 1), generator=torch.Generator().manual_seed(seed))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(length).expand_as(inputs).contiguous()
    return Batch(inputs, targets, positions, torch.zeros_like(inputs), torch.arange(size))


@contextmanager
def mesh(config: Config, device: torch.device) -> Iterator[Topology]:
    """The groups of a layout, for as long as its engines are in use."""
    topology = build_topology(batch_plan(config, dist.get_world_size()), device, MINUTES)
    try:
        yield topology
    finally:
        destroy_topology(topology)


@contextmanager
def one_process_mesh(device: str) -> Iterator[Topology]:
    """The mesh of a single process, for as long as engines are in use."""
    on_device = initialize_distributed(device, MINUTES)
    try:
        with mesh(config_of(TINY, "dense", "fp32"), on_device) as topology:
            yield topology
    finally:
        dist.destroy_process_group()


def config_of(shape: Shape, attention: str, precision: str, **sections: Mapping[str, Any]) -> Config:
    """Returns the package's configuration of a shape, with more fields by section: `model={"attention_rank": 32}`."""
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
        "optim": {"lr": LEARNING_RATE, "betas": list(BETAS), "eps": EPSILON, "weight_decay": WEIGHT_DECAY},
    }
    values["optim"]["grad_clip"] = CLIP
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.from_dict(values)


def config_for(shape: Shape, name: str, precision: str, **sections: Mapping[str, Any]) -> Config:
    """Returns the configuration of a contender of ours; of others one with as many parameters and FLOPs."""
    kind = kind_of(name)
    if name.endswith(COMPILED) and kind in OURS:
        sections["train"] = {**sections.get("train", {}), "compile": True}
    for parts, mlra in MLRA.items():
        if kind == mlra:
            sections["model"] = {**sections.get("model", {}), "attention_rank": shape.hidden_size // parts}
    return config_of(shape, "mlra" if kind in MLRA.values() else "dense", precision, **sections)


def kind_of(name: str) -> str:
    """Returns the name of a contender without its endings."""
    return name.removesuffix(COMPILED).removesuffix(AGAIN)


def draw_weights(shape: Shape, attentions: Sequence[str] = ("dense", "mlra")) -> dict[str, Tensor]:
    """Draws initial weights by canonical name, with as many threads as there are cores.

    Weights that models of several kinds of attention share are equal.
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
    """Engines that are built inside start from weights of `draw_weights`; what is not there is drawn."""
    draw = initialization.fill_initial_values

    def fill(tensor: Tensor, model: ModelConfig, info: ParameterInfo, seed: int) -> None:
        if info.name in weights and weights[info.name].shape == tensor.shape:
            with torch.no_grad():
                tensor.copy_(weights[info.name])
        else:
            draw(tensor, model, info, seed)

    with mock.patch.object(initialization, "fill_initial_values", fill):
        yield


def build_ours(config: Config, topology: Topology) -> Engine:
    """Returns the package's engine, DeepSpeed included."""
    return build_engine(config, batch_plan(config, topology.world_size), topology)


def build(
    name: str,
    shape: Shape,
    topology: Topology,
    precision: str,
    weights: Mapping[str, Tensor],
    **sections: Mapping[str, Any],
) -> Step:
    """Builds a contender, named with its endings, from weights of `draw_weights`; sections as for `config_of`."""
    kind = kind_of(name)
    if kind in OURS:
        with given_weights(weights):
            return step_of_engine(build_ours(config_for(shape, name, precision, **sections), topology))
    module = PlainGPT2(shape, weights) if kind == PLAIN else TransformersGPT2(shape, weights)
    if kind == ZERO:
        return step_of_zero(module, topology.device, precision)
    return step_of_module(module, topology.device, precision, name.endswith(COMPILED))


def step_of_engine(engine: Engine) -> Step:
    """Returns a step as the training loop takes it, with the decision before the update."""
    return lambda batch: engine.train_batch([batch], LEARNING_RATE, lambda proposal: proposal.is_finite).loss


class PlainBlock(nn.Module):
    """Pre-LN transformer block: one fused projection for q, k and v, torch's attention, tanh GELU; GPT-2's names."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        D, self.num_heads = hidden_size, num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(D, 3 * D), "c_proj": nn.Linear(D, D)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "c_proj": nn.Linear(4 * D, D)})

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, size = hidden.shape
        qkv = self.attn["c_attn"](self.ln_1(hidden)).view(batch, length, 3, self.num_heads, size // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        heads = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attn["c_proj"](heads.transpose(1, 2).reshape(batch, length, size))
        return hidden + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(hidden)), approximate="tanh"))


class PlainGPT2(nn.Module):
    """A GPT-2 as one tunes it by hand in plain PyTorch; nothing of ours is in it. Returns the mean loss of a batch."""

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.wpe = nn.Embedding(shape.sequence_length, shape.hidden_size)
        self.h = nn.ModuleList(PlainBlock(shape.hidden_size, shape.num_heads) for _ in range(shape.num_layers))
        self.ln_f = nn.LayerNorm(shape.hidden_size)
        _copy_weights(shape, weights, self, is_transposed=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            hidden = block(hidden)
        logits = functional.linear(self.ln_f(hidden), self.wte.weight)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class TransformersGPT2(nn.Module):
    """transformers' GPT2LMHeadModel with SDPA, without dropout and cache, and with one cross entropy over all tokens.

    Its own loss would shift the labels, drop a token per sample and copy the logits.
    """

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        # Imported here: processes that measure ours alone would spend a third of their start on it.
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
        _copy_weights(shape, weights, self.model.transformer, is_transposed=True)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(input_ids=tokens).logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def _copy_weights(shape: Shape, weights: Mapping[str, Tensor], model: nn.Module, is_transposed: bool) -> None:
    """Copies the weights of a dense model, by canonical name, into one with GPT-2's names.

    transformers' matrices are [in, out]. The model may have fewer rows of embeddings: ours are padded.
    """
    for tensor in gpt2_tensors(config_of(shape, "dense", "fp32").model):
        parameter, value = model.get_parameter(tensor.name), torch.cat([weights[name] for name in tensor.parameters])
        parameter.copy_(value.t() if is_transposed and tensor.is_transposed else value[: len(parameter)])


def _adamw(module: nn.Module) -> torch.optim.AdamW:
    """Returns torch's fused AdamW, with weight decay for matrices and embeddings only."""
    matrices = [parameter for parameter in module.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in module.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)


def step_of_module(module: nn.Module, device: torch.device, precision: str, is_compiled: bool = False) -> Step:
    """Returns a step of a tuned training loop: fused AdamW, multi-tensor clipping, autocast for bf16."""
    module.to(device).train()
    optimizer, parameters = _adamw(module), list(module.parameters())
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


def step_of_zero(module: nn.Module, device: torch.device, precision: str) -> Step:
    """Returns a step under DeepSpeed's ZeRO-1, with torch's fused AdamW, and clipping and bf16 by DeepSpeed.

    The bucket holds the whole model: DeepSpeed's default takes half a billion numbers whatever the model's size.
    """
    module.to(device).train()
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=_adamw(module),
        config={
            "train_micro_batch_size_per_gpu": 1,  # a number that it only multiplies
            "gradient_accumulation_steps": 1,
            "gradient_clipping": CLIP,
            "bf16": {"enabled": precision == "bf16"},
            "zero_optimization": {"stage": 1, "reduce_bucket_size": sum(p.numel() for p in module.parameters())},
        },
    )

    def step(batch: Batch) -> float:
        loss = engine(batch.tokens_BS.to(device, non_blocking=True), batch.targets_BS.to(device, non_blocking=True))
        engine.backward(loss)
        engine.step()
        return float(loss.item())

    return step
