"""Successive halving: which explorers are paused, where the number of rounds is known.

Dimensions: ``K`` explorers.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from optax_ev3._src.base import checks
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.explore.explorers import Explorer
from optax_ev3._src.explore.racing import RacingState


@dataclasses.dataclass(frozen=True)
class SuccessiveHalving:
    """After first rounds of all, the better half goes on, until one explorer is left.

    All take part in the first ``rounds`` rounds. Then the better half goes on after
    each round, by the scores of that round: those of an explorer's own parameters, or
    of its best average. Ties go to those that come first. An explorer whose own
    parameters were adopted is always among them. All others are paused, and cost
    nothing.

    With ``warmup``, the explorer ``first`` trains alone for so many rounds before the
    others join, from what is adopted by then: name the one that you would use without
    EV3. So early on the model is as good as with that one.

    Where progress stops, all come back for one round, and begin from the adopted
    parameters: another rate may serve better by then. They do so after 1, 2, 4, ...
    windows without a significant improvement, that is without new stable parameters.
    Once one is left, whoever is best in such a round goes on alone, even if the adopted
    parameters are better still. After a round in which nothing was valid, too, all take
    part.

    So the work of a training that makes progress is known beforehand, see
    :meth:`at_work`: 40 rounds of eight explorers take as many gradients as 58 of one.
    :class:`Racing` is for trainings whose end is not known.

    Attributes:
      rounds: How many rounds all take part in before the first halving; at least 1.
      window: Rounds without a significant improvement before all come back, at least 2.
      warmup: How many rounds ``first`` trains alone before these; at least 0.
      first: Its name; of a sweep the first member begins. Default: the one that comes
        first.

    Raises:
      TypeError: If a number is not an integer, or ``first`` is no string; in
        ``explore.relay``, which halves by itself.
      ValueError: If a number is out of range; in ``ev3``, if no explorer has this name,
        or one is a group that evolves: its members are compared in every round.

    Examples:
      >>> import optax, optax_ev3
      >>> from optax_ev3 import explore
      >>> total_steps = 1000
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.adam(1e-2), optax.sgd(0.1)],
      ...     assess_fn=lambda w: -(w**2),
      ...     loss_fn=lambda w: w**2,
      ...     explore=explore.branches(
      ...         total_steps // 40, racing=explore.SuccessiveHalving()
      ...     ),
      ... )

    References:
      Jamieson and Talwalkar, `Non-stochastic Best Arm Identification and Hyperparameter
      Optimization <https://arxiv.org/abs/1502.07943>`_, 2016.
    """

    rounds: int = 2
    window: int = 8
    warmup: int = 0
    first: str | None = None

    def __post_init__(self) -> None:
        for name, least in {"rounds": 1, "window": 2, "warmup": 0}.items():
            object.__setattr__(
                self, name, checks.integer(getattr(self, name), name, least)
            )
        if not isinstance(self.first, str | None):
            raise TypeError(
                f"first must be the name of an explorer, or None, got {self.first!r} "
                f"of type {type(self.first).__name__}."
            )

    def at_work(self, explorers: int, rounds: int) -> list[int]:
        """How many explorers take part in each round, as long as there is progress.

        Args:
          explorers: How many there are, members of sweeps counted one by one.
          rounds: How many rounds there are.

        Returns:
          A number for each round. Times the calls of a round, their sum is the
          number of gradients that a training takes.

        Examples:
          >>> from optax_ev3 import explore
          >>> explore.SuccessiveHalving().at_work(explorers=8, rounds=10)
          [8, 8, 4, 2, 1, 1, 1, 1, 1, 1]
        """
        count = checks.integer(explorers, "explorers", 1)
        plan = _plan(self, count)
        done = range(checks.integer(rounds, "rounds", 0))
        return [plan[min(before, len(plan) - 1)] for before in done]

    def begun_by(self, explorers: Mapping[str, Explorer]) -> "SuccessiveHalving":
        """With the name of the single explorer that begins.

        Raises:
          ValueError: There is none of this name.
        """
        members = {name: one.members(name) for name, one in explorers.items()}
        names = [name for several in members.values() for name in several]
        first = names[0] if self.first is None else self.first
        if first not in names and first not in members:
            raise ValueError(f"first must be one of {names}, got {first!r}.")
        return dataclasses.replace(self, first=members.get(first, [first])[0])


def paused(
    past: RacingState, layout: Layout, race: SuccessiveHalving, lead: jax.Array
) -> dict[str, jax.Array]:
    """Who is paused in the round to come: by name ``[]`` or ``[G]`` bool.

    Args:
      past: What the last round has shown.
      layout: Where the explorers are among the candidates.
      race: How they race.
      lead: ``[]`` int32, whose own parameters were adopted, K for nobody; it is never
        paused. At first the explorer that begins.
    """
    plan = jnp.asarray(_plan(race, layout.explorers))
    number = plan[jnp.minimum(past.rounds, len(plan) - 1)]
    come_back = _come_back(past.since, race.window) & (past.rounds >= race.warmup)
    # After a round in which nothing was valid, too, all take part.
    everyone = come_back | (past.lost > 0)
    return layout.split((_places(past, layout, lead) >= number) & ~everyone)


def _plan(race: SuccessiveHalving, count: int) -> list[int]:
    """How many take part in each round; the last number holds from then on."""
    plan = [1] * race.warmup + [count] * race.rounds
    while plan[-1] > 1:
        plan.append((plan[-1] + 1) // 2)
    return plan


def _come_back(since: jax.Array, window: int) -> jax.Array:
    """Whether so many rounds are 1, 2, 4, ... windows."""
    windows = since // window
    is_power = (windows > 0) & (windows & (windows - 1) == 0)
    return is_power & (since % window == 0)


def _places(past: RacingState, layout: Layout, lead: jax.Array) -> jax.Array:
    """``[K]``, how many explorers were better in the last round; none than the lead."""
    latest = (past.rounds - 1) % past.adopted.shape[0]
    scores = jnp.where(past.valid[latest] > 0, past.mean[latest], -jnp.inf)
    best = scores[: layout.proposals].reshape(layout.kinds, -1).max(axis=0)
    index = jnp.arange(layout.explorers)
    order = jnp.argsort(jnp.where(index == lead, jnp.inf, best), descending=True)
    return jnp.zeros_like(index).at[order].set(index)
