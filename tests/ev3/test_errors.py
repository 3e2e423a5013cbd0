"""Bad arguments, bad callbacks, and numbers that are not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    RULES,
    always,
    assert_finite,
    assert_identical,
    says,
    score,
    weights,
)

import optax_ev3
from optax_ev3 import adapt, ev3, explore, explorer, held_out

SGD = optax.sgd(0.1)


def metric(w):
    return -jnp.square(w)


# At construction.

BAD_ARGUMENTS = {
    "no explorers": (
        lambda: ev3([], metric),
        (ValueError, "at least one explorer", "none"),
    ),
    "no explorers in a mapping": (
        lambda: ev3({}, metric),
        (ValueError, "at least one"),
    ),
    "single transformation": (
        lambda: ev3(SGD, metric),
        (TypeError, "sequence or a mapping", "single transformation", "[...]"),
    ),
    "inner a string": (lambda: ev3("adam", metric), (TypeError, "sequence", "str")),
    "inner a generator": (
        lambda: ev3((one for one in [SGD]), metric),
        (TypeError, "sequence", "such as a list", "generator"),
    ),
    "averages from a generator": (
        lambda: explore.rounds(2, averages=(x for x in [])),
        (TypeError, "averages must be a sequence", "generator"),
    ),
    "numbers from a generator": (
        lambda: optax_ev3.sweep(optax.adam, learning_rate=(x for x in [0.1])),
        (ValueError, "sequence of numbers for learning_rate", "generator"),
    ),
    "inner a number": (lambda: ev3(3, metric), (TypeError, "sequence", "int")),
    "no transformation": (
        lambda: ev3([SGD, 0.1], metric),
        (TypeError, "GradientTransformation", "0.1", "float"),
    ),
    "factory": (
        lambda: ev3({"fast": optax.adam}, metric),
        (TypeError, "'fast'", "GradientTransformation", "function"),
    ),
    "repeated names": (
        lambda: ev3([explorer(SGD, name="a"), explorer(SGD, name="a")], metric),
        (ValueError, "different names", "twice", "['a']"),
    ),
    "name that a position gives": (
        lambda: ev3([SGD, explorer(SGD, name="explorer_0")], metric),
        (ValueError, "different names", "['explorer_0']"),
    ),
    "reserved name": (
        lambda: ev3({"stable": SGD, "current": SGD}, metric),
        (ValueError, "['current', 'stable']", "always there"),
    ),
    "name no string": (
        lambda: ev3({3: SGD}, metric),
        (TypeError, "name of an explorer must be a string", "3"),
    ),
    "explorer's name": (
        lambda: explorer(SGD, name=b"a"),
        (TypeError, "string", "b'a'"),
    ),
    "explorer's loss": (
        lambda: explorer(SGD, loss_fn=0.5, name="a"),
        (TypeError, "loss_fn of explorer 'a'", "callable", "0.5", "float"),
    ),
    "assess_fn no function": (
        lambda: ev3([SGD], jnp.zeros(3)),
        (TypeError, "assess_fn must be callable", "assess_fn(params, **named)"),
    ),
    "assess_fn without parameter": (
        lambda: ev3([SGD], lambda: 0.0),
        (TypeError, "assess_fn", "first positional", "()"),
    ),
    "assess_fn by name only": (
        lambda: ev3([SGD], lambda *, params: 0.0),
        (TypeError, "assess_fn", "first positional", "(*, params)"),
    ),
    "assess_fn without signature": (
        lambda: ev3([SGD], max),
        (TypeError, "assess_fn", "signature", "lambda params"),
    ),
    "loss_fn no function": (
        lambda: ev3([SGD], metric, loss_fn="mse"),
        (TypeError, "loss_fn must be callable", "'mse'", "str"),
    ),
    "length zero": (
        lambda: explore.rounds(0),
        (ValueError, "length", "at least 1", "0"),
    ),
    "own gradients without a loss": (
        lambda: ev3([SGD], metric, explore=explore.rounds(2, gradients="own")),
        (ValueError, 'gradients="own"', "loss_fn"),
    ),
    "gradients": (
        lambda: explore.branches(gradients="all"),
        (ValueError, "gradients", "'own', 'shared'", "'all'"),
    ),
    "strategy by its name": (
        lambda: ev3([SGD], metric, explore="rounds"),
        (TypeError, "explore must be a strategy", "explore.one_step()", "'rounds'"),
    ),
    "strategy not called": (
        lambda: ev3([SGD], metric, explore=explore.branches),
        (TypeError, "explore must be a strategy", "function"),
    ),
    "restart by its name": (
        lambda: explore.branches(restart="never"),
        (TypeError, "restart", "explore.never()", "explore.worse_than", "'never'"),
    ),
    "restart always": (
        lambda: explore.branches(restart=explore.Restart()),
        (TypeError, "Restart(inner_state='keep')", "explore.rounds"),
    ),
    "worse than what": (
        lambda: explore.worse_than("best"),
        (ValueError, "reference", "'adopted', 'start'", "'best'"),
    ),
    "restart_state": (
        lambda: explore.rounds(2, restart_state="old"),
        (ValueError, "restart_state", "'keep', 'new', 'copy'", "'old'"),
    ),
    "inner_state": (
        lambda: explore.never(inner_state="old"),
        (ValueError, "inner_state", "'keep', 'new', 'copy'", "'old'"),
    ),
    "growth below 1": (
        lambda: explore.rounds(2, growth=0.9),
        (ValueError, "growth", "at least 1", "0.9"),
    ),
    "growth a string": (
        lambda: explore.rounds(2, growth="fast"),
        (TypeError, "growth", "float", "'fast'"),
    ),
    "growth to less": (
        lambda: explore.rounds(5, max_length=4),
        (ValueError, "max_length", "at least length, 5", "4"),
    ),
    "averages no sequence": (
        lambda: explore.rounds(2, averages=explore.trajectory_average()),
        (TypeError, "averages must be a sequence"),
    ),
    "averages of something else": (
        lambda: explore.rounds(2, averages=["average"]),
        (TypeError, "explore.trajectory_average()", "'average'"),
    ),
    "averages twice the same": (
        lambda: explore.rounds(2, averages=[explore.trajectory_average()] * 2),
        (ValueError, "more than once", "TrajectoryAverage"),
    ),
    "averages in float16": (
        lambda: explore.trajectory_average(dtype=jnp.float16),
        (ValueError, "dtype", "None or bfloat16", "float16"),
    ),
    "decay of branches": (
        lambda: explore.branch_average(0.0),
        (ValueError, "decay", "between 0 and 1", "0.0"),
    ),
    "decay of one": (
        lambda: explore.branch_average(1.0),
        (ValueError, "decay", "between 0 and 1", "1.0"),
    ),
    "sweep of structures": (
        lambda: optax_ev3.sweep(
            lambda momentum: optax.sgd(0.1, momentum=momentum or None),
            momentum=[0.9, 0.0],
        ),
        (ValueError, "states of one structure", "'momentum': 0.0"),
    ),
    "sweep of nothing": (
        lambda: optax_ev3.sweep(optax.adam),
        (ValueError, "learning_rate=[1e-3, 1e-2]"),
    ),
    "sweep of one number": (
        lambda: optax_ev3.sweep(optax.adam, learning_rate=0.1),
        (ValueError, "sequence of numbers for learning_rate", "0.1"),
    ),
    "sweep without a factory": (
        lambda: optax_ev3.sweep(SGD, learning_rate=[0.1]),
        (TypeError, "factory"),
    ),
    "sweep of equal numbers": (
        lambda: ev3([optax_ev3.sweep(optax.sgd, learning_rate=[0.1, 0.1])], metric),
        (ValueError, "different names", "sgd/learning_rate_0.1"),
    ),
    "explorer called like an average": (
        lambda: ev3(
            {"a": SGD, "average/a": SGD},
            metric,
            explore=explore.rounds(2, averages=[explore.trajectory_average()]),
        ),
        (ValueError, "different names", "average/a"),
    ),
    "product without losses": (
        lambda: optax_ev3.product([SGD], []),
        (ValueError, "at least one loss"),
    ),
    "merge_fn no function": (
        lambda: optax_ev3.explorer(SGD, merge_fn=3),
        (TypeError, "merge_fn", "callable", "3"),
    ),
    "length a float": (
        lambda: explore.rounds(1.0),
        (TypeError, "length", "integer", "1.0", "float", "static_args"),
    ),
    "history_length zero": (
        lambda: ev3([SGD], metric, history_length=0),
        (ValueError, "history_length", "at least 1", "0"),
    ),
    "history_length a bool": (
        lambda: ev3([SGD], metric, history_length=True),
        (TypeError, "history_length", "integer", "True", "bool"),
    ),
    "assess_mode": (
        lambda: ev3([SGD], metric, assess_mode="pmap"),
        (ValueError, "assess_mode", "'unroll', 'vmap', 'map'", "'pmap'"),
    ),
    "adapt a class of rules": (
        lambda: ev3([SGD], metric, adapt=adapt.greedy),
        (TypeError, "adapt must be a rule", "confident()", "function"),
    ),
    "adapt a string": (
        lambda: ev3([SGD], metric, adapt="greedy"),
        (TypeError, "adapt must be a rule", "'greedy'", "str"),
    ),
    "key a float": (lambda: ev3([SGD], metric, key=0.5), (TypeError, "key", "0.5")),
    "key a bool": (lambda: ev3([SGD], metric, key=True), (TypeError, "key", "True")),
    "key a string": (lambda: ev3([SGD], metric, key="a"), (TypeError, "key", "'a'")),
    "several keys": (
        lambda: ev3([SGD], metric, key=jax.random.split(jax.random.key(0))),
        (TypeError, "key must be an integer seed or a single PRNG key"),
    ),
    "greedy's confidence": (
        lambda: adapt.greedy(1.0),
        (ValueError, "confidence", "above 0.5 and below 1", "1.0"),
    ),
    "confident's confidence": (
        lambda: adapt.confident(0.5),
        (ValueError, "confidence", "above 0.5 and below 1", "0.5"),
    ),
    "confident's clip": (
        lambda: adapt.confident(clip=0.0),
        (ValueError, "clip", "above 0", "0.0"),
    ),
    "confident's doubt": (
        lambda: adapt.confident(prior_rounds=-1.0),
        (ValueError, "prior_rounds", "above 0", "-1.0"),
    ),
    "confidence a string": (
        lambda: adapt.confident("high"),
        (TypeError, "confidence must be a number", "'high'", "str"),
    ),
    "confidence None": (lambda: adapt.greedy(None), (TypeError, "NoneType")),
    "confidence NaN": (lambda: adapt.confident(float("nan")), (ValueError, "nan")),
    "select_alpha": (
        lambda: adapt.lower_bound(select_alpha=-1),
        (ValueError, "select_alpha", "at least 0", "-1"),
    ),
    "decide_alpha": (
        lambda: adapt.lower_bound(decide_alpha=float("nan")),
        (ValueError, "decide_alpha", "at least 0", "nan"),
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case):
    make, (error, *parts) = BAD_ARGUMENTS[case]
    with says(error, *parts):
        make()


# At trace time.


def _two(w):
    return {"accuracy": jnp.zeros([4]), "speed": jnp.zeros([4])}


def _python_metric(w):
    return float(w.sum())


BAD_SCORES = {
    "rank 2": (lambda w: jnp.zeros([4, 3]), (ValueError, "[n]", "(4, 3)")),
    "integers": (
        lambda w: jnp.arange(4),
        (TypeError, "real or boolean", "int32", "astype"),
    ),
    "complex": (lambda w: w * 1j, (TypeError, "real or boolean", "complex64")),
    "empty batch": (lambda w: jnp.zeros([0]), (ValueError, "(0,)", "batch is empty")),
    "unequal sizes": (
        lambda w: {"a": jnp.zeros([4]), "b": jnp.zeros([5])},
        (ValueError, "same examples", "'a': 4", "'b': 5"),
    ),
    "no objectives": (lambda w: {}, (ValueError, "mapping without any objective")),
    "objective named by a number": (
        lambda w: {1: jnp.zeros([4])},
        (TypeError, "named by strings", "1"),
    ),
    "rank 2 of one objective": (
        lambda w: {"a": jnp.zeros([4, 1])},
        (ValueError, "objective 'a'", "(4, 1)"),
    ),
    "list": (lambda w: [jnp.zeros([4])], (TypeError, "array of scores", "list")),
    "nothing": (lambda w: None, (TypeError, "array of scores", "NoneType")),
    "text": (lambda w: "high", (TypeError, "assess_fn", "array of scores", "'high'")),
    "array of text": (
        lambda w: np.array("high"),
        (TypeError, "array of scores", "ndarray of dtype <U4"),
    ),
    "generator": (
        lambda w: (x for x in w),
        (TypeError, "assess_fn", "array of scores", "generator"),
    ),
    "generator of one objective": (
        lambda w: {"a": metric(w), "b": (x for x in w)},
        (TypeError, "objective 'b'", "array of scores", "generator"),
    ),
    "objectives named by several kinds": (
        lambda w: {1: metric(w), "a": metric(w)},
        (TypeError, "named by strings", "1"),
    ),
    "Python number of an array": (
        _python_metric,
        (TypeError, "cannot be traced", "jax.numpy", "host_metric"),
    ),
    "NumPy": (
        lambda w: np.mean(np.asarray(w)),
        (TypeError, "cannot be traced", "jax.numpy", "host_metric"),
    ),
    "branch": (
        lambda w: metric(w) if w.sum() > 0 else -metric(w),
        (TypeError, "cannot be traced", "host_metric"),
    ),
    "boolean mask": (
        lambda w: metric(w)[w > 0],
        (TypeError, "cannot be traced", "host_metric"),
    ),
    "argument that nobody gave": (
        lambda w, labels: metric(w),
        (TypeError, "assess_fn", "'labels'", "labels=...", "given", "['images']"),
    ),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("case", BAD_SCORES)
def test_bad_scores(case, jitted):
    assess_fn, (error, *parts) = BAD_SCORES[case]
    tx, w = ev3([optax.adam(0.1)], assess_fn, loss_fn=jnp.sum), jnp.ones([3])
    state = tx.init(w)
    before = jax.tree.map(np.array, (w, state))
    update = jax.jit(tx.update) if jitted else tx.update
    with says(error, *parts):
        update(w, state, w, images=jnp.ones([2]))
    assert_identical(jax.tree.map(np.array, (w, state)), before)


def test_bad_scores_are_found_before_anything_is_computed():
    calls = []

    def assess_fn(w):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.zeros([2, 2])

    tx, w = ev3([SGD], assess_fn), jnp.ones([3])
    with says(ValueError, "(2, 2)"):
        tx.update(w, tx.init(w), w)
    jax.effects_barrier()
    assert not calls


def test_leaked_tracer():
    leaked = []

    def assess_fn(w):
        scores = metric(w) + sum(leaked)
        leaked.append(scores)
        return scores

    tx, w = ev3([SGD], assess_fn), jnp.ones([3])
    with says(TypeError, "cannot be traced", "reads nothing traced elsewhere"):
        tx.update(w, tx.init(w), w)


@pytest.mark.parametrize("rule", RULES)
def test_rules_that_take_one_objective_say_so(rule):
    tx, w = ev3([SGD], _two, adapt=RULES[rule]()), jnp.ones([3])
    with says(ValueError, "one objective", "2", "['accuracy', 'speed']"):
        tx.update(w, tx.init(w), w)


def test_lower_bound_needs_two_examples():
    tx, w = (
        ev3([SGD], lambda w: metric(w)[:1], adapt=adapt.lower_bound()),
        jnp.ones([3]),
    )
    with says(ValueError, "lower_bound", "at least 2 examples", "(1,)"):
        tx.update(w, tx.init(w), w)


BAD_LOSSES = {
    "vector": (lambda w: w, "shape (3,)"),
    "integer": (lambda w: jnp.int32(1), "int32"),
    "nothing": (lambda w: None, "NoneType"),
    "list": (lambda w: [jnp.sum(w)], "list"),
    "text": (lambda w: "low", "str: 'low'"),
    "generator": (lambda w: (x for x in w), "generator"),
    "complex": (lambda w: jnp.sum(w) * 1j, "complex64"),
}


@pytest.mark.parametrize("case", BAD_LOSSES)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_bad_losses(case, own):
    loss_fn, got = BAD_LOSSES[case]
    inner = {"a": explorer(optax.polyak_sgd(), loss_fn if own else None)}
    tx, w = ev3(inner, metric, loss_fn=None if own else loss_fn), jnp.ones([3])
    role = "loss_fn of explorer 'a'" if own else "loss_fn"
    with says(TypeError, role, "real scalar", got):
        tx.update(w, tx.init(w), w)


def test_loss_with_an_argument_that_nobody_gave():
    tx = ev3([explorer(SGD, lambda w, x: jnp.sum(w * x), name="a")], metric)
    w = jnp.ones([3])
    with says(TypeError, "loss_fn of explorer 'a'", "'x'", "none"):
        tx.update(w, tx.init(w), w)


def test_state_that_changes_its_structure():
    def update(updates, state, params=None):
        return updates, (*state, jnp.zeros([]))

    tx = ev3({"odd": optax.GradientTransformation(lambda w: (), update)}, metric)
    w = jnp.ones([3])
    with says(ValueError, "'odd'", "structure of its state"):
        tx.update(w, tx.init(w), w)


@pytest.mark.parametrize("length", [1, 2])
def test_state_that_changes_its_shape(length):
    def update(updates, state, params=None):
        return updates, {"seen": (jnp.append(state["seen"][0], 1.0),)}

    def init(w):
        return {"seen": (jnp.zeros([2]),)}

    odd = optax.GradientTransformation(init, update)
    tx, w = (
        ev3({"a": SGD, "odd": odd}, metric, explore=explore.rounds(length)),
        jnp.ones([3]),
    )
    with says(ValueError, "'odd'", "['seen'][0]", "float32[2]", "float32[3]", "init"):
        tx.update(w, tx.init(w), w)


def _with_state(state, change):
    one = state.explore.explorers["a"]
    explorers = {"a": one._replace(opt_state=change(one))}
    return state._replace(explore=state.explore._replace(explorers=explorers))


RESTORED = {
    "list": (
        lambda state: _with_state(state, lambda one: list(one.opt_state)),
        (
            ValueError,
            "another structure",
            "explorers['a'].opt_state",
            "a list",
            "instead of a tuple",
            "tx.init(params)",
        ),
    ),
    "history in a dict": (
        lambda state: state._replace(history=state.history._asdict()),
        (ValueError, "rounds", "nothing"),
    ),
    "typed key": (
        lambda state: state._replace(ev3_key=jax.random.key(0)),
        (ValueError, ".ev3_key", "key<fry>", "uint32[2]", "jax.random.key_data"),
    ),
    "float for an integer": (
        lambda state: state._replace(ev3_round=0.5),
        (ValueError, ".ev3_round", "float32", "int32[]"),
    ),
    "shape": (
        lambda state: state._replace(stable=jnp.ones([4])),
        (ValueError, ".stable", "float32[4]", "float32[3]"),
    ),
}


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("case", RESTORED)
def test_states_of_another_structure(case, length):
    change, (error, *parts) = RESTORED[case]
    tx, w = (
        ev3({"a": optax.adam(0.1)}, metric, explore=explore.rounds(length)),
        jnp.ones([3]),
    )
    with says(error, *parts):
        tx.update(w, change(tx.init(w)), w)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"explore": explore.rounds(2)},
        {
            "explore": explore.rounds(2),
            "loss_fn": lambda w: jnp.square(w["a"]["b"]).sum(),
        },
    ],
    ids=["one step", "shared", "own"],
)
def test_gradients_of_another_structure(kwargs, adaptive):
    class Frozen(dict):
        """As flax.core.FrozenDict: a mapping that is another node."""

    jax.tree_util.register_pytree_with_keys(
        Frozen,
        lambda x: ([(jax.tree_util.DictKey(k), x[k]) for k in x], tuple(x)),
        lambda keys, values: Frozen(zip(keys, values, strict=True)),
    )
    inner = optax.adam(0.1) if adaptive else SGD
    tx = ev3([inner], lambda w: -jnp.square(w["a"]["b"]), **kwargs)
    w = {"a": Frozen(b=jnp.ones([3]))}
    with says(ValueError, "at ['a'] a dict with ['b'] instead of a Frozen with ['b']"):
        tx.update({"a": {"b": jnp.ones([3])}}, tx.init(w), w)


def test_errors_of_inner_optimizers_that_are_no_missing_arguments():
    def update(updates, state, params=None):
        raise TypeError("dtypes int8 and float32 have no common one")

    odd = optax.GradientTransformation(lambda w: (), update)
    tx, w = ev3({"odd": odd}, metric), jnp.ones([3])
    with says(TypeError, "'odd' cannot be updated: dtypes int8 and") as found:
        tx.update(w, tx.init(w), w)
    assert "loss_fn" not in str(found.value)


def test_raw_key_of_another_implementation():
    raw = jax.random.key_data(jax.random.key(0, impl="rbg"))
    with says(ValueError, "(4,)", "threefry2x32", "wrap_key_data(key, impl=...)"):
        ev3([SGD], metric, key=raw)
    # Of the default one it is taken.
    ours = jax.random.key_data(jax.random.key(5))
    state = ev3([SGD], metric, key=ours).init(jnp.ones([3]))
    np.testing.assert_array_equal(state.ev3_key, ours)


@pytest.mark.parametrize("length", [1, 2])
def test_errors_of_callbacks_name_a_wrapper_that_flattens(length):
    tx = ev3([SGD], lambda w: -jnp.square(w["a"]), explore=explore.rounds(length))
    around, w = optax.flatten(tx), {"a": jnp.ones([3])}
    with pytest.raises(TypeError) as found:
        around.update(w, around.init(w), w)
    (note,) = (x for x in found.value.__notes__ if "optax.flatten" in x)
    assert "(3,)" in note
    assert "inside" in note
    # Inside it works, and elsewhere nothing is said of it.
    inside = ev3([optax.flatten(SGD)], lambda w: -jnp.square(w["a"]))
    updates, _ = inside.update(w, inside.init(w), w)
    np.testing.assert_allclose(updates["a"], [-0.1] * 3, rtol=1e-6)
    with pytest.raises(KeyError) as found:
        bad = ev3([SGD], lambda w: w["b"])
        bad.update(w, bad.init(w), w)
    assert not any("flatten" in x for x in getattr(found.value, "__notes__", []))


def test_gradients_of_another_shape():
    tx, w = ev3({"a": SGD}, metric), {"w": jnp.ones([3])}
    state = tx.init(w)
    with says(ValueError, "'a'", "shapes", "(4,)", "(3,)", "like the parameters"):
        tx.update({"w": jnp.ones([4])}, state, w)
    with says(ValueError, "'a'", "like the parameters"):
        tx.update(jnp.ones([3]), state, w)


def test_update_without_params_says_what_to_pass():
    tx, w = ev3([SGD], metric), jnp.ones([3])
    with says(ValueError, "tx.update(grads, state, params)", "keep_params(tx)"):
        tx.update(w, tx.init(w))


@pytest.mark.parametrize("leaf", [jax.nn.relu, "relu", object()])
def test_parameters_that_are_no_arrays(leaf):
    """As in a module of Equinox with an activation."""
    tx, w = ev3([SGD], metric), {"w": jnp.ones([3])}
    parts = "arrays", repr(leaf), "['act']", "eqx.filter(model, eqx.is_inexact_array)"
    with says(TypeError, *parts):
        tx.init({**w, "act": leaf})
    with says(TypeError, *parts):
        tx.update(w, tx.init(w), {**w, "act": leaf})


def test_readers_need_one_state():
    tx, w = ev3([SGD], metric), jnp.ones([3])
    for read in (optax_ev3.stable_params, optax_ev3.summary, optax_ev3.history):
        with says(ValueError, "one state of ev3", "0"):
            read(SGD.init(w))
        with says(ValueError, "one state of ev3", "2"):
            read((tx.init(w), tx.init(w)))


def test_history_outside_of_transformations():
    tx, w = ev3([SGD], metric), jnp.ones([3])
    with says(TypeError, "outside of jit"):
        jax.jit(optax_ev3.history)(tx.init(w))
    batched = jax.vmap(tx.init)(jnp.ones([2, 3]))
    with says(ValueError, "one run at a time", "(2,)", "index"):
        optax_ev3.history(batched)


def test_numbers_injected_as_hyperparameters():
    made = optax.inject_hyperparams(ev3, static_args=("assess_fn",))
    tx, w = made(inner=[SGD], assess_fn=metric), jnp.ones([3])
    with says(TypeError, "history_length", "static_args"):
        jax.jit(tx.update)(w, tx.init(w), w)


BAD_DATA = {
    "metric no function": (
        3,
        jnp.ones([4]),
        None,
        (TypeError, "metric_fn", "callable"),
    ),
    "metric without a batch": (
        lambda w: w,
        jnp.ones([4]),
        None,
        (TypeError, "(params, batch)"),
    ),
    "no arrays": (score, {}, None, (ValueError, "first axis", "[]")),
    "scalars": (score, jnp.ones([]), None, (ValueError, "first axis", "()")),
    "unequal": (
        score,
        (jnp.ones([4]), jnp.ones([5, 2])),
        None,
        (ValueError, "one leading size", "(4,)", "(5, 2)"),
    ),
    "empty": (score, jnp.ones([0, 2]), None, (ValueError, "at least 1", "(0, 2)")),
    "float size": (score, jnp.ones([4]), 2.0, (TypeError, "integer or None", "2.0")),
    "bool size": (
        score,
        jnp.ones([4]),
        True,
        (TypeError, "integer or None", "True"),
    ),
    "size zero": (score, jnp.ones([4]), 0, (ValueError, "between 1 and the 4", "0")),
    "too large": (score, jnp.ones([4]), 5, (ValueError, "between 1 and the 4", "5")),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_held_out_data(case):
    metric_fn, data, batch_size, (error, *parts) = BAD_DATA[case]
    with says(error, *parts):
        held_out(metric_fn, data, batch_size)


# Numbers that are not finite.


def poisoned(when=lambda count: count >= 0):
    """SGD with a counter, whose update is ``poison`` in some rounds."""

    def update(updates, count, params=None, *, poison=jnp.nan):
        bad = jnp.where(when(count), poison, 1.0)
        return jax.tree.map(lambda u: -0.1 * u * bad, updates), count + 1

    return optax.GradientTransformationExtraArgs(lambda w: jnp.int32(0), update)


def start():
    return {"w": jnp.array([4.0, -2.0])}


def gradients(w, value=1.0):
    return jax.tree.map(lambda x: 2 * (x - 1) * value, w)


@functools.cache
def transformation(rule):
    tx = ev3({"adam": optax.adam(0.1), "sgd": SGD}, score, adapt=RULES[rule]())
    return tx, jax.jit(tx.update)


def trained(rule):
    """Parameters and state after three good rounds."""
    tx, update = transformation(rule)
    w = start()
    state = tx.init(w)
    for seed in range(3):
        updates, state = update(gradients(w), state, w, batch=weights(seed=seed))
        w = optax.apply_updates(w, updates)
    return w, state


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("where", ["worse", "better"])
@pytest.mark.parametrize("rule", RULES)
def test_round_of_bad_gradients_changes_nothing(rule, where, bad):
    w, state = trained(rule)
    _, update = transformation(rule)
    # Neither a better nor a worse stable candidate makes a move of this round.
    apart = {"worse": jnp.array([9.0, 9.0]), "better": jnp.array([1.0, 1.0])}[where]
    state = state._replace(stable={"w": apart})
    good = weights(seed=7)
    updates, skipped = update(gradients(w, bad), state, w, batch=good)
    assert_identical(updates, jax.tree.map(jnp.zeros_like, w))
    explorers = {
        name: one._replace(skipped=state.explore.explorers[name].skipped)
        for name, one in skipped.explore.explorers.items()
    }
    counters = {
        "ev3_round": state.ev3_round,
        "ev3_calls": state.ev3_calls,
        "explore": skipped.explore._replace(explorers=explorers),
    }
    assert_identical(skipped._replace(**counters), state)
    figures, before = optax_ev3.summary(skipped), optax_ev3.summary(state)
    assert int(figures.pop("ev3/skipped")) == 1
    assert int(before.pop("ev3/skipped")) == 0
    steps = [f"ev3/skipped_steps/{name}" for name in state.explore.explorers]
    for name in ("ev3/round", "ev3/calls", *steps):
        assert int(figures.pop(name)) == int(before.pop(name)) + 1
    assert_identical(figures, before)
    # Training goes on as if the round had not been, apart from the counters.
    after, after_state = update(
        gradients(w), skipped._replace(**counters), w, batch=good
    )
    expected, expected_state = update(gradients(w), state, w, batch=good)
    assert_identical((after, after_state), (expected, expected_state))


@functools.cache
def beside_poison(rule):
    """Compiled once for all kinds of poison."""
    inner = {"bad": poisoned(), "sgd": SGD, "late": poisoned(when=lambda n: n == 2)}
    tx = ev3(inner, score, adapt=RULES[rule]())
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("rule", RULES)
def test_bad_explorer_among_good_ones(rule, value):
    tx, update = beside_poison(rule)
    w = start()
    state = tx.init(w)
    for seed in range(6):
        extra = {"batch": weights(seed=seed), "poison": value}
        updates, state = update(gradients(w), state, w, **extra)
        w = optax.apply_updates(w, updates)
        assert_finite((updates, state))
    past = optax_ev3.history(state)
    adopted = past["adopted"]
    assert 0 not in adopted
    assert not set(adopted[2:]) & {2}  # Its third update was bad, and so is each later:
    assert (
        int(state.explore.explorers["late"].opt_state) == 2
    )  # its state is held there.
    assert int(state.explore.explorers["bad"].opt_state) == 0
    assert np.isnan(past["mean"][:, 0]).all()
    assert np.isnan(past["mean"][2:, 2]).all()
    assert np.isfinite(past["mean"][:2, 2]).all()
    assert float(jnp.abs(w["w"] - 1).sum()) < 5.0
    figures = optax_ev3.summary(state)
    assert [figures[f"ev3/{k}/bad"] for k in ("score", "valid")] == [0, 0]
    assert figures["ev3/score/late"] == past["mean"][1, 2]  # The last one that it had.
    assert [figures[f"ev3/valid/{k}"] for k in ("sgd", "late")] == [1, 0]
    assert float(figures["ev3/share/bad"]) == 0.0
    assert int(figures["ev3/skipped"]) == 0


@functools.cache
def with_a_bad_score(rule, single):
    # The bigger step alone leads below 3, where one of the scores goes bad.
    def assess_fn(w, bad):
        scores = -jnp.square(w["w"] - 1)
        scores = scores.at[0].set(jnp.where(w["w"][0] < 3, bad, scores[0]))
        return scores.sum() if single else scores

    inner = {"big": optax.sgd(0.4), "small": optax.sgd(0.05)}
    tx = ev3(inner, assess_fn, adapt=RULES[rule]())
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("single", [False, True], ids=["examples", "exact"])
@pytest.mark.parametrize("rule", RULES)
def test_score_of_one_candidate_not_finite(rule, single, value):
    (tx, update), w = with_a_bad_score(rule, single), start()
    state = tx.init(w)
    updates, state = update(gradients(w), state, w, bad=value)
    past = optax_ev3.history(state)
    assert past["adopted"].tolist() != [0]
    assert np.isnan(past["mean"][0, 0])
    assert np.isfinite(past["mean"][0, 1:]).all()
    assert_finite((updates, state))


@pytest.mark.parametrize("rule", RULES)
def test_goes_back_to_stable_when_all_else_is_broken(rule):
    def assess_fn(w, batch, bad):
        return jnp.where(w["w"].sum() > 5, bad, score(w, batch))

    tx, w = ev3([SGD], assess_fn, adapt=RULES[rule]()), {"w": jnp.array([8.0, 8.0])}
    good = {"w": jnp.array([2.0, 2.0])}
    state, update = tx.init(good), jax.jit(tx.update)
    for bad in (jnp.nan, -jnp.inf):
        updates, new = update(gradients(w), state, w, batch=weights(), bad=bad)
        np.testing.assert_array_equal(optax.apply_updates(w, updates)["w"], [2.0, 2.0])
        assert_identical(new.stable, good)
        assert_finite(new)


@pytest.mark.parametrize("rule", RULES)
def test_stays_where_nothing_is_valid(rule):
    tx = ev3([SGD], lambda w: w["w"] * jnp.nan, adapt=RULES[rule]())
    w = start()
    state = tx.init(w)._replace(stable={"w": jnp.array([1.0, 1.0])})
    updates, new = jax.jit(tx.update)(gradients(w), state, w)
    assert_identical(updates, jax.tree.map(jnp.zeros_like, w))
    assert_identical(new.stable, state.stable)
    assert_identical(new.history, state.history)
    assert int(optax_ev3.summary(new)["ev3/skipped"]) == 1


def test_inner_state_is_held_whoever_is_adopted():
    inner = {"bad": poisoned(when=lambda n: n == 1), "momentum": optax.sgd(0.1, 0.9)}
    tx, w = ev3(inner, score, adapt=always(2)), start()  # Always stays.
    state = tx.init(w)
    counts, update = [], jax.jit(tx.update)
    for _ in range(4):
        _, state = update(gradients(w), state, w, batch=weights())
        counts.append(int(state.explore.explorers["bad"].opt_state))
    assert counts == [1, 1, 1, 1]
    # The other's momentum: g (1 + 0.9 + 0.81 + 0.729).
    trace = state.explore.explorers["momentum"].opt_state[0].trace["w"]
    np.testing.assert_allclose(trace, 3.439 * gradients(w)["w"], rtol=1e-5)


def test_losses_and_arguments_to_cut_may_be_generated():
    def loss(w, x):
        return jnp.sum(w * x)

    grid = optax_ev3.product([SGD], (fn for fn in [loss]))
    assert [one.name for one in grid] == ["explorer_0/loss"]
    cut = optax_ev3.in_chunks(lambda w, x: x, 2, (name for name in ["x"]))
    assert cut.slice_args == ("x",)
