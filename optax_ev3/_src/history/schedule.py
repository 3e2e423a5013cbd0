"""The schedule that evolution found."""

import re
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from optax_ev3._src.history import report


def found_schedule(
    state: Any, name: str, explorer: str | None = None
) -> optax.Schedule:
    """The schedule that evolution found, to train again without EV3.

    By step, the number of the member whose branch was adopted at the end of the round;
    where none of the group was, the one before goes on, and after the end the last one.
    Rounds in which nothing was finite are not in the history, nor in the schedule.

    Args:
      state: As for :func:`optax_ev3.stable_params`, with concrete arrays.
      name: The hyperparameter.
      explorer: The name of the group; default: the only one that has it.

    Returns:
      A schedule: maps the count of steps, ``[]`` integer, to ``[]`` float32.

    Raises:
      ValueError: If there is no such hyperparameter or several groups have it, if no
        round has ended or no member was adopted in any, or if the history does not
        reach back to the first one: give ``ev3`` a longer ``history_length``.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> sgd = optax_ev3.evolve(
      ...     optax.sgd, {"learning_rate": optax_ev3.log_uniform(0.01, 0.1, 0.05)}
      ... )
      >>> tx = optax_ev3.ev3({"sgd": sgd}, lambda w: -(w**2))
      >>> w = jnp.array(2.0)
      >>> _, state = tx.update(2 * w, tx.init(w), w)
      >>> schedule = optax_ev3.found_schedule(state, "learning_rate")
      >>> again = optax.sgd(schedule)
    """
    past = report.history(state)
    having = [
        key.removeprefix("hyperparams/").removesuffix("/" + name)
        for key in past
        if key.startswith("hyperparams/") and key.endswith("/" + name)
    ]
    groups = having if explorer is None else [g for g in having if g == explorer]
    if len(groups) != 1:
        raise ValueError(
            f"expected one evolving group with {name!r}, found {groups}; "
            f"hyperparameters in the history: "
            f"{[k for k in past if k.startswith('hyperparams/')]}."
        )
    if not len(past["round"]):
        raise ValueError("no round has ended yet: there is no schedule.")
    if past["round"][0] > 0:
        raise ValueError(
            f"the history holds the last {len(past['round'])} of "
            f"{past['round'][-1] + 1} rounds, a schedule needs all: give ev3 a longer "
            f"history_length."
        )
    members = past[f"hyperparams/{groups[0]}/{name}"]
    winner = winners(past["candidates"], past["adopted"], groups[0])
    if (winner < 0).all():
        raise ValueError(
            f"no member of {groups[0]!r} was adopted in any round: it has no schedule."
        )
    rows = np.arange(len(members))
    known = np.maximum.accumulate(np.where(winner >= 0, rows, -1))
    known = np.where(known < 0, rows[winner >= 0][:1].sum(), known)
    values = jnp.asarray(members[known, winner[known]], jnp.float32)
    ends = jnp.asarray(np.cumsum(past["length"]))

    def schedule(count: Any):
        row = jnp.searchsorted(ends, count, side="right")
        return values[jnp.minimum(row, len(values) - 1)]

    return schedule


def winners(candidates: Iterable[str], adopted: Any, group: str) -> np.ndarray:
    """By round ``[R]``, the member of a group whose end or average was adopted, or -1.

    Args:
      candidates: Their names.
      adopted: Which one, by round.
      group: The name of the group, whose members are called ``GROUP/i``.
    """
    member = re.compile(rf"(?:(?:branch_)?average/)?{re.escape(group)}/(\d+)")
    found = map(member.fullmatch, candidates)
    owners = np.array([int(match[1]) if match else -1 for match in found])
    return owners[np.asarray(adopted, int)]
