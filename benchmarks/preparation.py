"""How fast text becomes tokens: this package's preparation of a data set against `tokenizers` alone.

Both read the same texts with the same tokenizer and the same number of threads. `tokenizers` has the texts in memory,
makes one call of `encode_batch_fast` and throws the tokens away. The preparation does all of its work: it starts its
processes, reads a JSONL file, splits, appends the ends of documents, writes and checks the files, forms checksums and
waits for the disk.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from tokenizers import Tokenizer

from benchmarks.processes import on_processes
from benchmarks.step_time import ratios
from mlra_scale.data.prepare import PrepareOptions, prepare
from mlra_scale.data.sources import open_sources
from mlra_scale.data.tokenizer import save_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 300.0


def write_corpus(folder: Path, vocab_size: int, max_bytes: int) -> None:
    """Writes texts (Python's own documentation) as a JSONL file, and a tokenizer that was trained on them.

    Args:
        folder: Where to: `corpus.jsonl` and `tokenizer`.
        vocab_size: Of the tokenizer.
        max_bytes: About so much text.
    """
    texts: list[str] = []
    size = 0
    (source,) = open_sources(["python-docs"], "text", "train", None)
    for document in source.documents():
        if size >= max_bytes:
            break
        if document.text.strip():
            texts.append(document.text)
            size += len(document.text)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="ascii")
    save_tokenizer(train_bpe(texts, vocab_size), folder / "tokenizer")


def prepare_corpus(folder: Path, workers: int) -> tuple[Path, int, float]:
    """Prepares the corpus anew.

    Args:
        folder: Where `write_corpus` wrote it.
        workers: Tokenizing processes.

    Returns:
        The data set, its number of tokens, and seconds.
    """
    output = folder / "data"
    options = PrepareOptions(
        output=output,
        sources=[str(folder / "corpus.jsonl")],
        tokenizer=[str(folder / "tokenizer")],
        validation_fraction=0.3,
        workers=workers,
        overwrite=True,
        progress=False,
    )
    began = perf_counter()
    manifest = prepare(options)
    return output, int(manifest.content["tokens"]), perf_counter() - began


def prepare_in_a_process(folder: Path, workers: int) -> tuple[int, float]:
    """Prepares the corpus in a process whose main module is empty, as light as that of tools/prepare_data.py.

    Workers import the main module of the process that starts them; this benchmark's would bring DeepSpeed along.

    Returns:
        Tokens and seconds.
    """
    code = "import sys; from benchmarks.preparation import print_prepared; print_prepared(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-c", code, str(folder), str(workers)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    if result.returncode != 0:
        raise SystemExit(f"preparing the corpus failed:\n{result.stderr[-4000:]}")
    tokens, seconds = json.loads(result.stdout.splitlines()[-1])
    return tokens, seconds


def print_prepared(folder: str, workers: str) -> None:
    """What that process does."""
    print(json.dumps(prepare_corpus(Path(folder), int(workers))[1:]))


def encode_alone(folder: Path) -> tuple[int, float]:
    """Encodes the corpus by `tokenizers` alone, in a process whose number of threads is set; tokens and seconds."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    lines = (folder / "corpus.jsonl").read_text(encoding="ascii").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    began = perf_counter()
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    seconds = perf_counter() - began
    return sum(len(encoding.ids) + 1 for encoding in encodings), seconds


@contextlib.contextmanager
def tokenizer_threads(count: int) -> Iterator[None]:
    """Processes that begin to tokenize inside have so many threads for it."""
    before = os.environ.get("RAYON_NUM_THREADS")
    os.environ["RAYON_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAYON_NUM_THREADS"]
        else:
            os.environ["RAYON_NUM_THREADS"] = before


def measure(folder: Path, workers: Sequence[int], rounds: int) -> dict[str, Any]:
    """Takes times.

    Args:
        folder: Where `write_corpus` wrote the corpus.
        workers: Numbers of processes (ours) and threads (of `tokenizers`).
        rounds: How many times each gets its turn.

    Returns:
        Tokens, seconds by contender and round, and the ratios of tokens per second.
    """
    ours: dict[int, list[float]] = {count: [] for count in workers}
    alone: dict[int, list[float]] = {count: [] for count in workers}
    tokens = 0
    for _ in range(rounds):
        for count in workers:
            with tokenizer_threads(1):
                tokens, seconds = prepare_in_a_process(folder, count)
            ours[count].append(seconds)
            with tokenizer_threads(count):
                ((same, seconds),) = on_processes(1, encode_alone, folder, timeout_s=TIMEOUT_SECONDS)
            alone[count].append(seconds)
            assert same == tokens, (same, tokens)
    return {
        "tokens": tokens,
        "seconds": {f"prepare_data, {count} worker(s)": values for count, values in ours.items()}
        | {f"tokenizers alone, {count} thread(s)": values for count, values in alone.items()},
        "tokens_per_second_to_tokenizers_alone": {str(count): ratios(alone[count], ours[count]) for count in workers},
    }
