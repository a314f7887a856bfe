"""Numbers as text, and sentences about differences and correlations that claim no more than their intervals do."""

from __future__ import annotations

import math

from mlra_scale.study.report.statistics import LEVEL, MIN_RUNS, Correlation, Mean

MIN_PAIRS = 3
"""With fewer pairs no claim is made."""


def number(value: float, digits: int = 3) -> str:
    """Returns a number with so many significant digits, in the shorter notation; '-' for nan."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = digits - 1 - (_exponent(value) if value else 0)
    return f"{value:.{max(0, decimals)}f}"


def to_error_digits(*values: float, error: float) -> list[str]:
    """Returns numbers rounded to the second significant digit of an error."""
    if not math.isfinite(error) or error <= 0.0:
        return [number(value) for value in values]
    decimals = 1 - _exponent(error)
    if 1e-3 <= max(error, *map(abs, values)) < 1e6:
        # Adding 0 turns -0.0 into 0.0.
        return [f"{round(value, decimals) + 0.0:.{max(0, decimals)}f}" for value in values]
    return [number(value, max(1, _exponent(value) + decimals + 1)) if value else "0" for value in values]


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def with_error(mean: Mean) -> str:
    """Returns 'value +- standard error', or the value alone if there is no error."""
    if mean.n < 2 or not math.isfinite(mean.error):
        return number(mean.value)
    return " +- ".join(to_error_digits(mean.value, mean.error, error=mean.error))


def interval(mean: Mean) -> str:
    """Returns 'low to high', or '-' if there is no interval."""
    return " to ".join(to_error_digits(mean.low, mean.high, error=mean.error)) if mean.n > 1 else "-"


def p_text(p: float) -> str:
    """Returns a p-value as text: '= 0.03', '< 1e-6'."""
    if math.isnan(p):
        return "is undefined"
    return "< 1e-6" if p < 1e-6 else f"= {number(p, 2)}"


def is_claimable(difference: Mean) -> bool:
    """Returns whether a claim can be made about a difference; only such differences count as comparisons."""
    return difference.n >= MIN_PAIRS and difference.has_spread


def is_supported(difference: Mean, adjusted_p: float) -> bool:
    """Returns whether a difference is claimed: its interval excludes 0 and its adjusted p-value is below 1 - LEVEL."""
    return is_claimable(difference) and difference.excludes_zero and adjusted_p < 1.0 - LEVEL


def verdict(difference: Mean, adjusted_p: float, num_comparisons: int) -> str:
    """Returns a sentence, without its full stop, about what a paired difference supports.

    Args:
        difference: The mean of paired differences.
        adjusted_p: Its p-value after Holm's adjustment; used only if the difference is claimable.
        num_comparisons: Number of comparisons in the adjustment.
    """
    n, shown = difference.n, with_error(difference)
    level = f"{100 * LEVEL:.0f} % interval"
    if n == 0:
        return "no pair is finished, so no claim is made"
    if n < MIN_PAIRS:
        return f"no claim is made with fewer than {MIN_PAIRS} pairs: {shown}, n = {n}"
    if not difference.has_spread:
        same = "0" if difference.value == 0.0 else number(difference.value)
        return f"no claim is made: the difference is {same} in each of the {n} pairs, so its error is unknown"
    if not difference.excludes_zero:
        return f"no difference is supported: {shown} ({level} {interval(difference)}), n = {n}"
    adjusted = f"Holm-adjusted p {p_text(adjusted_p)} over {num_comparisons} comparison{'s' * (num_comparisons != 1)}"
    if not is_supported(difference, adjusted_p):
        return (
            f"no difference is supported: {shown} ({level} {interval(difference)}) excludes 0 when taken alone, but "
            f"{adjusted}, n = {n}"
        )
    size = " +- ".join(to_error_digits(abs(difference.value), difference.error, error=difference.error))
    word = "lower" if difference.value < 0 else "higher"
    return f"{word} by {size}; the {level} {interval(difference)} excludes 0, {adjusted}, n = {n}"


def coefficient_text(found: Correlation) -> str:
    """Returns a coefficient with its interval, '0.62 (0.30 to 0.81)'; '-' if there is none."""
    if math.isnan(found.value):
        return "-"
    value, low, high = (f"{round(part, 2) + 0.0:.2f}" for part in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})" if math.isfinite(found.low) else value


def correlation_verdict(found: Correlation) -> str:
    """Returns a sentence, without its full stop, about what a coefficient supports."""
    if found.runs < MIN_RUNS:
        return f"none given: fewer than {MIN_RUNS} runs"
    if math.isnan(found.value):
        return "undefined: one of the two does not vary"
    if math.isnan(found.low):
        return "no claim: no interval could be drawn"
    if not found.is_supported:
        return "none supported: the interval includes 0"
    return f"{'positive' if found.value > 0 else 'negative'}: the interval excludes 0"
