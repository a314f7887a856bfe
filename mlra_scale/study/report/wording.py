"""Numbers, means and correlations as text that claims no more than the intervals do."""

from __future__ import annotations

import math

from mlra_scale.study.report.statistics import MIN_RUNS, Correlation, Mean


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
