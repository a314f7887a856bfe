"""Small GPT-2 folders in Hugging Face's format, with random weights, biases and norms, and a byte-level tokenizer."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mlra_scale.data.tokenizer import LoadedTokenizer, save_tokenizer, train_bpe

TEXT = """A window slides over the text, and every token in it is seen once as new and then only as context.
Low rank means that two thin matrices stand where one square matrix stood; nothing is between them.
Words, bytes and tokens are three ways to count the same text: 1, 2, 3 ... 10, 200, 3000.
"""
SHAPE = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}


@cache
def tokenizer() -> LoadedTokenizer:
    """A byte-level BPE of a few merges."""
    return train_bpe([TEXT] * 4, 300)


def random_gpt2(seed: int = 0, **config: Any) -> GPT2LMHeadModel:
    """A model whose weights are all random, large enough that the logits differ much between tokens."""
    values = {"vocab_size": tokenizer().vocabulary_size, "bos_token_id": 0, "eos_token_id": 0, **SHAPE, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(**values))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_gain = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
                parameter.normal_(mean=1.0 if is_gain else 0.0, std=0.2)
    return model.eval()


def gpt2_folder(folder: Path, seed: int = 0, has_tokenizer: bool = True, **config: Any) -> Path:
    """Saves such a model with its tokenizer."""
    random_gpt2(seed, **config).save_pretrained(folder)
    if has_tokenizer:
        save_tokenizer_files(folder)
    return folder


def save_tokenizer_files(folder: Path) -> None:
    """Writes the tokenizer's files into a folder that is there already."""
    save_tokenizer(tokenizer(), folder / "tokenizer")
    for file in (folder / "tokenizer").iterdir():
        file.rename(folder / file.name)
    (folder / "tokenizer").rmdir()
