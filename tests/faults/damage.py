"""Disturbances: stored bytes that are damaged, replaced or nested without end between two starts."""

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from tests.faults.bench import GUARDED, STEPS, Bench, start
from tests.faults.case import FLIP, REPLACED, SAME, TRUNCATION, Case, assert_refused, digests, each, flip, run_to_end
from tests.faults.kills import STEP
from tests.faults.training import Training
from tests.faults.triggers import Trigger
from tests.support.processes import tool
from tests.support.stored import assert_bitwise_equal, store_of

Damage = Callable[[Path], object]
WAITS = "checkpoint.asynchronous=false"
DEPTH = 200_000
NESTED = b"[" * DEPTH + b"]" * DEPTH
FALLBACK = "--resume auto takes an earlier checkpoint, says why, and the end equals that of the undisturbed run bitwise"
LOST = "the run continues with the same weights, and says which steps the record has lost"
REFUSED = "exit code 2 and one message that names the file; put right again, the run continues as if undisturbed"


def killed(training: Training, run: Path, step: int = 5) -> None:
    """A run that was killed after a step; earlier saves are complete where training waits for them."""
    start(training, run, code=-9, triggers=(Trigger(STEP, step),))


def refused(output: str, *parts: str) -> None:
    """Fails unless the start was refused in one message that names these things."""
    assert output.count("bad input") == 1, output[-2000:]
    assert_refused(output[output.index("bad input") :], *parts)


def truncate(path: Path) -> None:
    """Leaves the first half."""
    os.truncate(path, path.stat().st_size // 2)


def nest(path: Path) -> None:
    """Puts lists in lists in lists there."""
    path.write_bytes(NESTED)


def make_list(path: Path) -> None:
    """Valid JSON of another kind."""
    path.write_bytes(b"[1, 2]")


def absurd(path: Path) -> None:
    """Every whole number is absurdly large."""

    def grown(value: object) -> object:
        if isinstance(value, dict):
            return {key: grown(item) for key, item in value.items()}
        if isinstance(value, list):
            return [grown(item) for item in value]
        return 10**30 if type(value) is int else value

    path.write_text(json.dumps(grown(json.loads(path.read_text()))))


def control(path: Path) -> None:
    """A terminal's control characters in a word that a message may repeat."""
    path.write_text(path.read_text().replace("mlra-scale", "\\u001b[2J\\u0007", 1))


def empty(path: Path) -> None:
    """Nothing in it."""
    path.write_bytes(b"")


def kinds_of(damages: Iterable[Damage]) -> dict[str, int]:
    """Number of damages by kind."""
    named = {"flip": FLIP, "flipped": FLIP, "truncate": TRUNCATION, "empty": TRUNCATION}
    return dict(Counter(named.get(damage.__name__, REPLACED) for damage in damages))


def checkpoint(name: str, files: Sequence[str], *damages: Damage) -> Case:
    """The newest checkpoint is damaged, in one file and one way after the other."""

    def act(bench: Bench, place: Path) -> None:
        training = bench.training("pipeline2", WAITS)
        killed(training, place / "pristine")

        def attack(file: str, damage: Damage) -> None:
            run = place / f"{file.replace('/', '-')}-{damage.__name__}"
            shutil.copytree(place / "pristine", run)
            damage(run / "checkpoints" / "step-00000004" / file)
            start(training, run, resume=True)
            names = [event for event in read(run / "events.jsonl") if event["event"] == "fallback"]
            assert len(names) == 1 and Path(file).name in str(names[0]), names
            bench.finish(training, run)

        each((f"{damage.__name__} of {file}", partial(attack, file, damage)) for file in files for damage in damages)

    ways = ", ".join(damage.__name__ for damage in damages)
    return Case(
        name,
        f"the newest checkpoint: {ways} of {', '.join(files)}",
        FALLBACK,
        act,
        kinds=kinds_of(damages * len(files)),
    )


def read(path: Path) -> list[dict[str, object]]:
    """Reads JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def data(name: str, done: str, *damages: tuple[str, Damage], more: Sequence[str] = (), tier: str = "nightly") -> Case:
    """Prepared data are damaged between two starts, in one file after the other; and a run begins on them."""

    def act(bench: Bench, place: Path) -> None:
        shutil.copytree(bench.data, place / "data")
        training = replace(bench.training("single", WAITS, *more), data=place / "data")
        run = place / "run"
        killed(training, run)
        before = digests(run, ".lock")

        def attack(path: Path, damage: Damage) -> None:
            content, status = path.read_bytes(), path.stat()
            damage(path)
            # As a disk leaves it that lies: the time of the last change is the old one.
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            try:
                for target, resume in ((run, True), (place / "new", False)):
                    refused(start(training, target, resume=resume, code=2), path.name)
                    assert digests(run, ".lock") == before and not (place / "new" / "metrics.jsonl").exists()
            finally:
                shutil.rmtree(place / "new", ignore_errors=True)
                path.write_bytes(content)

        each(
            (f"{damage.__name__} of {file}", partial(attack, place / "data" / file, damage)) for file, damage in damages
        )
        bench.finish(training, run)

    return Case(name, done, REFUSED, act, tier=tier, kinds=kinds_of(damage for _, damage in damages))


def flip_at(place: float) -> Damage:
    """Flips a bit at a part of the file."""

    def flipped(path: Path) -> None:
        flip(path, int(place * (path.stat().st_size - 1)))

    return flipped


def overwrite(path: Path) -> None:
    """Every token another one, as many as before."""
    tokens = np.fromfile(path, np.uint16)
    ((tokens + 7) % 512).astype(np.uint16).tofile(path)


def swap_ids(path: Path) -> None:
    """Two tokens of the vocabulary change their ids."""
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    first, second = [word for word, number in words.items() if number in (300, 301)]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(content))


def other_end(path: Path) -> None:
    """Another token ends documents."""
    content = json.loads(path.read_text())
    content["tokenizer"]["end_of_document_token"] = 5
    path.write_text(json.dumps(content))


def verify_finds(bench: Bench, place: Path) -> None:
    """Flips of bits anywhere are found by --verify."""
    folder, draw = place / "data", random.Random(13)
    shutil.copytree(bench.data, folder)
    command = [*tool("prepare_data"), "--verify", str(folder)]
    run_to_end(command, place / "good.log")
    for _ in range(4):
        path = draw.choice([path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".json"])
        content = path.read_bytes()
        flip(path, draw.randrange(len(content)))
        assert_refused(run_to_end(command, place / "bad.log", code=2), path.name)
        path.write_bytes(content)


def moved_data(bench: Bench, place: Path) -> None:
    """The data folder is a link to another place, and the clock has jumped."""
    real, link = place / "real", place / "link"
    shutil.copytree(bench.data, real)
    link.symlink_to(real)
    training, run = replace(bench.training(), data=link), place / "run"
    killed(training, run)
    real.rename(place / "elsewhere")
    link.unlink()
    link.symlink_to(place / "elsewhere")
    future = time.time() + 5e8
    for path in [*(place / "elsewhere").rglob("*"), *run.rglob("*")]:
        os.utime(path, (future, future) if path.name != "metrics.jsonl" else (0, 0))
    bench.finish(training, run)


def tear(path: Path) -> None:
    """A line in the middle is half of what it was."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[len(lines) // 2] = lines[len(lines) // 2][:20] + b"\n"
    path.write_bytes(b"".join(lines))


def stored(
    name: str, file: str, *damages: Damage, more: Sequence[str] = (), passes: bool = False, steps: int = STEPS
) -> Case:
    """A file of the run directory is damaged between two starts; `passes`: the start may do without it."""

    def act(bench: Bench, place: Path) -> None:
        training = bench.training("single", WAITS, *more, steps=steps)
        killed(training, place / "pristine", 7)

        def attack(damage: Damage) -> None:
            run = place / damage.__name__
            shutil.copytree(place / "pristine", run)
            path = run / file
            damage(path)
            if passes:
                start(training, run, resume=True)
            else:
                refused(start(training, run, resume=True, code=2), path.name)
                if path.exists():
                    shutil.copy(place / "pristine" / file, path)
            bench.finish(training, run)

        each((damage.__name__, partial(attack, damage)) for damage in damages)

    ways = ", ".join(damage.__name__ for damage in damages)
    return Case(name, f"{file}: {ways}", "it does without it" if passes else REFUSED, act, kinds=kinds_of(damages))


def all_checkpoints(bench: Bench, place: Path) -> None:
    """Every checkpoint is damaged: a run never begins anew silently."""
    training, run = bench.training("single", WAITS), place / "run"
    killed(training, run)
    folders = sorted((run / "checkpoints").glob("step-*"))
    for folder in folders:
        flip(folder / "rank-00000.safetensors")
    refused(start(training, run, resume=True, code=2), *(folder.name for folder in folders))
    for folder in folders:
        flip(folder / "rank-00000.safetensors")
    bench.finish(training, run)


def record_lost(bench: Bench, place: Path) -> None:
    """The record is taken away between two starts: the run continues, and says so."""
    training = bench.training("single", WAITS)
    killed(training, place / "pristine", 7)
    for damage in (nest, empty, Path.unlink):
        run = place / damage.__name__
        shutil.copytree(place / "pristine", run)
        damage(run / "metrics.jsonl")
        output = start(training, run, resume=True)
        lost = [event for event in read(run / "events.jsonl") if event["event"] == "record_lost"]
        assert [(event["first_step"], event["last_step"]) for event in lost] == [(1, 6)], lost
        assert "metrics.jsonl has no losses of steps 1 to 6" in output, output[-1000:]
        assert_bitwise_equal(store_of(run, training.steps), store_of(bench.reference(training), training.steps))


def named_by_tools(bench: Bench, place: Path) -> None:
    """What the tools say of a damaged checkpoint."""
    run = place / "run"
    shutil.copytree(bench.reference(bench.training()), run)
    for damage in (nest, make_list, absurd):
        shutil.rmtree(run)
        shutil.copytree(bench.reference(bench.training()), run)
        damage(run / "checkpoints" / "step-00000008" / "manifest.json")
        for command in (["checkpoints", "describe"], ["evaluate"], ["export_hf"]):
            line = [*tool(command[0]), *command[1:], str(run / "checkpoints" / "step-00000008")]
            line += {"evaluate": ["--data", str(bench.data)], "export_hf": [str(place / "out")]}.get(command[0], [])
            assert_refused(run_to_end(line, place / "tools.log", code=2), "manifest.json")
            assert not (place / "out").exists()


CASES = (
    checkpoint("weights damaged", ("rank-00000.safetensors", "rank-00001.safetensors"), flip, truncate, Path.unlink),
    checkpoint("manifest damaged", ("manifest.json",), flip, nest, make_list, absurd, control, empty, Path.unlink),
    checkpoint("state damaged", ("state.json", "fragments.json", "config.yaml"), flip, nest, Path.unlink),
    checkpoint("stored tokenizer damaged", ("tokenizer/tokenizer.json", "tokenizer/vocab.json"), flip, Path.unlink),
    Case("all checkpoints damaged", "a bit flips in each of two", REFUSED, all_checkpoints, kinds={FLIP: 2}),
    Case(
        "tools and damaged manifests",
        "deep, a list, absurd sizes; each to three tools",
        "exit code 2, named",
        named_by_tools,
        kinds={REPLACED: 9},
    ),
    data(
        "bits flipped in tokens",
        "a bit of train.bin or validation.bin flips",
        *(("train.bin", flip_at(place)) for place in (0.0, 0.4, 1.0)),
        ("validation.bin", flip_at(0.5)),
    ),
    data("all tokens overwritten", "other tokens between two starts", ("train.bin", overwrite), tier=""),
    data(
        "bits flipped in indexes",
        "a bit of train.idx or validation.idx flips, or half is missing",
        *(("train.idx", flip_at(place)) for place in (0.05, 0.5, 0.95)),
        ("validation.idx", truncate),
    ),
    data(
        "bits flipped in the tokenizer",
        "a bit flips, or two ids are swapped",
        ("tokenizer/tokenizer.json", flip),
        ("tokenizer/tokenizer.json", swap_ids),
        ("tokenizer/vocab.json", flip),
        ("tokenizer/merges.txt", flip),
    ),
    data(
        "data manifest damaged",
        "the manifest of the data",
        *(("manifest.json", damage) for damage in (nest, make_list, absurd, control, empty, truncate, other_end)),
        more=("data.document_attention=masked",),
    ),
    Case("bits found by --verify", "four flips anywhere", "named, exit code 2", verify_finds, kinds={FLIP: 4}),
    Case("linked data, skewed clock", "data move behind a link, times are in the future or 0", SAME, moved_data),
    stored("latest damaged", "checkpoints/latest", nest, empty, Path.unlink, passes=True),
    stored("config.yaml damaged", "config.yaml", nest, make_list, empty, passes=True),
    stored("guard.json damaged", "guard.json", nest, make_list, absurd, truncate, more=GUARDED, steps=16),
    stored("record damaged", "metrics.jsonl", tear),
    Case(
        "record lost",
        "metrics.jsonl is replaced, emptied, removed",
        LOST,
        record_lost,
        tier="",
        kinds={REPLACED: 2, TRUNCATION: 1},
    ),
)
