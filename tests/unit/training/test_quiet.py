import warnings

import pytest

from mlra_scale.training.log.console import silence_libraries


def test_only_known_warnings_are_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        silence_libraries("cpu")
        del shown[:]
        known = "`torch.distributed.all_gather_into_tensor` is deprecated. Please use another."
        warnings.warn_explicit(known, FutureWarning, "torch/distributed/c10d_logger.py", 83, "torch.distributed")
        warnings.warn_explicit("loss is NaN", UserWarning, "torch/optim/adamw.py", 1, "torch.optim.adamw")
    assert [str(warning.message) for warning in shown] == ["loss is NaN"]
