"""The model file that exports ship, against the oracle and against transformers' own GPT-2."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache

from mlra_scale.shipped.modeling_mlra import MlraConfig, MlraForCausalLM
from tests.parity.test_reference import HEADS, HIDDEN, LAYERS, POSITIONS, RANK, VOCAB, make_huggingface, make_reference
from tests.support.reference import ReferenceGPT

FACTORISED = [(), ("q", "k", "v"), ("q", "k", "v", "o"), ("v",), ("k", "o")]
# QK-norm and scaled embeddings, as the oracle and as the shipped configuration have them.
OPTIONS: tuple[dict[str, Any], dict[str, Any]] = (
    {"qk_norm": True, "embedding_factor": 3.0},
    {"qk_norm": True, "embedding_scale": 3.0},
)
each_variant = pytest.mark.parametrize("factorised", FACTORISED, ids=lambda names: "".join(names) or "dense")
each_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def make_config(factorised: tuple[str, ...], **changes: Any) -> MlraConfig:
    return MlraConfig(
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        intermediate_size=96,
        attention_rank=RANK if factorised else None,
        factorised_projections=factorised,
        **changes,
    )


def make_model(
    reference: ReferenceGPT, factorised: tuple[str, ...], attention: str = "sdpa", **options: Any
) -> MlraForCausalLM:
    """The oracle's weights, every bias of them non-zero, in the shipped model; in float64."""
    model = MlraForCausalLM(make_config(factorised, attn_implementation=attention, **options)).double().eval()
    state = {f"model.{name}": tensor for name, tensor in reference.state_dict().items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # the head is the embedding
    assert model.lm_head.weight is model.model.embedding.weight
    return model


def random_tokens(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tokens() -> torch.Tensor:
    return random_tokens(3, 17)


@each_attention
@each_variant
def test_logits_equal_the_oracle(factorised: tuple[str, ...], attention: str, tokens: torch.Tensor) -> None:
    reference = make_reference(factorised)
    model = make_model(reference, factorised, attention)
    with torch.no_grad():
        expected = reference(tokens)
        assert expected.abs().max() > 1
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(tokens, use_cache=False).logits, expected, rtol=1e-10, atol=1e-10)
        last = model(tokens, logits_to_keep=2).logits
        torch.testing.assert_close(last, expected[:, -2:], rtol=1e-10, atol=1e-10)


@each_attention
@pytest.mark.parametrize("has_options", [False, True])
def test_the_cache_gives_the_same_logits(attention: str, has_options: bool, tokens: torch.Tensor) -> None:
    ours, theirs = OPTIONS if has_options else ({}, {})
    reference = make_reference(("q", "k", "v"), **ours)
    model = make_model(reference, ("q", "k", "v"), attention, **theirs)
    with torch.no_grad():
        expected = reference(tokens)
        cache, logits = None, []
        for part in tokens.split([5, 1, 7, 1, 1, 2], dim=1):  # several tokens at once on a filled cache, too
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        assert cache is not None and cache.get_seq_length() == tokens.shape[1]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-10, atol=1e-10)


@each_attention
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(attention: str, side: str, tokens: torch.Tensor) -> None:
    reference = make_reference(("q", "k", "v"))
    model = make_model(reference, ("q", "k", "v"), attention)
    lengths = [17, 9, 1]
    padded, mask = torch.zeros(3, 17, dtype=torch.long), torch.zeros(3, 17, dtype=torch.long)
    places = [slice(17 - n, 17) if side == "left" else slice(0, n) for n in lengths]
    for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
        padded[row, place], mask[row, place] = tokens[row, :n], 1
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits
        for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
            expected = reference(tokens[row : row + 1, :n])[0]
            torch.testing.assert_close(logits[row, place], expected, rtol=1e-10, atol=1e-10)
        if side == "left":  # the same in two parts, through the cache
            first = model(padded[:, :11], attention_mask=mask[:, :11], use_cache=True)
            second = model(padded[:, 11:], attention_mask=mask, past_key_values=first.past_key_values)
            real = mask[:, 11:].bool()
            torch.testing.assert_close(second.logits[real], logits[:, 11:][real], rtol=1e-10, atol=1e-10)


@each_variant
def test_greedy_generation_equals_stock_gpt2(factorised: tuple[str, ...]) -> None:
    reference = make_reference(factorised)
    model, stock = make_model(reference, factorised), make_huggingface(reference)
    prompts = random_tokens(3, 6, seed=8)
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0  # left-padded
    settings = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = stock.generate(prompts, **settings)
    assert len(set(expected[:, 6:].flatten().tolist())) > 3
    assert torch.equal(model.generate(prompts, **settings), expected)
    assert torch.equal(model.generate(prompts, use_cache=False, **settings), expected)
    cache = StaticCache(config=model.config, max_cache_len=22)
    assert torch.equal(model.generate(prompts, past_key_values=cache, **settings), expected)


@each_variant
@pytest.mark.parametrize("has_options", [False, True])
def test_loss_and_gradients_equal_the_oracle(
    factorised: tuple[str, ...], has_options: bool, tokens: torch.Tensor
) -> None:
    ours, theirs = OPTIONS if has_options else ({}, {})
    reference = make_reference(factorised, **ours)
    model = make_model(reference, factorised, **theirs)
    reference.loss(reference(tokens)[:, :-1], tokens[:, 1:]).backward()
    F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    own = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        gradient = own[f"model.{name}"].grad
        # The gradient of a key bias is zero in exact arithmetic, so the bound is absolute for it.
        assert gradient is not None and parameter.grad is not None, name
        assert (gradient - parameter.grad).norm() <= 1e-11 * parameter.grad.norm() + 1e-13, name
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss  # transformers' own loss rounds to float32
        expected = reference.loss(reference(tokens)[:, :-1], tokens[:, 1:])
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_recomputation_gives_the_same_gradients(tokens: torch.Tensor) -> None:
    reference = make_reference(("q", "k", "v"))
    gradients = []
    for is_recomputing in (False, True):
        model = make_model(reference, ("q", "k", "v")).train()
        if is_recomputing:
            model.activation_checkpointing_enable()
        output = model(tokens, labels=tokens)
        assert (output.past_key_values is None) == is_recomputing
        output.loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_documents_are_separated_by_their_positions(tokens: torch.Tensor) -> None:
    """Positions that start again mark packed documents, as transformers has it."""
    reference = make_reference(("q", "k", "v"))
    model = make_model(reference, ("q", "k", "v"))
    positions = torch.cat([torch.arange(9), torch.arange(8)]).expand(3, -1)
    documents = (torch.arange(17) >= 9).long().expand(3, -1)
    with torch.no_grad():
        logits = model(tokens, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(logits, reference(tokens, positions, documents), rtol=1e-10, atol=1e-10)


def test_hidden_states_and_attention_weights(tokens: torch.Tensor) -> None:
    reference = make_reference(("q", "k", "v"))
    model = make_model(reference, ("q", "k", "v"), "eager")
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True, output_attentions=True)
        expected = [logits.softmax(dim=-1) for logits in reference.attention_logits(tokens)]
    assert len(output.hidden_states) == LAYERS + 1
    for weights, logits in zip(output.attentions, expected, strict=True):
        torch.testing.assert_close(weights, logits, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r'attn_implementation="eager"'):
        make_model(reference, ("q", "k", "v"), "sdpa")(tokens, output_attentions=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "hidden_size 30 is not divisible by num_attention_heads 4"),
        ({"factorised_projections": ["q", "x"]}, "not x"),
        ({"attention_rank": None}, "attention_rank is None; use 1 to"),
        ({"num_attention_heads": 0}, "is not divisible by num_attention_heads 0; use"),
        ({"attention_rank": 1000}, "attention_rank is 1000; use 1 to"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "attention_rank": 8} | changes
    with pytest.raises(ValueError, match=message):
        MlraConfig(**values)


@each_attention
@pytest.mark.parametrize("use_cache", [True, False])
def test_more_tokens_than_positions_are_refused(attention: str, use_cache: bool) -> None:
    """By the forward pass and by generation, whether or not a mask or positions come along."""
    model = make_model(make_reference(()), (), attention)
    prompt = random_tokens(1, 20)
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    assert model.generate(prompt, max_new_tokens=5, **settings).shape == (1, 25), "the last one needs no position"
    for more in ({}, {"attention_mask": torch.ones_like(prompt)}):
        with pytest.raises(ValueError, match="25 tokens do not fit: the model has 24 positions"):
            model.generate(prompt, max_new_tokens=6, **settings, **more)
    with pytest.raises(ValueError, match="31 tokens do not fit: the model has 24 positions"):
        model(prompt[:, :1], position_ids=torch.tensor([[30]]))
    with pytest.raises(ValueError, match="25 tokens do not fit: the model has 24 positions"):
        model(random_tokens(1, 25), attention_mask=torch.ones(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="25 tokens do not fit: the model has 24 positions"):
        model(random_tokens(1, 25))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_padding_does_not_count_as_positions() -> None:
    model, tokens = make_model(make_reference(()), ()), random_tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[:, :6] = 0
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits[:, 6:]
        torch.testing.assert_close(logits, model(tokens[:, 6:]).logits, rtol=1e-10, atol=1e-10)


@each_attention
@pytest.mark.parametrize("cache", [None, DynamicCache, StaticCache], ids=["no cache", "dynamic", "static"])
def test_attention_alone_is_causal(attention: str, cache: Any, tokens: torch.Tensor) -> None:
    """Called without a mask, in one part or in several, it gives what the model's mask gives."""
    model = make_model(make_reference(("q", "k", "v")), ("q", "k", "v"), attention)
    hidden = torch.randn(3, 17, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    layer: Any = model.model.blocks[0].attention
    allowed = torch.ones(17, 17, dtype=torch.bool).tril()
    mask = torch.zeros(17, 17, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    with torch.no_grad():
        expected, _ = layer(hidden, mask[None, None])
        parts = [17] if cache is None else [5, 1, 7, 4]
        more = {"max_cache_len": 20} if cache is StaticCache else {}
        made = None if cache is None else cache(config=model.config, **more)
        found = torch.cat([layer(part, past_key_values=made)[0] for part in hidden.split(parts, dim=1)], dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        later = hidden.clone()
        later[:, 9:] += 1
        assert torch.equal(layer(later)[0][:, :9], layer(hidden)[0][:, :9])
