"""What a start takes over of stored moments where parameters have another optimizer than in the checkpoint.

AdamW's first moment and the momentum of muon and spectron are the same thing: an exponential mean of the gradient. From
AdamW to muon or spectron it is carried over, and the second moment is dropped. In the other direction AdamW begins anew
for these parameters, with both moments zero and a count of updates of its own. It divides its moments by 1 - beta1^t
and 1 - beta2^t with one t: with t = 1, right for a new second moment, a first moment that is carried over would count
1 / (1 - beta1) times, and the update would be about ten times too large. All other parameters keep their moments and
counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from mlra_scale.model.update_rules import VECTOR_PREFIX, UpdateRule, update_rules, vector_lengths

if TYPE_CHECKING:
    from mlra_scale.checkpoint.reader import Store

Rules = Mapping[str, UpdateRule]


def begins_anew(store: Store, rules: Rules) -> list[str]:
    """Returns the parameters whose AdamW begins with a start of these rules: a momentum alone is stored of them."""
    return [name for name, rule in rules.items() if rule.is_adamw and store.parts(name)[1:] == ("exp_avg",)]


def adam_begun_at(store: Store, rules: Rules) -> dict[str, int]:
    """Returns after how many updates of the run AdamW of a parameter began; not those that began with the run.

    Args:
        store: The checkpoint that the run continues from.
        rules: Of the start, for the parameters of the checkpoint.
    """
    state = store.state.get("engine")
    if state is None or not store.manifest.has_moments:
        return {}
    begun = {name: at for name, at in state.get("adam_begun_at", {}).items() if rules[name].is_adamw}
    anew = dict.fromkeys(begins_anew(store, rules), state["optimizer_step"])
    return {name: at for name, at in (begun | anew).items() if at > 0}


def vectors_anew(store: Store, rules: Rules) -> list[str]:
    """Returns spectron's vectors if they begin with the next update of a start of these rules: all of them or none.

    A rank knows those of its own stage only: all layouts must decide alike.
    """
    names = vector_lengths(rules, store.table).keys()
    return [] if names <= store.buffer_names else list(names)


def notice_of_change(store: Store, rules: Rules) -> str | None:
    """Returns one line about what begins anew, is converted or dropped; None where parameters keep their optimizers."""
    if not store.manifest.has_moments:
        return None
    assert store.config is not None
    with_both = [name for name in rules if "exp_avg_sq" in store.parts(name)]
    vectors = vectors_anew(store, rules)
    # A run that has made no update with spectron yet continues as it is, without vectors.
    is_same = set(vectors) <= vector_lengths(update_rules(store.model, store.config.optim), store.table).keys()
    factors = [] if is_same else [name.removeprefix(VECTOR_PREFIX) for name in vectors]
    found = [
        ("AdamW begins anew, with moments of zero, for", begins_anew(store, rules)),
        (
            "AdamW's first moment becomes the momentum, and its second one is dropped, of",
            [name for name in with_both if not rules[name].is_adamw],
        ),
        ("power iterations begin anew for", factors),
    ]
    parts = [f"{what} {_shown(names)}" for what, names in found if names]
    return f"another optimizer than in the checkpoint: {'; '.join(parts)}" if parts else None


def _shown(names: Iterable[str]) -> str:
    first, *others = names
    return first if not others else f"{len(others) + 1} parameters ({first} to {others[-1]})"
