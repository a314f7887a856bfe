"""Keyed dropout: the right share, no visible structure, and a pure function of its key."""

import torch

from mlra_scale.model.randomness import dropout_attention, dropout_hidden, key_of, keyed_generator


def masks(num_samples: int, key: int = 1, probability: float = 0.1) -> torch.Tensor:
    return dropout_hidden(torch.ones(num_samples, 16, 32), probability, key, torch.arange(num_samples)) > 0


def test_the_kept_share_is_right_and_kept_values_are_scaled() -> None:
    dropped = dropout_hidden(torch.ones(400, 16, 32), 0.1, 9, torch.arange(400))
    share = (dropped > 0).double().mean().item()
    assert abs(share - 0.9) < 4 * (0.09 / dropped.numel()) ** 0.5
    assert torch.allclose(dropped[dropped > 0], torch.tensor(1 / 0.9))


def test_masks_are_independent_over_samples_sites_and_elements() -> None:
    first, second = masks(400, key=1).double() - 0.9, masks(400, key=2).double() - 0.9
    flat = first.flatten(1)
    bound = 5 * 0.09 / first.numel() ** 0.5
    assert abs((first * second).mean().item()) < bound
    assert abs((flat[:-1] * flat[1:]).mean().item()) < 1.01 * bound
    assert abs((flat[:, :-1] * flat[:, 1:]).mean().item()) < 1.01 * bound
    # Each element's share over samples scatters as a binomial's does.
    assert abs(first.mean(0).var().item() / (0.09 / 400) - 1) < 0.3


def test_a_mask_depends_on_the_sample_not_on_its_place() -> None:
    together = dropout_hidden(torch.ones(4, 8, 8), 0.5, 3, torch.tensor([5, 6, 7, 8]))
    alone = dropout_hidden(torch.ones(1, 8, 8), 0.5, 3, torch.tensor([7]))
    assert torch.equal(together[2:3], alone)


def test_a_mask_depends_on_the_position_not_on_where_the_sequence_is_cut() -> None:
    ids = torch.tensor([5, 6])
    whole = dropout_hidden(torch.ones(2, 12, 8), 0.5, 3, ids)
    parts = [dropout_hidden(torch.ones(2, 4, 8), 0.5, 3, ids, first) for first in (0, 4, 8)]
    assert torch.equal(whole, torch.cat(parts, dim=1))


def test_an_attention_mask_depends_on_the_global_head() -> None:
    ids = torch.tensor([3, 4])
    whole = dropout_attention(torch.ones(2, 4, 8, 8), 0.5, 3, ids, first_head=0)
    shard = dropout_attention(torch.ones(2, 2, 8, 8), 0.5, 3, ids, first_head=2)
    assert torch.equal(whole[:, 2:], shard)
    assert not torch.equal(whole[:, 0], whole[:, 1])


def test_generators_depend_on_seed_and_name_only() -> None:
    def draw(seed: int, name: str) -> torch.Tensor:
        return torch.randn(8, generator=keyed_generator(seed, name))

    assert torch.equal(draw(1, "a"), draw(1, "a"))
    assert not torch.equal(draw(1, "a"), draw(2, "a"))
    assert not torch.equal(draw(1, "a"), draw(1, "b"))
    assert 0 <= key_of(0, "") < 2**63
