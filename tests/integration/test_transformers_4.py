"""Exports of `gpt2` format in transformers 4.57, which a separate process loads: the same ids and the same logits.

The older library is installed by pip into a folder of its own, which is kept between runs (TRANSFORMERS_4 names another
one); torch and the rest are those of this environment.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from mlra_scale.checkpoint.huggingface.exporting import ExportOptions, export_checkpoint
from mlra_scale.checkpoint.huggingface.tensors import FORMATS
from tests.unit.checkpoint.huggingface.builders import checkpoint
from tests.unit.checkpoint.huggingface.test_exported_tokenizer import TEXT, source_of, write

pytestmark = pytest.mark.slow  # the library is fetched from a package index
REQUIREMENTS = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
PLACE = Path(
    os.environ.get("TRANSFORMERS_4", Path(tempfile.gettempdir()) / f"mlra-scale-transformers-4.57.6-{os.getuid()}")
)
CODE = """
import json, sys, torch, transformers
assert transformers.__version__ == "4.57.6", transformers.__file__
from transformers import AutoTokenizer, GPT2LMHeadModel
found = {}
for folder in json.loads(sys.argv[1]):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(sys.argv[2]).input_ids
    found[folder] = {"ids": ids, "text": tokenizer.decode(ids), "eos": tokenizer.eos_token, "bos": tokenizer.bos_token}
    found[folder]["length"] = tokenizer.model_max_length
for folder in json.loads(sys.argv[3]):
    model, report = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    found[folder]["logits"] = model.eval()(torch.arange(16)[None]).logits[0, -1].tolist()
    found[folder]["end"] = model.generation_config.eos_token_id
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def transformers_4() -> Iterator[Path]:
    """A folder with the older library; skips where pip cannot bring it."""
    if not (PLACE / "complete").is_file():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(PLACE)]
        installed = subprocess.run([*pip, *REQUIREMENTS], capture_output=True, text=True, timeout=500)
        if installed.returncode:
            pytest.skip(f"needs {', '.join(REQUIREMENTS)} from pip: {installed.stderr.strip()[-300:]}")
        (PLACE / "complete").touch()
    yield PLACE


def loaded(library: Path, tokenizers: list[Path], models: list[Path]) -> dict[str, dict]:
    arguments = [json.dumps([str(path) for path in paths]) for paths in (tokenizers, models)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    ran = subprocess.run(
        [sys.executable, "-c", CODE, arguments[0], TEXT, arguments[1]],
        capture_output=True,
        text=True,
        timeout=500,
        stdin=subprocess.DEVNULL,
        env=clean | {"PYTHONPATH": str(library), "HF_HUB_OFFLINE": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_exports_load_in_transformers_4_57(transformers_4: Path, tmp_path: Path) -> None:
    """Generic fast tokenizers in both formats without remote code, and the weights of the stock format."""
    source = checkpoint(tmp_path / "checkpoint")
    for name in FORMATS:
        export_checkpoint(source, tmp_path / name, ExportOptions(name), None)
    tokenizers = [tmp_path / name for name in FORMATS]
    for kind in ("begins_with_bos", "has_both", "unigram", "end_is_not_special", "as transformers 5 saves it"):
        place = tmp_path / kind.replace(" ", "_")
        place.mkdir()
        write(place, source_of(place / "source", kind))
        tokenizers.append(place / "out")
    found = loaded(transformers_4, tokenizers, [tmp_path / "gpt2"])
    for folder in tokenizers:
        ours, theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False), found[str(folder)]
        assert theirs["ids"] == ours(TEXT).input_ids and len(theirs["ids"]) > 4
        assert theirs["text"] == ours.decode(theirs["ids"])
        assert (theirs["bos"], theirs["eos"], theirs["length"]) == (ours.bos_token, ours.eos_token, 32)
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").eval()
    with torch.no_grad():
        logits = model(torch.arange(16)[None]).logits[0, -1]
    assert found[str(tmp_path / "gpt2")]["end"] == model.generation_config.eos_token_id
    torch.testing.assert_close(torch.tensor(found[str(tmp_path / "gpt2")]["logits"]), logits, rtol=1e-5, atol=1e-5)
