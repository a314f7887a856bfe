"""What an export consists of: the tensors of each format, by name, and how each is made from a store.

`gpt2` is the layout of GPT2LMHeadModel: factorised projections are merged (exactly, since nothing stands between the
factors; in float64, so that only the rounding to the written type remains), q, k and v share one matrix, and matrices
are transposed, since GPT-2's Conv1D keeps them as [in, out]. `mlra` keeps names, factors and all values as they are.

In both the rows that pad the vocabulary are left out, sigmaReparam and LayerNorm Scaling are folded into the weights
(plain.py), and the output head is the token embedding, stored once. With `model.embedding_scale` that holds for `mlra`
only: GPT-2 has no factor between the two, so there the scaled embedding and the head are two matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from mlra_scale.checkpoint.errors import CheckpointError
from mlra_scale.checkpoint.huggingface.plain import PlainWeights

if TYPE_CHECKING:
    from mlra_scale.checkpoint.reader import Store
    from mlra_scale.config import ModelConfig

Format = Literal["gpt2", "mlra"]
FORMATS: tuple[Format, ...] = ("gpt2", "mlra")


@dataclass(frozen=True)
class ExportTensor:
    """A tensor to write.

    Attributes:
        name: Its name in the exported files.
        shape: Its shape there.
        make: Returns it, in the most accurate type there is; called when its turn to be written has come.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


def check_expressible(model: ModelConfig, export_format: Format) -> None:
    """Raises CheckpointError if a format cannot express a model.

    Args:
        model: The configuration of the trained model.
        export_format: One of FORMATS.
    """
    if export_format == "gpt2" and model.qk_norm:
        raise CheckpointError(
            "the model normalises queries and keys (model.qk_norm), which stock GPT-2 cannot: what a norm divides by "
            "depends on the text, so no weight can take it in; use --format mlra"
        )


def export_tensors(store: Store, export_format: Format) -> list[ExportTensor]:
    """Returns the tensors of an export, in the order of the model; none is made yet.

    Args:
        store: An open checkpoint.
        export_format: One of FORMATS.
    """
    plain = PlainWeights(store)
    return list(_gpt2(store, plain) if export_format == "gpt2" else _mlra(store, plain))


def _mlra(store: Store, plain: PlainWeights) -> Iterator[ExportTensor]:
    for name in plain.names:
        if name == "embedding.weight":
            yield _vocabulary(store, f"model.{name}")
        else:
            yield _one(plain, name, f"model.{name}", store.table[name].shape)


def _gpt2(store: Store, plain: PlainWeights) -> Iterator[ExportTensor]:
    model = store.model
    D, F = model.hidden_size, model.ffn_size
    yield _vocabulary(store, "transformer.wte.weight", model.embedding_factor)
    yield _one(plain, "positions.weight", "transformer.wpe.weight", (model.max_positions, D))
    for index in range(model.num_layers):
        source, target = f"blocks.{index}", f"transformer.h.{index}"
        qkv = tuple(f"{source}.attention.{projection}" for projection in ("q", "k", "v"))
        yield from _norm(plain, f"{source}.attention_norm", f"{target}.ln_1", D)
        yield from _linear(plain, qkv, f"{target}.attn.c_attn", D, 3 * D)
        yield from _linear(plain, (f"{source}.attention.o",), f"{target}.attn.c_proj", D, D)
        yield from _norm(plain, f"{source}.mlp_norm", f"{target}.ln_2", D)
        yield from _linear(plain, (f"{source}.mlp.fc_in",), f"{target}.mlp.c_fc", D, F)
        yield from _linear(plain, (f"{source}.mlp.fc_out",), f"{target}.mlp.c_proj", F, D)
    yield from _norm(plain, "final_norm", "transformer.ln_f", D)
    if model.embedding_factor != 1.0:
        yield _vocabulary(store, "lm_head.weight")


def _vocabulary(store: Store, target: str, factor: float = 1.0) -> ExportTensor:
    """The embedding without the rows that pad it."""
    tokens, width = store.model.vocab_size, store.model.hidden_size

    def make() -> torch.Tensor:
        rows = store.rows("embedding.weight", 0, tokens)
        return rows if factor == 1.0 else rows.double() * factor

    return ExportTensor(target, (tokens, width), make)


def _one(plain: PlainWeights, source: str, target: str, shape: tuple[int, ...]) -> ExportTensor:
    return ExportTensor(target, shape, lambda: plain[source])


def _norm(plain: PlainWeights, source: str, target: str, width: int) -> Iterator[ExportTensor]:
    for kind in ("weight", "bias"):
        yield _one(plain, f"{source}.{kind}", f"{target}.{kind}", (width,))


def _linear(
    plain: PlainWeights, sources: tuple[str, ...], target: str, inputs: int, outputs: int
) -> Iterator[ExportTensor]:
    """One Conv1D for one or several of our maps side by side."""
    yield ExportTensor(
        f"{target}.weight", (inputs, outputs), lambda: torch.cat([_dense(plain, name) for name in sources]).T
    )
    yield ExportTensor(f"{target}.bias", (outputs,), lambda: torch.cat([_bias(plain, name) for name in sources]))


def _dense(plain: PlainWeights, name: str) -> torch.Tensor:
    """The matrix [out, in] of a linear map that may be factorised."""
    if f"{name}.weight" in plain:
        return plain[f"{name}.weight"]
    return plain[f"{name}.up.weight"].double() @ plain[f"{name}.down.weight"].double()


def _bias(plain: PlainWeights, name: str) -> torch.Tensor:
    return plain[f"{name}.bias" if f"{name}.bias" in plain else f"{name}.up.bias"]
