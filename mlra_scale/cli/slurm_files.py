"""`mlra-scale slurm-files`: writes the sbatch files and the DeepSpeed files of an installation into a folder."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from mlra_scale import bundled
from mlra_scale.cli.command import Command
from mlra_scale.cli.options import place
from mlra_scale.console import InputError

EXAMPLES = """examples:
  PROG .                      then: sbatch slurm/train_mlra_72L.sh data.path=...
  PROG /shared/training

Submit from that folder, or set MLRA_SCALE_ROOT to it. A checkout of the project has these files already, and one more:
slurm/check.sh, which needs the checkout's benchmarks/.
exit codes: 0; 2 a file of another content is there
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=place, metavar="DIR", help="folder for slurm/ and ds_configs/; made if need be")


def _run(options: argparse.Namespace) -> int:
    files = {options.folder / name: source for name, source in bundled.files().items()}
    try:
        edited = [str(path) for path, source in files.items() if path.exists() and not _is_equal(path, source)]
        if edited:
            raise InputError(
                "nothing was written: these files are there with another content, perhaps your own changes: "
                + ", ".join(edited)
                + "; name another folder and compare"
            )
        for path, source in files.items():
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, path)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from None
    print("\n".join(map(str, files)))
    return 0


def _is_equal(path: Path, source: Path) -> bool:
    return path.read_bytes() == source.read_bytes()


COMMAND = Command(
    name="slurm-files",
    summary="write the sbatch files and DeepSpeed's files of this installation into a folder",
    description="Writes DIR/slurm/*.sh and DIR/ds_configs/*.json, the files of this version of the package. Files that "
    "are there with the same content stay; one with another content is never written over.",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
    has_side_effects=True,
)
