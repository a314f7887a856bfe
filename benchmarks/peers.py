"""Other trainers of the same shape, as their users set them up: transformers with DeepSpeed, and litgpt."""

import sys
from importlib.util import find_spec
from pathlib import Path

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.baseline_gpt2 import decay_groups
from benchmarks.contenders import BETAS, CLIP, EPSILON, LEARNING_RATE, WEIGHT_DECAY, Shape, Step
from mlra_scale.data import Batch

ROOT = Path(__file__).resolve().parents[1]


def step_of_zero(module: nn.Module, device: torch.device, precision: str) -> Step:
    """A module under DeepSpeed's ZeRO-1, with torch's fused AdamW, clipping and bf16 by DeepSpeed.

    The bucket holds the whole model: DeepSpeed's own default takes half a billion numbers whatever the model's size.
    """
    module.to(device).train()
    optimizer = torch.optim.AdamW(
        decay_groups(module, WEIGHT_DECAY), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,  # a number that it only multiplies
            "gradient_accumulation_steps": 1,
            "gradient_clipping": CLIP,
            "bf16": {"enabled": precision == "bf16"},
            "zero_optimization": {
                "stage": 1,
                "reduce_bucket_size": sum(parameter.numel() for parameter in module.parameters()),
            },
        },
    )

    def step(batch: Batch) -> float:
        loss = engine(batch.tokens_BS.to(device, non_blocking=True), batch.targets_BS.to(device, non_blocking=True))
        engine.backward(loss)
        engine.step()
        return float(loss.item())

    return step


def why_no_litgpt() -> str | None:
    """What is missing for litgpt, with the remedy, or None."""
    missing = [name for name in ("litgpt", "lightning", "jsonargparse") if find_spec(name) is None]
    pip = f"{sys.prefix}/bin/pip install"
    # In two steps: litgpt asks for a huggingface_hub older than transformers takes, and runs with the newer.
    remedy = f"{pip} -c {ROOT}/constraints.txt -e '{ROOT}[bench]' && {pip} --no-deps litgpt==0.5.13"
    return f"not installed: {', '.join(missing)} ({remedy})" if missing else None


class LitGPT(nn.Module):
    """litgpt's GPT at GPT-2's depth, width, heads and MLP, its loss over all tokens.

    Its model has no learned positions: rotary ones on a quarter of each head stand for them, its default. The head is
    tied to the embedding, as its own pre-training does on request. So it computes something else with almost as many
    parameters, and starts from weights of its own.
    """

    DIFFERENCE = "rotary positions on a quarter of each head in place of learned ones"

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from litgpt.model import GPT, Config

        config = Config(
            block_size=shape.sequence_length,
            n_layer=shape.num_layers,
            n_embd=shape.hidden_size,
            n_head=shape.num_heads,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size,
            norm_class_name="LayerNorm",
            parallel_residual=False,
            rotary_percentage=0.25,
            bias=True,
            attn_bias=True,
            lm_head_bias=False,
            mlp_class_name="GptNeoxMLP",
            intermediate_size=4 * shape.hidden_size,
            gelu_approximate="tanh",
        )
        self.model = GPT(config)
        self.model.apply(self.model._init_weights)
        self.model.lm_head.weight = self.model.transformer.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(tokens)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
