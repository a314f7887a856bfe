"""One rank of transformers' Trainer under DDP or one of DeepSpeed's stages, with the callback.

torchrun --nproc_per_node 2 -m tests.processes.api.sharded FOLDER ddp|1|2|3
"""

import sys
from typing import Any

import mlra_scale
from tests.integration.test_other_loops import samples
from tests.support.gpt2_folders import random_gpt2
from tests.unit.stability.test_tev import check


def main(folder: str, stage: str) -> None:
    from transformers import Trainer, TrainingArguments

    values: dict[str, Any] = {}
    if stage != "ddp":
        values["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": {"stage": int(stage)},
            # Otherwise DeepSpeed compiles an optimizer of its own.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        **values,
    )
    model = random_gpt2()
    dataset: Any = samples(64, model.config.vocab_size)
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
    callback = mlra_scale.TevCallback(trainer, every=2)
    trainer.add_callback(callback)
    trainer.train()
    assert arguments.world_size == 2
    wrapper = "DistributedDataParallel" if stage == "ddp" else "DeepSpeedEngine"
    assert type(trainer.model_wrapped).__name__ == wrapper
    weight = model.transformer.wte.weight
    if stage == "3":
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            matrix = weight.detach().double().numpy().copy()
    else:
        matrix = weight.detach().double().numpy()
    assert [step for step, _ in callback.history] == [0, 2, 4]
    assert callback.history[0][1].mean != callback.history[2][1].mean, "nothing was trained"
    check(callback.history[2][1], matrix)


if __name__ == "__main__":
    main(*sys.argv[1:])
