import pytest
import torch

from mlra_scale.config import load_config
from mlra_scale.training import metrics
from mlra_scale.training.metrics import (
    Throughput,
    peak_memory_bytes,
    peak_of_device_name,
    peak_tflops,
    train_line,
    validation_line,
)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_by_name(name: str, peak: float | None) -> None:
    assert peak_of_device_name(name) == peak


def test_peak_is_unknown_on_a_cpu_unless_given() -> None:
    cpu = torch.device("cpu")
    assert peak_tflops(load_config("debug"), cpu) is None
    assert peak_tflops(load_config("debug", overrides=["train.peak_tflops=0.5"]), cpu) == 0.5


def test_peak_of_fp32_is_unknown_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gpu = torch.device("cuda", 0)
    assert peak_tflops(load_config("debug"), gpu) is None
    assert peak_tflops(load_config("debug", overrides=["train.precision=bf16"]), gpu) == 989.4


def test_throughput_counts_only_the_time_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("debug", overrides=["train.peak_tflops=1.0"])
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    throughput = Throughput(config, world_size=2, device=torch.device("cpu"))
    for pause in (100.0, 50.0):
        throughput.start()
        now[0] += 2.0
        throughput.stop(512)
        now[0] += pause  # an evaluation
    values = throughput.since_last()
    assert values["tokens_per_second"] == 256.0
    assert values["mfu"] == pytest.approx(256.0 * config.model.flops_per_token(64) / 2e12)
    throughput.start()
    now[0] += 0.25
    assert throughput.so_far == 0.25
    now[0] += 0.75
    throughput.stop(512)
    assert throughput.since_last()["tokens_per_second"] == 512.0
    assert throughput.mean == 3 * 512 / 5.0


def test_memory_of_a_cpu_process_is_its_resident_memory() -> None:
    assert 10 * 2**20 < peak_memory_bytes(torch.device("cpu")) < 2**40


def test_lines() -> None:
    record = {"step": 7, "loss": 6.23456, "gradient_norm": 1.2345, "learning_rate": 3e-4, "tokens_per_second": 12345.6}
    record["memory_gib"] = 0.51
    line = train_line(record, 100)
    assert line == "step   7/100 | loss 6.2346 | grad 1.23 | lr 3.00e-04 | 12,346 tok/s | mem 0.51 GiB"
    full = {**record, "mfu": 0.345, "tev_mean": 0.02, "tev_std": 0.001, "loss_scale": 65536.0, "overflow": True}
    for part in ("MFU 34.5 %", "TEV 0.02000 +- 0.00100", "scale 65536", "overflow"):
        assert part in train_line(full, 100)
    evaluation = {"step": 7, "validation_loss": 5.0, "validation_perplexity": 148.41}
    assert validation_line(evaluation, 100) == "step   7/100 | validation loss 5.0000 | perplexity 148.4"
