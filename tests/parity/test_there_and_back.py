"""GPT-2 at its real sizes through import and export: bit by bit there and back, and factorised at full rank."""

import pytest

from tests.parity import there_and_back

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("arguments", [["gpt2"], ["gpt2-medium"], ["gpt2-xl", "--layers", "4"]], ids=" ".join)
def test_real_sizes_come_back_bit_by_bit(arguments: list[str]) -> None:
    assert there_and_back.main(arguments) == 0
