"""GPT-2 with low-rank attention projections (MLRA) for Hugging Face transformers: configuration and model.

With low_rank_linear.py the file stands alone (torch and transformers only): both travel with exported checkpoints as
remote code:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Each of the attention's projections q, k, v, o is dense or the product of two factors, y = (x W_D^T) W_U^T + b (Chung et
al. 2024, arXiv 2409.07787). All else is GPT-2: pre-LN blocks, learned positions, the tanh form of GELU, a tied head.
Two options: queries and keys may be normalised (arXiv 2302.05442), and token embeddings scaled where they enter.
Written for transformers 5.23.

Legend of shape suffixes: B batch, S sequence (queries), T keys, D hidden, N heads, H head dimension, R rank,
F feed-forward, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

# Relative: that is how transformers finds the files that remote code needs.
from .low_rank_linear import INITIALIZATIONS, LowRankLinear

PROJECTIONS = ("q", "k", "v", "o")


class MlraConfig(PreTrainedConfig):
    """Shape of the model.

    Attributes:
        vocab_size: Number of tokens V.
        max_position_embeddings: Number of learned positions: the longest possible sequence.
        num_hidden_layers: Number of blocks.
        hidden_size: Width D.
        num_attention_heads: Number of heads N; must divide D.
        intermediate_size: Inner width F of the feed-forward layers; None means 4 D.
        attention_rank: Rank R of the factorised projections; not needed when none is.
        factorised_projections: Which of "q", "k", "v", "o" are products of two factors.
        embedding_dropout: Dropout after the sum of token and position embedding, in training.
        attention_dropout: Dropout of the attention's weights, in training.
        residual_dropout: Dropout of each sublayer's output, in training.
        layer_norm_eps: Epsilon of every layer norm.
        qk_norm: Whether queries and keys pass a layer norm without bias over the width of a head.
        embedding_scale: What token embeddings are multiplied by on entry; the head takes them as they are.
        initializer_range: Standard deviation of weights that no checkpoint gives; those of maps that write to the
            residual stream are divided by sqrt(2 num_hidden_layers), as in GPT-2.
        attention_init: Initialization of factors that no checkpoint gives: "gpt2", "xavier" or "matched".
        use_cache: Whether the forward pass returns its keys and values by default.
    """

    model_type = "mlra_gpt2"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 50257
    max_position_embeddings: int = 1024
    num_hidden_layers: int = 12
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    attention_rank: int | None = 384
    factorised_projections: list[str] | tuple[str, ...] = ("q", "k", "v")
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    qk_norm: bool = False
    embedding_scale: float = 1.0
    initializer_range: float = 0.02
    attention_init: str = "gpt2"
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; "
                "use a multiple of it"
            )
        if unknown := sorted(set(self.factorised_projections) - set(PROJECTIONS)):
            raise ValueError(f"factorised_projections may name q, k, v and o, not {', '.join(unknown)}")
        if self.factorised_projections and not (self.attention_rank and 1 <= self.attention_rank <= self.hidden_size):
            raise ValueError(
                f"attention_rank is {self.attention_rank}; use 1 to {self.hidden_size}, the hidden_size, or leave "
                "factorised_projections empty"
            )
        if self.attention_init not in INITIALIZATIONS:
            raise ValueError(f"attention_init is {self.attention_init!r}; use {', '.join(INITIALIZATIONS)}")
        # A list, as JSON gives it back, so that a configuration equals itself after saving and loading.
        self.factorised_projections = [name for name in PROJECTIONS if name in self.factorised_projections]
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)


def eager_attention(
    module: nn.Module,
    query_BNSH: Tensor,
    key_BNTH: Tensor,
    value_BNTH: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch, with transformers' signature; keys and values include cached ones.

    The mask is added to the logits, broadcast to [B, N, S, T].

    Returns:
        The mixed values [B, S, N, H] and the weights [B, N, S, T].
    """
    logits_BNST = query_BNSH @ key_BNTH.transpose(-1, -2) * scaling
    if attention_mask is not None:
        logits_BNST = logits_BNST + attention_mask
    accurate = torch.promote_types(logits_BNST.dtype, torch.float32)
    weights_BNST = torch.softmax(logits_BNST, dim=-1, dtype=accurate).to(value_BNTH.dtype)
    dropped_BNST = functional.dropout(weights_BNST, p=dropout, training=module.training)
    return (dropped_BNST @ value_BNTH).transpose(1, 2).contiguous(), weights_BNST


class MlraAttention(nn.Module):
    """Causal self-attention whose projections may each be factorised.

    q, k, v, o: weight [D, D], bias [D], or where factorised down.weight [R, D], up.weight [D, R], up.bias [D]
    q_norm, k_norm, where there are: weight [H]
    """

    def __init__(self, config: MlraConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q = _projection(config, "q")
        self.k = _projection(config, "k")
        self.v = _projection(config, "v")
        self.o = _projection(config, "o")
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps, bias=False)
            self.k_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps, bias=False)

    def forward(
        self,
        hidden_BSD: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the attention's contribution to the residual stream and, where they are computed, its weights.

        Without a mask attention is causal: each token sees itself and all earlier ones. Keys and values are appended to
        `past_key_values`. `kwargs` go to the implementation of attention.
        """
        # A static cache counts in a tensor of its own, which the update below changes: the sum is a copy.
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx) + 0
        query_BNSH, key_BNTH, value_BNTH = (
            projection(hidden_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        query_BNSH, key_BNTH = self.q_norm(query_BNSH), self.k_norm(key_BNTH)
        if past_key_values is not None:
            key_BNTH, value_BNTH = past_key_values.update(key_BNTH, value_BNTH, self.layer_idx)
        if attention_mask is None and self._needs_mask(hidden_BSD, past_key_values, num_past):
            attention_mask = _causal_mask(hidden_BSD, key_BNTH.shape[2], num_past)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        mixed_BSNH, weights_BNST = attend(
            self,
            query_BNSH,
            key_BNTH,
            value_BNTH,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o(mixed_BSNH.flatten(2)), weights_BNST

    def _needs_mask(self, hidden_BSD: Tensor, past_key_values: Cache | None, num_past: int | Tensor) -> bool:
        """Whether attention without a mask would not be causal."""
        if getattr(past_key_values, "is_compileable", False):
            return True  # keys of tokens to come are there already, and are zero
        if hidden_BSD.shape[1] == 1:
            return False
        # sdpa without a mask is causal as if the first query stood at the first key; eager is not causal at all.
        is_filled = not isinstance(num_past, int) or num_past > 0
        return is_filled or self.config._attn_implementation == "eager"


def _causal_mask(hidden_BSD: Tensor, num_keys: int, num_past: int | Tensor) -> Tensor:
    """A mask [1, 1, S, T] to add to the logits: 0 up to the query's own position, the lowest number after it."""
    keys_T = torch.arange(num_keys, device=hidden_BSD.device)
    queries_S = torch.arange(hidden_BSD.shape[1], device=hidden_BSD.device) + num_past
    lowest = torch.finfo(hidden_BSD.dtype).min
    hidden_ST = keys_T[None] > queries_S[:, None]
    return torch.zeros_like(hidden_ST, dtype=hidden_BSD.dtype).masked_fill(hidden_ST, lowest)[None, None]


def _projection(config: MlraConfig, name: str) -> nn.Module:
    width, scale = config.hidden_size, _residual_scale(config) if name == "o" else 1.0
    if name not in config.factorised_projections:
        return _with_initial_std(nn.Linear(width, width), config.initializer_range * scale)
    assert config.attention_rank is not None
    result = LowRankLinear(
        width,
        width,
        config.attention_rank,
        init=config.attention_init,
        std=config.initializer_range,
        up_scale=scale,
    )
    _with_initial_std(result.down, result.down_std)
    _with_initial_std(result.up, result.up_std)
    return result


def _residual_scale(config: MlraConfig) -> float:
    """What the initial weights of a map that writes to the residual stream are multiplied by."""
    return 1.0 / math.sqrt(2.0 * config.num_hidden_layers)


def _with_initial_std(layer: nn.Linear, std: float) -> nn.Linear:
    """Marks a layer with the standard deviation of its initial weights, where it is another one than the model's.

    transformers initializes weights that a checkpoint lacks layer by layer, after the model has been built.
    """
    layer.initial_std = std  # type: ignore[assignment]
    return layer


class ScaledEmbedding(nn.Embedding):
    """Token embedding that scales what it returns, where the scale is not 1."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        embedded = super().forward(input)
        return embedded if self.scale == 1.0 else embedded * self.scale


class MlraFeedForward(nn.Module):
    """GPT-2's two-layer perceptron.

    fc_in.weight: [F, D]; fc_in.bias: [F]; fc_out.weight: [D, F]; fc_out.bias: [D]
    """

    def __init__(self, config: MlraConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.fc_in = nn.Linear(config.hidden_size, config.intermediate_size)
        fc_out = nn.Linear(config.intermediate_size, config.hidden_size)
        self.fc_out = _with_initial_std(fc_out, config.initializer_range * _residual_scale(config))

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        return self.fc_out(functional.gelu(self.fc_in(hidden_BSD), approximate="tanh"))


class MlraBlock(GradientCheckpointingLayer):
    """Pre-LN transformer block: h + attention(LN(h)), then h + feed-forward(LN(h)).

    attention_norm, mlp_norm: weight [D], bias [D]
    """

    def __init__(self, config: MlraConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = MlraAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MlraFeedForward(config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_BSD: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attended_BSD, weights_BNST = self.attention(
            self.attention_norm(hidden_BSD), attention_mask, past_key_values, **kwargs
        )
        hidden_BSD = hidden_BSD + self.dropout(attended_BSD)
        return hidden_BSD + self.dropout(self.mlp(self.mlp_norm(hidden_BSD))), weights_BNST


class MlraPreTrainedModel(PreTrainedModel):
    """What transformers wants to know about the models below."""

    config_class = MlraConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MlraBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std: Any = getattr(module, "initial_std", None)
        if std is not None:
            assert isinstance(module, nn.Linear)
            nn.init.normal_(module.weight, std=std)


class MlraModel(MlraPreTrainedModel):
    """The blocks with embeddings and final norm, without a head.

    embedding.weight: [V, D]; positions.weight: [max_position_embeddings, D]; final_norm: weight [D], bias [D]
    """

    def __init__(self, config: MlraConfig) -> None:
        super().__init__(config)
        self.embedding: nn.Module = ScaledEmbedding(config.vocab_size, config.hidden_size, config.embedding_scale)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(MlraBlock(config, index) for index in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.embedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Computes the hidden states.

        Args:
            input_ids: Token ids [B, S].
            attention_mask: 1 for tokens and 0 for padding, [B, T] with the cached ones; or a mask [B, 1, S, T].
            position_ids: Position of each token [B, S]; by default counted from the first token that is not padding.
            past_key_values: Keys and values of earlier tokens, appended to.
            inputs_embeds: Token embeddings [B, S, D], as `get_input_embeddings()` returns them, instead of input_ids.
            use_cache: Whether to return keys and values.
            output_attentions: Whether to return the attention's weights (with attn_implementation="eager" only).
            output_hidden_states: Whether to return the hidden state before each block, and the last one.
            **kwargs: Passed on to the implementation of attention.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        has_weights = self.config.output_attentions if output_attentions is None else output_attentions
        has_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if has_weights and self.config._attn_implementation != "eager":
            raise ValueError('output_attentions needs attn_implementation="eager": load the model with it')
        is_recomputing = self.gradient_checkpointing and self.training
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not is_recomputing
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        embedded_BSD = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        # By position: transformers 5.24 has renamed past_key_values to cache.
        mask = create_causal_mask(self.config, embedded_BSD, attention_mask, past_key_values, position_ids)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = _default_positions(embedded_BSD, attention_mask, past)
        self._check_positions(position_ids, attention_mask, past)
        hidden_BSD = self.dropout(embedded_BSD + self.positions(position_ids))
        states: list[Tensor] = []
        weights: list[Tensor] = []
        for block in self.blocks:
            states.append(hidden_BSD)
            hidden_BSD, weights_BNST = block(hidden_BSD, attention_mask=mask, past_key_values=past_key_values, **kwargs)
            weights.append(weights_BNST)
        hidden_BSD = self.final_norm(hidden_BSD)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_BSD,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, hidden_BSD) if has_states else None,
            attentions=tuple(weights) if has_weights else None,
        )

    def _check_positions(self, positions_BS: Tensor, attention_mask: Tensor | None, past: int | Tensor) -> None:
        """Refuses tokens beyond the last position, for which the look-up's own error names nothing."""
        if torch.compiler.is_compiling() or positions_BS.is_meta:
            return
        limit = self.config.max_position_embeddings
        longest = attention_mask.shape[-1] if attention_mask is not None else past + positions_BS.shape[1]
        # Reading a position waits for a GPU: that is worth it only where so many tokens may be too many.
        if positions_BS.is_cpu or (isinstance(longest, int) and longest > limit):
            needed = int(positions_BS.max()) + 1
            if needed > limit:
                raise ValueError(
                    f"{needed} tokens do not fit: the model has {limit} positions (max_position_embeddings)"
                )


def _default_positions(embedded_BSD: Tensor, attention_mask: Tensor | None, past: int | Tensor) -> Tensor:
    """Positions [B or 1, S] of the new tokens, counted from the first token that is not padding."""
    length = embedded_BSD.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        counted_BT = attention_mask.long().cumsum(-1) - 1
        return counted_BT[:, -length:].clamp(min=0)
    return (torch.arange(length, device=embedded_BSD.device) + past).unsqueeze(0)


class MlraForCausalLM(MlraPreTrainedModel, GenerationMixin):
    """The model with its language-model head, which shares the token embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012 - transformers' own form

    def __init__(self, config: MlraConfig) -> None:
        super().__init__(config)
        self.model = MlraModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Computes the logits of the next token and, given labels, the mean loss.

        `labels` are token ids [B, S], which are shifted in here (labels = input_ids is a language model); -100 is left
        out. `logits_to_keep` is the number of last tokens to compute logits for (0: all), or their indices. All else is
        passed on to MlraModel.forward, `kwargs` also to the loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BSV, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# save_pretrained then writes this file beside the weights, and the map that the auto classes need into config.json.
MlraConfig.register_for_auto_class()
MlraForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["MlraConfig", "MlraForCausalLM", "MlraModel"]
