"""Where torchrun puts the output of the ranks."""

from pathlib import Path

from mlra_scale.cluster.logs import RankLogs


def test_logs_are_named_by_the_global_rank(tmp_path: Path) -> None:
    environments: dict[int, dict[str, str]] = {local_rank: {} for local_rank in range(2)}
    places = RankLogs(tmp_path, 6).reify(environments)
    for local_rank in range(2):
        name = f"{tmp_path}/rank-{6 + local_rank:05d}"
        assert places.stdouts[local_rank] == places.tee_stdouts[local_rank] == f"{name}.log"
        assert places.error_files[local_rank] == f"{name}.error.json"
        assert environments[local_rank]["TORCHELASTIC_ERROR_FILE"] == f"{name}.error.json"
    assert places.tee_stderrs == {}
    assert list(tmp_path.iterdir()) == [], "no folders of torchrun's own"
