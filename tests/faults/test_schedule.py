"""The hour of failures: what is drawn, what it says of real clusters, and a short one on the local Slurm cluster."""

from collections import Counter
from pathlib import Path

import pytest

from tests.faults.hour import CHEAP, KINDS
from tests.faults.schedule import LLAMA, Results, arithmetic, draw, main, share, table
from tests.slurm.cluster import slurm_missing


def test_the_drawn_faults_are_those_of_the_seed_and_of_every_kind() -> None:
    faults = draw(18, 50, list(KINDS))
    assert len(faults) == 50 and faults == draw(18, 50, list(KINDS)) and faults != draw(19, 50, list(KINDS))
    counts = Counter(kind for kind, _ in faults)
    assert counts.keys() == KINDS.keys() and max(counts.values()) - min(counts.values()) <= 1
    assert {node for _, node in faults} == {0, 1}
    assert set(CHEAP) < KINDS.keys() and not any(KINDS[kind].needs for kind in CHEAP)


def test_the_share_of_effective_training_time() -> None:
    """A failure an hour, 60 s to come back, 20 s a step: of 3,600 s, 60 and 5 steps are lost at a save every 10."""
    assert share(3600.0, 60.0, 20.0, 10) == pytest.approx(3600 / (3600 + 60 + 100))
    assert LLAMA.between / 3600 == pytest.approx(3.09, abs=0.01)


def test_what_is_printed_of_the_results() -> None:
    seconds: dict[str, list[float | None]] = {"stop": [1.0, 3.0], "rank kill": [20.0, None]}
    results = Results(seconds, ["fault 4"], wall=100.0, num_steps=160, step_seconds=0.5)
    assert results.effective == 0.8 and results.median == 20.0
    assert (
        "| stop | " in table(results) and "| 2 | 0 | 2.0 |" in table(results) and "| 2 | 1 | 20.0 |" in table(results)
    )
    assert "80.0 %" in arithmetic(results) and "2407.21783" in arithmetic(results)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_short_schedule_keeps_every_promise(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if (reason := slurm_missing()) is not None:
        pytest.skip(f"needs Slurm: {reason}")
    code = main(["--faults", "6", "--kinds", *CHEAP, "--keep", str(tmp_path / "hour")])
    assert code == 0, capsys.readouterr().out
