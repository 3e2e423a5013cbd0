"""The methods of the quality suite by name: EV3, and its rivals of one run."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from optax import contrib

import optax_ev3
from optax_ev3 import explore

GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # Learning rates that rivals are tuned over.


def momentum(rate):
    return optax.sgd(rate, momentum=0.9)


def muon(rate):
    """Its updates are as large as Adam's, so that the same rates serve (Liu et al.)."""
    return contrib.muon(rate, consistent_rms=0.2)


KINDS = {"adam": optax.adam, "muon": muon, "momentum": momentum}
# The explorers of EV3's preset, by kind and rate.
EIGHT = {
    **{f"adam {rate:g}": ("adam", rate) for rate in (3e-4, 1e-3, 3e-3, 1e-2)},
    **{f"muon {rate:g}": ("muon", rate) for rate in (1e-3, 3e-3, 1e-2)},
    "momentum 0.1": ("momentum", 0.1),
}
HARMFUL = {
    "ascent": optax.sgd(-0.1),
    "sgd 1000": optax.sgd(1000.0),
    "nan": optax.sgd(math.nan),
}
COUNT = len(EIGHT)
LENGTH = 25  # Of the rounds of EV3's preset, where it is not told the end.
ROUNDS = 40  # Of the preset, where it is.


def visible(params, state):
    return params


class Rival(NamedTuple):
    """An optimizer that is run alone.

    Attributes:
      make: From the learning rate and the number of steps to a transformation.
      default: The learning rate that its documentation, or its paper, gives.
      rates: What it is tuned over; none where it claims to need no tuning.
      evaluated: From final parameters and state.
    """

    make: Callable[..., Any]
    default: float
    rates: tuple[float, ...] = ()
    evaluated: Callable[..., Any] = visible


def with_cosine(make):
    """A rate that falls to zero along a cosine over all steps."""
    return lambda rate, steps: make(optax.cosine_decay_schedule(rate, steps))


def plateau(rate, steps):
    """As documented: on means of the loss over some steps."""
    window = max(steps // 100, 1)
    return optax.chain(
        optax.adam(rate),
        contrib.reduce_on_plateau(patience=5, accumulation_size=window),
    )


def averaged(params, state):
    return contrib.schedule_free_eval_params(state, params)


# What others are to reach: as its documentation says, without tuning.
BASELINE = "AdamW + cosine"
RIVALS = {
    BASELINE: Rival(with_cosine(optax.adamw), 1e-3, GRID),
    "schedule-free AdamW": Rival(
        lambda rate, steps: contrib.schedule_free_adamw(rate), 2.5e-3, GRID, averaged
    ),
    "Adam + reduce_on_plateau": Rival(plateau, 1e-3, GRID),
    "Muon + cosine": Rival(with_cosine(muon), 1e-3, GRID),
    "ADOPT + cosine": Rival(with_cosine(contrib.adopt), 1e-3),
    "AdEMAMix + cosine": Rival(with_cosine(contrib.ademamix), 1e-3),
    "Prodigy + cosine": Rival(with_cosine(contrib.prodigy), 1.0),
    "Mechanic of AdamW": Rival(
        lambda rate, steps: contrib.mechanize(optax.adamw(rate)), 1e-3
    ),
    "MoMo-Adam": Rival(lambda rate, steps: contrib.momo_adam(rate), 1e-2),
    "COCOB": Rival(lambda rate, steps: contrib.cocob(rate), 1.0),
}


class EV3(NamedTuple):
    """How EV3 is made, and what a round of it takes.

    Attributes:
      make: From the task, the held-out part, the seed and the budget in gradients to a
        transformation.
      explorers: How many there are.
      own: Whether each of them takes gradients of its own.
      length: Calls of a round, from what `make` gets but the seed.
      evaluated: From final parameters and state.
    """

    make: Callable[..., Any]
    explorers: int = COUNT
    own: bool = True
    length: Callable[..., int] = lambda task, held_out, budget: LENGTH
    evaluated: Callable[..., Any] = lambda params, state: optax_ev3.best_params(state)


def loss_of(task):
    """What EV3 differentiates by itself: a function of its own for each task."""

    def loss(params, batch):
        return task.loss(params, batch)

    return loss


def explorer(task, tx, own=True):
    """One with BatchNorm's statistics where there are any, and gradients of its own."""
    return optax_ev3.explorer(tx, loss_of(task) if own else None, merge_fn=task.merge)


def assessed(task, held_out, length=LENGTH):
    """The scores of all held-out examples, or of some that are drawn in each round."""
    count, total = looked_at(task, held_out, length), _count(held_out)
    drawn = {} if count == total else {"batch_size": count, "shuffle": True}
    return optax_ev3.held_out(task.score, held_out, **drawn)


def _count(part):
    """Examples of a part of the data."""
    return len(jax.tree.leaves(part)[0])


def looked_at(task, held_out, length=LENGTH):
    """Held-out examples of a round: at most a quarter of those that a branch trains on.

    So its three candidates, a pass each, take a quarter of its gradients' work at most.
    """
    return min(_count(held_out), max(length * task.batch // 4, 1))


def total_steps(task, held_out, budget):
    """Calls of a relay that do as much work as the budget, its assessments counted.

    A turn of 25 calls ends with five candidates; first turns are shorter: 3% for these.
    """
    turn = LENGTH + 5 * looked_at(task, held_out) / (3 * task.batch)
    return max(int(0.97 * budget * LENGTH / turn), 1)


def longest(task, held_out, budget, count, race):
    """Calls of a round so that all rounds do as much work as the budget, or less."""
    numbers = race.at_work(count, ROUNDS)
    candidates = sum(3 * number + 2 for number in numbers)

    def work(length):
        passes = candidates * looked_at(task, held_out, length) / (3 * task.batch)
        return length * sum(numbers) + passes

    lengths = range(1, budget // sum(numbers) + 1)
    return max((x for x in lengths if work(x) <= budget), default=1)


def planned(length, race):
    """The preset's strategy where it is told the end, with this race."""
    steps = ROUNDS * length
    last = round(steps / 5)
    return explore.branches(
        length,
        restart=explore.never(inner_state="copy"),
        averages=[explore.trajectory_average(), explore.branch_average()],
        racing=race,
        schedule=optax.linear_schedule(1.0, 0.0, last, steps - last),
    )


def portfolio(inner=None, own=True, knows_end=False, race=None, **kwargs):
    """EV3's preset.

    Args:
      inner: Optimizers by name in the place of the preset's eight.
      own: Whether there is a loss_fn, so that explorers take gradients of their own;
        else it is a relay.
      knows_end: Whether it is told how many calls there are.
      race: Another plan of who takes part than the preset's, where it knows the end.
      **kwargs: What else the preset takes.
    """
    count = len(inner or EIGHT)

    def length(task, held_out, budget):
        if own and knows_end:
            plan = race or explore.SuccessiveHalving()
            return longest(task, held_out, budget, count, plan)
        return LENGTH

    def end(task, held_out, budget):
        if own:
            return ROUNDS * length(task, held_out, budget)
        return total_steps(task, held_out, budget)

    def make(task, held_out, seed, budget):
        calls, chosen = length(task, held_out, budget), {}
        if race:
            chosen["explore"] = planned(calls, race)
        elif knows_end:
            chosen["total_steps"] = end(task, held_out, budget)
        wrap, loss = None, loss_of(task)
        if task.merge:
            wrap = functools.partial(explorer, task, own=own)
            loss = lambda params, batch: task.loss(params, batch)[0]
        return optax_ev3.portfolio(
            assessed(task, held_out, calls),
            loss if own else None,
            inner=inner,
            wrap=wrap,
            key=seed,
            **chosen,
            **kwargs,
        )

    return EV3(make, count, own, length)


def off(factor):
    """The eight with all rates multiplied."""
    return {
        f"{kind} {rate * factor:g}": KINDS[kind](rate * factor)
        for kind, rate in EIGHT.values()
    }


def evolving(factor):
    """A group of eight of Adam that starts at 0.003 times a factor."""
    space = {"learning_rate": optax_ev3.log_uniform(1e-7, 10.0, 3e-3 * factor)}
    group = {"adam": optax_ev3.evolve(optax.adam, space, COUNT)}
    strategy = explore.branches(
        20,
        growth=1.1,
        max_length=100,
        restart=explore.worse_than("start", inner_state="copy"),
        averages=[explore.trajectory_average()],
    )
    return portfolio(group, explore=strategy, adapt=None)._replace(explorers=COUNT)


MAIN = PORTFOLIO, RELAY = "EV3 portfolio", "EV3 relay"
UNTOLD = tuple(f"{name}, end unknown" for name in MAIN)
BEGINS = f"{PORTFOLIO}, Adam begins"
AWAY = {"/ 100": 0.01, "x 100": 100.0}
EV3S = {
    PORTFOLIO: portfolio(knows_end=True),
    RELAY: portfolio(own=False, knows_end=True),
    UNTOLD[0]: portfolio(),
    UNTOLD[1]: portfolio(own=False),
    BEGINS: portfolio(
        knows_end=True, race=explore.SuccessiveHalving(warmup=3, first="adam_0.001")
    ),
    **{
        f"{PORTFOLIO} at rates {k}": portfolio(off(x), knows_end=True)
        for k, x in AWAY.items()
    },
    **{f"EV3 evolve from {k}": evolving(x) for k, x in {"0.003": 1.0, **AWAY}.items()},
}
