"""SIGKILLs where the suites of saves and of random moments do not come: start, data, measurements, rollback, tools."""

import shutil
import signal
from pathlib import Path

from mlra_scale.checkpoint import Store
from mlra_scale.training.record import read_record
from tests.faults.bench import GUARDED, MEASURED, Bench
from tests.faults.case import SAME, Case, digests, killed_commands, killed_runs, run_to_end
from tests.faults.launching import Armed
from tests.faults.training import timeless
from tests.faults.triggers import Trigger
from tests.support.processes import tool

STEP = "call mlra_scale/training/watch/step_watchers.py *._throughput"
"""Once in each step, after its update."""


def stopped_then(event: str, rank: int = 0, occurrence: int = 1) -> tuple[Trigger, ...]:
    """SIGTERM in a step, and SIGKILL in the save that it asked for."""
    return Trigger(STEP, 1, signal.SIGTERM), Trigger(event, occurrence, rank=rank)


TRAINING = (
    killed_runs(
        "kills while starting",
        "single",
        Trigger("import torch"),
        Trigger(STEP, 5),
        Trigger("import torch"),
        Trigger("import mlra_scale.training.start.request"),
        Trigger("import deepspeed"),
        Trigger("import mlra_scale.training.loop.trainer"),
        is_real=True,
    ),
    killed_runs(
        "kills while opening data",
        "pipeline2",
        Trigger("open r */data/manifest.json"),
        Trigger("open r */data/train.idx", rank=1),
        Trigger(STEP, 3),
        Trigger("open r */data/train.bin"),
        Trigger("open r */data/validation.bin", rank=1),
        Trigger("call mlra_scale/data/opening.py *", 3),
        Trigger("call mlra_scale/data/opening.py *", 20, rank=1),
        Trigger("open r */data/tokenizer/*"),
    ),
    killed_runs(
        "kills while measuring",
        "single",
        Trigger("call mlra_scale/training/watch/passes.py DataPasses._measure_validation"),
        Trigger("call mlra_scale/stability/activations.py *", 12),
        Trigger("call mlra_scale/stability/gradients.py *.before_step", 2),
        Trigger("call mlra_scale/parallel/zero_engine.py *eval_batch", 2),
        Trigger("call mlra_scale/stability/tev.py report"),
        Trigger("call mlra_scale/stability/spectral.py *", 9),
        Trigger("call mlra_scale/stability/gradients.py *.before_update", 2),
        Trigger("call mlra_scale/training/watch/passes.py DataPasses._measure_validation", 2),
        more=MEASURED,
    ),
    killed_runs(
        "kills while loading",
        "zero3-dp2",
        Trigger(STEP, 5),
        Trigger("call mlra_scale/training/start/resume_choice.py *", 3),
        Trigger("call mlra_scale/checkpoint/manifest.py *", 4, rank=1),
        Trigger("call mlra_scale/checkpoint/reader.py Store.verify", rank=1),
        Trigger("call mlra_scale/checkpoint/loading.py load_checkpoint", rank=1),
        Trigger("call mlra_scale/checkpoint/reader.py Store.fill"),
        Trigger("call mlra_scale/training/record.py cut_record"),
        Trigger("rename */.metrics.jsonl.tmp *"),
        Trigger("rename */.config.yaml.tmp *"),
        Trigger("rename */*latest* *"),
    ),
    killed_runs(
        "kills in a rollback",
        "single",
        Trigger("call mlra_scale/training/loop/session.py *.roll_back"),
        Trigger("call mlra_scale/checkpoint/loading.py load_checkpoint", 2),
        Trigger("call mlra_scale/checkpoint/retention.py remove_after"),
        Trigger("rename *guard.json.tmp *"),
        Trigger("call mlra_scale/training/log/report.py *.on_rollback"),
        Trigger("open w */rolled_back.jsonl"),
        more=GUARDED,
        tier="slow",
        steps=16,
    ),
    killed_runs(
        "kills in the save of a stop",
        "pipeline2",
        stopped_then("open w *rank-00001*", rank=1),
        stopped_then("open w *manifest.json*"),
        stopped_then("rename *unfinished*"),
        stopped_then("rename *latest* *"),
        stopped_then("call mlra_scale/training/loop/session.py *._stopped_by_signal"),
        stopped_then("call mlra_scale/parallel/topology.py destroy*", rank=1),
        every=1000,
    ),
    killed_runs(
        "kills in retention and at the end",
        "pipeline2",
        Trigger("call mlra_scale/checkpoint/retention.py prune"),
        Trigger("rename */step-* */.*"),
        Trigger("remove rank-0000*"),
        Trigger("rmdir *"),
        Trigger("call mlra_scale/training/log/report.py *.finish"),
        keep_last=1,
    ),
)


def prepared(bench: Bench, output: Path) -> list[str]:
    """Prepares a small data set."""
    options = [
        "--source=python-docs",
        "--train-bpe=512",
        "--max-bytes=100000",
        "--validation-fraction=0.3",
        "--workers=1",
        "--quiet",
    ]
    return [*tool("prepare_data"), "--output", str(output), *options]


def killed_verification(bench: Bench, place: Path) -> None:
    """`--verify` only reads: killed while it does, it has changed nothing, and then finds nothing."""
    folder = place / "data"
    shutil.copytree(bench.data, folder)
    before, line, log = digests(folder), [*tool("prepare_data"), "--verify", str(folder)], place / "verify.log"
    for event in VERIFYING:
        assert Armed(line, log, triggers=[Trigger(event)]).wait() == -signal.SIGKILL
        assert digests(folder) == before
    run_to_end(line, log)
    assert digests(folder) == before


def same_data(one: Path, other: Path) -> None:
    """Fails unless every file is the same."""
    assert digests(one) == digests(other)


def trained(bench: Bench) -> str:
    """A run directory."""
    return str(bench.reference(bench.training()))


def exported(bench: Bench) -> Path:
    """A dense GPT-2 in Hugging Face's format."""
    with bench.lock:
        folder = bench.folder / "gpt2"
        if not folder.exists():
            run_to_end([*tool("export_hf"), trained(bench), str(folder)], bench.folder / "gpt2.log")
        return folder


def same_export(one: Path, other: Path) -> None:
    """Fails unless all that a model reads is the same."""
    assert digests(one, "README.md") == digests(other, "README.md")
    assert (one / "README.md").exists() == (other / "README.md").exists()


def same_checkpoint(one: Path, other: Path) -> None:
    """Fails unless the weights are the same, and the checkpoint is whole."""
    stores = [Store.open(path) for path in (one, other)]
    assert [store.verify() for store in stores] == [[], []]
    for name in stores[0].table:
        assert stores[0].tensor(name).equal(stores[1].tensor(name)), name


def same_report(one: Path, other: Path) -> None:
    """Fails unless the same files are there, and the page is whole."""
    assert sorted(digests(one)) == sorted(digests(other))
    assert all(page.read_text().rstrip().endswith("</html>") for page in one.glob("*.html"))


TOOLS = (
    killed_commands(
        "kills while preparing data",
        prepared,
        Trigger("open w *train.bin"),
        Trigger("call mlra_scale/data/encode.py *", 20),
        Trigger("open w *validation.blocks"),
        Trigger("open w *manifest.json*"),
        Trigger("call mlra_scale/files.py sync", 4),
        Trigger("rename *.partial *"),
        same=same_data,
    ),
    killed_commands(
        "kills while replacing data",
        lambda bench, output: [*prepared(bench, output), "--overwrite", "--seed", "1"],
        Trigger("open w *train.bin"),
        Trigger("call mlra_scale/files.py sync_tree"),
        Trigger("call mlra_scale/files.py _exchange"),
        prepare=lambda bench, output: [shutil.copytree(bench.data, path) for path in (output, output.with_name("old"))],
        is_allowed=lambda output: not output.exists() or digests(output) == digests(output.with_name("old")),
        same=same_data,
    ),
    *(
        killed_commands(
            f"kills while exporting {name}",
            lambda bench, output, name=name: [  # type: ignore[misc]
                *tool("export_hf"),
                trained(bench),
                str(output),
                "--format",
                name,
            ],
            Trigger("open w *config.json"),
            Trigger("import transformers*"),
            Trigger("call mlra_scale/checkpoint/huggingface/verification.py *", 3),
            Trigger("rename *"),
            same=same_export,
        )
        for name in ("gpt2", "mlra")
    ),
    killed_commands(
        "kills while importing",
        lambda bench, output: [*tool("import_hf"), str(exported(bench)), str(output), "--rank", "8"],
        Trigger("open w *.safetensors*"),
        Trigger("open w *manifest.json*"),
        Trigger("rename *"),
        same=same_checkpoint,
    ),
    killed_commands(
        "kills while reporting",
        lambda bench, output: [*tool("report"), trained(bench), "--output", str(output)],
        Trigger("mkdir *"),
        Trigger("open w *.png"),
        Trigger("rename *html*"),
        same=same_report,
        is_allowed=lambda output: not list(output.glob("*.html")),
    ),
)
UNCHANGED = "nothing is changed, and the same command then ends with 0"
SWEEPS = ("undisturbed", "killed")
SWEEP_KILLS = "SIGKILL of a cell, of the sweep when it has started a cell, and when it writes results.jsonl"
STUDY = """
name: two
preset: debug
data: {data}
base:
  model.num_layers: 2
  model.hidden_size: 32
  train.steps: 8
  train.log_every: 1
  checkpoint.every: 2
variants:
  mlra:
axes:
  optim.lr: [1e-3, 3e-3]
seeds: [5]
ranks: 1
"""


def killed_sweep(bench: Bench, place: Path) -> None:
    """A cell is killed, the sweep is killed beside its running cells, and while it writes results."""
    study = place / "two.yaml"
    study.write_text(STUDY.format(data=bench.data))

    def command(name: str) -> list[str]:
        return [*tool("sweep"), str(study), "--output", str(place / name), "--jobs", "2"]

    run_to_end(command("undisturbed"), place / "undisturbed.log")
    line, log = command("killed"), place / "killed.log"
    cell = Armed(line, log, triggers=[Trigger(STEP, 3, program="mlra_scale.train")])
    assert cell.wait() == 1, cell.output()[-1000:]
    # Its cells live on, and the next one finds them.
    beside = Armed(line, log, triggers=[Trigger("spawn", 1, program="tools/sweep.py")])
    assert beside.wait(end=False) == -signal.SIGKILL
    writing = Armed(line, log, triggers=[Trigger("rename * */results.jsonl", 1, program="tools/sweep.py")])
    assert writing.wait(end=False) == -signal.SIGKILL
    run_to_end(line, log)
    beside.end()
    writing.end()
    one, other = ([item["cell"] for item in read_record(place / name / "results.jsonl")] for name in SWEEPS)
    assert one == other
    for path in sorted((place / "undisturbed").rglob("metrics.jsonl")):
        killed = place / "killed" / path.relative_to(place / "undisturbed")
        assert timeless(killed.parent) == timeless(path.parent), path.parent.name


VERIFYING = ("open r *manifest.json", "open r *train.bin")
CASES = (
    *TRAINING,
    *TOOLS,
    Case(
        "kills while verifying data", f"SIGKILL at {', '.join(VERIFYING)}", UNCHANGED, killed_verification, num_kills=2
    ),
    Case("kills in a sweep", SWEEP_KILLS, SAME, killed_sweep, num_kills=3),
)
