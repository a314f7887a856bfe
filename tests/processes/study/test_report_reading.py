"""A report is drawn without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlra_scale.config import ConfigError
from mlra_scale.study.provenance import note_start

ROOT = Path(__file__).resolve().parents[3]


def test_a_report_loads_no_torch() -> None:
    code = (
        "import sys; import mlra_scale.study.report.run_report, mlra_scale.study.report.sweep_report;"
        "print(*({'torch', 'deepspeed', 'megatron'} & set(sys.modules)))"
    )
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.split() == []


def test_notes_of_a_study_have_a_version_and_those_of_a_newer_program_are_refused(tmp_path: Path) -> None:
    about = tmp_path / "study.json"
    about.write_text(json.dumps({"name": "s", "started": "then", "ended": None}))
    note_start(about, "s", [])
    written = json.loads(about.read_text())
    assert (written["version"], written["started"]) == (2, "then"), "the notes of version 1 were read"
    about.write_text(json.dumps({**written, "version": 3}))
    with pytest.raises(ConfigError, match=r"it has version 3; this program reads versions 1 to 2"):
        note_start(about, "s", [])
    assert json.loads(about.read_text())["version"] == 3
