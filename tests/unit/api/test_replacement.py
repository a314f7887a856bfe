"""Low-rank projections in a GPT-2 of transformers: the same model at full rank, trained, and merged back."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from mlra_scale import LowRankLinear, merge_attention_projections, replace_attention_projections
from mlra_scale.api.replacement import JoinedProjections
from tests.support.gpt2_folders import random_gpt2

WIDTH = 32
TOKENS = torch.arange(20).view(2, 10)


def logits(model: GPT2LMHeadModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("projections", [("q", "k", "v"), ("q", "k", "v", "o"), ("v",), ("o",)], ids="".join)
def test_at_full_rank_it_is_the_same_model(projections: tuple[str, ...]) -> None:
    model = random_gpt2().double()
    before = logits(model)
    replace_attention_projections(model, WIDTH, projections)
    found = sum(isinstance(module, LowRankLinear) for module in model.modules())
    assert found == 2 * len(projections)
    assert [type(block.attn.c_attn) for block in model.transformer.h] == [
        JoinedProjections if projections != ("o",) else Conv1D
    ] * 2
    torch.testing.assert_close(logits(model), before, rtol=1e-12, atol=1e-12)


def test_it_trains_and_merges_into_a_plain_gpt2(tmp_path: Path) -> None:
    model = random_gpt2()
    before = logits(model)
    replace_attention_projections(model, 8, "qkvo")
    assert not torch.allclose(logits(model), before), "a rank of 8 of 32 loses something"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start: dict[str, Any] = {name: value.clone() for name, value in model.named_parameters()}
    losses = []
    for _ in range(5):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    factors = [name for name, _ in model.named_parameters() if ".down." in name or ".up." in name]
    assert len(factors) == 2 * 4 * 3
    # A key's bias changes nothing, so that its gradient is rounding noise.
    assert all(not torch.equal(model.get_parameter(name), start[name]) for name in factors if ".k.up.bias" not in name)
    trained = logits(model)
    merge_attention_projections(model)
    torch.testing.assert_close(logits(model), trained, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(again.eval()), logits(model))


def test_new_factors_begin_with_the_chosen_spread_and_keep_biases() -> None:
    model = random_gpt2(n_embd=256, n_layer=2, n_head=4)
    biases = model.transformer.h[0].attn.c_attn.bias.detach().clone()
    torch.manual_seed(0)
    replace_attention_projections(model, 64, "qkvo", init="matched")
    attention = model.transformer.h[0].attn
    std = math.sqrt(model.config.initializer_range) * 64**-0.25
    assert attention.c_attn.k.down.weight.std().item() == pytest.approx(std, rel=0.03)
    assert attention.c_proj.up.weight.std().item() == pytest.approx(std / math.sqrt(2 * 2), rel=0.03)
    assert torch.equal(torch.cat([getattr(attention.c_attn, name).up.bias for name in "qkv"]), biases)


def test_frozen_weights_stay_frozen() -> None:
    model = random_gpt2().eval().requires_grad_(False)
    model.transformer.h[1].requires_grad_(True)
    replace_attention_projections(model, 8, "qko")
    for turn in range(2):
        for number, block in enumerate(model.transformer.h):
            assert {parameter.requires_grad for parameter in block.parameters()} == {number == 1}, turn
        assert not any(module.training for module in model.modules())
        merge_attention_projections(model)


def test_a_model_of_which_one_block_cannot_be_replaced_is_left_as_it_was() -> None:
    model = random_gpt2()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 0] = math.nan
    before = [*model.state_dict()]
    with pytest.raises(ValueError, match=r"the weights \[32, 32\] are not finite numbers"):
        replace_attention_projections(model, 4)
    assert [*model.state_dict()] == before
    with pytest.raises(ValueError, match="or on the meta device"):
        replace_attention_projections(random_gpt2().to("meta"), 4)


def test_types_are_kept() -> None:
    model = random_gpt2().to(torch.bfloat16)
    replace_attention_projections(model, 8, ("q", "v"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    merge_attention_projections(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_what_cannot_be_replaced_is_refused() -> None:
    model = random_gpt2()
    for rank in (0, WIDTH + 1):
        with pytest.raises(ValueError, match=f"rank is {rank}; use 1 to 32"):
            replace_attention_projections(model, rank)
    with pytest.raises(ValueError, match=r"name some of q, k, v, o"):
        replace_attention_projections(model, 4, ("q", "x"))
    before = [*model.state_dict()]
    with pytest.raises(ValueError, match="init is 'other'; use svd, gpt2, xavier, matched"):
        replace_attention_projections(model, 4, init="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear has no attention of GPT-2"):
        replace_attention_projections(nn.Linear(3, 3), 2)
    assert [*model.state_dict()] == before, "what was refused has changed nothing"
    replace_attention_projections(model, 4)
    with pytest.raises(ValueError, match="replaced already"):
        replace_attention_projections(model, 4)
    with pytest.raises(ValueError, match="encoder"):
        replace_attention_projections(random_gpt2(add_cross_attention=True), 4)
