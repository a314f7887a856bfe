"""Runs the code of docs/library.md as it stands: what it takes for granted before it, a loop of its library after it.

python -m tests.processes.api.page        # in an empty folder
"""

import json
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.integration.test_other_loops import lightning_module, samples
from tests.support.gpt2_folders import random_gpt2
from tests.unit.stability.test_tev import check
from tests.unit.test_imports import ROOT

Code = str


def words_of(model: Any) -> np.ndarray:
    return model.transformer.wte.weight.detach().double().numpy()


def run(code: Code, **names: Any) -> dict[str, Any]:
    exec(code, names)
    return names


def losses_of(model: nn.Module, steps: int = 4) -> list[float]:
    """A plain loop of torch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.arange(16).view(2, 8)
    losses = []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return losses


def measured(code: Code) -> None:
    model = random_gpt2()
    losses_of(model)
    check(run(code, model=model)["summary"], words_of(model))


def trained_by_transformers(code: Code) -> None:
    from transformers import TrainingArguments

    model = random_gpt2()
    arguments = TrainingArguments(output_dir="out", max_steps=3, report_to="none", save_strategy="no", use_cpu=True)
    dataset = samples(24, model.config.vocab_size)
    names = run(code, model=model, arguments=arguments, dataset=dataset)
    (callback,) = [each for each in names["trainer"].callback_handler.callbacks if type(each) is names["TevCallback"]]
    assert [step for step, _ in callback.history] == [0, 3]
    check(callback.history[-1][1], words_of(model))


def trained_by_lightning(code: Code) -> None:
    trainer = run(code)["trainer"]
    trainer.fit_loop.max_epochs = 1
    module = lightning_module()
    dataset: Any = samples(24, 30)
    loader: Any = torch.utils.data.DataLoader(dataset, batch_size=2)
    trainer.fit(module, loader)
    (callback,) = [each for each in trainer.callbacks if type(each).__name__ == "LightningTevCallback"]
    assert [step for step, _ in callback.history] == [0, 12]
    check(callback.history[-1][1], module.net.words.weight.detach().double().numpy())


def trained_by_deepspeed(code: Code) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 3},
    }
    with open("ds_config.json", "w") as file:
        json.dump(config, file)
    model = random_gpt2()
    names = run(code, model=model)
    engine, history = names["engine"], names["attached"].history
    tokens = torch.arange(16).view(2, 8)
    for _ in range(100):
        engine.backward(engine(tokens, labels=tokens).loss)
        engine.step()
    assert [step for step, _ in history] == [0, 100]
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        check(history[1][1], words_of(model))


def used_for_a_linear_map(code: Code) -> None:
    layer = run(code)["layer"]
    layer(torch.randn(4, 768)).square().sum().backward()
    assert layer.down.weight.grad.shape == (384, 768)


def replaced(code: Code) -> None:
    from transformers import GPT2LMHeadModel

    random_gpt2(n_embd=512).save_pretrained("gpt2")
    assert "...  # train" in code
    names = run(code.replace("...  # train", "losses_of(model)"), losses_of=losses_of)
    tokens = torch.arange(16).view(2, 8)
    with torch.no_grad():
        again = GPT2LMHeadModel.from_pretrained("mine").eval()(tokens).logits
        assert torch.equal(again, names["model"].eval()(tokens).logits)


def registered(code: Code) -> None:
    import mlra_scale

    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "attention_rank": 8}
    saved = mlra_scale.MlraForCausalLM(mlra_scale.MlraConfig(vocab_size=50, max_position_embeddings=16, **shape))
    saved.save_pretrained("exported/first-mlra")
    names = run(code)
    assert type(names["model"]) is type(names["exported"]) is mlra_scale.MlraForCausalLM
    assert names["model"].config.num_hidden_layers == 48
    assert torch.equal(names["exported"].lm_head.weight, saved.lm_head.weight)
    losses_of(names["exported"])


LOOPS: tuple[Callable[[Code], None], ...] = (
    measured,
    trained_by_transformers,
    trained_by_lightning,
    trained_by_deepspeed,
    used_for_a_linear_map,
    replaced,
    registered,
)


def main() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), flags=re.DOTALL)
    for block, loop in zip(blocks, LOOPS, strict=True):
        loop(block)
        print(f"ran {loop.__name__}", flush=True)


if __name__ == "__main__":
    main()
