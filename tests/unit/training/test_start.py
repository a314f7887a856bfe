"""What a start finds out before a process group exists: the indexes of the data are read once for all of it."""

import pickle
import shutil
from pathlib import Path

import pytest

from mlra_scale.config import Config, Named
from mlra_scale.data import folder, identify_data, open_datasets
from mlra_scale.data.indexed import IndexedFiles
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.start import Asked, Start, prepare

WRITTEN = Path(__file__).resolve().parents[2] / "fixtures" / "written_by_3a017c2"


def started(place: Path, resume: str) -> Start:
    """The start of two ranks on the data and, to resume, in the run directory of the fixture."""
    run = RunDirectory(place / "zero3" if resume == "auto" else place / "new")
    values = Config.from_yaml((WRITTEN / "zero3" / "config.yaml").read_text()).to_dict()
    config = Config.model_validate(values | {"data": {"path": str(place / "data")}})
    return prepare(Asked(config, Named(frozenset({"data.path"})), run, resume, 2), is_here=False)


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_every_index_is_read_once_from_the_check_to_the_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    place, read, open_indexed = Path(shutil.copytree(WRITTEN, tmp_path / "written")), list[str](), folder.open_indexed

    def counted(prefix: str, table: Path | None = None) -> IndexedFiles:
        read.append(prefix)
        return open_indexed(prefix, table)

    monkeypatch.setattr(folder, "open_indexed", counted)
    start = started(place, resume)
    opened = open_datasets(start.config, start.mixes, start.found)
    assert start.progress.step == (3 if resume == "auto" else 0) and len(opened.notices) == 1
    assert sorted(read) == [str(place / "data" / split) for split in ("train", "validation")]
    assert opened.identity == identify_data(start.config)


def test_other_processes_find_the_data_for_themselves(tmp_path: Path) -> None:
    """The index files are mapped into memory: pickled they would be sent as a whole."""
    start = started(Path(shutil.copytree(WRITTEN, tmp_path / "written")), "none")
    sent = pickle.dumps(start)
    received = pickle.loads(sent)
    assert start.found is not None and received.found is None and received == start and len(sent) < 100_000
