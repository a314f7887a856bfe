"""Model options in one process and in float64: the training's layers against the oracle, and what each one costs."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mlra_scale.checkpoint.huggingface.training_side import distributed_of_one
from mlra_scale.config import ModelConfig
from mlra_scale.config.model_config import PROJECTIONS
from mlra_scale.model.context import ModelContext
from mlra_scale.model.gpt import GPT
from mlra_scale.model.initialization import initial_std
from mlra_scale.model.parameters import LinearMap, ParameterTable
from mlra_scale.model.probe import Heads, observe
from mlra_scale.model.spectral import ScaledLinear, iterate, load_vectors, spectral_norms, stored_vectors
from tests.support.layouts import canonical_weights, initial_state
from tests.support.oracle import build_reference, initial_vectors
from tests.support.reference import ReferenceGPT

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "vocab_padding_multiple": 1,
    "max_positions": 24,
    "num_layers": 3,
    "hidden_size": 32,
    "num_heads": 4,
    "attention_rank": 10,
    "init_std": 0.15,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "qk-norm": {"qk_norm": True},
    "sigma-reparam": {"sigma_reparam": True},
    "layer-norm-scaling": {"layer_norm_scaling": True},
    "embedding-scale": {"embedding_scale": "sqrt_width"},
    "completep": {"depth_rule": "completep", "base_depth": 2},
    "completep-all": {"depth_rule": "completep", "base_depth": 8, "qk_norm": True, "sigma_reparam": True},
    "all": {"qk_norm": True, "sigma_reparam": True, "layer_norm_scaling": True, "embedding_scale": "sqrt_width"},
}
ATTENTIONS: dict[str, dict[str, Any]] = {
    "mlra": {},
    "dense": {"attention": "dense"},
    "o-factorised": {"factorised_projections": ("k", "o")},
}
SEED = 7


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with distributed_of_one():
        yield


def model_of(option: str, attention: str = "mlra", **values: Any) -> ModelConfig:
    return ModelConfig(**{**SHAPE, **OPTIONS[option], **ATTENTIONS[attention], **values})


def built(model: ModelConfig, weights: dict[str, torch.Tensor], **options: Any) -> GPT:
    """The training's model with these weights, in float64."""
    group = dist.ProcessGroup(dist.HashStore(), 0, 1)  # has no means to communicate
    gpt = GPT(ModelContext(model, SEED, group, **options)).double()
    gpt.load_state_dict({name: tensor.double() for name, tensor in weights.items()}, strict=False)
    assert {name for name, _ in gpt.named_parameters()} == weights.keys()
    return gpt


def oracle(model: ModelConfig, weights: dict[str, torch.Tensor]) -> ReferenceGPT:
    config: Any = SimpleNamespace(model=model, train=SimpleNamespace(seed=SEED))
    return build_reference(config, weights)


def tokens_of(seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(SHAPE["vocab_size"], (3, 18), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def logits_of(gpt: GPT, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return gpt.logits(tokens, positions, torch.zeros_like(tokens), tokens[:, 0])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("option", OPTIONS)
def test_logits_and_every_gradient_equal_the_oracle(option: str, attention: str) -> None:
    model = model_of(option, attention)
    weights = canonical_weights(model)
    gpt, reference = built(model, weights), oracle(model, weights)
    tokens, targets = tokens_of()
    logits, expected = logits_of(gpt, tokens), reference(tokens)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)
    for module, output in ((gpt, logits), (reference, expected)):
        module.zero_grad()
        reference.loss(output, targets).backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in gpt.named_parameters():
        gradient = theirs[name].grad
        assert gradient is not None and parameter.grad is not None, name
        # The gradient of a key bias is zero in exact arithmetic (without QK-norm), so the bound is absolute for it.
        assert (parameter.grad - gradient).norm() <= 1e-10 * gradient.norm() + 1e-13, name
        assert gradient.norm() > 1e-9 or (name.endswith((".k.bias", ".k.up.bias")) and not model.qk_norm), name


@pytest.mark.parametrize("option", ["all", "completep-all"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_recomputation_gives_the_same_gradients(attention: str, option: str) -> None:
    model = model_of(option, attention)
    weights = canonical_weights(model)
    tokens, targets = tokens_of()
    gradients = []
    for checkpointing in ("none", "selective", "block"):
        gpt = built(model, weights, activation_checkpointing=checkpointing)
        logits = logits_of(gpt, tokens)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        gradients.append([parameter.grad for parameter in gpt.parameters()])
    for others in gradients[1:]:
        for one, other in zip(gradients[0], others, strict=True):
            assert one is not None and other is not None
            assert torch.equal(one, other)


def parts_of(weights: dict[str, torch.Tensor], entry: LinearMap) -> list[torch.Tensor]:
    """The matrix of a map, or its factors, in float64."""
    return [weights[info.name].double() for info in entry.weights]


def whole_map(weights: dict[str, torch.Tensor], entry: LinearMap) -> torch.Tensor:
    """The matrix of a map, whatever it consists of, in float64."""
    first, *second = parts_of(weights, entry)
    return second[0] @ first if second else first


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_six_maps_of_each_block_are_normalised(attention: str) -> None:
    model = model_of("sigma-reparam", attention)
    table = ParameterTable(model)
    maps = list(table.normalised.values())
    parts = ["attention.q", "attention.k", "attention.v", "attention.o", "mlp.fc_in", "mlp.fc_out"]
    assert [entry.name for entry in maps] == [f"blocks.{block}.{part}" for block in range(3) for part in parts]
    named = [name for entry in maps for name in (*[info.name for info in entry.weights], entry.gain)]
    matrices = [name for name, info in table.items() if info.kind in ("matrix", "factor")]
    assert sorted(named) == sorted(matrices + [name for name in table if name.endswith(".gain")])
    for entry in maps:
        part = entry.name.split(".")[-1]
        is_factorised = part in PROJECTIONS and model.is_factorised(part)
        assert [info.name.split(".")[-2] for info in entry.weights] == (["down", "up"] if is_factorised else [part])
        assert entry.vector == f"power_iteration/{entry.name}"
        assert entry.vector_size == (model.rank if is_factorised else model.hidden_size)
        # What lies between the factors is split by no tensor parallelism.
        first, *second = entry.weights
        is_at_output = is_factorised or part in ("o", "fc_out")
        assert first.shape[0 if is_at_output else 1] == entry.vector_size
        assert first.shard_dim != (0 if is_at_output else 1)
        assert all(info.shape[1] == entry.vector_size and info.shard_dim != 1 for info in second)
    assert ParameterTable(model_of("none", attention)).normalised == {}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_power_iteration_finds_the_largest_singular_value(attention: str) -> None:
    model = model_of("sigma-reparam", attention)
    weights, vectors = canonical_weights(model), initial_vectors(model, SEED)
    for entry in ParameterTable(model).normalised.values():
        expected = torch.linalg.matrix_norm(whole_map(weights, entry), 2)
        vector, estimates = vectors[entry.name].double(), []
        for _ in range(400):
            iteration = iterate(entry, vector, parts_of(weights, entry))
            vector = iteration.next_vector
            estimates.append(iteration.sigma)
        assert estimates[0] < 0.999 * expected, "one step is not enough: what carries over matters"
        torch.testing.assert_close(estimates[-1], expected, rtol=1e-6, atol=0)
        assert abs(float(vector.norm()) - 1) < 1e-12


def test_a_new_model_begins_near_the_largest_singular_value_of_its_weights() -> None:
    model = model_of("sigma-reparam", hidden_size=256, attention_rank=96, num_layers=1)
    weights, vectors = initial_state(model, SEED), initial_vectors(model, SEED)
    for entry in ParameterTable(model).normalised.values():
        exact = float(torch.linalg.matrix_norm(whole_map(weights, entry), 2))
        found = iterate(entry, vectors[entry.name].double(), parts_of(weights, entry))
        assert 0.9 * exact < float(found.sigma) < 1.0001 * exact, entry.name


def converged(reference: ReferenceGPT, model: ModelConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Vectors after so many iterations that they are singular vectors."""
    vectors = {name: vector.double() for name, vector in initial_vectors(model, SEED).items()}
    for entry in ParameterTable(model).normalised.values():
        for _ in range(4000):
            vectors[entry.name] = iterate(entry, vectors[entry.name], parts_of(weights, entry)).next_vector
    reference.set_vectors(vectors)
    return vectors


@pytest.mark.parametrize("attention", ["mlra", "dense"])
def test_the_oracles_gradients_are_those_through_the_singular_value_itself(attention: str) -> None:
    """Once the vectors have converged: u and v need no gradient, since sigma is stationary in them."""
    model = model_of("sigma-reparam", attention, num_layers=1)
    weights = canonical_weights(model)
    reference = oracle(model, weights)
    converged(reference, model, weights)
    tokens, targets = tokens_of()
    reference.loss(reference(tokens), targets).backward()
    plain = oracle(model_of("none", attention, num_layers=1), {n: w for n, w in weights.items() if "gain" not in n})
    leaves = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    folded = {name: leaf for name, leaf in leaves.items() if "gain" not in name}
    for entry in ParameterTable(model).normalised.values():
        sigma = torch.linalg.svdvals(whole_map(leaves, entry))[0]
        scaled = entry.weights[-1].name
        folded[scaled] = leaves[scaled] * (leaves[entry.gain] / sigma)
    plain.loss(torch.func.functional_call(plain, folded, (tokens,)), targets).backward()
    for name, parameter in reference.named_parameters():
        gradient = leaves[name].grad
        assert gradient is not None and parameter.grad is not None
        assert (parameter.grad - gradient).norm() <= 1e-6 * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_vectors_belong_to_a_step_and_carry_over(attention: str) -> None:
    """Three steps of gradient descent in two micro-batches each, with a validation between them, against the oracle."""
    model = model_of("sigma-reparam", attention)
    weights = canonical_weights(model)
    gpt, reference = built(model, weights), oracle(model, weights)
    norms = spectral_norms(gpt)
    assert [norm.entry for norm in norms] == list(ParameterTable(model).normalised.values())
    for step in range(3):
        tokens, targets = tokens_of(step)
        for norm in norms:
            norm.found = None
        for part in (slice(0, 1), slice(1, 3)):
            loss = reference.loss(logits_of(gpt, tokens[part]), targets[part])
            (loss * len(targets[part]) / 3).backward()
        for norm in norms:
            norm.advance()
        reference.loss(reference(tokens), targets).backward()
        for network in (gpt, reference):
            for parameter in network.parameters():
                assert parameter.grad is not None
                parameter.data -= 0.1 * parameter.grad
                parameter.grad = None
        reference.advance()
        with torch.no_grad():
            torch.testing.assert_close(logits_of(gpt, tokens), reference(tokens), rtol=1e-9, atol=1e-9)
    found = stored_vectors(norms)
    maps = dict(reference.named_modules())
    for name in initial_vectors(model, SEED):
        torch.testing.assert_close(
            found[f"power_iteration/{name}"].double(),
            maps[name].vector,
            rtol=1e-6,
            atol=1e-7,
        )
        assert (maps[name].vector - initial_vectors(model, SEED)[name]).norm() > 1e-3, "nothing moved"


def test_loaded_vectors_are_those_that_were_stored() -> None:
    model = model_of("sigma-reparam")
    weights = canonical_weights(model)
    one, other = built(model, weights).float(), built(model, weights).float()
    tokens, _ = tokens_of()
    before = logits_of(one, tokens)
    for norm in spectral_norms(one):
        norm.advance()
    after = logits_of(one, tokens)
    assert not torch.equal(after, before)
    assert torch.equal(logits_of(other, tokens), before)
    load_vectors(spectral_norms(other), stored_vectors(spectral_norms(one)))
    assert torch.equal(logits_of(other, tokens), after)


def test_the_scaled_map_has_the_gradients_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((2, 3, 4), (5, 4)))
    scale = torch.tensor([0.7], dtype=torch.float64)
    inputs = tuple(tensor.requires_grad_() for tensor in (x, weight, scale))
    torch.testing.assert_close(ScaledLinear.apply(*inputs), x @ (scale * weight).T)
    assert torch.autograd.gradcheck(ScaledLinear.apply, inputs)


def test_in_bfloat16_the_scale_is_computed_in_float32() -> None:
    model = model_of("all")
    weights = {name: weight.bfloat16() for name, weight in canonical_weights(model).items()}
    gpt, exact = built(model, weights).bfloat16(), built(model, weights)
    tokens, _ = tokens_of()
    expected = logits_of(exact, tokens)
    error = (logits_of(gpt, tokens).double() - expected).norm() / expected.norm()
    assert error < 3 * 2**-8
    for norm, other in zip(spectral_norms(gpt), spectral_norms(exact), strict=True):
        assert norm.found is not None and other.found is not None
        assert norm.found.sigma.dtype == torch.float32
        torch.testing.assert_close(norm.found.sigma.double(), other.found.sigma, rtol=1e-5, atol=0)


def test_queries_and_keys_have_no_scale_with_qk_norm() -> None:
    """Ten times the weights of q give the same attention, but for the epsilon; without QK-norm they do not."""
    tokens, _ = tokens_of()
    for option, is_equal in (("qk-norm", True), ("none", False)):
        model = model_of(option, "dense")
        weights = canonical_weights(model)
        larger = {
            name: 10 * weight if ".q.weight" in name or ".q.bias" in name else weight
            for name, weight in weights.items()
        }
        one, other = (logits_of(built(model, values), tokens) for values in (weights, larger))
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3) == is_equal


@pytest.mark.parametrize("option", ["none", "all"])
def test_the_probe_records_the_logits_that_attention_uses(option: str) -> None:
    model = model_of(option)
    weights = canonical_weights(model)
    gpt, reference = built(model, weights), oracle(model, weights)
    tokens, _ = tokens_of()
    seen: list[torch.Tensor] = []

    def see_heads(index: int, heads: Heads) -> None:
        seen.append(torch.stack([piece.logits_NSS for piece in heads.logits()]))

    with torch.no_grad():
        with observe(gpt, see_heads):
            logits_of(gpt, tokens)
        logits_of(gpt, tokens)  # which nobody observes
        expected = reference.attention_logits(tokens)
    for found, logits in zip(seen, expected, strict=True):
        torch.testing.assert_close(found.double(), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("option", OPTIONS)
def test_the_table_counts_what_the_configuration_counts(option: str, attention: str) -> None:
    model = model_of(option, attention)
    table, counts = ParameterTable(model), model.parameter_counts()
    for kind, count in counts.items():
        assert sum(info.numel() for info in table.values() if info.kind == kind) == count, kind
    plain = model_of("none", attention)
    added = 2 * 8 * 3 * model.qk_norm + 6 * 3 * model.sigma_reparam
    assert model.num_parameters() == plain.num_parameters() + added
    assert model.flops_per_token(16) == plain.flops_per_token(16)
    new = {name: table[name] for name in table if name not in ParameterTable(plain)}
    assert all(info.kind == "norm" and info.shard_dim is None for info in new.values())  # never decayed
    state = initial_state(model, SEED)
    assert all(bool((state[name] == 1).all()) for name in new)
    # A parameter that both have begins with the same values, but for the depth-scaled ones.
    has_own_rule = model.layer_norm_scaling or model.depth_rule != "none"
    scaled = ("o.weight", "o.up.weight", "fc_out.weight") if has_own_rule else ()
    for name, value in initial_state(plain, SEED).items():
        assert torch.equal(state[name], value) or name.endswith(scaled), name


def test_without_the_depth_scaled_initialization_the_residual_projections_are_like_the_others() -> None:
    unscaled = {"layer_norm_scaling": True}, {"depth_scaled_init": False}, {"depth_rule": "completep"}
    for model in (model_of("none", **values) for values in unscaled):
        table = ParameterTable(model)
        for name in ("blocks.0.attention.o.weight", "blocks.1.mlp.fc_out.weight"):
            assert initial_std(model, table[name]) == model.base_std
    factorised = model_of("layer-norm-scaling", "o-factorised")
    table = ParameterTable(factorised)
    stds = [initial_std(factorised, table[f"blocks.0.attention.o.{part}.weight"]) for part in ("up", "down")]
    assert stds[0] == stds[1]


def test_completep_scales_whole_branches_and_nothing_at_its_base_depth() -> None:
    """Twice the base depth is half of each branch, bias included; at the base depth it is the model without a rule."""
    tokens, _ = tokens_of()
    plain = model_of("none", depth_scaled_init=False)
    weights = canonical_weights(plain)
    expected = logits_of(built(plain, weights), tokens)
    assert torch.equal(logits_of(built(model_of("completep", base_depth=3), weights), tokens), expected)
    deeper = logits_of(built(model_of("completep", num_layers=3, base_depth=1), weights), tokens)
    ends = ("attention.o.weight", "attention.o.bias", "fc_out.weight", "fc_out.bias")
    folded = {name: weight.double() / 3 if name.endswith(ends) else weight for name, weight in weights.items()}
    torch.testing.assert_close(logits_of(built(plain, folded), tokens), deeper, rtol=1e-12, atol=1e-12)
    for forgotten in ends:
        some = folded | {name: weights[name] for name in weights if name.endswith(forgotten)}
        assert (logits_of(built(plain, some), tokens) - deeper).abs().max() > 1e-3, forgotten


def numbers_kept(gpt: GPT, length: int) -> int:
    """How many numbers the graph of a forward pass keeps for the backward pass, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.itemsize
        return tensor

    tokens, _ = tokens_of()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = logits_of(gpt, tokens[:, :length])
    assert logits.requires_grad
    return sum(kept.values())


def test_what_options_keep_for_the_backward_pass() -> None:
    """Per token; as planning/memory.py has it: 2 D per block with QK-norm, and nothing for the others."""
    per_token = {}
    for option in OPTIONS:
        model = model_of(option)
        gpt = built(model, canonical_weights(model))
        per_token[option] = (numbers_kept(gpt, 16) - numbers_kept(gpt, 8)) / (3 * 8)
    for option in ("sigma-reparam", "layer-norm-scaling", "embedding-scale", "completep"):
        assert per_token[option] == per_token["none"], option
    width, heads, layers = 32, 4, 3
    statistics = 4 * heads  # mean and deviation of each query and key
    for option in ("qk-norm", "completep-all", "all"):
        assert per_token[option] - per_token["none"] == layers * (2 * width + statistics), option
