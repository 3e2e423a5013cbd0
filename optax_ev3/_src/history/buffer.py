"""The history of past rounds: a ring buffer, and totals over all rounds.

Dimensions: ``H`` rounds kept, ``C`` candidates, ``M`` objectives, ``G`` members of an
evolving group.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import select
from optax_ev3._src.base.evidence import Estimate, compare, estimate
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.base.states import History, RoundInfo, put_row
from optax_ev3._src.history import credit


def empty(
    length: int,
    layout: Layout,
    objectives: Sequence[str],
    hyperparams: Mapping[str, Mapping[str, jax.Array]],
) -> History:
    """No round yet, for H = ``length``.

    Args:
      length: How many rounds are kept.
      layout: Which candidates there are.
      objectives: Those that the rule names, the main one first.
      hyperparams: By evolving group, the numbers of its members.
    """

    def blank() -> jax.Array:
        return jnp.zeros([length, layout.candidates], jnp.float32)

    def counts(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.int32)

    return History(
        rounds=counts(),
        since=counts(),
        adopted=counts(length),
        significant=counts(length),
        mean=blank(),
        stderr=blank(),
        z=blank(),
        others={name: Estimate(blank(), blank()) for name in objectives[1:]},
        valid=counts(length, layout.candidates),
        length=counts(length),
        examples=counts(length),
        objectives={k: jnp.asarray(i, jnp.int32) for i, k in enumerate(objectives)},
        priorities={name: jnp.zeros([length], jnp.float32) for name in objectives},
        hyperparams=jax.tree.map(
            lambda row: jnp.zeros([length, *jnp.shape(row)], jnp.float32),
            {group: dict(names) for group, names in hyperparams.items()},
        ),
        adoptions=counts(layout.candidates),
        credit=credit.nothing(layout.proposals),
        overruled=counts(),
    )


def append(past: History, info: RoundInfo) -> History:
    """The history with one more round, which takes the place of the oldest.

    A round in which nothing was valid is not recorded.
    """
    return select.where(info.explored, _appended(past, info), past)


def _appended(past: History, info: RoundInfo) -> History:
    last = (past.rounds - 1) % past.adopted.shape[0]
    decision, valid = info.decision, info.evidence.valid

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return put_row(old, past.rounds, new)

    def clean(old: jax.Array, new: jax.Array) -> jax.Array:
        return put(old, jnp.where(valid, new, 0))

    def keep(old: Estimate, new: Estimate) -> Estimate:
        mean = jnp.where(valid, new.mean, old.mean[last])
        return Estimate(put(old.mean, mean), clean(old.stderr, new.stderr))

    newest = estimate(info.evidence, info.objective)
    main = keep(Estimate(past.mean, past.stderr), newest)
    others = {
        k: keep(old, estimate(info.evidence, k)) for k, old in past.others.items()
    }
    against = compare(info.evidence, info.objective, info.evidence.current)
    rounds = jnp.asarray(optax.safe_increment(past.rounds))
    overruled = jnp.asarray(optax.safe_increment(past.overruled))
    return past._replace(
        rounds=rounds,
        since=info.since,
        adopted=put(past.adopted, decision.adopted),
        significant=put(past.significant, decision.significant),
        mean=main.mean,
        stderr=main.stderr,
        z=clean(past.z, against.z),
        others=others,
        valid=put(past.valid, info.validity),
        length=put(past.length, info.length),
        examples=put(past.examples, info.examples),
        priorities={
            name: put(past.priorities[name], weight)
            for name, weight in _priorities(info).items()
        },
        hyperparams={
            group: {k: put(old, info.hyperparams[group][k]) for k, old in names.items()}
            for group, names in past.hyperparams.items()
        },
        # Together as many as rounds, which are counted up to the greatest int32.
        adoptions=past.adoptions.at[decision.adopted].add(rounds - past.rounds),
        credit=credit.add(past.credit, info.validity, newest.mean),
        overruled=jnp.where(info.overruled, overruled, past.overruled),
    )


def _priorities(info: RoundInfo) -> dict[str, jax.Array]:
    """By name, what each objective weighed; zero where the rule does not say."""
    weights = info.decision.priorities
    if weights is None:
        return dict.fromkeys(info.objectives, jnp.zeros([]))
    if jnp.shape(weights) != (len(info.objectives),):
        raise ValueError(
            f"a rule must give a priority for each of its objectives, "
            f"{list(info.objectives)}, got shape {jnp.shape(weights)}."
        )
    return dict(zip(info.objectives, weights, strict=True))
