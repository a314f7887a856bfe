"""GPT-2 at its real sizes through import and export: python -m tests.parity.there_and_back [SIZE] [--layers N].

A randomly initialised model (124 M parameters by default, biases random too) goes to a checkpoint and back, bit by bit;
then factorised at full rank, and at half of it, to logits that are compared with those of the original. The same at a
tiny size is in tests/integration/test_tools_import.py; this takes about half a minute and 2 GB of disk.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel

from mlra_scale.checkpoint import Store
from mlra_scale.checkpoint.huggingface.configuration import model_from_store
from mlra_scale.checkpoint.huggingface.exporting import ExportOptions, export_checkpoint
from mlra_scale.checkpoint.huggingface.importing import import_gpt2

# Layers, width, heads.
SIZES = {"gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25)}


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


def make_folder(folder: Path, config: GPT2Config) -> None:
    """Saves a model with random weights and biases."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="100GB")


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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it all; returns 1 if a bit or the logits differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", choices=SIZES, default="gpt2")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the size has")
    parser.add_argument("--ranks", type=int, nargs="*", metavar="R", help="default: the width, and half of it")
    options = parser.parse_args(argv)
    num_layers, width, num_heads = SIZES[options.size]
    config = GPT2Config(n_layer=options.layers or num_layers, n_embd=width, n_head=num_heads)
    tokens = torch.randint(config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        place = Path(temporary)
        make_folder(place / "gpt2", config)
        observed("import, dense", lambda: import_gpt2(place / "gpt2", place / "dense"))
        store = Store.open(place / "dense")
        one_file = ExportOptions("gpt2", max_shard_bytes=10**11)
        observed("export", lambda: export_checkpoint(store, place / "back", one_file, None))
        differing = differing_tensors(place / "gpt2", place / "back")
        print(f"{store.model.num_parameters():,} parameters there and back: {len(differing)} tensors differ")
        expected = GPT2LMHeadModel.from_pretrained(place / "gpt2").eval()(tokens).logits
        is_close = True
        for rank in (width, width // 2) if options.ranks is None else options.ranks:
            target = place / f"rank-{rank}"
            made = observed(f"import, q k v at rank {rank}", partial(import_gpt2, place / "gpt2", target, rank))
            difference = float((model_from_store(Store.open(target))(tokens).logits - expected).abs().max())
            energy = sum(entry.energy for entry in made.kept) / len(made.kept)
            print(f"  energy kept {energy:.6f}, largest difference of a logit {difference:.3g}")
            is_close = is_close and (rank < width or difference < 1e-4)
    return 0 if not differing and is_close else 1


if __name__ == "__main__":
    sys.exit(main())
