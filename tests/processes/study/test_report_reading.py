"""A report is drawn without torch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_a_report_loads_no_torch() -> None:
    code = (
        "import sys; import mlra_scale.study.report.run_report, mlra_scale.study.report.sweep_report;"
        "print(*({'torch', 'deepspeed', 'megatron', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.split() == []
