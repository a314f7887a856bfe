"""How many tokens the output head takes at a time. Imports no torch: the memory plan counts with it."""

CHUNK_NUMBERS = {"cpu": 2**22, "cuda": 2**28}
"""Logits of a chunk: on CPUs 16 MiB in fp32, the fastest of 1 to 64 at four shapes; on GPUs 1 GiB, not measured."""
LARGEST_FP16_CHUNK = 1024
"""Tokens whose gradients of one weight can be summed in fp16 without overflow, at hidden values below 64."""


def num_chunks(num_tokens: int, num_columns: int, device: str, is_fp16: bool) -> int:
    """Returns into how many chunks of nearly equal size the head divides a micro-batch.

    Args:
        num_tokens: Tokens of the micro-batch.
        num_columns: Rows of the embedding that the rank holds.
        device: "cpu" or "cuda".
        is_fp16: Whether it computes in fp16.
    """
    largest = max(1, CHUNK_NUMBERS[device] // num_columns)
    return -(-num_tokens // (min(largest, LARGEST_FP16_CHUNK) if is_fp16 else largest))


def chunks(num_tokens: int, count: int) -> list[slice]:
    """Splits tokens into chunks of nearly equal size.

    Args:
        num_tokens: Tokens of the micro-batch.
        count: How many chunks.
    """
    return [slice(num_tokens * index // count, num_tokens * (index + 1) // count) for index in range(count)]
