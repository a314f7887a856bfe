"""The index of weights in several files, as Hugging Face writes it: model.safetensors.index.json and its like."""

from __future__ import annotations

from pathlib import Path

from mlra_scale.config.json_text import printable, read_json_object


def weight_map(index: Path) -> dict[str, str]:
    """Reads which file holds which tensor.

    Args:
        index: The index file.

    Returns:
        Name of the file, which lies beside the index, by name of the tensor.

    Raises:
        ValueError: It cannot be read, or has no such table; the message begins with the path.
    """
    found = read_json_object(index).get("weight_map")
    where = printable(str(index))
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{where} has no weight_map: an object of tensor names and file names")
    for name, file in found.items():
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\0" in file:
            raise ValueError(f"{where}: the weight_map of {name[:80]!a} is {str(file)[:80]!a}, not a file name")
    return found
