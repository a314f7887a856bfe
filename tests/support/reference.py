"""GPT-2 with multi-head low-rank attention in plain PyTorch: the oracle every other implementation is compared with.

It uses torch and nothing else, spells the mathematics out (no fused kernels, no parallelism, no dropout) and works in
float64. Its parameters carry the project's canonical names, so full canonical weights load with ``load_state_dict``
once the padded rows of the embedding are cut off. It is an oracle only: it is not trained with, not benchmarked and
not shipped in exports.

Legend of shape suffixes: B batch, S sequence, T key positions (= S), D hidden, N heads, H head dimension, R rank,
F feed-forward, V vocabulary, P number of positions.
"""

import math

import torch
from torch import Tensor, nn


class LowRankProjection(nn.Module):
    """``y = (x down^T) up^T + bias`` with nothing between the two factors.

    Weights: down.weight [R, in], up.weight [out, R], up.bias [out].
    """

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=True)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.up(self.down(x_BSD))


def unit(x: Tensor) -> Tensor:
    """Vector of length 1 in the direction of x."""
    return x / x.norm()


class SpectralMap(nn.Module):
    """``y = gain / sigma(W) x W^T + bias``: sigmaReparam (Zhai et al. 2023) of a linear map, here without its weights.

    sigma(W) = u^T W v; u and v come of one power iteration, which begins at ``vector`` and leaves ``next_vector``.
    """

    vector: Tensor
    next_vector: Tensor

    def scaled(self, x: Tensor, weight_OI: Tensor, gain: Tensor, bias_O: Tensor, u_O: Tensor, v_I: Tensor) -> Tensor:
        return x @ (gain / (u_O @ weight_OI @ v_I) * weight_OI).T + bias_O


class SpectralLinear(SpectralMap):
    """A dense map; the vector is a right singular vector (of length in), or a left one (of length out).

    Weights: weight [out, in], bias [out], gain [1].
    """

    def __init__(self, in_features: int, out_features: int, is_left: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.gain = nn.Parameter(torch.ones(1))
        self.is_left = is_left

    def forward(self, x_BSD: Tensor) -> Tensor:
        with torch.no_grad():
            if self.is_left:
                v_I = unit(self.weight.T @ self.vector)
                u_O = self.next_vector = unit(self.weight @ v_I)
            else:
                u_O = unit(self.weight @ self.vector)
                v_I = self.next_vector = unit(self.weight.T @ u_O)
        return self.scaled(x_BSD, self.weight, self.gain, self.bias, u_O, v_I)


class SpectralLowRankProjection(SpectralMap):
    """A factorised map, normalised as the product W = up down; the vector [R] stands between the factors.

    Weights: down.weight [R, in], up.weight [out, R], up.bias [out], up.gain [1].
    """

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=True)
        self.up.register_parameter("gain", nn.Parameter(torch.ones(1)))

    def forward(self, x_BSD: Tensor) -> Tensor:
        weight_OI = self.up.weight @ self.down.weight
        with torch.no_grad():
            v_I = unit(self.down.weight.T @ self.vector)
            u_O = unit(weight_OI @ v_I)
            self.next_vector = unit(self.up.weight.T @ u_O)
        return self.scaled(x_BSD, weight_OI, self.up.get_parameter("gain"), self.up.bias, u_O, v_I)


class ReferenceAttention(nn.Module):
    """Causal multi-head attention whose projections may each be factorised.

    Weights: q, k, v, o, each either weight [D, D] and bias [D] or down.weight [R, D], up.weight [D, R], up.bias [D],
    with sigmaReparam a gain [1] as well; with QK-norm q_norm.weight and k_norm.weight [H].
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        factorised: tuple[str, ...],
        rank: int | None,
        qk_norm_eps: float | None = None,
        sigma_reparam: bool = False,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads

        def projection(name: str) -> nn.Module:
            if name not in factorised:
                return linear(hidden_size, hidden_size, sigma_reparam, is_left=name == "o")
            assert rank is not None
            kind = SpectralLowRankProjection if sigma_reparam else LowRankProjection
            return kind(hidden_size, hidden_size, rank)

        self.q = projection("q")
        self.k = projection("k")
        self.v = projection("v")
        self.o = projection("o")
        self.qk_norm_eps = qk_norm_eps
        if qk_norm_eps is not None:
            self.q_norm = nn.LayerNorm(self.head_dim, eps=qk_norm_eps, bias=False)
            self.k_norm = nn.LayerNorm(self.head_dim, eps=qk_norm_eps, bias=False)

    def normalised(self, heads_BNSH: Tensor, weight_H: Tensor) -> Tensor:
        """QK-norm (arXiv 2302.05442): a layer norm without bias over the width of a head."""
        assert self.qk_norm_eps is not None
        centred_BNSH = heads_BNSH - heads_BNSH.mean(dim=-1, keepdim=True)
        variance_BNS1 = (centred_BNSH**2).mean(dim=-1, keepdim=True)
        return centred_BNSH / (variance_BNS1 + self.qk_norm_eps).sqrt() * weight_H

    def split_heads(self, x_BSD: Tensor) -> Tensor:
        """[B, S, N * H] -> [B, N, S, H]; head n owns features n * H to (n + 1) * H."""
        batch, sequence, _ = x_BSD.shape
        return x_BSD.view(batch, sequence, self.num_heads, self.head_dim).transpose(1, 2)

    def logits(self, x_BSD: Tensor) -> Tensor:
        """Scaled, unmasked attention logits [B, N, S, T]."""
        q_BNSH = self.split_heads(self.q(x_BSD))
        k_BNTH = self.split_heads(self.k(x_BSD))
        if self.qk_norm_eps is not None:
            q_BNSH = self.normalised(q_BNSH, self.q_norm.weight)
            k_BNTH = self.normalised(k_BNTH, self.k_norm.weight)
        return q_BNSH @ k_BNTH.transpose(-1, -2) / math.sqrt(self.head_dim)

    def forward(self, x_BSD: Tensor, mask_B1ST: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the attention output [B, S, D] and the logits [B, N, S, T], masked with -inf."""
        logits_BNST = self.logits(x_BSD).masked_fill(~mask_B1ST, -math.inf)
        shifted_BNST = logits_BNST - logits_BNST.amax(dim=-1, keepdim=True).detach()
        weights_BNST = shifted_BNST.exp()
        weights_BNST = weights_BNST / weights_BNST.sum(dim=-1, keepdim=True)
        mixed_BNSH = weights_BNST @ self.split_heads(self.v(x_BSD))
        return self.o(mixed_BNSH.transpose(1, 2).reshape(x_BSD.shape)), logits_BNST


def gelu_tanh(x: Tensor) -> Tensor:
    """GPT-2's GELU: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def linear(in_features: int, out_features: int, sigma_reparam: bool, is_left: bool) -> nn.Module:
    """A dense map, plain or with sigmaReparam (and then with its vector at the output or not)."""
    if sigma_reparam:
        return SpectralLinear(in_features, out_features, is_left)
    return nn.Linear(in_features, out_features)


class ReferenceMLP(nn.Module):
    """Feed-forward block. Weights: fc_in.weight [F, D], fc_in.bias [F], fc_out.weight [D, F], fc_out.bias [D].

    With sigmaReparam also fc_in.gain and fc_out.gain [1].
    """

    def __init__(self, hidden_size: int, ffn_hidden_size: int, sigma_reparam: bool = False):
        super().__init__()
        self.fc_in = linear(hidden_size, ffn_hidden_size, sigma_reparam, is_left=False)
        self.fc_out = linear(ffn_hidden_size, hidden_size, sigma_reparam, is_left=True)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.fc_out(gelu_tanh(self.fc_in(x_BSD)))


class ReferenceBlock(nn.Module):
    """Pre-LN transformer block. Weights: attention_norm and mlp_norm (weight, bias [D]), attention, mlp.

    Both norms are multiplied by norm_factor: 1/sqrt(l) in block l with LayerNorm Scaling (arXiv 2502.05795), else 1.
    Both branches are multiplied by branch_factor: L0/L with CompleteP (arXiv 2505.01618, alpha = 1), else 1.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        ffn_hidden_size: int,
        factorised: tuple[str, ...],
        rank: int | None,
        layer_norm_eps: float,
        qk_norm: bool = False,
        sigma_reparam: bool = False,
        norm_factor: float = 1.0,
        branch_factor: float = 1.0,
    ):
        super().__init__()
        self.branch_factor = branch_factor
        qk_norm_eps = layer_norm_eps if qk_norm else None
        self.norm_factor = norm_factor
        self.attention_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = ReferenceAttention(hidden_size, num_heads, factorised, rank, qk_norm_eps, sigma_reparam)
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mlp = ReferenceMLP(hidden_size, ffn_hidden_size, sigma_reparam)

    def forward(self, x_BSD: Tensor, mask_B1ST: Tensor) -> tuple[Tensor, Tensor]:
        attended_BSD, logits_BNST = self.attention(self.norm_factor * self.attention_norm(x_BSD), mask_B1ST)
        x_BSD = x_BSD + self.branch_factor * attended_BSD
        return x_BSD + self.branch_factor * self.mlp(self.norm_factor * self.mlp_norm(x_BSD)), logits_BNST


class ReferenceGPT(nn.Module):
    """GPT-2 with dense or low-rank attention projections, learned positions and a tied head.

    Weights: embedding.weight [V, D] (also the head), positions.weight [P, D], blocks.{i}, final_norm.{weight,bias} [D].

    Args:
        vocab_size: number of real tokens V; there is no padding here.
        factorised: which of "q", "k", "v", "o" are low-rank; empty for dense attention.
        rank: R of the factorised projections; not used when none is.
        qk_norm: whether queries and keys are normalised.
        sigma_reparam: whether each linear map of a block is; then set_vectors comes before the first forward pass.
        layer_norm_scaling: whether the norms of block l, from 1, are multiplied by 1/sqrt(l).
        embedding_factor: what token embeddings are multiplied by on entry, but not in the head (arXiv 2312.16903).
        branch_factor: what both branches of every block are multiplied by.
    """

    def __init__(
        self,
        vocab_size: int,
        max_positions: int,
        num_layers: int,
        hidden_size: int,
        num_heads: int,
        ffn_hidden_size: int,
        factorised: tuple[str, ...] = (),
        rank: int | None = None,
        layer_norm_eps: float = 1e-5,
        qk_norm: bool = False,
        sigma_reparam: bool = False,
        layer_norm_scaling: bool = False,
        embedding_factor: float = 1.0,
        branch_factor: float = 1.0,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Embedding(max_positions, hidden_size)
        self.blocks = nn.ModuleList(
            ReferenceBlock(
                hidden_size,
                num_heads,
                ffn_hidden_size,
                tuple(factorised),
                rank,
                layer_norm_eps,
                qk_norm,
                sigma_reparam,
                1.0 / math.sqrt(block) if layer_norm_scaling else 1.0,
                branch_factor,
            )
            for block in range(1, num_layers + 1)
        )
        self.embedding_factor = embedding_factor
        self.final_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def set_vectors(self, vectors: dict[str, Tensor]) -> None:
        """Sets where the power iterations of sigmaReparam begin, by canonical name of the map (unit vectors)."""
        maps = {name: module for name, module in self.named_modules() if isinstance(module, SpectralMap)}
        assert maps.keys() == vectors.keys(), maps.keys() ^ vectors.keys()
        for name, module in maps.items():
            module.vector = vectors[name]

    def advance(self) -> None:
        """Ends a training step: the power iterations continue from where the last forward pass left them."""
        for module in self.modules():
            if isinstance(module, SpectralMap):
                module.vector = module.next_vector

    def _run(
        self, tokens_BS: Tensor, positions_BS: Tensor | None, documents_BS: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        sequence = tokens_BS.shape[1]
        order_S = torch.arange(sequence, device=tokens_BS.device)
        mask_B1ST = (order_S[:, None] >= order_S[None, :])[None, None]
        if documents_BS is not None:
            mask_B1ST = mask_B1ST & (documents_BS[:, :, None] == documents_BS[:, None, :])[:, None]
        if positions_BS is None:
            positions_BS = order_S.expand_as(tokens_BS)
        x_BSD = self.embedding_factor * self.embedding(tokens_BS) + self.positions(positions_BS)
        attention_logits = []
        for block in self.blocks:
            x_BSD, logits_BNST = block(x_BSD, mask_B1ST)
            attention_logits.append(logits_BNST)
        return self.final_norm(x_BSD), attention_logits

    def forward(self, tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Logits of the next token [B, S, V], from token ids [B, S].

        Positions None: 0, 1, ..., S - 1. With documents, a token attends only within its own.
        """
        hidden_BSD, _ = self._run(tokens, positions, documents)
        return hidden_BSD @ self.embedding.weight.T

    def attention_logits(
        self, tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None
    ) -> list[Tensor]:
        """Returns, for each layer, the scaled attention logits [B, N, S, T]; forbidden pairs hold -inf.

        Arguments as in forward.
        """
        return self._run(tokens, positions, documents)[1]

    def loss(self, logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
        """Mean cross-entropy in nats, plus ``z_loss`` times the mean of log^2 Z (Chowdhery et al. 2022, sec. 5)."""
        log_z_BS = torch.logsumexp(logits, dim=-1)
        target_logits_BS = logits.gather(-1, targets[..., None]).squeeze(-1)
        loss = (log_z_BS - target_logits_BS).mean()
        # The branch keeps a loss without the term bitwise free of it.
        return loss + z_loss * (log_z_BS**2).mean() if z_loss else loss
