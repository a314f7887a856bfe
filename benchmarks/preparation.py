"""How fast text becomes tokens: the preparation of a data set against `tokenizers` alone.

    python -m benchmarks.preparation [--quick] [--json FILE] [--megabytes 120] [--workers 1 2] [--corpus FOLDER]

The text is source code: .py files below a folder (default: the installed packages), a document each, as a JSONL file.
Both use the same BPE. `tokenizers` has the texts in memory, encodes a thousand at once with so many threads, and throws
the tokens away; only that is timed. The preparation does all of its work in that time: it imports its libraries, starts
its processes, reads and parses, splits, appends the ends of documents, writes, forms checksums and waits for the disk.
The last table is CPU time: how many workers the main process could feed if it did nothing but that.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, Table, median_of, parse, parser_of, ratios, rotated
from mlra_scale.data.tokenizer import save_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 1800.0
VOCABULARY, BPE_BYTES = 32_000, 20_000_000

ALONE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2])
tokenizer.encode_special_tokens = True
with open(sys.argv[1], encoding="ascii") as lines:
    texts = [json.loads(line)["text"] for line in lines]
tokens, began = 0, time.perf_counter()
for first in range(0, len(texts), 1000):
    encodings = tokenizer.encode_batch_fast(texts[first:first + 1000], add_special_tokens=False)
    tokens += sum(map(len, encodings)) + len(encodings)
seconds = time.perf_counter() - began
print(json.dumps({"tokens": tokens, "seconds": seconds}))
"""
OURS = """
import time
began = time.perf_counter()
import json, resource, sys
from pathlib import Path
from mlra_scale.data.mixture import Component
from mlra_scale.data.options import PrepareOptions
from mlra_scale.data.prepare import prepare
from mlra_scale.data.sources import SourceName
(manifest,) = prepare(PrepareOptions(
    Path(sys.argv[3]), [Component("", [SourceName(sys.argv[1])])], [sys.argv[2]], validation_fraction=0.01,
    workers=int(sys.argv[4]), overwrite=True, progress=False))
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
main, workers = (usage.ru_utime + usage.ru_stime for usage in used)
seconds = time.perf_counter() - began
print(json.dumps({"tokens": manifest.tokens, "seconds": seconds, "main": main, "workers": workers}))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = parser_of("benchmarks.preparation", "Preparation of data against tokenizers alone.", 5, has_device=False)
    add = parser.add_argument
    add("--megabytes", type=int, default=120, help="of text (default: %(default)s)")
    add("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers and threads (default: 1 2)")
    add("--corpus", type=Path, default=Path(sysconfig.get_paths()["purelib"]), help="folder with .py files")
    arguments = parse(parser, argv)
    if not arguments.corpus.is_dir():
        parser.error(f"--corpus {arguments.corpus}: there is no such folder")
    report = Report.begin(arguments)
    with tempfile.TemporaryDirectory() as name:
        size = write_corpus(Path(name), arguments.corpus, 10**6 if arguments.quick else arguments.megabytes * 10**6)
        report.numbers = measure(Path(name), arguments.workers, arguments.rounds)
    for table in tables_of(report.numbers, size, arguments.rounds):
        report.add(table)
    report.write(arguments.json)
    return 0


def texts_below(folder: Path) -> Iterator[str]:
    """Yields the text of all .py files."""
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            yield text


def write_corpus(folder: Path, source: Path, max_bytes: int) -> int:
    """Writes corpus.jsonl of about so many bytes, and tokenizer.json trained on its beginning; returns the bytes."""
    size, beginning = 0, []
    with open(folder / "corpus.jsonl", "w", encoding="ascii") as file:
        for text in texts_below(source):
            if size >= max_bytes:
                break
            if size < BPE_BYTES:
                beginning.append(text)
            size += len(text.encode())
            file.write(json.dumps({"text": text}) + "\n")
    save_tokenizer(train_bpe(beginning, VOCABULARY), folder / "tokenizer")
    return size


def measure(folder: Path, workers: Sequence[int], rounds: int) -> dict[str, Any]:
    """Takes times; returns what each contender printed, by contender, a list of one per round."""
    contenders = [(kind, count) for count in workers for kind in ("ours", "alone")]
    found: dict[str, list[dict[str, float]]] = {f"{kind} {count}": [] for kind, count in contenders}
    for turn in range(rounds):
        for kind, count in rotated(contenders, turn):
            words = [str(folder / "corpus.jsonl"), str(folder / "tokenizer" / "tokenizer.json")]
            words += [str(folder / "data"), str(count)] if kind == "ours" else []
            found[f"{kind} {count}"].append(run(OURS if kind == "ours" else ALONE, words, count))
    assert len({each["tokens"] for results in found.values() for each in results}) == 1, "different tokens"
    return found


def run(code: str, words: Sequence[str], threads: int) -> dict[str, float]:
    """Runs Python code in a process of its own; returns the JSON object that it prints last."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-c", code, *words]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    if result.returncode != 0:
        raise SystemExit(f"failed:\n{result.stderr[-4000:]}")
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def tables_of(found: dict[str, list[dict[str, float]]], size: int, rounds: int) -> list[Table]:
    """Returns the tables: times, ratios, CPU time."""
    seconds = {name: [each["seconds"] for each in results] for name, results in found.items()}
    titles = {"ours": "prepare_data, {} worker(s)", "alone": "tokenizers alone, {} thread(s)"}
    tokens = next(iter(found.values()))[0]["tokens"]
    rows: list[list[Any]] = []
    for name, values in seconds.items():
        kind, count = name.split()
        rows.append([titles[kind].format(count), median_of(values), tokens / median_of(values)])
    counts = sorted({int(name.split()[1]) for name in found})
    compared: list[list[Any]] = [
        [f"prepare_data / tokenizers alone, {count}", ratios(seconds[f"alone {count}"], seconds[f"ours {count}"])]
        for count in counts
    ]
    for kind, title in (("ours", "prepare_data"), ("alone", "tokenizers alone")):
        compared += [
            [f"{title}, {count} / {counts[0]}", ratios(seconds[f"{kind} {counts[0]}"], seconds[f"{kind} {count}"])]
            for count in counts[1:]
        ]
    busy: list[list[Any]] = [
        [
            f"{count} workers",
            median_of([each["main"] for each in found[f"ours {count}"]]),
            median_of([each["workers"] for each in found[f"ours {count}"]]),
            ratios(
                [each["workers"] for each in found[f"ours {count}"]], [each["main"] for each in found[f"ours {count}"]]
            ),
        ]
        for count in counts
        if count > 1
    ]
    spread = f"median [quartiles] (extremes) of {rounds} rounds"
    return [
        Table(f"{size / 1e6:.0f} MB of text, {tokens:,.0f} tokens; medians", ["", "s", "tokens/s"], rows),
        Table(f"tokens/s; {spread}", ["", "ratio"], compared),
        Table(f"CPU time, start-up included; {spread}", ["", "main, s", "workers, s", "workers / main"], busy),
    ]


if __name__ == "__main__":
    sys.exit(main())
