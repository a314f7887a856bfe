"""Named starting points. Of the deep presets only the depth is chosen; all else is derived in one function.

docs/configuration.md has a table of all presets with their number of parameters. All MLRA presets have rank D/2, where
MLRA and its dense twin have equally many.
"""

from __future__ import annotations

from typing import Any

from mlra_scale.config.problems import ConfigError, Problem, nearest
from mlra_scale.config.schema import Config

DEEP_LAYERS = (48, 72, 96, 192)
_NO_EMBEDDING_DECAY = ({"kind": "embedding", "weight_decay": 0.0}, {"kind": "positions", "weight_decay": 0.0})


def _small(
    num_layers: int, hidden_size: int, vocab_size: int, length: int, steps: int, warmup: int, log_every: int, every: int
) -> dict[str, Any]:
    """A thin model in fp32 for a whole run on CPUs, with an evaluation and a checkpoint every `every` steps."""
    model = {"num_layers": num_layers, "hidden_size": hidden_size, "num_heads": 4, "vocab_size": vocab_size}
    train = {"steps": steps, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": length}
    return {
        "model": model | {"max_positions": length, "init_width_rule": "inverse_sqrt_width"},
        "train": train | {"precision": "fp32", "log_every": log_every},
        "optim": {"lr": 3e-3, "warmup_steps": warmup},
        "tev": {"every": log_every},
        "evaluation": {"every": every, "batches": 2},
        "checkpoint": {"every": every},
    }


def _large(
    num_layers: int, hidden_size: int, num_heads: int, attention: str, lr: float, micro_batch_size: int
) -> dict[str, Any]:
    """A GPT-2 of full size with the recipe of all of them: 50,000 steps of 512 x 1024 tokens in bf16.

    Embedding and positions have no weight decay, as in OLMo 2 (arXiv 2501.00656); docs/studies/combine decided it. The
    thin presets, from which the studies start, keep it.
    """
    model = {"num_layers": num_layers, "hidden_size": hidden_size, "num_heads": num_heads, "attention": attention}
    train = {"steps": 50_000, "global_batch_size": 512, "micro_batch_size": micro_batch_size, "sequence_length": 1024}
    return {
        "model": model,
        "train": train | {"precision": "bf16"},
        "optim": {"lr": lr, "warmup_steps": 2_000, "rules": [dict(rule) for rule in _NO_EMBEDDING_DECAY]},
        "evaluation": {"every": 1_000, "batches": 8},
        "checkpoint": {"every": 1_000},
    }


def _deep(num_layers: int, attention: str) -> dict[str, Any]:
    """The deep presets, of which only the depth is chosen.

    Width 1024 and 16 heads for every depth, and one recipe for all of them (batch of 512 x 1024 tokens, peak rate
    2.5e-4, 2,000 steps of warm-up, 50,000 steps: 26 G tokens), so that two members differ in depth and in nothing
    else. Only the micro-batch, which does not change the mathematics, follows the depth: the largest power of two with
    num_layers * micro_batch_size <= 384, which keeps the memory of activations about constant.
    """
    micro_batch_size = 2 ** ((384 // num_layers).bit_length() - 1)
    return _large(num_layers, 1024, 16, attention, lr=2.5e-4, micro_batch_size=micro_batch_size)


def _wide(attention: str) -> dict[str, Any]:
    """Deep and wide: 72 layers and the recipe of the deep presets at width 4096, 32 heads as in Touvron et al. 2023.

    Its training state fits into no GPU, and over many nodes its batch is too small for data parallelism alone: tensor
    and pipeline parallelism are needed (docs/planning.md). The peak rate is that of the 13 B model of Brown et al. 2020
    (GPT-3), table 2.1, the nearest in size.
    """
    return _large(72, 4096, 32, attention, lr=1e-4, micro_batch_size=1)


def _all_presets() -> dict[str, dict[str, Any]]:
    presets = {
        # Seconds on one core: for tests and for looking at a whole run.
        "debug": _small(4, 64, vocab_size=512, length=64, steps=20, warmup=2, log_every=5, every=10),
        # Deep and thin, one to two minutes in two processes on two CPU cores.
        "laptop": _small(24, 128, vocab_size=4096, length=128, steps=150, warmup=20, log_every=10, every=50),
    }
    presets |= {f"gpt2-mlra-{depth}l": _deep(depth, "mlra") for depth in DEEP_LAYERS}
    presets |= {f"gpt2-{depth}l": _deep(depth, "dense") for depth in DEEP_LAYERS}
    presets |= {"gpt2-mlra-72l-wide": _wide("mlra"), "gpt2-72l-wide": _wide("dense")}
    # The four shapes of Radford et al. 2019; peak rates as Brown et al. 2020 (GPT-3), table 2.1, has them.
    presets["gpt2"] = _large(12, 768, 12, "dense", lr=6e-4, micro_batch_size=16)
    presets["gpt2-medium"] = _large(24, 1024, 16, "dense", lr=3e-4, micro_batch_size=16)
    presets["gpt2-large"] = _large(36, 1280, 20, "dense", lr=2.5e-4, micro_batch_size=8)
    presets["gpt2-xl"] = _large(48, 1600, 25, "dense", lr=2e-4, micro_batch_size=4)
    return presets


def preset_names() -> tuple[str, ...]:
    """Returns the names of all presets, smallest first."""
    return tuple(_all_presets())


def preset_values(name: str) -> dict[str, Any]:
    """Returns the values of a preset that differ from the schema's defaults, and its name, as a new nested mapping.

    Raises:
        ConfigError: There is no such preset; the nearest name is given.
    """
    presets = _all_presets()
    if name not in presets:
        raise ConfigError([Problem("preset", name, "unknown preset" + nearest(name, presets))])
    return {"preset": name, **presets[name]}


def preset(name: str) -> Config:
    """Returns the configuration of a preset, with every default filled in.

    Raises:
        ConfigError: There is no such preset.
    """
    return Config.from_dict(preset_values(name))
