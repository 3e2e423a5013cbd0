"""The methods of the quality suite by name, and how EV3 is set."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from optax import contrib

import optax_ev3
from optax_ev3 import adapt, explore

ADAMS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
MOMENTUM = functools.partial(optax.sgd, momentum=0.9)
RULES = {
    **{f"adam {rate:g}": (optax.adam, rate) for rate in ADAMS},
    **{f"momentum {rate:g}": (MOMENTUM, rate) for rate in (0.01, 0.1)},
    "rmsprop 0.001": (optax.rmsprop, 1e-3),
}
SINGLES = {name: make(rate) for name, (make, rate) in RULES.items()}
COUNT = len(SINGLES)
LENGTH = 25

AVERAGES = (explore.trajectory_average(), explore.branch_average())
# EV3: the first is the one that is recommended, the others are what it is made of.


def branches(length=LENGTH, **kwargs):
    """The recommended strategy, but for what is given."""
    defaults = {
        "restart": explore.never(inner_state="copy"),
        "averages": AVERAGES,
        "racing": explore.Racing(patience=2, window=8),
    }
    return explore.branches(length, **{**defaults, **kwargs})


SIGNIFICANT = explore.worse_than("adopted", inner_state="copy")
HOSTILE = {
    "uphill": optax.sgd(-0.1),
    "sgd 1000": optax.sgd(1000.0),
    "nan": optax.sgd(math.nan),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "EV3": {},
    "EV3, three hostile explorers more": {"inner": {**SINGLES, **HOSTILE}},
    "EV3, nobody rests": {"explore": branches(racing=None)},
    "EV3, restart significant": {"explore": branches(restart=SIGNIFICANT)},
    # All start each round from the adopted parameters, and nobody is paused.
    "EV3, restart always, nobody rests, confident": {
        "explore": explore.rounds(LENGTH, averages=AVERAGES),
        "adapt": None,
    },
    "EV3, confident": {"adapt": adapt.confident()},
    "EV3, the paper's rule": {"adapt": adapt.lower_bound()},
    "EV3, no averages": {"explore": branches(averages=())},
    "EV3, no branch averages": {"explore": branches(averages=AVERAGES[:1])},
    "EV3, length 50": {"explore": branches(50)},
    "EV3, length 10 growing to 80": {
        "explore": branches(10, growth=1.5, max_length=80)
    },
    "EV3, shared gradients": {
        "explore": explore.rounds(10, gradients="shared", averages=AVERAGES),
        "own": False,
    },
    "EV3, one step": {"explore": None, "adapt": adapt.confident(), "own": False},
}
AWAY = {"/ 100": 0.01, "x 100": 100.0}
EVOLVING = explore.branches(
    20,
    growth=1.1,
    max_length=100,
    restart=explore.worse_than("start", inner_state="copy"),
    averages=AVERAGES[:1],
)


# How many calls of EV3 cost as much as the whole budget, on average: what a pilot
# tells, and total_steps has to know.
CALLS = {
    "digits MLP": 1453,
    "digits CNN": 586,
    "noisy labels": 1563,
    "imbalanced": 1636,
    "outliers": 1004,
    "breast cancer": 510,
    "wine": 257,
    "transformer": 1965,
    "distillation": 1388,
    "auto-encoder": 1847,
    "physics": 2844,
}


def visible(params, state):
    return params


def best(params, state):
    return optax_ev3.best_params(state)


class Method(NamedTuple):
    """How an optimizer is made, and which parameters are evaluated.

    Attributes:
      make: From the learning rate and the number of steps to a transformation.
      rates: Learning rates to choose from.
      horizon: Whether it has to know the number of steps.
      evaluated: From final parameters and state.
    """

    make: Callable[..., Any]
    rates: tuple[float, ...] = (0.0,)
    horizon: bool = False
    evaluated: Callable[..., Any] = visible


class EV3(NamedTuple):
    """How EV3 is made, and what a round of it takes.

    Attributes:
      make: From the task, the held-out part and the seed to a transformation.
      explorers: How many there are.
      own: Whether each of them takes gradients of its own.
      evaluated: From final parameters and state.
    """

    make: Callable[..., Any]
    explorers: int
    own: bool
    evaluated: Callable[..., Any] = visible


def ev3(inner=SINGLES, explorers=None, own=True, **kwargs):
    """EV3 with the recommended setting, but for what is given."""
    kwargs = {"explore": branches(), "adapt": adapt.greedy(), **kwargs}

    def make(task, held_out, seed):
        def loss(params, batch):
            return task.loss(params, batch)

        def explorer(one):
            # With losses of their own they need no gradient of the caller's.
            return optax_ev3.explorer(one, loss) if own else one

        return optax_ev3.ev3(
            {name: explorer(one) for name, one in inner.items()},
            assessed(task, held_out),
            loss_fn=loss,
            key=seed,
            **kwargs,
        )

    return EV3(make, explorers or len(inner), own)


def assessed(task, held_out):
    """The scores of all held-out examples, or of some that are drawn in each round."""
    total = len(jax.tree.leaves(held_out)[0])
    count = looked_at(task, total)
    drawn = {} if count == total else {"batch_size": count, "shuffle": True}
    return optax_ev3.held_out(task.score, held_out, **drawn)


def portfolio(own, ends):
    """The preset, by itself, without or with the number of calls.

    Args:
      own: Whether there is a loss_fn, so that explorers take gradients of their own.
      ends: Whether it is told how many calls there are.
    """

    def make(task, held_out, seed):
        def loss(params, batch):
            return task.loss(params, batch)

        return optax_ev3.portfolio(
            assessed(task, held_out),
            loss if own else None,
            total_steps=CALLS[task.name] if ends else None,
            key=seed,
        )

    return EV3(make, COUNT, own, best)


def looked_at(task, total):
    """Held-out examples of a round: at most a quarter of those that a branch trains on.

    So its three candidates, a pass each, take a quarter of its gradients' work at most.
    """
    return min(total, LENGTH * task.batch // 4)


def evolving(factor):
    """A group of eight of Adam that starts at 0.003 times a factor."""
    space = {"learning_rate": optax_ev3.log_uniform(1e-7, 10.0, 3e-3 * factor)}
    group = optax_ev3.evolve(optax.adam, space, COUNT)
    return ev3({"adam": group}, COUNT, explore=EVOLVING, adapt=None)


def off(factor):
    """The recommended setting with all rates multiplied."""
    return ev3(inner={k: make(rate * factor) for k, (make, rate) in RULES.items()})


def plateau(rate, steps):
    """As documented: on means of the loss over some steps."""
    window = max(steps // 100, 1)
    return optax.chain(
        optax.adam(rate),
        contrib.reduce_on_plateau(patience=5, accumulation_size=window),
    )


@functools.cache
def alone(make):
    """The same function for the same optimizer, which then compiles once."""
    return lambda rate, steps: make(rate)


def cosine(rate, steps):
    return optax.adamw(optax.cosine_decay_schedule(rate, steps))


OTHERS = {
    "cosine": Method(cosine, rates=ADAMS, horizon=True),
    "reduce_on_plateau": Method(plateau, rates=ADAMS, horizon=True),
    "schedule-free": Method(
        lambda rate, steps: contrib.schedule_free_adamw(rate),
        rates=ADAMS,
        evaluated=lambda params, state: contrib.schedule_free_eval_params(
            state, params
        ),
    ),
    "prodigy": Method(lambda rate, steps: contrib.prodigy(1.0)),
    "prodigy, cosine": Method(
        lambda rate, steps: contrib.prodigy(optax.cosine_decay_schedule(1.0, steps)),
        horizon=True,
    ),
    "mechanize": Method(lambda rate, steps: contrib.mechanize(optax.adamw(1e-3))),
}
PORTFOLIOS = {
    "EV3, total steps": portfolio(own=True, ends=True),
    "EV3, relay": portfolio(own=False, ends=False),
}
METHODS = {
    **{name: ev3(**kwargs) for name, kwargs in VARIANTS.items()},
    **PORTFOLIOS,
    **{name: Method(alone(make), (rate,)) for name, (make, rate) in RULES.items()},
    **OTHERS,
    **{f"EV3, rates {name}": off(factor) for name, factor in AWAY.items()},
    **{
        f"EV3, evolve from {name}": evolving(factor)
        for name, factor in {"0.003": 1.0, **AWAY}.items()
    },
}
