"""Initial weights: a pure function of (seed, canonical name), equal in every layout.

| weight                         | `gpt2`          | `xavier`             | `matched` (MLRA)   | `matched-to-mlra`   |
|--------------------------------|-----------------|----------------------|--------------------|---------------------|
| embedding, positions           | std             | std                  | std                | std                 |
| dense q, k, v                  | std             | sqrt(2 / (in + out)) | -                  | product [1]         |
| dense o                        | std / sqrt(2 L) | std / sqrt(2 L)      | std / sqrt(2 L)    | std / sqrt(2 L) [2] |
| factors down [R, D], up [D, R] | std, each       | sqrt(2 / (D + R))    | sqrt(std) R^(-1/4) | -                   |
| factor up of o [3]             | / sqrt(2 L)     | / sqrt(2 L)          | / sqrt(2 L)        | -                   |
| mlp.fc_in                      | std             | std                  | std                | std                 |
| mlp.fc_out                     | std / sqrt(2 L) | std / sqrt(2 L)      | std / sqrt(2 L)    | std / sqrt(2 L)     |
| biases                         | 0               | 0                    | 0                  | 0                   |
| weights of norms, gains [4]    | 1               | 1                    | 1                  | 1                   |

[1] the std of the product W_U W_D of the paired MLRA model; [2] the product's, over sqrt(2 L), if o is paired too;
[3] GPT-2's depth scaling of a residual projection sits on the up factor alone; [4] of QK-norm and sigmaReparam too.

All are normal with mean 0; std is the base std (`model.init_std`, with `model.init_width_rule`), L the number of
blocks. The product of two factors with stds a and b has element std a b sqrt(R), which `matched` solves for std and
`matched-to-mlra`, the control of the paper's claim, copies into a dense weight. The paper's own initialization is
not known to us: these are our choices.

`model.depth_scaled_init` false takes every 1/sqrt(2 L) out; null means true, and false with `model.layer_norm_scaling`
or `model.depth_rule` completep. The latter multiplies both branches of a block by L0 / L as they are computed, at every
step: no initial value depends on the depth, and at L = L0 the model is that of depth_rule none without the 1/sqrt(2 L).
With sigmaReparam the scale of a matrix does not change what the model computes, only how fast the matrix turns.
"""

import math

import torch

from mlra_scale.config import ModelConfig
from mlra_scale.model.parameters import ParameterInfo
from mlra_scale.model.randomness import keyed_generator


def xavier_std(fan_in: int, fan_out: int) -> float:
    """Standard deviation of Xavier (Glorot) normal initialization."""
    return math.sqrt(2.0 / (fan_in + fan_out))


def factor_std(model: ModelConfig, scheme: str) -> float:
    """Standard deviation of each of the two factors under `scheme` (`gpt2`, `xavier` or `matched`)."""
    if scheme == "xavier":
        return xavier_std(model.hidden_size, model.rank)
    if scheme == "matched":
        return math.sqrt(model.base_std) * model.rank**-0.25
    return model.base_std


def product_std(model: ModelConfig, scheme: str) -> float:
    """Standard deviation of an element of W_U W_D when both factors are drawn under `scheme`."""
    return factor_std(model, scheme) ** 2 * math.sqrt(model.rank)


def initial_std(model: ModelConfig, info: ParameterInfo) -> float:
    """Standard deviation of a weight's initial values; 0 for biases and norms (see the module's table)."""
    if info.kind in ("bias", "norm"):
        return 0.0
    writes_to_stream = info.name.endswith((".o.weight", ".o.up.weight", ".fc_out.weight"))
    scale = model.residual_scale if writes_to_stream else 1.0
    if info.kind == "factor":
        return factor_std(model, model.attention_init) * scale
    layer = info.name.split(".")[-2]
    if layer in ("q", "k", "v", "o"):
        return _dense_projection_std(model, layer) * scale
    return model.base_std * scale


def _dense_projection_std(model: ModelConfig, projection: str) -> float:
    if model.attention == "dense" and projection in model.factorised_projections:
        if model.attention_init == "matched-to-mlra":
            return product_std(model, model.paired_mlra_init)
        if model.attention_init == "xavier" and projection != "o":
            return xavier_std(model.hidden_size, model.hidden_size)
    return model.base_std


@torch.no_grad()
def fill_initial_values(tensor: torch.Tensor, model: ModelConfig, info: ParameterInfo, seed: int) -> None:
    """Fills a tensor of the parameter's global shape with its initial values.

    The values are drawn in fp32 on the CPU, so that they do not depend on the tensor's device and type.
    """
    assert tuple(tensor.shape) == info.shape, (info.name, tuple(tensor.shape), info.shape)
    if info.kind == "bias":
        tensor.zero_()
    elif info.kind == "norm":
        tensor.fill_(0.0 if info.name.endswith(".bias") else 1.0)
    else:
        # empty_like: DeepSpeed's zero.Init patches torch.empty to make tensors of the training precision.
        values = torch.empty_like(tensor, dtype=torch.float32, device="cpu")
        values.normal_(0.0, initial_std(model, info), generator=keyed_generator(seed, info.name))
        if info.kind == "embedding":
            values[model.vocab_size :] = 0.0
        tensor.copy_(values)
