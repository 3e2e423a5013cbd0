"""Successive halving: who goes on after a round, when all come back, what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import says

import optax_ev3
from optax_ev3 import explore
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.explore import halving, racing

AVERAGES = [explore.trajectory_average(), explore.branch_average()]


def names(count):
    return [f"e{index}" for index in range(count)]


def moves(speed):
    """An optimizer of constant speed, whatever the gradients are."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u: speed + 0 * u, updates), state

    return optax.GradientTransformation(lambda params: (), update)


def climb(inner, strategy, calls, score=lambda w: w):
    """The history of a training whose score rises with the parameter."""
    tx = optax_ev3.ev3(
        inner, score, loss_fn=lambda w: -w, explore=strategy, history_length=calls
    )

    def body(carry, _):
        w, state = carry
        updates, state = tx.update(-jnp.ones([]), state, w)
        return (w + updates, state), None

    w = jnp.zeros([])
    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=calls)[0])
    w, state = run((w, tx.init(w)))
    return optax_ev3.history(state), w


def at_work(past, count):
    """``[rounds, K]`` bool."""
    return ~np.isnan(past["mean"][:, :count])


def left(count, rounds, first):
    """The definition: how many go on after so many rounds."""
    for _ in range(first, rounds + 1):
        count = -(-count // 2)
    return count


def test_who_is_paused():
    """Against the definition, for scores by lot."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        # Of few shapes, each of which is compiled.
        count, kinds = (int(rng.choice(x)) for x in ([1, 3, 8], [1, 3]))
        first, window = int(rng.integers(1, 4)), int(rng.choice([2, 5]))
        rounds, lost = int(rng.integers(0, 40)), int(rng.random() < 0.1)
        since = int(rng.integers(0, 40))
        warmup = int(rng.integers(0, 4))
        layout = Layout(
            {name: [name] for name in names(count)},
            dict.fromkeys(names(count), True),
            ["mean", "branch"][: kinds - 1],
        )
        mean = rng.integers(0, 9, layout.candidates)  # Some are tied.
        valid = rng.choice([-1, 0, 1], layout.candidates)
        lead = int(rng.integers(count + 1))  # Or nobody.
        past, latest = racing.init(window, layout.candidates), (rounds - 1) % window
        past = past._replace(
            rounds=jnp.int32(rounds),
            mean=past.mean.at[latest].set(mean),
            valid=past.valid.at[latest].set(valid),
            lost=jnp.int32(lost),
            since=jnp.int32(since),
        )
        race = explore.SuccessiveHalving(first, window, warmup)
        found = halving.paused(past, layout, race, jnp.int32(lead))
        best = [
            max(
                mean[one + kind * count] if valid[one + kind * count] > 0 else -np.inf
                for kind in range(kinds)
            )
            for one in range(count)
        ]
        # Ties go to those that come first.
        order = sorted(range(count), key=lambda one: (one != lead, -best[one], one))
        comes_back = since in [window * 2**k for k in range(6)]
        number = 1 if rounds < warmup else left(count, rounds - warmup, first)
        if lost or (comes_back and rounds >= warmup):
            number = count
        expected = [one not in order[:number] for one in range(count)]
        assert [bool(found[name]) for name in names(count)] == expected


def test_rounds_have_no_end():
    layout = Layout({n: [n] for n in names(8)}, dict.fromkeys(names(8), True))
    for rounds in (10**6 + 1, 2**31 - 1):
        past = racing.init(8, 10)._replace(rounds=jnp.int32(rounds))
        found = halving.paused(past, layout, explore.SuccessiveHalving(), jnp.int32(3))
        assert [n for n, flag in found.items() if not flag] == ["e3"]


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("stacked", [False, True])
def test_the_better_half_goes_on(length, stacked):
    """Those of greater speed."""
    speeds = [0.3, 0.1, 0.5, 0.2, 0.8, 0.7, 0.4, 0.6]
    inner = {f"e{i}": optax.sgd(speed) for i, speed in enumerate(speeds)}
    if not stacked:  # Unlike those that share a loss.
        inner = {k: optax_ev3.explorer(tx, lambda w: -w) for k, tx in inner.items()}
    race = explore.SuccessiveHalving(2, warmup=1, first="e3")
    past, w = climb(inner, explore.branches(length, racing=race), 20 * length)
    found = at_work(past, 8)
    numbers = [left(8, rounds, 2) for rounds in range(19)]
    assert numbers == [8, 8, 4, 2, *[1] * 15]
    assert race.at_work(8, 20) == [1, *numbers]
    assert np.flatnonzero(found[0]).tolist() == [3]
    order = np.argsort(speeds)[::-1]
    for row, number in zip(found[1:], numbers, strict=True):
        assert set(np.flatnonzero(row)) == set(order[:number])
    # All begin from where the first one got to.
    np.testing.assert_allclose(w, length * (0.2 + 19 * 0.8), 1e-5)


def test_one_that_begins_and_fails_leaves_it_to_the_others():
    fails = optax.GradientTransformation(
        lambda params: (), lambda u, state, params=None: (u + jnp.nan, state)
    )
    inner = {"fails": fails, "slow": moves(0.1), "fast": moves(0.2)}
    race = explore.SuccessiveHalving(warmup=3)
    past, w = climb(inner, explore.branches(2, racing=race), 40)
    # After a round in which nothing is valid all join. The best one trains alone for
    # what is left of the three rounds.
    assert (past["adopted"] == 2).all() and len(past["adopted"]) == 19
    np.testing.assert_allclose(w, 19 * 2 * 0.2, 1e-5)
    slow = at_work(past, 3)[:, 1]
    assert slow.tolist() == [True, False, False, True, True, True, *[False] * 13]
    assert not past["paused"][0].any() and past["paused"][1, :2].all()


def begins(inner, calls=4, **kwargs):
    """Who takes part in the first rounds, of one call each."""
    race = explore.SuccessiveHalving(warmup=calls, **kwargs)
    past, _ = climb(inner, explore.branches(1, racing=race), calls)
    count = len(past["candidates"]) - 2
    found = at_work(past, count)
    assert (found == found[0]).all()
    return [past["candidates"][index] for index in np.flatnonzero(found[0])]


def test_the_one_that_comes_first_begins_wherever_it_is_stored():
    """Its state is too large for the stack of the others, which comes before it."""
    adam = optax.adam(1e-3)
    inner = {
        "large": optax.chain(optax.trace(0.9), adam, optax.trace(0.9)),
        **{f"adam{i}": optax.adam(10.0**-i) for i in range(1, 4)},
        "momentum": optax.sgd(0.1, momentum=0.9),
    }
    assert begins(inner) == ["large"]
    assert begins(inner, first="adam2") == ["adam2"]


def test_of_a_sweep_the_first_member_begins():
    sweep = optax_ev3.sweep(optax.sgd, learning_rate=[0.1, 0.2])
    inner = {"one": optax.sgd(0.3), "two": sweep}
    members = ["two/learning_rate_0.1", "two/learning_rate_0.2"]
    assert begins(inner, first="two") == members[:1]
    assert begins(inner, first=members[1]) == members[1:]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("first", [1, 2, 5])
def test_how_many_are_at_work(count, first):
    for warmup in (0, 4):
        race = explore.SuccessiveHalving(first, warmup=warmup)
        expected = [1] * warmup + [left(count, rounds, first) for rounds in range(12)]
        assert race.at_work(count, 12 + warmup) == expected
        assert race.at_work(count, 3) == expected[:3] and race.at_work(count, 0) == []
    with says(ValueError, "rounds", "0", "-1"):
        race.at_work(count, -1)
    with says(TypeError, "explorers", "2.5"):
        race.at_work(2.5, 3)


def test_they_come_back_where_nothing_is_gained():
    """After two, four and eight such rounds, from the adopted parameters."""
    inner = {"fast": moves(0.5), "slow": moves(0.1), "slower": moves(0.05)}
    race = explore.SuccessiveHalving(rounds=1, window=2)
    strategy = explore.branches(2, averages=AVERAGES, racing=race)
    past, _ = climb(inner, strategy, 30, lambda w: jnp.minimum(w, 4.0))
    mean, found = past["mean"], at_work(past, 3)
    # The fourth round brings it to 4, and is the last one that gains anything.
    assert found.sum(1).tolist() == [3, 2, 1, 1, 1, 1, 3, 1, 3, *[1] * 3, 3, 1, 1]
    assert (mean[4:, 0] == 4).all()


def test_they_come_back_from_the_adopted_parameters():
    """Each round begins where the best one was: so its distance is what it goes."""
    inner = {"far": optax.sgd(1.9), "near": optax.sgd(0.5), "none": optax.sgd(0.0)}
    race = explore.SuccessiveHalving(rounds=1, window=2)
    tx = optax_ev3.ev3(
        inner,
        lambda w: -jnp.square(w - jnp.linspace(2.9, 3.1, 16)),
        loss_fn=lambda w: jnp.square(w - 3.0) / 2,
        explore=explore.branches(2, averages=AVERAGES[:1], racing=race),
        history_length=32,
    )
    w = jnp.zeros([])
    state, update = tx.init(w), jax.jit(tx.update)
    for _ in range(40):
        updates, state = update(w - 3.0, state, w)
        w = w + updates
    past = optax_ev3.history(state)
    (back, *_) = np.flatnonzero(at_work(past, 3)[3:].all(1)) + 3
    before = past["mean"][back, -2]  # That of `current`.
    # What does nothing has the score of where it began.
    assert past["mean"][back, 2] == pytest.approx(before, rel=1e-5)


def test_who_serves_better_by_then_leads_from_then_on():
    """Long steps pass the highest point by, again and again; short ones do not."""
    inner = {"long": optax.sgd(1.99), "short": optax.sgd(0.5), "none": optax.sgd(0.0)}
    places = jnp.linspace(2.0, 4.0, 16)

    def huber(w):
        return optax.huber_loss(w, 3.0, delta=0.2)

    tx = optax_ev3.ev3(
        inner,
        lambda w: -jnp.abs(w - places),
        loss_fn=huber,
        explore=explore.branches(2, racing=explore.SuccessiveHalving(1, 3)),
        history_length=32,
    )
    w = jnp.zeros([])
    state, update = tx.init(w), jax.jit(tx.update)
    for _ in range(60):
        updates, state = update(jax.grad(huber)(w), state, w)
        w = w + updates
    past = optax_ev3.history(state)
    found = at_work(past, 3)
    assert (past["adopted"][:3] == 0).all()
    (back, *_) = np.flatnonzero(found[3:].all(1)) + 3
    again = found[back + 1 :].all(1)
    after = found[back + 1 :][: again.argmax() if again.any() else None]
    assert (after == [False, True, False]).all() and len(after) >= 2
    assert abs(float(w) - 3) < 0.05


def test_all_take_part_where_the_last_one_fails():
    """One that is best at first and is lost later leaves it to the others."""

    def update(updates, state, params=None):
        return 1.0 + 0 * updates + jnp.where(params < 5.5, 0.0, jnp.nan), state

    fails = optax.GradientTransformation(lambda params: (), update)
    inner = {"fails": fails, "slow": moves(0.1)}
    race = explore.SuccessiveHalving(1, 2**20)
    past, w = climb(inner, explore.branches(1, racing=race), 30)
    assert (past["adopted"][:4] == 0).all()
    assert (past["adopted"][-10:] == 1).all()
    assert float(w) > 6.5


def test_paused_ones_take_no_gradients():
    """Losses are counted as they are run."""
    runs = {"good": 0, "bad": 0}

    def loss(name):
        def fn(w):
            jax.debug.callback(lambda _: runs.update({name: runs[name] + 1}), w)
            return -w

        return fn

    inner = [
        optax_ev3.explorer(moves(1.0), loss("good"), name="good"),
        optax_ev3.explorer(moves(0.5), loss("bad"), name="bad"),
    ]
    race = explore.SuccessiveHalving(2, 2**20)
    climb(inner, explore.branches(3, racing=race), 24)
    jax.effects_barrier()
    assert runs["good"] >= 24 and runs["bad"] * 24 == runs["good"] * 6


def test_evolving_groups_are_refused():
    space = {"learning_rate": optax_ev3.log_uniform(0.01, 0.3)}
    inner = {"group": optax_ev3.evolve(optax.adam, space, 3)}
    strategy = explore.branches(2, racing=explore.SuccessiveHalving())
    with says(ValueError, "SuccessiveHalving", "explore.Racing", r"['group']", "sweep"):
        optax_ev3.ev3(inner, lambda w: w, loss_fn=lambda w: -w, explore=strategy)


def test_an_unknown_one_that_begins():
    strategy = explore.branches(2, racing=explore.SuccessiveHalving(first="c"))
    inner = {"a": optax.adam(0.1), "b": optax.adam(0.2)}
    with says(ValueError, "first", "['a', 'b']", "'c'"):
        optax_ev3.ev3(inner, lambda w: w, loss_fn=lambda w: -w, explore=strategy)


def test_a_relay_refuses_it():
    with says(TypeError, "racing", "explore.Racing", "SuccessiveHalving"):
        explore.relay(racing=explore.SuccessiveHalving())


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ((0,), ValueError, ["rounds", "1", "0"]),
        ((2, 1), ValueError, ["window", "2", "1"]),
        ((2.0,), TypeError, ["rounds", "2.0"]),
        ((2, True), TypeError, ["window", "True"]),
        ((2, 8, -1), ValueError, ["warmup", "0", "-1"]),
        ((2, 8, 1.5), TypeError, ["warmup", "1.5"]),
        ((2, 8, 3, 0), TypeError, ["first", "0", "int"]),
    ],
)
def test_bad_input(arguments, error, parts):
    with says(error, *parts):
        explore.SuccessiveHalving(*arguments)
