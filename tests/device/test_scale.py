"""What start-up, TEV and a save cost the hosts of 1,024 and 4,096 ranks: the real code, with every rank's part."""

from pathlib import Path

import pytest

from tests.support.device.scale import MESHES, Mesh, configured, save_costs, tev_costs

SECONDS = 5.0
"""CPU time that rank 0 may need for a part of a save or of a measurement."""
SMALL = [mesh for mesh in MESHES if not mesh.is_large]
LARGE = [mesh for mesh in MESHES if mesh.is_large]


def compare(mesh: Mesh, folder: Path) -> None:
    config, plan, seconds = configured(mesh)
    assert seconds < SECONDS
    tev = tev_costs(config, plan)
    assert tev.cpu_seconds < SECONDS
    # A vector of the vocabulary, and a few numbers of every rank.
    assert tev.sent < 9 * (config.model.vocab_size + config.model.hidden_size)
    save, fragments, manifest = save_costs(config, plan, folder)
    assert save.cpu_seconds < mesh.save_seconds
    assert fragments < mesh.fragments_bytes
    assert manifest < 200 * plan.world_size + 200 * 20 * config.model.num_layers


@pytest.mark.parametrize("mesh", SMALL, ids=lambda mesh: mesh.name)
def test_a_job_of_thousands_of_ranks_costs_its_hosts_little(mesh: Mesh, tmp_path: Path) -> None:
    compare(mesh, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("mesh", LARGE, ids=lambda mesh: mesh.name)
def test_zero_3_on_thousands_of_ranks_has_runs_of_every_weight_on_each(mesh: Mesh, tmp_path: Path) -> None:
    compare(mesh, tmp_path)
