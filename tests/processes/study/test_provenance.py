"""study.json: older ones are read, and every start writes the newest version (git says which commit runs)."""

import json
from pathlib import Path

from mlra_scale.study.provenance import note_start


def test_notes_of_a_study_have_a_version_and_older_ones_are_read(tmp_path: Path) -> None:
    about = tmp_path / "study.json"
    about.write_text(json.dumps({"name": "s", "started": "then", "ended": None}))
    note_start(about, "s", [])
    assert json.loads(about.read_text())["version"] == 2 and json.loads(about.read_text())["started"] == "then"
