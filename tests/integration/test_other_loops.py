"""The callbacks in loops of transformers and Lightning, against numpy on the weights of each step."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mlra_scale
from tests.support.gpt2_folders import random_gpt2
from tests.unit.stability.test_tev import check

TOKENS = 16


def samples(number: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (number, TOKENS), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


@pytest.mark.parametrize(("last", "expected"), [(5, [0, 2, 4, 5]), (3, [0, 2, 3])], ids=["whole", "stopped"])
def test_the_trainer_of_transformers(tmp_path: Path, last: int, expected: list[int]) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = random_gpt2()
    matrices: dict[int, np.ndarray] = {}
    reported: list[tuple[int, str]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            matrices[state.global_step] = kwargs["model"].transformer.wte.weight.detach().double().numpy().copy()
            control.should_training_stop = state.global_step == last

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            reported.extend((state.global_step, name) for name in kwargs["logs"] if name in ("loss", "tev_mean"))

    matrices[0] = model.transformer.wte.weight.detach().double().numpy().copy()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        logging_steps=2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    dataset: Any = samples(24, model.config.vocab_size)
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[Watch()])
    callback = mlra_scale.TevCallback(trainer, every=2)
    trainer.add_callback(callback)
    trainer.train()
    assert [step for step, _ in callback.history] == expected
    for step, statistics in callback.history:
        check(statistics, matrices[step])
    assert len({statistics.mean for _, statistics in callback.history}) == len(expected), "nothing was trained"
    logged = {entry["step"]: entry["tev_mean"] for entry in trainer.state.log_history if "tev_mean" in entry}
    assert logged == {step: statistics.mean for step, statistics in callback.history}
    # The losses of the same steps are logged too.
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4][: last // 2]
    assert {step for step, name in reported if name == "tev_mean"} == set(expected)


class Net(nn.Module):
    """A language model without context."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 8)
        self.head = nn.Linear(8, 30)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(tokens))


def lightning_module() -> Any:
    """Such a model as Lightning trains it, on `samples`."""
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            tokens = batch["input_ids"]
            return nn.functional.cross_entropy(self.net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    return Module()


@pytest.mark.parametrize(
    ("every", "max_steps", "expected"), [(2, 5, [0, 2, 4, 5]), (2, -1, [0, 2, 4, 6]), (0, 3, [0, 3])]
)
def test_the_trainer_of_lightning(tmp_path: Path, every: int, max_steps: int, expected: list[int]) -> None:
    pytest.importorskip("lightning", reason="needs lightning")
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers import CSVLogger

    matrices: dict[int, np.ndarray] = {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            matrices[trainer.global_step] = pl_module.net.words.weight.detach().double().numpy().copy()

    module = lightning_module()
    matrices[0] = module.net.words.weight.detach().double().numpy().copy()
    callback = mlra_scale.LightningTevCallback(every=every)
    logger = CSVLogger(str(tmp_path), name="logs", version="0")
    trainer = Trainer(
        max_steps=max_steps,
        max_epochs=1 if max_steps < 0 else None,
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=1,
        logger=logger,
        callbacks=[callback, Watch()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    dataset: Any = samples(24, 30)
    loader: Any = torch.utils.data.DataLoader(dataset, batch_size=2)
    trainer.fit(module, loader)
    assert [step for step, _ in callback.history] == expected
    for step, statistics in callback.history:
        check(statistics, matrices[step])
    with (tmp_path / "logs" / "0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["tev_mean"]]
    assert {int(row["step"]): float(row["tev_mean"]) for row in rows} == {
        step: statistics.mean for step, statistics in callback.history
    }
