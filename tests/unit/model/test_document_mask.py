"""The mask of documents: one for all blocks of a pass, in two forms that allow the same."""

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from mlra_scale.checkpoint.huggingface.training_side import distributed_of_one
from mlra_scale.config import ModelConfig
from mlra_scale.model.context import ModelContext
from mlra_scale.model.document_mask import (
    DocumentMasks,
    additive_mask,
    allowed,
    allowed_by,
    block_mask,
    has_flex_attention,
)
from mlra_scale.model.gpt import GPT

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 1]])
MODEL: dict[str, Any] = {"vocab_size": 61, "max_positions": 8, "num_layers": 3, "hidden_size": 32, "num_heads": 2}


class Counted(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("attention_dropout", [0.0, 0.1])
def test_blocks_share_one_mask(checkpointing: Any, attention_dropout: float) -> None:
    model = ModelConfig(**MODEL, attention_dropout=attention_dropout)
    group = dist.ProcessGroup(dist.HashStore(), 0, 1)  # has no means to communicate
    context = ModelContext(model, 1, group, has_document_mask=True, activation_checkpointing=checkpointing)
    samples = torch.arange(len(DOCUMENTS))
    with distributed_of_one():
        gpt = GPT(context)
        with Counted() as counted:
            for documents in (DOCUMENTS.clone(), DOCUMENTS.clone()):
                gpt(DOCUMENTS, DOCUMENTS, documents, samples, DOCUMENTS).backward()
    assert counted.names.count("tril") == 2, "one mask for each of two passes"
    assert not {"_local_scalar_dense", "nonzero"} & set(counted.names), "the host waits for the device"


def test_a_mask_lives_as_long_as_its_documents() -> None:
    masks, documents = DocumentMasks(has_blocks=False), DOCUMENTS.clone()
    first = masks.of(documents, torch.float32)
    assert masks.of(documents, torch.float32) is first
    assert masks.of(documents.detach(), torch.float32) is first, "another view of the same ids, as ZeRO 3's hooks make"
    assert masks.of(documents[:1], torch.float32) is not first
    assert masks.of(DOCUMENTS.clone(), torch.float32) is not first
    del documents
    gc.collect()
    assert len(masks._masks) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_additive_mask_gives_the_bits_of_a_boolean_one(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 8, 4, dtype=dtype, requires_grad=True) for _ in range(3))
    found = []
    for mask in (allowed(DOCUMENTS), additive_mask(DOCUMENTS, dtype)):
        output = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        found.append([output, *torch.autograd.grad(output.square().sum(), [q, k, v])])
    for boolean, additive in zip(*found, strict=True):
        assert torch.equal(boolean, additive)


def test_both_forms_allow_the_same() -> None:
    expected = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    for sample, ids in enumerate(DOCUMENTS.tolist()):
        for query in range(8):
            for key in range(query + 1):
                expected[sample, 0, query, key] = ids[query] == ids[key]
    assert torch.equal(allowed_by(additive_mask(DOCUMENTS, torch.bfloat16)), expected)
    with Counted() as counted:
        blocks = block_mask(DOCUMENTS)
    assert torch.equal(allowed_by(blocks), expected)
    assert not {"_local_scalar_dense", "nonzero"} & set(counted.names), "the host waits for the device"


def test_flex_attention_reads_what_masked_attention_reads() -> None:
    # Its backward pass, and its kernel, are for GPUs only.
    from torch.nn.attention.flex_attention import flex_attention

    generator = torch.Generator().manual_seed(2)
    documents = torch.randint(0, 2, (2, 200), generator=generator).cumsum(dim=1)
    q, k, v = (torch.randn(2, 3, 200, 16, generator=generator) for _ in range(3))
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed(documents))
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=block_mask(documents)), expected)


def test_flex_attention_is_for_gpus_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(**MODEL)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert has_flex_attention("cuda", "bf16", model)
    assert not has_flex_attention("cpu", "bf16", model)
    assert not has_flex_attention("cuda", "fp32", model)
    assert not has_flex_attention("cuda", "bf16", ModelConfig(**MODEL, attention_dropout=0.1))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not has_flex_attention("cuda", "bf16", model)
