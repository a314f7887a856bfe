"""Exports: what is in the folder, that it is the trained model, and that a bad one fails and leaves nothing."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GPT2LMHeadModel

from mlra_scale.checkpoint.files import CheckpointError, entry_of
from mlra_scale.checkpoint.huggingface import exporting
from mlra_scale.checkpoint.huggingface.configuration import model_from_store
from mlra_scale.checkpoint.huggingface.exporting import ExportOptions, VerificationText, export_checkpoint
from mlra_scale.checkpoint.huggingface.importing import import_gpt2
from mlra_scale.checkpoint.huggingface.modeling_mlra import MlraForCausalLM
from mlra_scale.checkpoint.huggingface.tensors import FORMATS, ExportTensor, Format
from mlra_scale.checkpoint.huggingface.verification import LogitComparison, Verification, VerificationError
from mlra_scale.checkpoint.reader import Store
from mlra_scale.checkpoint.weights import write_weights
from mlra_scale.data.tokenizer import save_tokenizer, train_bpe
from tests.support.gpt2_folders import gpt2_folder, tokenizer
from tests.support.oracle import build_reference
from tests.support.reference import ReferenceGPT
from tests.unit.checkpoint.huggingface.builders import (
    ONLY_MLRA,
    VARIANTS,
    checkpoint,
    model_config,
    random_text,
    vectors,
    weights,
)

MODELS: dict[Format, Any] = {"gpt2": GPT2LMHeadModel, "mlra": MlraForCausalLM}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return checkpoint(tmp_path_factory.mktemp("store") / "step-00000000")


def load(folder: Path, export_format: Format, dtype: torch.dtype = torch.float32) -> Any:
    model, report = MODELS[export_format].from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refusal(
    place: Path, source: Store, options: ExportOptions | None = None, text: VerificationText | None = None
) -> str:
    """The error of an export to `out`, which leaves nothing behind."""
    with pytest.raises(CheckpointError) as error:
        export_checkpoint(source, place / "out", options or ExportOptions("gpt2"), text or random_text())
    assert not (place / "out").exists() and not list(place.glob(".*"))
    return str(error.value)


def oracle(variant: str) -> ReferenceGPT:
    config: Any = SimpleNamespace(model=model_config(variant))
    return build_reference(config, weights(variant), vectors(variant))


EXPORTS = [(variant, name) for variant in VARIANTS for name in FORMATS if name == "mlra" or variant not in ONLY_MLRA]


@pytest.mark.parametrize(("variant", "export_format"), EXPORTS)
def test_exports_equal_the_oracle(tmp_path: Path, variant: str, export_format: Format) -> None:
    source = checkpoint(tmp_path / "checkpoint", variant)
    text = random_text()
    verification = export_checkpoint(source, tmp_path / "out", ExportOptions(export_format), text)
    assert verification is not None and verification.exported.max_difference < 1e-5
    assert verification.exported.agreement == 1.0 and verification.exported.num_tokens == 96
    expected = oracle(variant)
    model = load(tmp_path / "out", export_format)
    with torch.no_grad():
        logits = model(text.tokens_NS[:, :-1]).logits
        torch.testing.assert_close(logits.double(), expected(text.tokens_NS[:, :-1]), rtol=0, atol=1e-5)
    assert logits.shape[-1] == tokenizer().vocabulary_size, "no padded row leaks"
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    names |= {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    assert files_of(tmp_path / "out") == names | ({"modeling_mlra.py"} if export_format == "mlra" else set())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("variant", ONLY_MLRA)
def test_what_gpt2_cannot_express_is_refused_before_any_work(tmp_path: Path, variant: str) -> None:
    source = checkpoint(tmp_path / "checkpoint", variant, has_tokenizer=False)
    assert "which stock GPT-2 cannot" in refusal(tmp_path, source)
    assert "model.qk_norm" in refusal(tmp_path, source) and "use --format mlra" in refusal(tmp_path, source)
    assert files_of(tmp_path) == {"checkpoint"}


@pytest.mark.parametrize("export_format", FORMATS)
def test_a_parameter_that_an_export_does_not_know_is_never_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export_format: Format
) -> None:
    source = checkpoint(tmp_path / "checkpoint", has_tokenizer=False)
    name = "blocks.1.attention.scale.weight"
    monkeypatch.setattr(source, "table", {**source.table, name: source.table["final_norm.weight"]})
    with pytest.raises(CheckpointError, match=rf"^the format {export_format} has no place for {re.escape(name)}: "):
        export_checkpoint(source, tmp_path / "out", ExportOptions(export_format), text=None)
    assert files_of(tmp_path) == {"checkpoint"}
    with pytest.raises(CheckpointError, match=f"has no place for {re.escape(name)}"):
        model_from_store(source)


@pytest.mark.parametrize("variant", ["all", "folding", "completep-folding", "completep-qk-norm"])
def test_evaluation_sees_the_model_that_an_export_is(tmp_path: Path, variant: str) -> None:
    source = checkpoint(tmp_path / "checkpoint", variant)
    tokens = random_text().tokens_NS[:, :-1]
    with torch.no_grad():
        logits = model_from_store(source)(tokens).logits
        torch.testing.assert_close(logits.double(), oracle(variant)(tokens), rtol=0, atol=1e-5)


def test_options_that_fold_leave_plain_weights(tmp_path: Path) -> None:
    """No gain is left, a map's largest singular value is its gain, and a norm has its block's factor."""
    source = checkpoint(tmp_path / "checkpoint", "folding")
    export_checkpoint(source, tmp_path / "out", ExportOptions("mlra"), random_text())
    plain = checkpoint(tmp_path / "plain", "mlra")
    state, ours = load(tmp_path / "out", "mlra").state_dict(), weights("folding")
    assert state.keys() == {f"model.{name}" for name in plain.table} | {"lm_head.weight"}
    for norm in ("attention_norm.weight", "mlp_norm.bias"):
        folded = ours[f"blocks.2.{norm}"].double() / 3**0.5
        assert torch.equal(state[f"model.blocks.2.{norm}"], folded.float())
        assert torch.equal(state[f"model.blocks.0.{norm}"], ours[f"blocks.0.{norm}"])
    matrix = state["model.blocks.1.mlp.fc_in.weight"].double()
    # One power iteration from the vectors of other weights: the singular value is only about the gain.
    largest, gain = torch.linalg.matrix_norm(matrix, 2), ours["blocks.1.mlp.fc_in.gain"]
    assert 0.999 * gain < largest < 2 * gain
    assert torch.equal(state["model.blocks.1.attention.q.down.weight"], ours["blocks.1.attention.q.down.weight"])


@pytest.mark.parametrize("variant", ["completep", "completep-dense", "completep-o-sigma"])
def test_completep_folds_into_what_ends_a_branch(tmp_path: Path, variant: str) -> None:
    """In float64, then rounded once: three layers, and a base depth of two."""
    export_checkpoint(checkpoint(tmp_path / "checkpoint", variant), tmp_path / "out", ExportOptions("mlra"), None)
    state, ours = load(tmp_path / "out", "mlra").state_dict(), weights(variant)
    is_factorised, has_gain = variant != "completep-dense", variant == "completep-o-sigma"
    ends = {"attention.o.up" if is_factorised else "attention.o", "mlp.fc_out"}
    for name in state.keys() - {"lm_head.weight", "model.embedding.weight"}:
        ours_name = name.removeprefix("model.")
        owner, _, leaf = ours_name.partition(".")[2].partition(".")[2].rpartition(".")
        is_normalised = (
            has_gain and leaf == "weight" and owner.startswith(("attention.", "mlp.")) and "down" not in owner
        )
        if not is_normalised:
            expected = (ours[ours_name].double() * 2 / 3).float() if owner in ends else ours[ours_name]
            assert torch.equal(state[name], expected), name
        elif owner in ends:
            # The map's largest singular value is its gain, about (one power iteration), times two thirds.
            matrix, gain = state[name].double(), ours[f"{ours_name.removesuffix('.weight')}.gain"].double()
            if is_factorised and owner == "attention.o.up":
                matrix = matrix @ ours[ours_name.replace(".up.", ".down.")].double()
            assert 0.999 * gain < 1.5 * torch.linalg.matrix_norm(matrix, 2) < 2 * gain, name


def test_an_exported_completep_model_comes_back_as_one_without_a_depth_rule(tmp_path: Path) -> None:
    """Its branches are scaled by weights then: scaled once more it would be another model."""
    source = checkpoint(tmp_path / "checkpoint", "completep-dense")
    export_checkpoint(source, tmp_path / "out", ExportOptions("gpt2"), random_text())
    made = import_gpt2(tmp_path / "out", tmp_path / "made")
    assert source.model.depth_rule == "completep" and made.model.depth_rule == "none"
    tokens = random_text().tokens_NS[:, :-1]
    with torch.no_grad():
        logits = model_from_store(Store.open(tmp_path / "made"))(tokens).logits
        torch.testing.assert_close(logits.double(), oracle("completep-dense")(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fault", ["attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"])
def test_a_branch_that_is_not_scaled_as_a_whole_fails(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "checkpoint", "completep", has_tokenizer=False)
    spoil(monkeypatch, changed(f"h.1.{fault}", lambda tensor: tensor * 1.5))
    with pytest.raises(VerificationError, match="its logits"):
        export_checkpoint(source, tmp_path / "out", ExportOptions("gpt2"), random_text())


def test_a_scaled_embedding_and_its_head_are_two_matrices_in_gpt2(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint", "embedding-scale")
    for name in FORMATS:
        export_checkpoint(source, tmp_path / name, ExportOptions(name), random_text())
    stock, own = (load(tmp_path / name, name) for name in FORMATS)
    embedding = weights("embedding-scale")["embedding.weight"][: tokenizer().vocabulary_size]
    assert not stock.config.tie_word_embeddings
    assert torch.equal(stock.transformer.wte.weight, (embedding.double() * 32**0.5).float())
    assert torch.equal(stock.lm_head.weight, embedding)
    assert own.config.tie_word_embeddings and own.lm_head.weight is own.model.embedding.weight
    tokens = random_text().tokens_NS[:, :-1]
    entering = own.get_input_embeddings()(tokens)
    torch.testing.assert_close(entering, stock.transformer.wte(tokens))
    torch.testing.assert_close(own(inputs_embeds=entering).logits, own(tokens).logits)
    prompts = tokens[:, :6]
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    texts = [
        model.generate(prompts, use_cache=cached, **settings) for model in (stock, own) for cached in (True, False)
    ]
    assert all(torch.equal(text, texts[0]) for text in texts[1:])


@pytest.mark.parametrize("fault", ["embedding.weight", "lm_head.weight"])
def test_an_embedding_that_is_scaled_in_the_wrong_place_fails(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "checkpoint", "embedding-scale", has_tokenizer=False)
    name = "wte.weight" if fault == "embedding.weight" else fault
    wrong = 32**-0.5 if name == "wte.weight" else 32**0.5
    spoil(monkeypatch, changed(name, lambda tensor: tensor * wrong))
    with pytest.raises(VerificationError, match="its logits"):
        export_checkpoint(source, tmp_path / "out", ExportOptions("gpt2"), random_text())


def test_a_checkpoint_without_its_vectors_is_not_opened(tmp_path: Path) -> None:
    values = model_config("sigma-reparam").model_dump(mode="json")
    folder = write_weights(tmp_path / "checkpoint", values, weights("sigma-reparam").items(), None, {})
    with pytest.raises(CheckpointError, match=r"lacks power_iteration/blocks\.0\.attention\.q, a vector of 16"):
        Store.open(folder)


def test_the_card_names_the_options(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint", "all")
    export_checkpoint(source, tmp_path / "out", ExportOptions("mlra"), None)
    card = (tmp_path / "out" / "README.md").read_text()
    for option in ("QK-norm", "sigmaReparam", "LayerNorm Scaling", "token embeddings times 5.65685 on entry"):
        assert option in card, option
    deep = checkpoint(tmp_path / "deep", "completep")
    export_checkpoint(deep, tmp_path / "third", ExportOptions("mlra"), None)
    card = (tmp_path / "third" / "README.md").read_text()
    assert "CompleteP (arXiv 2505.01618), branches times 2/3, folded into o and fc_out" in card
    plain = checkpoint(tmp_path / "plain")
    export_checkpoint(plain, tmp_path / "other", ExportOptions("mlra"), None)
    assert "options" not in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.parametrize("variant", ["dense", "mlra"])
def test_dense_weights_are_exported_bit_by_bit_and_factors_merged_in_float64(tmp_path: Path, variant: str) -> None:
    export_checkpoint(
        checkpoint(tmp_path / "checkpoint", variant), tmp_path / "out", ExportOptions("gpt2"), random_text()
    )
    ours = weights(variant)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt" and "lm_head.weight" not in file.keys()  # noqa: SIM118
        fused = file.get_tensor("transformer.h.1.attn.c_attn.weight").T.chunk(3)
        for matrix, name in zip(fused, "qkv", strict=True):
            prefix = f"blocks.1.attention.{name}"
            if variant == "dense":
                assert torch.equal(matrix, ours[f"{prefix}.weight"])
            else:
                up, down = (ours[f"{prefix}.{part}.weight"].double() for part in ("up", "down"))
                assert torch.equal(matrix, (up @ down).float())
        embedding = file.get_tensor("transformer.wte.weight")
        assert torch.equal(embedding, ours["embedding.weight"][: tokenizer().vocabulary_size])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("export_format", FORMATS)
def test_16_bit_types_are_held_to_the_training_sides_own_error(
    tmp_path: Path, store: Store, export_format: Format, dtype: torch.dtype
) -> None:
    verification = export_checkpoint(store, tmp_path / "out", ExportOptions(export_format, dtype), random_text())
    assert verification is not None and verification.own is not None
    assert 0 < verification.exported.max_difference <= 2 * verification.own.max_difference
    assert load(tmp_path / "out", export_format, dtype).dtype == dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_shards_hold_at_most_what_was_asked_for(tmp_path: Path, store: Store) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    export_checkpoint(store, whole, ExportOptions("gpt2"), random_text())
    export_checkpoint(store, parts, ExportOptions("gpt2", max_shard_bytes=40_000), random_text())
    shards = sorted(parts.glob("model-*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    sizes = [shard.stat().st_size for shard in shards]
    assert max(sizes[1:]) <= 40_000 + 4000, "but for the header, and the embedding, which is larger"
    one, other = (load(folder, "gpt2").state_dict() for folder in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_tokenizer_comes_along(tmp_path: Path, store: Store) -> None:
    export_checkpoint(store, tmp_path / "out", ExportOptions("gpt2"), random_text())
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Words, bytes and t\u00f6kens:  1, 2,\n\n3 ... don't"
    assert loaded(text)["input_ids"] == tokenizer().tokenizer.encode(text).ids
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.model_max_length == 32
    end = tokenizer().end_of_document_token
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "out" / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (end, end), name
    assert values["pad_token_id"] == end


def test_without_a_tokenizer_no_token_is_special(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint", has_tokenizer=False)
    export_checkpoint(source, tmp_path / "out", ExportOptions("gpt2"), random_text())
    assert files_of(tmp_path / "out") == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    config = load(tmp_path / "out", "gpt2").config
    assert config.bos_token_id is None and config.eos_token_id is None, "not those of OpenAI's GPT-2"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path, store: Store) -> None:
    texts = [" ".join(f"{a}{b}{c}" for a in "abcdef" for b in "ghijkl" for c in "mnop")] * 3
    save_tokenizer(train_bpe(texts, 600), tmp_path / "large")
    assert "they do not belong together" in refusal(tmp_path, store, ExportOptions(tokenizer=tmp_path / "large"))


def test_the_card_says_what_the_checkpoint_says(tmp_path: Path, store: Store) -> None:
    export_checkpoint(store, tmp_path / "out", ExportOptions("mlra"), random_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    parameters = sum(parameter.numel() for parameter in load(tmp_path / "out", "mlra").parameters())
    for fact in (f"{parameters:,} as trained", "q, k, v of rank 16", "origin: source | a test", store.manifest.save_id):
        assert fact in card, fact
    assert "on random tokens" in card and "bound 0.0001" in card and "trust_remote_code=True" in card
    export_checkpoint(store, tmp_path / "unverified", ExportOptions("mlra"), None)
    assert "not compared" in (tmp_path / "unverified" / "README.md").read_text()


def swap_q_and_k(tensors: list[ExportTensor]) -> list[ExportTensor]:
    def swapped(tensor: ExportTensor) -> ExportTensor:
        def make() -> torch.Tensor:
            q, k, v = tensor.make().chunk(3, dim=-1)
            return torch.cat([k, q, v], dim=-1)

        return ExportTensor(tensor.name, tensor.shape, make) if "c_attn" in tensor.name else tensor

    return [swapped(tensor) for tensor in tensors]


def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., list[ExportTensor]]:
    def apply(tensors: list[ExportTensor]) -> list[ExportTensor]:
        assert any(part in tensor.name for tensor in tensors), part
        return [
            ExportTensor(tensor.name, tensor.shape, lambda make=tensor.make: change(make()))  # type: ignore[misc]
            if part in tensor.name
            else tensor
            for tensor in tensors
        ]

    return apply


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[ExportTensor]], list[ExportTensor]]) -> None:
    """Changes the tensors that are written."""
    original = exporting.export_tensors
    monkeypatch.setattr(exporting, "export_tensors", lambda *arguments: change(original(*arguments)))


FAULTS = {
    "q and k swapped": swap_q_and_k,
    "a bias forgotten": changed("h.1.attn.c_attn.bias", torch.zeros_like),
    "the output's bias forgotten": changed("h.2.mlp.c_proj.bias", torch.zeros_like),
    "a square matrix not transposed": changed("h.0.attn.c_proj.weight", torch.Tensor.t),
    "a norm forgotten": changed("ln_f.weight", torch.ones_like),
    "positions shifted": changed("wpe.weight", lambda tensor: tensor.roll(1, 0)),
    "tokens shifted": changed("wte.weight", lambda tensor: tensor.roll(1, 0)),
    "merged in bfloat16": changed("h.0.attn.c_attn.weight", lambda tensor: tensor.bfloat16().double()),
    "not numbers": changed("h.0.mlp.c_fc.bias", lambda tensor: tensor * torch.nan),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_the_trained_model_fails_and_leaves_nothing(
    tmp_path: Path, store: Store, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, FAULTS[fault])
    with pytest.raises(VerificationError, match=r"its logits are not the trained model's: .* \(bound 0\.0001\)"):
        export_checkpoint(store, tmp_path / "out", ExportOptions("gpt2"), random_text())
    if fault in ("q and k swapped", "tokens shifted", "a bias forgotten", "not numbers"):
        with pytest.raises(VerificationError, match="its logits"):
            export_checkpoint(store, tmp_path / "out", ExportOptions("gpt2", torch.bfloat16), random_text())
    assert not files_of(tmp_path)
    export_checkpoint(store, tmp_path / "out", ExportOptions("gpt2"), None)  # the user's own risk
    assert "model.safetensors" in files_of(tmp_path / "out")


@pytest.mark.parametrize("fault", ["activation", "epsilon"])
def test_a_wrong_configuration_fails(tmp_path: Path, store: Store, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = exporting.write_configuration

    def write(folder: Path, *arguments: Any) -> None:
        original(folder, *arguments)
        values = json.loads((folder / "config.json").read_text())
        values |= {"activation_function": "gelu"} if fault == "activation" else {"layer_norm_epsilon": 1e-3}
        (folder / "config.json").write_text(json.dumps(values))

    monkeypatch.setattr(exporting, "write_configuration", write)
    with pytest.raises(VerificationError, match="its logits"):
        export_checkpoint(store, tmp_path / "out", ExportOptions("gpt2"), random_text())


def corrupt(folder: Path, name: str, row: int) -> Path:
    """Flips a high bit of one weight in a written file."""
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    begin, _ = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    raw[8 + length + begin + row * 32 * 4 + 3] ^= 0x40  # the exponent of a float32
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("has_its_checksum", [False, True], ids=["by checksum", "by logits"])
def test_a_weight_that_changes_on_disk_fails(
    tmp_path: Path, store: Store, has_its_checksum: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = exporting.write_shards

    def write(folder: Path, *arguments: Any) -> Any:
        files = original(folder, *arguments)
        path = corrupt(folder, "transformer.h.1.mlp.c_fc.weight", row=0)
        # To show that the logits tell it, too, the checksum is brought in line.
        return files | {path.name: entry_of(path)} if has_its_checksum else files

    monkeypatch.setattr(exporting, "write_shards", write)
    message = "its logits" if has_its_checksum else "reads back other than it was written"
    with pytest.raises(VerificationError, match=message):
        export_checkpoint(store, tmp_path / "out", ExportOptions("gpt2"), random_text())
    assert not files_of(tmp_path)


@pytest.mark.parametrize("export_format", FORMATS)
def test_a_missing_or_unknown_tensor_fails(
    tmp_path: Path, store: Store, export_format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ExportTensor("extra.weight", (1,), lambda: torch.ones(1))
    with monkeypatch.context() as patch, pytest.raises(VerificationError, match="missing_keys"):
        spoil(patch, lambda tensors: tensors[:-1])
        export_checkpoint(store, tmp_path / "out", ExportOptions(export_format), random_text())
    with monkeypatch.context() as patch, pytest.raises(VerificationError, match="unexpected_keys"):
        spoil(patch, lambda tensors: [*tensors, extra])
        export_checkpoint(store, tmp_path / "out", ExportOptions(export_format), random_text())


def test_an_export_is_replaced_only_on_request_and_by_a_good_one(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()  # an empty folder may be filled
    export_checkpoint(store, target, ExportOptions("gpt2"), random_text())
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(CheckpointError, match="give --force to replace it"):
        export_checkpoint(store, target, ExportOptions("mlra"), random_text())
    with monkeypatch.context() as patch, pytest.raises(VerificationError):
        spoil(patch, swap_q_and_k)
        export_checkpoint(store, target, ExportOptions("gpt2", is_replacing=True), random_text())
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    export_checkpoint(store, target, ExportOptions("mlra", is_replacing=True), random_text())
    assert "modeling_mlra.py" in files_of(target) and files_of(tmp_path) == {"out"}


def test_what_is_no_export_is_never_replaced(tmp_path: Path, store: Store) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    # Somebody else's model, or any folder with a config.json.
    gpt2_folder(tmp_path / "gpt2", has_tokenizer=False)
    (tmp_path / "gpt2" / "README.md").write_text("The only copy of a fine-tuned GPT-2.")
    for name in ("thesis", "gpt2", "file", "link"):
        message = "not an export of this tool" if name in ("thesis", "gpt2") else "not a folder"
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(store, tmp_path / name, ExportOptions(is_replacing=True), random_text())
    assert files_of(tmp_path) == {"thesis", "gpt2", "file", "link"} and files_of(tmp_path / "thesis") == {"chapter.tex"}
    assert {"config.json", "model.safetensors", "README.md"} <= files_of(tmp_path / "gpt2")


@pytest.mark.parametrize("sign", [1, -1])
def test_a_weight_that_a_type_cannot_hold_is_refused(
    tmp_path: Path, store: Store, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last position: no text of the verification comes there."""

    def beyond(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[-1, 0] = sign * 7e4
        return tensor

    spoil(monkeypatch, changed("wpe.weight", beyond))
    with pytest.raises(CheckpointError, match=r"wpe\.weight has values beyond 65504, where torch\.float16 ends"):
        export_checkpoint(store, tmp_path / "out", ExportOptions("gpt2", torch.float16), None)
    assert not files_of(tmp_path)
    export_checkpoint(store, tmp_path / "out", ExportOptions("gpt2", torch.bfloat16), None)


def test_two_exports_to_one_place_do_not_meet(tmp_path: Path, store: Store) -> None:
    def second(line: str) -> None:
        with pytest.raises(CheckpointError, match=r"another export to .*out is at work"):
            export_checkpoint(store, tmp_path / "out", ExportOptions("mlra"), random_text())

    export_checkpoint(store, tmp_path / "out", ExportOptions("gpt2"), random_text(), say=second)
    assert load(tmp_path / "out", "gpt2") is not None


def test_a_file_in_the_way_is_refused(tmp_path: Path, store: Store) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be written: (Not a directory|File exists)"):
        export_checkpoint(store, tmp_path / "file" / "out", ExportOptions(), random_text())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 1, dtype=torch.long), "sequences of 1 tokens"),
        # Queries and keys do not matter to the first token of a text, positions but the first to none of them.
        (torch.zeros(1, 2, dtype=torch.long), "needs 17 to 33"),
        (torch.zeros(1, 34, dtype=torch.long), "needs 17 to 33"),
        (torch.full((1, 17), 9999), "has a token 9999"),
    ],
)
def test_text_that_the_model_cannot_read_is_refused(
    tmp_path: Path, store: Store, tokens: torch.Tensor, message: str
) -> None:
    assert message in refusal(tmp_path, store, text=VerificationText(tokens, "a text"))


def test_the_figures_of_a_comparison() -> None:
    expected = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, -12.0]])
    actual = expected + torch.tensor([[0.0, 0.0, 0.03], [0.0, -0.04, 0.0]])
    comparison = LogitComparison()
    comparison.add(expected, actual, torch.tensor([2, 0]))
    p, q = expected.double().softmax(-1), actual.double().softmax(-1)
    assert comparison.max_difference == pytest.approx(0.04) and comparison.largest_logit == 12.0
    assert comparison.rms_difference == pytest.approx((0.0025 / 6) ** 0.5, rel=1e-4)
    assert comparison.divergence == pytest.approx(float((p * (p / q).log()).sum()) / 2, rel=1e-6)
    likelihoods = [float(x[0, 2] * x[1, 0]) for x in (p, q)]
    assert comparison.perplexities == pytest.approx([likelihood**-0.5 for likelihood in likelihoods])
    assert comparison.agreement == 1.0
    assert Verification(torch.float32, comparison, None).max_bound == pytest.approx(1.2e-4)
    assert not Verification(torch.float32, comparison, None).has_passed
    assert Verification(torch.bfloat16, comparison, comparison).has_passed
    comparison.add(expected, actual * torch.nan, torch.tensor([2, 0]))
    assert not Verification(torch.bfloat16, comparison, comparison).has_passed, "what is no number is never good"
