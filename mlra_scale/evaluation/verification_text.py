"""Real text for verifying an export: from the data that a run was validated on, or from a file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch

from mlra_scale.config import Config, ConfigError
from mlra_scale.data.opening import open_datasets
from mlra_scale.data.tokenizer import LoadedTokenizer
from mlra_scale.evaluation.errors import EvaluationError
from mlra_scale.evaluation.texts import Encoder, documents_of_sources, joined


def validation_tokens(config: Config, num_tokens: int) -> torch.Tensor:
    """Reads the first validation sequences of a run.

    Args:
        config: The run's configuration; paths of data are as it names them.
        num_tokens: About how many tokens; at least one sequence is read.

    Returns:
        Token ids [N, S + 1]: inputs and the token that follows them.

    Raises:
        EvaluationError: The data are gone, or are others.
    """
    length = config.train.sequence_length
    try:
        stream = open_datasets(config).validation
    except ConfigError as error:
        raise EvaluationError(
            f"the validation data that the checkpoint's config.yaml names cannot be opened: {error}\n"
            "start from the folder that the training was started from, or name a text with --text"
        ) from error
    count = min(max(1, num_tokens // length), stream.samples_per_epoch)
    batch = stream.batch(0, count)
    return torch.cat([batch.tokens_BS, batch.targets_BS[:, -1:]], dim=1)


def text_tokens(names: Sequence[str], loaded: LoadedTokenizer, length: int, num_tokens: int) -> torch.Tensor:
    """Reads the beginning of a text, documents one after the other as in training.

    Args:
        names: Files, folders or globs, as tools/prepare_data.py knows them.
        loaded: The model's tokenizer.
        length: Tokens per sequence; a text that is shorter gives one shorter sequence.
        num_tokens: About how many tokens; at least one sequence is read.

    Returns:
        Token ids [N, S + 1]: inputs and the token that follows them.

    Raises:
        EvaluationError: The text has less than two tokens.
        DataError: It cannot be read.
    """
    count = max(1, num_tokens // length)
    wanted = count * length + 1
    encoder = Encoder(loaded, wanted)
    documents = joined(documents_of_sources(names, encoder), encoder.end_of_document)
    tokens = list(islice((token for piece in documents for token in piece.tokens), wanted))
    if len(tokens) < 2:
        raise EvaluationError(f"{' '.join(names)} has {len(tokens)} tokens; the verification needs two at least")
    length = min(length, len(tokens) - 1)
    count = (len(tokens) - 1) // length
    flat = torch.tensor(tokens[: count * length + 1])
    return torch.stack([flat[i * length : (i + 1) * length + 1] for i in range(count)])
