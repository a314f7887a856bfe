"""Named starting points. Depth is the dial of the deep family; everything else there is derived in one function.

Parameter counts (real vocabulary, tied head once; `ModelConfig.num_parameters`), all at rank D/2, where MLRA and its
dense twin have equally many:

    debug                            236,928
    laptop                         5,299,456
    gpt2-mlra-48l, gpt2-48l      657,132,544
    gpt2-mlra-72l, gpt2-72l      959,441,920
    gpt2-mlra-96l, gpt2-96l    1,261,751,296
    gpt2-mlra-192l, gpt2-192l  2,470,988,800
    gpt2-mlra-72l-wide, gpt2-72l-wide
                              14,709,403,648
    gpt2                         124,439,808
    gpt2-medium                  354,823,168
    gpt2-large                   774,030,080
    gpt2-xl                    1,557,611,200
"""

from __future__ import annotations

from typing import Any

from mlra_scale.config.problems import ConfigError, Problem, nearest
from mlra_scale.config.schema import Config

DEEP_LAYERS = (48, 72, 96, 192)


def _debug() -> dict[str, Any]:
    """Trains in seconds on one core: for tests and for looking at a whole run."""
    return {
        "model": {
            "vocab_size": 512,
            "max_positions": 64,
            "num_layers": 4,
            "hidden_size": 64,
            "num_heads": 4,
            "init_width_rule": "inverse_sqrt_width",
        },
        "train": {
            "steps": 20,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "sequence_length": 64,
            "precision": "fp32",
            "log_every": 5,
        },
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "tev": {"every": 5},
        "evaluation": {"every": 10, "batches": 2},
        "checkpoint": {"every": 10},
        "wandb": {"mode": "disabled"},
    }


def _laptop() -> dict[str, Any]:
    """Deep and thin: 24 layers of width 128, one to two minutes in two processes on two CPU cores."""
    return {
        "model": {
            "vocab_size": 4096,
            "max_positions": 128,
            "num_layers": 24,
            "hidden_size": 128,
            "num_heads": 4,
            "init_width_rule": "inverse_sqrt_width",
        },
        "train": {
            "steps": 150,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "sequence_length": 128,
            "precision": "fp32",
            "log_every": 10,
        },
        "optim": {"lr": 3e-3, "warmup_steps": 20},
        "tev": {"every": 10},
        "evaluation": {"every": 50, "batches": 2},
        "checkpoint": {"every": 50},
        "wandb": {"mode": "disabled"},
    }


def _deep(num_layers: int, attention: str) -> dict[str, Any]:
    """The deep family: depth is the dial.

    Width 1024 and 16 heads for every depth, and one recipe for all of them (batch of 512 x 1024 tokens, peak rate
    2.5e-4, 2,000 steps of warm-up, 50,000 steps: 26 G tokens), so that two members differ in depth and in nothing
    else. Only the micro-batch, which does not change the mathematics, follows the depth: the largest power of two with
    num_layers * micro_batch_size <= 384, which keeps the memory of activations about constant.

    Args:
        num_layers: The depth L.
        attention: "mlra" or "dense".

    Returns:
        The preset's sections.
    """
    micro_batch_size = 2 ** ((384 // num_layers).bit_length() - 1)
    return {
        "model": {
            "num_layers": num_layers,
            "hidden_size": 1024,
            "num_heads": 16,
            "attention": attention,
        },
        "train": {
            "steps": 50_000,
            "global_batch_size": 512,
            "micro_batch_size": micro_batch_size,
            "sequence_length": 1024,
            "precision": "bf16",
        },
        "optim": {"lr": 2.5e-4, "warmup_steps": 2_000},
        "evaluation": {"every": 1_000, "batches": 8},
        "checkpoint": {"every": 1_000},
    }


def _wide(attention: str) -> dict[str, Any]:
    """Deep and wide: the deep family's 72 layers and recipe at width 4096, with 32 heads as in Touvron et al. 2023.

    Its training state fits into no GPU, and over many nodes its batch is too small for data parallelism alone: tensor
    and pipeline parallelism are needed (docs/planning.md). The peak rate is that of the 13 B model of Brown et al. 2020
    (GPT-3), table 2.1, the nearest in size.

    Args:
        attention: "mlra" or "dense".
    """
    values = _deep(72, attention)
    values["model"] |= {"hidden_size": 4096, "num_heads": 32}
    values["train"] |= {"micro_batch_size": 1}
    values["optim"] |= {"lr": 1e-4}
    return values


def _classic(num_layers: int, hidden_size: int, num_heads: int, lr: float, micro_batch_size: int) -> dict[str, Any]:
    """The four shapes of Radford et al. 2019, dense; peak rates as Brown et al. 2020 (GPT-3), table 2.1, has them."""
    return {
        "model": {
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "attention": "dense",
        },
        "train": {
            "steps": 50_000,
            "global_batch_size": 512,
            "micro_batch_size": micro_batch_size,
            "sequence_length": 1024,
            "precision": "bf16",
        },
        "optim": {"lr": lr, "warmup_steps": 2_000},
        "evaluation": {"every": 1_000, "batches": 8},
        "checkpoint": {"every": 1_000},
    }


def _all_presets() -> dict[str, dict[str, Any]]:
    presets = {"debug": _debug(), "laptop": _laptop()}
    presets |= {f"gpt2-mlra-{depth}l": _deep(depth, "mlra") for depth in DEEP_LAYERS}
    presets |= {f"gpt2-{depth}l": _deep(depth, "dense") for depth in DEEP_LAYERS}
    presets |= {"gpt2-mlra-72l-wide": _wide("mlra"), "gpt2-72l-wide": _wide("dense")}
    presets["gpt2"] = _classic(12, 768, 12, lr=6e-4, micro_batch_size=16)
    presets["gpt2-medium"] = _classic(24, 1024, 16, lr=3e-4, micro_batch_size=16)
    presets["gpt2-large"] = _classic(36, 1280, 20, lr=2.5e-4, micro_batch_size=8)
    presets["gpt2-xl"] = _classic(48, 1600, 25, lr=2e-4, micro_batch_size=4)
    return presets


def preset_names() -> tuple[str, ...]:
    """Returns the names of all presets, smallest first."""
    return tuple(_all_presets())


def preset_values(name: str) -> dict[str, Any]:
    """Returns a preset as plain nested values, a new mapping at every call.

    Args:
        name: One of `preset_names()`.

    Returns:
        The values that differ from the schema's defaults, and the preset's name.

    Raises:
        ConfigError: There is no such preset; the nearest name is given.
    """
    presets = _all_presets()
    if name not in presets:
        raise ConfigError([Problem("preset", name, "unknown preset" + nearest(name, presets))])
    return {"preset": name, **presets[name]}


def preset(name: str) -> Config:
    """Returns the configuration of a preset.

    Args:
        name: One of `preset_names()`.

    Returns:
        The preset with every default filled in.

    Raises:
        ConfigError: There is no such preset.
    """
    return Config.from_dict(preset_values(name))
