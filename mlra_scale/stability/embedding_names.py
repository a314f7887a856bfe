"""Names under which models keep their token embedding."""

from collections.abc import Iterable

# Most specific first; the first one that occurs is taken.
INPUT_NAMES = (
    "wte.weight",  # GPT-2, GPT-J, Falcon
    "embed_tokens.weight",  # Llama, Qwen, Mistral, Gemma, OPT, Phi
    "word_embeddings.weight",  # BLOOM, BERT, Megatron
    "tok_embeddings.weight",  # ModernBERT, Llama's own files
    "embed_in.weight",  # GPT-NeoX
    "token_embedding.weight",
    "word_embedding.weight",
    "embeddings.weight",  # Mamba, RWKV
    "embedding.weight",  # this project's own name
    "shared.weight",  # T5
)
HEAD_NAMES = ("lm_head.weight", "embed_out.weight", "output.weight")


def input_embeddings(names: Iterable[str]) -> list[str]:
    """Returns those of some parameters that are named like a token embedding; none, one, or several alike."""
    names = list(names)
    for ending in INPUT_NAMES:
        found = sorted(name for name in names if name == ending or name.endswith("." + ending))
        if found:
            return found
    return []
