"""A plain PyTorch GPT-2 as one would tune it by hand, to measure against; nothing of ours is in it.

One fused projection for query, key and value, torch's scaled_dot_product_attention, tanh GELU, a tied head, one cross
entropy over all tokens, fused AdamW. The weights have the names and shapes of the package's parameter table only where
`load_weights` translates them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Pre-LN transformer block."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_out = nn.Linear(hidden_size, hidden_size)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp_in = nn.Linear(hidden_size, 4 * hidden_size)
        self.mlp_out = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, size = hidden.shape
        qkv = self.qkv(self.attention_norm(hidden)).view(batch, length, 3, self.num_heads, size // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        heads = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(heads.transpose(1, 2).reshape(batch, length, size))
        inner = functional.gelu(self.mlp_in(self.mlp_norm(hidden)), approximate="tanh")
        return hidden + self.mlp_out(inner)


class BaselineGPT2(nn.Module):
    """GPT-2 that returns the mean loss of a batch."""

    def __init__(self, vocab_size: int, max_positions: int, num_layers: int, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Embedding(max_positions, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(hidden_size)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits = functional.linear(self.final_norm(hidden), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes over the weights of a dense model, given by the names of the package's parameter table."""
        parts = {
            "tokens.weight": weights["embedding.weight"][: self.tokens.num_embeddings],
            "positions.weight": weights["positions.weight"],
        }
        names = {"attention.o": "attention_out", "mlp.fc_in": "mlp_in", "mlp.fc_out": "mlp_out"}
        names |= {"attention_norm": "attention_norm", "mlp_norm": "mlp_norm"}
        for kind in ("weight", "bias"):
            parts[f"final_norm.{kind}"] = weights[f"final_norm.{kind}"]
            for index in range(len(self.blocks)):
                prefix = f"blocks.{index}"
                qkv = [weights[f"{prefix}.attention.{projection}.{kind}"] for projection in "qkv"]
                parts[f"{prefix}.qkv.{kind}"] = torch.cat(qkv)
                for theirs, ours in names.items():
                    parts[f"{prefix}.{ours}.{kind}"] = weights[f"{prefix}.{theirs}.{kind}"]
        self.load_state_dict(parts)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices and embeddings, none for biases and norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
