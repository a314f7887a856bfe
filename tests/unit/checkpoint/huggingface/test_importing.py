"""GPT-2 folders become checkpoints: every way they are stored, exactly; factorised, with what that keeps."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2ForSequenceClassification, GPT2LMHeadModel

from mlra_scale.checkpoint import CheckpointError, Store
from mlra_scale.checkpoint.huggingface.configuration import model_from_store
from mlra_scale.checkpoint.huggingface.importing import factorise, import_gpt2
from tests.support.gpt2_folders import TEXT, gpt2_folder, random_gpt2, save_tokenizer_files, tokenizer

INPUT = torch.randint(290, (3, 32), generator=torch.Generator().manual_seed(0))


def logits_of(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(INPUT).logits


def assert_same_weights(store: Store, model: GPT2LMHeadModel) -> None:
    """Every weight against the module that it came from, bit by bit."""
    theirs, width = model.transformer, model.config.n_embd
    vocabulary = model.config.vocab_size
    stored = store.tensor("embedding.weight")
    assert len(stored) == store.model.padded_vocab_size and not stored[vocabulary:].any()
    expected = {"positions.weight": theirs.wpe.weight, "embedding.weight": theirs.wte.weight}
    expected |= {f"final_norm.{kind}": getattr(theirs.ln_f, kind) for kind in ("weight", "bias")}
    for number, block in enumerate(theirs.h):
        name = f"blocks.{number}"
        linear = {"attention.o": block.attn.c_proj, "mlp.fc_in": block.mlp.c_fc, "mlp.fc_out": block.mlp.c_proj}
        for ours, layer in linear.items():
            expected |= {f"{name}.{ours}.weight": layer.weight.T, f"{name}.{ours}.bias": layer.bias}
        for place, letter in enumerate("qkv"):
            columns = slice(place * width, (place + 1) * width)
            expected[f"{name}.attention.{letter}.weight"] = block.attn.c_attn.weight[:, columns].T
            expected[f"{name}.attention.{letter}.bias"] = block.attn.c_attn.bias[columns]
        for ours, norm in (("attention_norm", block.ln_1), ("mlp_norm", block.ln_2)):
            expected |= {f"{name}.{ours}.weight": norm.weight, f"{name}.{ours}.bias": norm.bias}
    assert expected.keys() == set(store.table)
    for name, tensor in expected.items():
        assert torch.equal(store.tensor(name)[: len(tensor)], tensor.float()), name


def test_dense_is_exact(tmp_path: Path) -> None:
    folder = gpt2_folder(tmp_path / "gpt2", n_inner=48, layer_norm_epsilon=1e-6, attn_pdrop=0.0, resid_pdrop=0.25)
    made = import_gpt2(folder, tmp_path / "made")
    store = Store.open(tmp_path / "made")
    assert store.verify() == [] and store.kind == "weights" and store.step == 0 and not store.manifest.has_moments
    model = random_gpt2(n_inner=48, layer_norm_epsilon=1e-6, attn_pdrop=0.0, resid_pdrop=0.25)
    assert_same_weights(store, model)
    assert (store.model.attention, store.model.ffn_size, store.model.layer_norm_eps) == ("dense", 48, 1e-6)
    assert (store.model.attention_dropout, store.model.residual_dropout) == (0.0, 0.25)
    assert store.model.depth_rule == "none" and store.model.branch_factor == 1.0
    assert store.state["origin"]["format"] == "gpt2"
    assert made.model == store.model and made.kept == [] and "dropout" in made.notes[0]
    assert torch.allclose(logits_of(model_from_store(store)), logits_of(model), atol=1e-5)
    assert store.tokenizer_folder is not None
    read = AutoTokenizer.from_pretrained(store.tokenizer_folder)
    assert read(TEXT).input_ids == tokenizer().tokenizer.encode(TEXT).ids


def without_prefix(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): value for name, value in tensors.items()}, folder / "model.safetensors"
    )


def with_old_buffers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for block in range(2):
        tensors[f"transformer.h.{block}.attn.bias"] = torch.ones(1, 1, 32, 32).tril().bool()
        tensors[f"transformer.h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / "model.safetensors")


def with_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    change_config(folder, tie_word_embeddings=False)


def as_pickle(folder: Path, **options: Any) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()


def as_old_pickle(folder: Path) -> None:
    as_pickle(folder, _use_new_zipfile_serialization=False)


def as_pickled_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    weight_map = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    random_gpt2().save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


@pytest.mark.parametrize(
    "change",
    [without_prefix, with_old_buffers, with_head, as_pickle, as_old_pickle, as_pickled_shards, as_shards],
    ids=lambda change: change.__name__,
)
def test_every_way_a_folder_may_be_stored(tmp_path: Path, change: Any) -> None:
    folder = gpt2_folder(tmp_path / "gpt2", has_tokenizer=False)
    change(folder)
    made = import_gpt2(folder, tmp_path / "made", vocab_padding_multiple=1)
    store = Store.open(tmp_path / "made")
    assert_same_weights(store, random_gpt2())
    assert not made.has_tokenizer and store.tokenizer_folder is None
    assert store.model.padded_vocab_size == store.model.vocab_size


def test_sixteen_bits_become_fp32_exactly(tmp_path: Path) -> None:
    model = random_gpt2().bfloat16()
    model.save_pretrained(tmp_path / "gpt2")
    made = import_gpt2(tmp_path / "gpt2", tmp_path / "made")
    assert made.stored_dtypes == ["bfloat16"]
    assert_same_weights(Store.open(tmp_path / "made"), model)


@pytest.mark.parametrize("projections", [("q", "k", "v"), ("q", "k", "v", "o"), ("v",)])
def test_full_rank_gives_the_same_logits(tmp_path: Path, projections: tuple[str, ...]) -> None:
    folder = gpt2_folder(tmp_path / "gpt2")
    made = import_gpt2(folder, tmp_path / "made", rank=32, projections=projections)
    store = Store.open(tmp_path / "made")
    assert store.model.factorised_projections == projections and store.model.rank == 32
    assert [(entry.block, entry.projection) for entry in made.kept] == [(b, p) for b in (0, 1) for p in projections]
    assert all(entry.energy == pytest.approx(1.0, abs=1e-12) for entry in made.kept)
    assert (logits_of(model_from_store(store)) - logits_of(random_gpt2())).abs().max() < 1e-4


def test_what_a_lower_rank_keeps(tmp_path: Path) -> None:
    folder = gpt2_folder(tmp_path / "gpt2")
    made = import_gpt2(folder, tmp_path / "made", rank=5)
    assert len(made.kept) == 6
    store = Store.open(tmp_path / "made")
    whole = random_gpt2().transformer.h[1].attn.c_attn.weight.detach()[:, 32:64].T.double()
    up, down = (store.tensor(f"blocks.1.attention.k.{part}.weight").double() for part in ("up", "down"))
    # The nearest matrix of its rank is the one whose error is the rest of the singular values.
    singular = torch.linalg.svdvals(whole)
    assert float((whole - up @ down).norm()) == pytest.approx(float(singular[5:].norm()), rel=1e-6)
    assert made.kept[4].energy == pytest.approx(1 - float((whole - up @ down).norm() / whole.norm()) ** 2, rel=1e-6)
    # Balanced: both factors have the roots of the singular values.
    assert torch.allclose(up.T @ up, torch.diag(singular[:5]), atol=1e-5)
    assert torch.allclose(down @ down.T, torch.diag(singular[:5]), atol=1e-5)


def test_a_matrix_of_low_rank_is_kept_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(9, 2, generator=generator) @ torch.randn(2, 6, generator=generator)
    up, down, energy = factorise(low, 2)
    assert energy == pytest.approx(1.0, abs=1e-10) and torch.allclose(up @ down, low, atol=1e-5)
    up, down, energy = factorise(torch.zeros(3, 3), 2)
    assert energy == 1.0 and not up.any() and not down.any()


def change_config(folder: Path, **values: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | values))


def change_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    content = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        content.pop(name, None)
        if value is not None:
            content[name] = value
    save_file(content, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu': here it is gelu_new or gelu_pytorch_tanh"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true: attention"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false"),
        ({"add_cross_attention": True}, "add_cross_attention is true: there is no encoder"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
        ({"model_type": "llama"}, "model_type is 'llama'; only gpt2"),
        ({"n_head": 5}, "n_embd 32 is not divisible by n_head 5"),
        ({"n_embd": "wide"}, "is not sound"),
        ({"layer_norm_epsilon": 1.0}, "layer_norm_eps"),
        ({"tie_word_embeddings": False}, "says tie_word_embeddings false, and lm_head.weight is missing"),
        ({"n_layer": 3}, "lacks h.2.attn.c_attn.bias, .* and 6 more"),
        ({"n_layer": 1}, "has weights that this project's GPT-2 does not have: h.1"),
        ({"vocab_size": 299}, r"has wte.weight \(300, 32\), config.json makes it \(299, 32\)"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    folder = gpt2_folder(tmp_path / "gpt2", has_tokenizer=False)
    change_config(folder, **values)
    with pytest.raises(CheckpointError, match=expected) as error:
        import_gpt2(folder, tmp_path / "made")
    assert str(folder) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = gpt2_folder(tmp_path / "gpt2", has_tokenizer=False)
    whole = (folder / "model.safetensors").read_bytes()

    def refusal(rank: int | None = None) -> str:
        with pytest.raises(CheckpointError) as error:
            import_gpt2(folder, tmp_path / "made", rank)
        assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]
        (folder / "model.safetensors").write_bytes(whole)
        return str(error.value)

    change_tensors(folder, **{"lm_head.weight": torch.zeros(300, 32)})
    assert "has a head of its own" in refusal()
    change_tensors(folder, **{"transformer.ln_f.bias": torch.full((32,), torch.nan)})
    assert "final_norm.bias has values that are not finite" in refusal()
    change_tensors(folder, **{"transformer.h.0.attn.c_attn.weight": torch.full((32, 96), torch.inf)})
    assert "blocks.0.attention.q.down.weight has values that are not finite" in refusal(rank=4)
    change_tensors(folder, **{"transformer.wpe.weight": torch.zeros(32, 32, dtype=torch.int8)})
    assert "has wpe.weight as torch.int8" in refusal()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert "cannot be read as safetensors" in refusal()
    assert "a rank of 33 does not fit its width; use 1 to 32" in refusal(rank=33)
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in refusal()
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"wte.weight": "model-2.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=re.escape("model-2.safetensors is missing, although")):
        import_gpt2(folder, tmp_path / "made")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"wte.weight": "model-1.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"names tensors that no file has: wte\.weight"):
        import_gpt2(folder, tmp_path / "made")


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this ran",)


def test_a_pickle_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = gpt2_folder(tmp_path / "gpt2", has_tokenizer=False)
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": Harm()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as tensors and nothing else"):
        import_gpt2(folder, tmp_path / "made")
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is not a table of tensors"):
        import_gpt2(folder, tmp_path / "made")
    assert "this ran" not in capsys.readouterr().out


def test_other_models_and_places_are_refused(tmp_path: Path) -> None:
    classifier = GPT2ForSequenceClassification(random_gpt2(num_labels=3).config)
    classifier.save_pretrained(tmp_path / "classifier")
    with pytest.raises(CheckpointError, match=r"does not have: score\.weight"):
        import_gpt2(tmp_path / "classifier", tmp_path / "made")
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        import_gpt2(tmp_path / "nothing", tmp_path / "made")
    folder = gpt2_folder(tmp_path / "gpt2", has_tokenizer=False)
    (tmp_path / "made").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        import_gpt2(folder, tmp_path / "made")


def test_tokenizers_of_the_old_file_names_are_copied(tmp_path: Path) -> None:
    folder = gpt2_folder(tmp_path / "gpt2", has_tokenizer=False)
    save_tokenizer_files(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    import_gpt2(folder, tmp_path / "made")
    assert sorted(path.name for path in (tmp_path / "made" / "tokenizer").iterdir()) == ["merges.txt", "vocab.json"]
