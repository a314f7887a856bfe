"""The plans of the low-rank projections against dense: measured, predicted and counted.

    python -m benchmarks.low_rank [--quick] [--rounds N] [--tensor 1 2] [--counted 1 2 4 8] [--json FILE]

Four tables, of R = D/2, D/4 and D/8 and the plans replicated, sharded and merged (mlra_scale/model/low_rank_plan.py):
1. The projections q, k, v of one block, forward and backward, in one and two gloo processes with one thread each, for
   several numbers of tokens T per micro-batch; all take turns within a round. Beside each ratio of times to dense is
   what the cost model says when it is fed with the rate of a matrix product and the bytes/s of an all-reduce that were
   measured in the same rounds, and which plan is the fastest by either.
2. The same in whole training steps of a few layers; predicted is the measured dense step with the projections' time
   replaced.
3. FLOPs and numbers sent, counted in the real modules (torch's FlopCounterMode, and a mode that sees collectives) for
   every degree, also those for which there are not enough cores to time anything; the formulas of the cost model must
   give the same or nothing is reported. Useful FLOPs are those of MFU's numerator, which counts the factors once: what
   a plan computes beyond them is its own. Then what `auto` chooses for the deep presets, and where it repeats
   the down-projection (replicated, with more than one rank).
4. Relative errors of factored and merged projections in bf16 and fp32 against fp64.
"""

import argparse
import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import low_rank_ranks
from benchmarks.contenders import Shape, config_of, one_process_mesh
from benchmarks.low_rank_ranks import ALL_REDUCE, DENSE, MATRIX_PRODUCT, RATE_PASSES, plans_of
from benchmarks.processes import on_processes
from benchmarks.report import add_common, check_common, write_report
from benchmarks.step_time import environment_of, ratios, spread
from mlra_scale.config import batch_plan, load_config
from mlra_scale.model import low_rank_plan as cost_model
from mlra_scale.model.low_rank_plan import CPU_CORE, H100, PLANS, Device
from mlra_scale.model.parameters import LowRankPlan

SHAPE = Shape("D=512 L=4", num_layers=4, hidden_size=512, num_heads=8, batch_size=8)
TOKENS = (256, 1024, 4096)
TINY = Shape("tiny", num_layers=2, hidden_size=32, num_heads=8, batch_size=2, sequence_length=16, vocab_size=256)
COUNTED = Shape("counted", num_layers=1, hidden_size=64, num_heads=8, batch_size=1)
COUNTED_TOKENS = 128
PARTS = (2, 4, 8)
DEGREES = (1, 2, 4, 8)
PRESET = "gpt2-mlra-72l"


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(prog="benchmarks.low_rank", description="Plans of the low-rank projections.")
    add_common(parser, rounds=9)
    parser.add_argument("--tensor", type=int, nargs="*", choices=(1, 2, 4), default=[1, 2], help="timed degrees")
    parser.add_argument("--counted", type=int, nargs="*", choices=DEGREES, default=list(DEGREES), help="counted ones")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="for one degree (default: 1800)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    check_common(parser, arguments)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    shape, tokens, rounds = (TINY, (32, 64), 2) if arguments.quick else (SHAPE, TOKENS, arguments.rounds)
    limit = arguments.timeout
    report: dict[str, Any] = {
        "environment": environment_of("cpu"),
        "shape": {"name": shape.name, "tokens_per_step": shape.tokens_per_step},
        "rounds": rounds,
    }
    print("\n".join(f"{name}: {value}" for name, value in report["environment"].items()), flush=True)
    report |= {"timed": {}, "counted": {}}
    for tensor in sorted({*arguments.tensor, *arguments.counted}):
        timed, is_counted = (shape, tokens, rounds) if tensor in arguments.tensor else None, tensor in arguments.counted
        times, counts = zip(*on_processes(tensor, on_rank, tensor, timed, is_counted, timeout_s=limit), strict=True)
        if timed is not None:
            report["timed"][tensor] = evaluate(shape, tensor, times[0])
            print("\n".join(["", *timed_lines(shape, tensor, rounds, report["timed"][tensor])]), flush=True)
        if is_counted:
            report["counted"][tensor] = check_counts(tensor, counts)
    print("\n".join(["", *counted_lines(report["counted"])]), flush=True)
    report["chosen"] = chosen()
    print("\n".join(["", *chosen_lines(report["chosen"])]), flush=True)
    sizes = (TINY, 64, PARTS, 2) if arguments.quick else (SHAPE, 1024, PARTS, 5)
    with one_process_mesh("cpu"):
        report["errors"] = low_rank_ranks.errors(*sizes)
    print("\n".join(["", *error_lines(report["errors"])]), flush=True)
    write_report(arguments, report)
    return 0


def on_rank(tensor: int, timed: tuple[Shape, Sequence[int], int] | None, is_counted: bool) -> tuple[Any, Any]:
    """What a process of one degree does: processes are started once for times and counts.

    Args:
        tensor: The degree.
        timed: Shape, numbers of tokens and rounds; None times nothing.
        is_counted: Whether FLOPs and numbers are counted.

    Returns:
        Times (low_rank_ranks.measure) and counts (low_rank_ranks.count), None for what was not asked for.
    """
    times = low_rank_ranks.measure(tensor, *timed[:2], PARTS, timed[2]) if timed is not None else None
    return times, low_rank_ranks.count(COUNTED, COUNTED_TOKENS, PARTS) if is_counted else None


def model_shape(shape: Shape, parts: int, tokens: int, tensor: int) -> cost_model.Shape:
    """The shape as the cost model has it."""
    return cost_model.Shape(tokens=tokens, hidden_size=shape.hidden_size, rank=shape.hidden_size // parts, ranks=tensor)


def dense_multiply_adds(shape: cost_model.Shape) -> float:
    """Of dense q, k and v of one rank, forward."""
    return shape.factorised * shape.tokens * shape.hidden_size**2 / shape.ranks


def dense_numbers_sent(shape: cost_model.Shape) -> float:
    """By dense q, k and v of one rank: the sum of the hidden state's gradient."""
    return 2 * shape.tokens * shape.hidden_size * (shape.ranks - 1) / shape.ranks


def predicted_seconds(plan: str, shape: cost_model.Shape, device: Device) -> float:
    """The cost model's time of a low-rank plan, or of dense by the same rule."""
    if plan != DENSE:
        name: LowRankPlan = plan  # type: ignore[assignment]
        return cost_model.seconds(name, shape, device)
    sent = dense_numbers_sent(shape) * shape.element_bytes / device.bandwidth
    latency = device.latency if shape.ranks > 1 else 0.0
    return 3 * 2 * dense_multiply_adds(shape) / device.flops + sent + latency


def evaluate(shape: Shape, tensor: int, times: dict[str, Any]) -> dict[str, Any]:
    """Ratios of times to dense, measured and predicted.

    Args:
        shape: Of the whole step.
        tensor: The degree.
        times: Of rank 0 (low_rank_ranks.measure).
    """
    result: dict[str, Any] = {"seconds": times, "projections": {}, "rates": {}}
    devices: dict[int, Device] = {}
    for tokens, seconds in times["projections"].items():
        device = device_of(shape, tensor, tokens, seconds)
        result["rates"][tokens] = {"flops": device.flops, "bandwidth": device.bandwidth}
        devices[tokens] = device
        dense = predicted_seconds(DENSE, model_shape(shape, 1, tokens, tensor), device)
        rows = {}
        for plan in plans_of(tensor, PARTS)[1:]:
            modelled = predicted_seconds(plan.name, model_shape(shape, plan.parts, tokens, tensor), device)
            rows[str(plan)] = ratios(seconds[str(plan)], seconds[DENSE]) | {"predicted": modelled / dense}
        result["projections"][tokens] = rows
    tokens = min(times["projections"], key=lambda count: abs(count - shape.tokens_per_step))
    device = devices[tokens]
    step = statistics.median(times["steps"][DENSE])
    dense = predicted_seconds(DENSE, model_shape(shape, 1, shape.tokens_per_step, tensor), device)
    result["steps"] = {}
    for plan in plans_of(tensor, PARTS)[1:]:
        modelled = predicted_seconds(plan.name, model_shape(shape, plan.parts, shape.tokens_per_step, tensor), device)
        result["steps"][str(plan)] = ratios(times["steps"][str(plan)], times["steps"][DENSE]) | {
            "predicted": 1.0 + shape.num_layers * (modelled - dense) / step
        }
    return result


def device_of(shape: Shape, tensor: int, tokens: int, seconds: dict[str, list[float]]) -> Device:
    """The measured rates as the cost model takes them; the rate of an all-reduce of this size has its latency in it."""
    work = RATE_PASSES * 2 * tokens * shape.hidden_size * (shape.hidden_size // tensor)
    flops = work / statistics.median(seconds[MATRIX_PRODUCT])
    if tensor == 1:
        return Device(flops=flops, bandwidth=float("inf"))
    sent = RATE_PASSES * 4 * 2 * tokens * shape.hidden_size * (tensor - 1) / tensor
    return replace(CPU_CORE, flops=flops, bandwidth=sent / statistics.median(seconds[ALL_REDUCE]), latency=0.0)


def check_counts(tensor: int, counts: Sequence[dict[str, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Counted FLOPs and numbers of a rank, once they are what the formulas say on every rank.

    Raises:
        SystemExit: They are not.
    """
    found = {}
    for plan in plans_of(tensor, PARTS):
        shape = model_shape(COUNTED, plan.parts or 1, COUNTED_TOKENS, tensor)
        macs, sent = dense_multiply_adds(shape), dense_numbers_sent(shape)
        useful = 6 * dense_multiply_adds(model_shape(COUNTED, 1, COUNTED_TOKENS, 1))
        if plan.parts:
            name: LowRankPlan = plan.name  # type: ignore[assignment]
            macs, sent = cost_model.multiply_adds(name, shape), cost_model.numbers_sent(name, shape)
            useful = useful_flops(plan.parts)
        for rank, counted in enumerate(counts):
            if counted[str(plan)] != (6 * macs, sent):
                raise SystemExit(
                    f"tensor {tensor}, rank {rank}, {plan}: counted {counted[str(plan)]} FLOPs and numbers sent, and "
                    f"the cost model says {(6 * macs, sent)}"
                )
        found[str(plan)] = {"flops": 6 * macs, "numbers_sent": sent, "all_ranks_to_useful": 6 * macs * tensor / useful}
    return found


def useful_flops(parts: int) -> float:
    """What MFU counts for q, k and v of the counted block: the factors, once, as ModelConfig.flops_per_token does."""

    def flops(rank: int) -> float:
        model = config_of(COUNTED, "mlra", "fp32", model={"attention_rank": rank}).model
        return model.flops_per_token(COUNTED.sequence_length)

    rank = COUNTED.hidden_size // parts
    # The formula is linear in R; what does not depend on R is not the projections'.
    return COUNTED_TOKENS * (flops(2 * rank) - flops(rank))


def chosen() -> list[dict[str, Any]]:
    """What `auto` does for a deep preset, by rank, degree, micro-batch and device.

    Raises:
        SystemExit: It repeats the down-projection where a plan that does not would cost less.
    """
    rows = []
    for device_name, device in (("cuda", H100), ("cpu", CPU_CORE)):
        for parts in PARTS:
            for tensor in DEGREES:
                for micro_batch in (1, 4):
                    rows.append(_choice(device_name, device, parts, tensor, micro_batch))
    return rows


def _choice(device_name: str, device: Device, parts: int, tensor: int, micro_batch: int) -> dict[str, Any]:
    fields = [
        f"model.attention_rank_ratio={1.0 / parts}",
        f"parallel.tensor={tensor}",
        f"train.micro_batch_size={micro_batch}",
        f"train.device={device_name}",
    ]
    config = load_config(preset=PRESET, overrides=fields)
    plan = batch_plan(config, tensor)
    shape = cost_model.shape_of(config, plan)
    costs = {name: cost_model.seconds(name, shape, device) for name in cost_model.possible_plans(config, plan)}
    name = cost_model.low_rank_plan(config, plan)
    repeats = name == "replicated" and tensor > 1
    dense = predicted_seconds(DENSE, shape, device)
    return {
        "device": device_name,
        "parts": parts,
        "tensor": tensor,
        "tokens": shape.tokens,
        "auto": name,
        "repeats": repeats,
        "to_dense": {plan_name: cost / dense for plan_name, cost in costs.items()},
    }


def timed_lines(shape: Shape, tensor: int, rounds: int, result: dict[str, Any]) -> list[str]:
    """Measured and predicted ratios of one degree as text."""
    lines = [
        f"tensor {tensor}, {shape.name}, fp32: time / dense, median [quartiles] (extremes) of {rounds} rounds; "
        "then as predicted"
    ]
    tables = [(f"q, k, v, forward and backward, T = {tokens}", rows) for tokens, rows in result["projections"].items()]
    tables.append((f"whole steps, T = {shape.tokens_per_step}", result["steps"]))
    for title, rows in tables:
        lines.append(title)
        for tokens, rates in result["rates"].items():
            if title.endswith(f"T = {tokens}") and title.startswith("q"):
                wire = f", all-reduce {rates['bandwidth'] / 1e9:.2f} GB/s" if tensor > 1 else ""
                lines.append(f"    measured: matrix product {rates['flops'] / 1e9:.1f} GFLOP/s{wire}")
        lines += [f"    {name:22}{spread(row):38} {row['predicted']:.3f}" for name, row in rows.items()]
        for parts in PARTS:
            of_rank = {name: row for name, row in rows.items() if name.endswith(f"/{parts}")}
            fastest = [min(of_rank, key=lambda name: of_rank[name][key]) for key in ("median", "predicted")]
            lines.append(f"    fastest at R=D/{parts}: {fastest[0].split()[0]}, predicted {fastest[1].split()[0]}")
    return lines


def counted_lines(counted: dict[int, dict[str, dict[str, float]]]) -> list[str]:
    """Counted FLOPs and numbers as text."""
    lines = [
        f"counted on every rank, forward and backward, D={COUNTED.hidden_size}, T={COUNTED_TOKENS} (equal to the cost "
        "model's formulas):",
        f"{'':30}{'FLOPs of a rank':>16}{'/ dense':>9}{'all ranks / useful':>20}{'numbers sent':>14}{'/ dense':>9}",
    ]
    for tensor, rows in counted.items():
        dense = rows[DENSE]
        for name, row in rows.items():
            sent = row["numbers_sent"] / (dense["numbers_sent"] or 1.0)
            lines.append(
                f"t = {tensor:<4}{name:22}{row['flops']:>16.0f}{row['flops'] / dense['flops']:>9.3f}"
                f"{row['all_ranks_to_useful']:>20.3f}{row['numbers_sent']:>14.0f}{sent:>9.3f}"
            )
    return lines


def chosen_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What `auto` chooses, as text."""
    lines = [
        f"what auto chooses for {PRESET} (T tokens per micro-batch), and the predicted time of each plan / dense",
        f"{'device':8}{'R':6}{'t':>3}{'T':>7}  {'auto':12}{'down-projection':18}" + "".join(f"{n:>12}" for n in PLANS),
    ]
    for row in rows:
        repeats = "repeated, cheapest" if row["repeats"] else "once"
        costs = "".join(f"{row['to_dense'][name]:>12.3f}" if name in row["to_dense"] else f"{'':12}" for name in PLANS)
        place = f"{row['device']:8}{'D/' + str(row['parts']):6}{row['tensor']:>3}{row['tokens']:>7}"
        lines.append(f"{place}  {row['auto']:12}{repeats:18}{costs}")
    return lines


def error_lines(errors: dict[str, dict[str, float]]) -> list[str]:
    """Errors against fp64 as text."""
    kinds = list(next(iter(errors.values())))
    lines = ["relative error against fp64, weights and inputs rounded to bf16 first" + " (replicated: factored)"]
    lines.append(f"{'':32}" + "".join(f"{kind:>22}" for kind in kinds))
    lines += [f"{name:32}" + "".join(f"{row[kind]:>22.2e}" for kind in kinds) for name, row in errors.items()]
    return lines


if __name__ == "__main__":
    sys.exit(main())
