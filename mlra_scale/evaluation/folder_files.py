"""The JSON files of a Hugging Face folder, checked before a library reads them: an error names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mlra_scale.config.json_text import printable, read_foreign_json_object
from mlra_scale.config.weight_map import weight_map
from mlra_scale.evaluation.errors import EvaluationError

_INDEX = "model.safetensors.index.json"
_MODEL_FILES = ("config.json", "generation_config.json", _INDEX)
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_NUMBERS_OF_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_FEWEST_LAYER_BYTES = 512
"""Of a file that is not safetensors: names and shapes of a layer's tensors alone take more."""


def read_model_files(folder: Path) -> dict[str, Any]:
    """Checks the JSON files of a model.

    Args:
        folder: In Hugging Face's format, with config.json.

    Returns:
        The content of config.json.

    Raises:
        EvaluationError: A file is damaged, or config.json has more layers than there are weights: to build them would
            take for ever.
    """
    try:
        for name in _MODEL_FILES:
            if (folder / name).is_file():
                read_foreign_json_object(folder / name)
        values = read_foreign_json_object(folder / "config.json")
    except ValueError as error:
        raise EvaluationError(str(error)) from None
    most, where = _most_layers(folder), printable(str(folder / "config.json"))
    for section in (values, *(value for value in values.values() if isinstance(value, dict))):
        for name in _NUMBERS_OF_LAYERS:
            number = section.get(name)
            if number is None:  # other libraries write null for what a model does not have
                continue
            if type(number) is not int or number < 1:
                raise EvaluationError(f"{where}: {name} is {str(number)[:80]!a}; it must be a whole number from 1 on")
            if most is not None and number > most:
                raise EvaluationError(
                    f"{where}: {name} is {number}, but the weights beside it are those of {most} layers at most; "
                    "restore the file that belongs to them"
                )
    return values


def check_tokenizer_files(folder: Path) -> None:
    """Checks the small JSON files of a tokenizer.

    Raises:
        EvaluationError: One is damaged.
    """
    for name in _TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            try:
                read_foreign_json_object(path)
            except ValueError as error:
                raise EvaluationError(str(error)) from None


def reason_of(error: Exception) -> str:
    """Returns the first line of a library's message, fit for a terminal."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], 300)


def _most_layers(folder: Path) -> int | None:
    """More layers than tensors there cannot be; None where the folder has no weights."""
    try:
        if (folder / _INDEX).is_file():
            return len(weight_map(folder / _INDEX))
        if (folder / "model.safetensors").is_file():
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                return len(list(file.keys()))
    except (ValueError, OSError, SafetensorError) as error:
        raise EvaluationError(f"{printable(str(folder))} cannot be loaded: {reason_of(error)}") from error
    sizes = [file.stat().st_size for file in folder.glob("*.bin")]
    return sum(sizes) // _FEWEST_LAYER_BYTES if sizes else None
