"""Tokenizer folders as other people's tools leave them, each of which was once exported wrongly."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [f"document number {i} about gradient norms and deep layers" for i in range(60)]


def byte_level(*special: str, vocab_size: int = 300) -> Tokenizer:
    """A byte-level BPE of the corpus; special tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def template(tokenizer: Tokenizer, single: str, pair: str | None = None) -> Any:
    """A post-processor that adds <s> and </s> where the templates have them."""
    tokens = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>") if token in single + (pair or "")]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def begins_with_bos() -> Tokenizer:
    """Adds <s> before every text in a plain call, which preparing data does not."""
    tokenizer = byte_level("<s>", "</s>")
    tokenizer.post_processor = template(tokenizer, "<s> $A")
    return tokenizer


def end_is_not_special() -> Tokenizer:
    """The token that ends documents is added, and not special."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("</s>", special=False, normalized=False)])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **settings: Any) -> Path:
    """Writes tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    values = {name: token for name, token in named.items() if tokenizer.token_to_id(token) is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(values | settings))
    return folder
