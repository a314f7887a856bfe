"""The oracle against an implementation that is not ours: transformers' GPT-2, in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from tests.support.reference import ReferenceGPT

VOCAB, POSITIONS, LAYERS, HIDDEN, HEADS, FFN, RANK = 61, 24, 3, 32, 4, 96, 12


def make_reference(factorised: tuple[str, ...], **options: Any) -> ReferenceGPT:
    model = ReferenceGPT(VOCAB, POSITIONS, LAYERS, HIDDEN, HEADS, FFN, factorised, RANK, **options).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough that attention is far from uniform and every bias and norm matters.
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if "norm.weight" in name:
                parameter.add_(1.0)
    return model


def merged(weights: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense weight and bias of a projection that may be factorised."""
    if f"{name}.weight" in weights:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]
    return weights[f"{name}.up.weight"] @ weights[f"{name}.down.weight"], weights[f"{name}.up.bias"]


def make_huggingface(reference: ReferenceGPT) -> GPT2LMHeadModel:
    """The same function as a GPT2LMHeadModel, whose Conv1D stores [in, out]."""
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=FFN,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval()
    ours = reference.state_dict()
    theirs = {
        "transformer.wte.weight": ours["embedding.weight"],
        "lm_head.weight": ours["embedding.weight"],
        "transformer.wpe.weight": ours["positions.weight"],
        "transformer.ln_f.weight": ours["final_norm.weight"],
        "transformer.ln_f.bias": ours["final_norm.bias"],
    }
    for i in range(LAYERS):
        block, target = f"blocks.{i}", f"transformer.h.{i}"
        qkv = [merged(ours, f"{block}.attention.{projection}") for projection in "qkv"]
        theirs[f"{target}.attn.c_attn.weight"] = torch.cat([weight for weight, _ in qkv]).T
        theirs[f"{target}.attn.c_attn.bias"] = torch.cat([bias for _, bias in qkv])
        for source, name in (("attention.o", "attn.c_proj"), ("mlp.fc_in", "mlp.c_fc"), ("mlp.fc_out", "mlp.c_proj")):
            weight, bias = merged(ours, f"{block}.{source}")
            theirs[f"{target}.{name}.weight"], theirs[f"{target}.{name}.bias"] = weight.T, bias
        for source, name in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            for kind in ("weight", "bias"):
                theirs[f"{target}.{name}.{kind}"] = ours[f"{block}.{source}.{kind}"]
    missing, unexpected = model.load_state_dict(theirs, strict=False)
    assert not unexpected and not [name for name in missing if not name.endswith("attn.bias")], (missing, unexpected)
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (3, 17), generator=torch.Generator().manual_seed(5))


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """transformers' own loss would round the logits to float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


FACTORISED = [(), ("q", "k", "v"), ("q", "k", "v", "o"), ("v",)]


@pytest.mark.parametrize("factorised", FACTORISED, ids=lambda names: "".join(names) or "dense")
def test_logits_loss_and_gradients_equal_transformers(factorised: tuple[str, ...], tokens: torch.Tensor) -> None:
    reference = make_reference(factorised)
    other = make_huggingface(reference)
    logits, expected = reference(tokens), other(tokens).logits
    assert logits.abs().max() > 1
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    loss, expected_loss = reference.loss(logits[:, :-1], tokens[:, 1:]), next_token_loss(expected, tokens)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-10)
    loss.backward()
    expected_loss.backward()
    theirs = {name: parameter.grad for name, parameter in other.named_parameters()}
    ours = dict(reference.named_parameters())

    def compare(name: str, expected: torch.Tensor) -> None:
        gradient = ours[name].grad
        # The gradient of a key bias is zero in exact arithmetic, so the bound is absolute for it.
        assert gradient is not None and (gradient - expected).norm() <= 1e-11 * expected.norm() + 1e-13, name

    def compare_projection(name: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        if f"{name}.weight" in ours:
            compare(f"{name}.weight", weight)
            compare(f"{name}.bias", bias)
        else:  # by the chain rule for W = up @ down
            up, down = ours[f"{name}.up.weight"].detach(), ours[f"{name}.down.weight"].detach()
            compare(f"{name}.up.weight", weight @ down.T)
            compare(f"{name}.down.weight", up.T @ weight)
            compare(f"{name}.up.bias", bias)

    for i in range(LAYERS):
        block, target = f"blocks.{i}", f"transformer.h.{i}"
        qkv = zip(
            theirs[f"{target}.attn.c_attn.weight"].T.chunk(3),
            theirs[f"{target}.attn.c_attn.bias"].chunk(3),
            strict=True,
        )
        for projection, (weight, bias) in zip("qkv", qkv, strict=True):
            compare_projection(f"{block}.attention.{projection}", weight, bias)
        for source, name in (("attention.o", "attn.c_proj"), ("mlp.fc_in", "mlp.c_fc"), ("mlp.fc_out", "mlp.c_proj")):
            compare_projection(
                f"{block}.{source}", theirs[f"{target}.{name}.weight"].T, theirs[f"{target}.{name}.bias"]
            )
        for source, name in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            for kind in ("weight", "bias"):
                compare(f"{block}.{source}.{kind}", theirs[f"{target}.{name}.{kind}"])
    for name, target in (("embedding", "wte"), ("positions", "wpe"), ("final_norm", "ln_f")):
        compare(f"{name}.weight", theirs[f"transformer.{target}.weight"])
    compare("final_norm.bias", theirs["transformer.ln_f.bias"])


def test_documents_with_reset_positions_equal_separate_sequences(tokens: torch.Tensor) -> None:
    reference = make_reference(("q", "k", "v"))
    cut = 7
    length = tokens.shape[1]
    documents = (torch.arange(length) >= cut).long().expand_as(tokens)
    positions = torch.cat([torch.arange(cut), torch.arange(length - cut)]).expand_as(tokens)
    with torch.no_grad():
        packed = reference(tokens, positions=positions, documents=documents)
        apart = torch.cat([reference(tokens[:, :cut]), reference(tokens[:, cut:])], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-11, atol=1e-11)


def test_attention_logits_are_masked_and_scaled(tokens: torch.Tensor) -> None:
    reference = make_reference(("q", "k", "v"))
    block: Any = reference.blocks[0]
    with torch.no_grad():
        logits = reference.attention_logits(tokens)
        normed = block.attention_norm(reference.embedding(tokens) + reference.positions(torch.arange(tokens.shape[1])))
        q, k = block.attention.q(normed), block.attention.k(normed)
    assert len(logits) == LAYERS and logits[0].shape == (3, HEADS, 17, 17)
    size = HIDDEN // HEADS
    expected = (q[1, 9, size : 2 * size] * k[1, 4, size : 2 * size]).sum() / math.sqrt(size)
    torch.testing.assert_close(logits[0][1, 1, 9, 4], expected)
    assert torch.isinf(logits[0][1, 1, 4, 9])


def test_z_loss_adds_the_mean_squared_log_partition(tokens: torch.Tensor) -> None:
    reference = make_reference(())
    logits = reference(tokens).detach()
    difference = reference.loss(logits, tokens, z_loss=0.1) - reference.loss(logits, tokens)
    torch.testing.assert_close(difference, 0.1 * logits.exp().sum(-1).log().square().mean())
