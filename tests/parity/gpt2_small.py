"""GPT-2 at its real size through import and export: python -m tests.parity.gpt2_small [--layers N].

A randomly initialised gpt2-small (124 M parameters, biases random too) goes to a checkpoint and back, bit by bit; then
factorised at full rank, and at half of it, to logits that are compared with those of the original. The same at a tiny
size is in tests/integration/test_tools_import.py; this takes about half a minute and 2 GB of disk.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel

from mlra_scale.checkpoint import Store
from mlra_scale.checkpoint.huggingface.exporting import ExportOptions, export_checkpoint
from mlra_scale.checkpoint.huggingface.importing import import_gpt2
from mlra_scale.checkpoint.huggingface.loading import model_from_store


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def observed(name: str, action: Callable[[], Any]) -> Any:
    """Runs something, and prints its seconds and by how much it raised the process' anonymous memory at most."""
    before, peak, is_over = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.005):
            peak = max(peak, anonymous_bytes())

    watcher, began = threading.Thread(target=watch), time.monotonic()
    watcher.start()
    try:
        result = action()
    finally:
        is_over.set()
        watcher.join()
    print(f"{name:<34} {time.monotonic() - began:6.1f} s, {max(0, peak - before) / 1e6:6.0f} MB anonymous", flush=True)
    return result


def make_folder(folder: Path, num_layers: int) -> None:
    """Saves a model with random weights and biases."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=num_layers))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)


def differing_tensors(first: Path, second: Path) -> list[str]:
    """Names of the tensors that are not the same bits in both folders."""
    with safe_open(first / "model.safetensors", "pt") as one, safe_open(second / "model.safetensors", "pt") as two:
        names = set(one.keys()) | set(two.keys())
        common = set(one.keys()) & set(two.keys())
        return sorted(
            name
            for name in names
            if name not in common
            or not torch.equal(one.get_tensor(name).view(torch.uint8), two.get_tensor(name).view(torch.uint8))
        )


def main() -> int:
    """Runs it all; returns 1 if a bit or the logits differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    num_layers = parser.parse_args().layers
    tokens = torch.randint(50257, (2, 64), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        place = Path(temporary)
        make_folder(place / "gpt2", num_layers)
        observed("import, dense", lambda: import_gpt2(place / "gpt2", place / "dense"))
        store = Store.open(place / "dense")
        observed("export", lambda: export_checkpoint(store, place / "back", ExportOptions("gpt2"), None))
        differing = differing_tensors(place / "gpt2", place / "back")
        print(f"{store.model.num_parameters():,} parameters there and back: {len(differing)} tensors differ")
        expected = GPT2LMHeadModel.from_pretrained(place / "gpt2").eval()(tokens).logits
        is_close = True
        for rank in (768, 384):
            name = f"import, q k v at rank {rank}"
            made = observed(name, lambda rank=rank: import_gpt2(place / "gpt2", place / f"r{rank}", rank=rank))
            logits = model_from_store(Store.open(place / f"r{rank}"))(tokens).logits
            difference = float((logits - expected).abs().max())
            energy = sum(entry.energy for entry in made.kept) / len(made.kept)
            print(f"  energy kept {energy:.6f}, largest difference of a logit {difference:.3g}")
            is_close = is_close and (rank < 768 or difference < 1e-4)
    return 0 if not differing and is_close else 1


if __name__ == "__main__":
    sys.exit(main())
