"""`mlra-scale report`: writes a report of a run, of several runs, or of a sweep."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlra_scale.cli.command import Command
from mlra_scale.cli.options import place
from mlra_scale.console import InputError

EXAMPLES = """examples:
  PROG runs/first
  PROG runs/first runs/second runs/third
  PROG runs/first runs/second --prompt 'Return a list of' --output reports/both
  PROG runs/small

What is in a report, and how each number is computed: docs/report.md.
exit codes: 0; 2 there is no run and no sweep, the report cannot be written, or the extra `report` is not installed
"""
SAMPLE_TOKENS, SAMPLE_TOP_K = 60, 40


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "paths",
        type=place,
        nargs="+",
        metavar="FOLDER",
        help="run directory, several of them to compare, or a sweep's output folder",
    )
    add(
        "--output",
        type=place,
        metavar="FOLDER",
        help="where to write (default: the folder report in FOLDER; of several runs, beside the first one)",
    )
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="show what the newest checkpoint of each run writes after TEXT; may be repeated",
    )


def _run(options: argparse.Namespace) -> int:
    try:
        from mlra_scale.study.report.run_report import curves_text, report_run
        from mlra_scale.study.report.runs_report import names_of, report_runs
        from mlra_scale.study.report.sweep_record import is_sweep
        from mlra_scale.study.report.sweep_report import report_sweep
    except ImportError as error:
        reason = f"reports need more libraries ({error}); install them with: pip install 'mlra-scale[report]'"
        raise InputError(reason) from None

    paths: list[Path] = options.paths
    _check(paths, [path for path in paths if is_sweep(path)], options.prompt)
    output: Path = options.output or (paths[0].resolve().parent if len(paths) > 1 else paths[0]) / "report"
    samples = _samples(paths, names_of(paths), options.prompt)
    try:
        if len(paths) > 1:
            written = report_runs(paths, output, samples)
        elif is_sweep(paths[0]):
            written = report_sweep(paths[0], output)
        else:
            written = report_run(paths[0], output, samples)
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror})") from None
    print("\n".join(map(str, written)))
    if len(paths) == 1 and not is_sweep(paths[0]) and (text := curves_text(paths[0])):
        print(f"\n{text}")
    return 0


def _check(paths: Sequence[Path], sweeps: Sequence[Path], prompts: Sequence[str]) -> None:
    """Refuses what is neither a run nor a sweep, and what only runs have.

    Raises:
        InputError: The paths, or the paths and the prompts, do not go together.
    """
    from mlra_scale.training.run_directory import RunDirectory

    for path in paths:
        if path not in sweeps and not RunDirectory(path).holds_a_run():
            raise InputError(f"{path}: neither a run directory nor a sweep's output folder")
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("the same run is named twice")
    if sweeps and len(paths) > 1:
        raise InputError(f"{sweeps[0]} is a sweep's output folder, which has a report of its own; name runs only")
    if sweeps and prompts:
        raise InputError(f"{sweeps[0]} is a sweep's output folder; --prompt is for runs")


def _samples(paths: Sequence[Path], names: Sequence[str], prompts: Sequence[str]) -> dict[str, dict[str, str]]:
    """Lets each run write on from each prompt; a run that cannot has the reason instead."""
    found: dict[str, dict[str, str]] = {prompt: {} for prompt in prompts}
    if not prompts:
        return found
    from mlra_scale.evaluation.generation import GenerationOptions, generate
    from mlra_scale.evaluation.models import open_model

    for path, name in zip(paths, names, strict=True):
        try:
            opened = open_model(path)
            tokens = min(SAMPLE_TOKENS, opened.max_positions // 2)
            options = GenerationOptions(max_new_tokens=tokens, top_k=SAMPLE_TOP_K)
            texts = [text.text for text in generate(opened, opened.tokenizer(), prompts, options)]
        except InputError as error:
            texts = [f"(no sample: {error})"] * len(prompts)
        for prompt, text in zip(prompts, texts, strict=True):
            found[prompt][name] = text
    return found


COMMAND = Command(
    name="report",
    summary="write a report of a run, of several runs or of a sweep: one HTML page with its figures",
    description="One HTML file with everything inside, and its figures as PNG files, of a run directory, of several "
    "run directories side by side, or of a sweep's output folder; all of them may still be at work.",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
    is_intermixed=True,
    has_side_effects=True,
)
