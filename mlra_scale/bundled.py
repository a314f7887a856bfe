"""The folders `ds_configs/` and `slurm/`, which come with this package: beside it in a checkout, in it when installed.

A checkout has them at its top only. `setup.py` puts their files into the wheel, as folders of the package.
Nothing of ours is imported here, so every room may use it.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_PATTERNS = {"ds_configs": "*.json", "slurm": "*.sh"}
_FOR_CHECKOUTS = {"check.sh"}
"""Files that a checkout alone can run: check.sh starts benchmarks/, which are not part of the package."""


def folder(name: str) -> Path:
    """Returns the folder of this name, `ds_configs` or `slurm`."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def files() -> dict[str, Path]:
    """Returns the files that an installation has, by their path in a checkout such as `slurm/launch.sh`."""
    found = [(name, path) for name, pattern in _PATTERNS.items() for path in sorted(folder(name).glob(pattern))]
    return {f"{name}/{path.name}": path for name, path in found if path.name not in _FOR_CHECKOUTS}


def ds_config(path: str | Path) -> Path:
    """Returns the DeepSpeed file of a path: the file that is there, else the one that this package has under this name.

    So `ds_configs/zero1.json`, which the planner's commands and the documents name, works in every folder.
    """
    return Path(path) if Path(path).exists() else files().get(str(path), Path(path))
