"""One flipped bit, and a truncation, in every kind of file that is read: each in this process, in milliseconds.

A file with a checksum must be found damaged, or be read as what was written. A file without one is refused in one
message that names it, or read: a digit that became another digit is seen by nobody. No other error comes of either.
"""

import hashlib
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from mlra_scale.checkpoint import CheckpointError, Store
from mlra_scale.checkpoint.retention import latest
from mlra_scale.cluster.job_file import JobAttempt, JobFile, read_job_file
from mlra_scale.config import ConfigError, load_config
from mlra_scale.console import InputError
from mlra_scale.data.index_cache import cached_indices
from mlra_scale.data.sources import SourceName, open_sources, texts_of
from mlra_scale.planning.cluster import named_cluster
from mlra_scale.planning.cluster_file import read_cluster_file, write_cluster_file
from mlra_scale.study.grid import load_study
from mlra_scale.study.results import CellFiles
from mlra_scale.training.record import JsonLines, read_record
from mlra_scale.training.resume import read_stored
from mlra_scale.training.run_directory import RunDirectory
from mlra_scale.training.run_reader import read_lines
from tests.faults.bench import Bench
from tests.faults.case import FLIP, TRUNCATION, Case, each
from tests.support.stored import weights_of

FLIPS = (0.0, None, None, 1.0)
"""Where bits flip, as a part of the file; None: anywhere."""
TRUNCATIONS = (0.0, 0.5, 1.0)
"""How much of a file is left, of all bytes but the last."""
HASHED = "refused in one message that names the file, or read as what was written; no other error"
PLAIN = "refused in one message that names the file, or read (the file has no checksum); no other error"
LONGEST = 4000
"""Characters of a message."""


@dataclass(frozen=True)
class Reader:
    """A kind of file.

    Attributes:
        name: What it is.
        files: Those that are damaged, below the folder.
        make: Makes a sound folder.
        read: Reads all that a program uses of it; returns it in a form that can be compared.
        is_hashed: Whether any change must be found.
        is_by_hand: Whether a person writes it: messages name the field, its value and the remedy instead of the file.
        tier: Of the case.
    """

    name: str
    files: Sequence[str]
    make: Callable[[Bench, Path], object]
    read: Callable[[Path], Any]
    is_hashed: bool = False
    is_by_hand: bool = False
    tier: str = ""

    def case(self) -> Case:
        """All damages of this kind."""

        def act(bench: Bench, place: Path) -> None:
            self.make(bench, place / "sound")
            whole = self.read(place / "sound")
            draw = random.Random(self.name)

            def attack(file: str, change: Callable[[bytes], bytes]) -> None:
                folder = place / "damaged"
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(place / "sound", folder)
                (folder / file).write_bytes(change((folder / file).read_bytes()))
                try:
                    found = self.read(folder)
                except (InputError, ValueError) as error:
                    text = str(error)
                    # Some messages name a folder, whose files belong together.
                    is_named = Path(file).name in text or str(folder) in text
                    is_named |= self.is_by_hand and isinstance(error, ConfigError) and bool(error.problems[0].field)
                    assert is_named, f"not named: {text[:500]}"
                    assert text.replace("\n", "").isprintable() and len(text) < LONGEST, ascii(text[:500])
                except Exception as error:
                    raise AssertionError(f"{type(error).__name__}: {error}"[:500]) from error
                else:
                    assert not self.is_hashed or found == whole, "read as something else"

            each(
                (f"{what} of {file}", partial(attack, file, change))
                for file in self.files
                for what, change in damages(draw)
            )

        kinds = {FLIP: len(FLIPS) * len(self.files), TRUNCATION: len(TRUNCATIONS) * len(self.files)}
        done = f"bits flip in, and ends are missing of, {', '.join(self.files)}"
        promise = HASHED if self.is_hashed else PLAIN
        return Case(f"damaged: {self.name}", done, promise, act, tier=self.tier, kinds=kinds)


def damages(draw: random.Random) -> list[tuple[str, Callable[[bytes], bytes]]]:
    """What is done to a file, each with its name."""
    found: list[tuple[str, Callable[[bytes], bytes]]] = []
    for share in FLIPS:
        place, bit = draw.random() if share is None else share, draw.randrange(8)
        found.append((f"bit {bit} at {place:.4f}", partial(flipped, place=place, bit=bit)))
    found += [(f"all behind {share}", partial(cut, share=share)) for share in TRUNCATIONS]
    return found


def cut(content: bytes, share: float) -> bytes:
    """The beginning of the content."""
    return content[: int(share * (len(content) - 1))]


def flipped(content: bytes, place: float, bit: int) -> bytes:
    """The content with one bit changed."""
    at = int(place * (len(content) - 1))
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


def make_checkpoint(bench: Bench, folder: Path) -> None:
    """A checkpoint of two ranks, with a tokenizer and buffers; a later one; and `latest`, which names the first."""
    import torch

    from tests.unit.checkpoint.builders import Layout, write_checkpoint, write_tokenizer

    tokenizer = write_tokenizer(folder.parent / "tokenizer")
    buffers = {"vector": torch.arange(3.0)}
    write_checkpoint(folder, 3)  # to whose name one bit leads
    write_checkpoint(folder, 1, Layout(2), buffers=buffers, tokenizer=tokenizer)


def checkpoint(folder: Path) -> Any:
    """What is in a checkpoint."""
    store = Store.open(folder / "step-00000001")
    if faults := store.verify():
        raise CheckpointError("; ".join(faults))
    return store.step, store.state, weights_of(store)


def newest(folder: Path) -> Any:
    """The checkpoint that `latest` names."""
    pointer = latest(folder)
    if pointer is None or not (pointer / "manifest.json").is_file():
        raise CheckpointError(f"{folder / 'latest'} names {pointer}, which is no checkpoint")
    return pointer.name


def data(folder: Path) -> Any:
    """All samples, and what else a run reads of prepared data."""
    from mlra_scale.data.opening import check_data, open_datasets
    from tests.unit.data.builders import config_for

    config = config_for(folder)
    if problems := check_data(config):
        raise ConfigError(problems)
    opened = open_datasets(config)
    samples = [hashed(stream.batch(0, stream.samples_per_epoch)) for stream in (opened.train, opened.validation)]
    identity = opened.identity
    return opened.num_train_tokens, identity.mix.fingerprints, identity.validation, identity.tokenizer, samples


def hashed(batch: Any) -> str:
    """A hash of the tokens of a batch."""
    return hashlib.sha256(batch.tokens_BS.numpy().tobytes()).hexdigest()


def indices() -> tuple[Any, Any]:
    """Two arrays as those of an epoch."""
    return np.arange(40, dtype=np.int32), np.arange(80, dtype=np.int32).reshape(40, 2)


def cached(folder: Path) -> Any:
    """Indices from a cache."""
    found = cached_indices(folder, EPOCH, indices)
    assert found is not None
    return [array.tolist() for array in found]


def make_indices(bench: Bench, folder: Path) -> None:
    """A cache, whose folder has a fixed name."""
    folder.mkdir()
    cached(folder)


RUN = "run"
RECORD = [{"step": step, "loss": 6.0 - step / 7, "seconds": step * 0.1} for step in range(1, 9)]
ROLLBACK = {"step": 5, "to_step": 2, "skipped_from": 8, "skipped_to": 16, "reason": "loss 9.1"}


def make_run(bench: Bench, folder: Path) -> None:
    """The small files of a run directory."""
    run = RunDirectory(folder / RUN)
    run.create(load_config("debug"))
    for path, items in ((run.metrics, RECORD), (run.rolled_back, RECORD[4:])):
        lines = JsonLines(path)
        for item in items:
            lines.write(item)
        lines.close()
    lines = JsonLines(run.events)
    for step in range(4):
        lines.write({"time": "2026-11-30T00:00:00", "event": "checkpoint", "step": step})
    lines.close()
    run.write_rollbacks([ROLLBACK])
    (run.path / "started_from").write_text("/somewhere/checkpoints/step-00000004\n")
    (run.path / "result.json").write_text('{"cell": "a", "state": "done", "final_loss": 3.25}\n')
    job = JobFile(run.job, job_id="7", attempts=[JobAttempt(1, "7", ["n1", "n2"], 2)])
    job.write()


def of_run(read: Callable[[RunDirectory], Any]) -> Callable[[Path], Any]:
    """A reader of a run directory."""
    return lambda folder: read(RunDirectory(folder / RUN))


def lines(path: Path, key: str | None = None) -> Any:
    """A record as a report reads it, which takes everything, and then as a run does."""
    read_lines(path, [])
    return read_record(path, key)


def result(run: RunDirectory) -> Any:
    """The result of a cell."""
    return CellFiles(cast(Any, SimpleNamespace(name="a")), run).read_result()


STUDY = "name: two\npreset: debug\ndata: d\nvariants:\n  mlra:\naxes:\n  optim.lr: [1e-3, 3e-3]\nseeds: [5]\nranks: 1\n"
CONFIG = "model:\n  num_layers: 2\n  hidden_size: 32\ntrain:\n  steps: 8\noptim:\n  lr: 1e-3\n"
DEEPSPEED = '{"zero_optimization": {"stage": 1, "reduce_bucket_size": 500000}}\n'


def text(name: str, content: str) -> Callable[[Bench, Path], None]:
    """Makes a folder with one file."""

    def make(bench: Bench, folder: Path) -> None:
        folder.mkdir()
        (folder / name).write_text(content)

    return make


def make_cluster(bench: Bench, folder: Path) -> None:
    """The constants of a cluster."""
    folder.mkdir()
    write_cluster_file(folder / "cluster.json", named_cluster("h100"), [])


def make_sources(bench: Bench, folder: Path) -> None:
    """Text in every form."""
    import gzip

    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    texts = [f"document {number}, with some words" for number in range(40)]
    rows = "".join(f'{{"text": "{item}"}}\n' for item in texts)
    (folder / "a.txt").write_text("\n\n".join(texts))
    (folder / "a.jsonl").write_text(rows)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode(), mtime=0))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet")


def sources(folder: Path) -> Any:
    """All documents; each form by itself."""
    names = [SourceName(str(path)) for path in sorted(folder.iterdir())]
    return [list(texts_of(source)) for source in open_sources(names)]


def tokens(folder: Path) -> Any:
    """What a tokenizer makes of a text."""
    from mlra_scale.data.tokenizer import load_tokenizer

    return load_tokenizer([str(folder / "tokenizer.json")]).tokenizer.encode("the low rank of thin matrices").ids


def make_tokenizer(bench: Bench, folder: Path) -> None:
    """A tokenizer alone, as --tokenizer names one."""
    shutil.copytree(bench.data / "tokenizer", folder)


def make_gpt2(bench: Bench, folder: Path) -> None:
    """A GPT-2 of transformers, as an export in `gpt2` format is one too."""
    from tests.support.gpt2_folders import gpt2_folder

    gpt2_folder(folder)


def make_export(bench: Bench, folder: Path) -> None:
    """An export in `mlra` format."""
    from mlra_scale.checkpoint.huggingface.exporting import ExportOptions, export_checkpoint
    from tests.unit.checkpoint.huggingface.builders import checkpoint as written

    export_checkpoint(written(folder.parent / "checkpoint"), folder, ExportOptions(export_format="mlra"), None)


def opened(folder: Path) -> Any:
    """A model as `evaluate` and `generate` open it, and its tokenizer."""
    from mlra_scale.evaluation.models import open_model

    model = open_model(folder, device="cpu")
    return model.vocab_size, model.tokenizer().vocabulary_size


def imported(folder: Path) -> Any:
    """A GPT-2 as `import_hf` reads it."""
    from mlra_scale.checkpoint.huggingface.importing import import_gpt2

    made = import_gpt2(folder, folder.parent / "imported" / "step-00000000")
    shutil.rmtree(folder.parent / "imported")
    return made.model


EPOCH = "an epoch"
CACHED = hashlib.sha256(EPOCH.encode()).hexdigest()[:24]
"""The folder of its indices."""
DATA_FILES = ("manifest.json", *(f"{split}.{kind}" for split in ("train", "validation") for kind in ("bin", "idx")))
READERS = (
    Reader(
        "checkpoint",
        tuple(
            f"step-00000001/{name}"
            for name in (
                *("manifest.json", "rank-00000.safetensors", "rank-00001.safetensors", "fragments.json", "state.json"),
                *("state.safetensors", "config.yaml", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
            )
        ),
        make_checkpoint,
        checkpoint,
        is_hashed=True,
    ),
    Reader("latest", ("latest",), make_checkpoint, newest, is_hashed=True),
    Reader(
        "data set",
        (
            *DATA_FILES,
            *("train.blocks", "validation.blocks"),
            *(f"tokenizer/{name}" for name in ("tokenizer.json", "vocab.json", "merges.txt")),
        ),
        lambda bench, folder: shutil.copytree(bench.data, folder),
        data,
        is_hashed=True,
    ),
    Reader(
        "cached index",
        tuple(f"{CACHED}/{name}" for name in ("documents.npy", "samples.npy", "sha256.json")),
        make_indices,
        cached,
        is_hashed=True,
    ),
    Reader("record", (f"{RUN}/metrics.jsonl",), make_run, of_run(lambda run: lines(run.metrics, "step"))),
    Reader("events", (f"{RUN}/events.jsonl",), make_run, of_run(lambda run: lines(run.events))),
    Reader(
        "record of undone steps", (f"{RUN}/rolled_back.jsonl",), make_run, of_run(lambda run: lines(run.rolled_back))
    ),
    Reader("guard.json", (f"{RUN}/guard.json",), make_run, of_run(RunDirectory.read_rollbacks)),
    Reader("job.json", (f"{RUN}/job.json",), make_run, of_run(lambda run: read_job_file(run).attempts)),
    Reader("configuration of a run", (f"{RUN}/config.yaml",), make_run, of_run(lambda run: read_stored(run.config))),
    Reader("started_from", (f"{RUN}/started_from",), make_run, of_run(RunDirectory.origin)),
    Reader("result of a cell", (f"{RUN}/result.json",), make_run, of_run(result)),
    Reader(
        "study",
        ("study.yaml",),
        text("study.yaml", STUDY),
        lambda folder: load_study(folder / "study.yaml"),
        is_by_hand=True,
    ),
    Reader(
        "configuration file",
        ("config.yaml",),
        text("config.yaml", CONFIG),
        lambda folder: load_config("debug", folder / "config.yaml"),
        is_by_hand=True,
    ),
    Reader(
        "DeepSpeed file",
        ("zero.json",),
        text("zero.json", DEEPSPEED),
        lambda folder: load_config("debug", None, folder / "zero.json"),
        is_by_hand=True,
    ),
    Reader("cluster file", ("cluster.json",), make_cluster, lambda folder: read_cluster_file(folder / "cluster.json")),
    Reader("text", ("a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"), make_sources, sources),
    Reader("tokenizer", ("tokenizer.json",), make_tokenizer, tokens),
    Reader(
        "exported folder, gpt2",
        ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json"),
        make_gpt2,
        opened,
        tier="slow",
    ),
    Reader(
        "exported folder, mlra",
        ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        make_export,
        opened,
        tier="slow",
    ),
    Reader("imported folder", ("config.json", "model.safetensors"), make_gpt2, imported, tier="slow"),
)
CASES = tuple(reader.case() for reader in READERS)
