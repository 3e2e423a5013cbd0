"""Every optimizer that optax exports works as an explorer, as it does alone."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    always,
    assert_close,
    assert_finite,
    assert_same_types,
    lenient,
    says,
    traced,
    types,
    x64,
)
from optax import contrib

import optax_ev3
from optax_ev3 import explore

# optax warns of changes to come in some of its own defaults.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning:optax"
)


def _seeded(fn, *args, **kwargs):
    """Optimizers with randomness: their argument has had two names."""
    names = inspect.signature(fn).parameters
    seed = {"key": jax.random.key(1)} if "key" in names else {"seed": 1}
    return fn(*args, **kwargs, **seed)


# How each export is made: a name alone stands for a call without arguments, or with a
# learning rate. Kept by module, since a few names are in both.
_RATE = {
    optax: """
        adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad
        fromage lamb lars lion nadam nadamw novograd optimistic_adam optimistic_adam_v2
        optimistic_gradient_descent radam rmsprop rprop scale scale_by_learning_rate
        sgd
        sign_sgd signum sm3 yogi
    """,
    contrib: """
        acprop ademamix adopt cocob dog dowg madgrad momo momo_adam muon
        scale_by_madgrad schedule_free_adamw schedule_free_sgd simplified_ademamix
        sophia dadapt_adamw prodigy
    """,
}
_PLAIN = {
    optax: """
        add_decayed_weights apply_every centralize identity keep_params_nonnegative
        lbfgs normalize_by_update_norm polyak_sgd scale_by_adadelta scale_by_adam
        scale_by_adamax scale_by_adan scale_by_amsgrad scale_by_belief
        scale_by_distance_over_gradients scale_by_factored_rms scale_by_lbfgs
        scale_by_lion scale_by_novograd scale_by_optimistic_gradient
        scale_by_param_block_norm scale_by_param_block_rms scale_by_polyak
        scale_by_radam scale_by_rms scale_by_rss scale_by_sign scale_by_sm3
        scale_by_stddev
        scale_by_trust_ratio scale_by_yogi set_to_zero zero_nans
    """,
    contrib: """
        hutchinson_estimator_diag_hessian normalize reduce_on_plateau scale_by_acprop
        scale_by_ademamix scale_by_adopt scale_by_cocob scale_by_simplified_ademamix
    """,
}
_MASK = {"w": True, "b": False}


def _norm(updates, *_, **__):
    return optax.global_norm(updates)


_SPECIAL = {
    "optax.MultiSteps": lambda: optax.MultiSteps(optax.adam(0.05), 2),
    "optax.adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.1),
    "optax.add_noise": lambda: _seeded(optax.add_noise, 0.1, 0.5),
    "optax.apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.05), 2),
    "optax.chain": lambda: optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.add_decayed_weights(0.1),
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.1, 4)),
    ),
    "optax.clip": lambda: optax.clip(0.1),
    "optax.clip_by_block_rms": lambda: optax.clip_by_block_rms(0.1),
    "optax.clip_by_global_norm": lambda: optax.clip_by_global_norm(0.1),
    "optax.conditionally_mask": lambda: optax.conditionally_mask(
        optax.sgd(0.1), lambda step, **_: step % 2 == 0
    ),
    "optax.conditionally_transform": lambda: optax.conditionally_transform(
        optax.adam(0.1), lambda step, **_: step % 2 == 0
    ),
    "optax.ema": lambda: optax.ema(0.9),
    "optax.flatten": lambda: optax.flatten(optax.adam(0.05)),
    "optax.freeze": lambda: optax.freeze(_MASK),
    "optax.inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        optax.linear_schedule(0.1, 0.01, 3)
    ),
    "optax.inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(
        optax.sgd
    )(learning_rate=0.1),
    "optax.masked": lambda: optax.masked(optax.adam(0.05), _MASK),
    "optax.multi_transform": lambda: optax.multi_transform(
        {"a": optax.adam(0.05), "s": optax.sgd(0.1)}, {"w": "a", "b": "s"}
    ),
    "optax.named_chain": lambda: optax.named_chain(
        ("clip", optax.clip(0.1)), ("adam", optax.adam(0.05))
    ),
    "optax.noisy_sgd": lambda: _seeded(optax.noisy_sgd, 0.05),
    "optax.partition": lambda: optax.partition(
        {"a": optax.adam(0.05), "s": optax.sgd(0.1)}, {"w": "a", "b": "s"}
    ),
    "optax.scale_by_backtracking_linesearch": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(8, store_grad=True)
    ),
    "optax.scale_by_rprop": lambda: optax.scale_by_rprop(0.05),
    "optax.scale_by_schedule": lambda: optax.scale_by_schedule(
        optax.linear_schedule(-0.1, -0.01, 3)
    ),
    "optax.scale_by_zoom_linesearch": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_zoom_linesearch(8)
    ),
    "optax.selective_transform": lambda: optax.selective_transform(
        optax.sgd(0.1), freeze_mask=_MASK
    ),
    "optax.snapshot": lambda: optax.snapshot("norm", _norm),
    "optax.stateless": lambda: optax.stateless(
        lambda updates, params: jax.tree.map(lambda u: -0.1 * u, updates)
    ),
    "optax.stateless_with_tree_map": lambda: optax.stateless_with_tree_map(
        lambda update, param: -0.1 * update
    ),
    "optax.trace": lambda: optax.trace(0.9),
    "optax.with_extra_args_support": lambda: optax.with_extra_args_support(
        optax.adam(0.05)
    ),
    "optax.contrib.galore": lambda: contrib.galore(0.05, rank=2),
    "optax.contrib.mechanize": lambda: contrib.mechanize(optax.sgd(0.1)),
    "optax.contrib.reduce_on_plateau": lambda: optax.chain(
        optax.adam(0.05), contrib.reduce_on_plateau(patience=1, factor=0.5)
    ),
    "optax.contrib.sam": lambda: contrib.sam(
        optax.sgd(0.1), optax.chain(contrib.normalize(), optax.sgd(0.1))
    ),
    "optax.contrib.sam opaque": lambda: contrib.sam(
        optax.sgd(0.1),
        optax.chain(contrib.normalize(), optax.sgd(0.1)),
        opaque_mode=True,
    ),
    "optax.contrib.scale_by_galore": lambda: contrib.scale_by_galore(rank=2),
    "optax.contrib.schedule_free": lambda: contrib.schedule_free(
        optax.adam(0.1, b1=0.0), 0.1
    ),
    "optax.contrib.split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(
        optax.adam(0.05)
    ),
}

# What is tried in a test of its own, since it takes other gradients or parameters.
_ELSEWHERE = {
    "optax.measure_with_ema": "no optimizer: a measure, for optax.monitor",
    "optax.monitor": "changes the structure of its state in the first update",
    "optax.contrib.scale_by_muon": "takes matrices alone, contrib.muon takes the rest",
    "optax.lookahead": "parameters are pairs, gradients are those of one half",
    "optax.contrib.differentially_private_aggregate": "takes a gradient per example",
    "optax.contrib.dpsgd": "takes a gradient per example",
}

# Functions that make no transformation.
_NOT_OPTIMIZERS = {
    "losses": """
        convex_kl_divergence cosine_distance cosine_similarity ctc_loss
        ctc_loss_with_forward_probs generalized_kl_divergence hinge_loss huber_loss
        kl_divergence l2_loss log_cosh ntxent safe_softmax_cross_entropy
        sigmoid_binary_cross_entropy sigmoid_focal_loss smooth_labels
        softmax_cross_entropy softmax_cross_entropy_with_integer_labels squared_error
    """,
    "schedules": """
        constant_schedule cosine_decay_schedule cosine_onecycle_schedule
        exponential_decay join_schedules linear_onecycle_schedule linear_schedule
        piecewise_constant_schedule piecewise_interpolate_schedule polynomial_schedule
        sgdr_schedule warmup_constant_schedule warmup_cosine_decay_schedule
        warmup_exponential_decay_schedule
    """,
    "functions of arrays, trees and states": """
        apply_updates bias_correction global_norm incremental_update init_empty_state
        matrix_inverse_pth_root microbatch multi_normal nnls
        per_example_global_norm_clip per_example_layer_norm_clip periodic_update
        power_iteration safe_increment
        safe_int32_increment safe_norm safe_root_mean_squares scale_gradient
        skip_large_updates skip_not_finite tree_map_params update_infinity_moment
        update_moment update_moment_per_elem_norm value_and_grad_from_state
        schedule_free_eval_params
    """,
    "types": "MaskOrFn OptState Params ScalarOrSchedule Schedule Updates",
}


def _factories():
    found = {}
    for table, args in ((_RATE, (0.05,)), (_PLAIN, ())):
        for module, names in table.items():
            for name in names.split():
                if hasattr(module, name):
                    full = f"{module.__name__}.{name}"
                    found[full] = functools.partial(getattr(module, name), *args)
    for full, factory in _SPECIAL.items():
        module = contrib if ".contrib." in full else optax
        if hasattr(module, full.split(".")[-1].split()[0]):
            found[full] = factory
    return found


FACTORIES = _factories()


@pytest.mark.parametrize("module", [optax, contrib], ids=lambda m: m.__name__)
def test_every_export_is_accounted_for(module):
    known = set(FACTORIES) | _ELSEWHERE.keys()
    others = {name for names in _NOT_OPTIMIZERS.values() for name in names.split()}
    unknown = []
    for name in dir(module):
        value = getattr(module, name)
        states = inspect.isclass(value) and name != "MultiSteps"
        if name.startswith("_") or inspect.ismodule(value) or states:
            continue
        if f"{module.__name__}.{name}" not in known and name not in others:
            unknown.append(name)
    assert not unknown, "new in this release of optax: try or list them here"


# The problem: linear regression, on which every optimizer can move.


def params():
    w = np.random.default_rng(0).normal(size=(4, 3)) * 0.3
    return {"w": jnp.asarray(w, jnp.float32), "b": jnp.full([3], 0.1, jnp.float32)}


def batch(step):
    rng = np.random.default_rng(step + 1)
    x = rng.normal(size=(8, 4))
    y = x @ np.linspace(-1, 1, 12).reshape(4, 3) + 0.5
    return {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}


def score(params, x, y):
    error = x @ params["w"] + jnp.expand_dims(params["b"], 0) - y
    return -jnp.square(error).mean(axis=1)


def loss(params, x, y):
    return -score(params, x, y).mean()


def update_alone(tx, grads, state, params, data):
    """The oracle: each optimizer as its own documentation says to call it."""
    bound = functools.partial(loss, **data)
    extras = {
        "value": bound(params),
        "grad": grads,
        "value_fn": bound,
        "grad_fn": lambda p, _: jax.grad(bound)(p),
        "obj_fn": bound,
    }
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        return tx.update(grads, state, params)
    names = inspect.signature(tx.update).parameters
    if any(p.kind == p.VAR_KEYWORD for p in names.values()):
        # Line searches reject what they don't need, others ignore it.
        allowed = ("value", "obj_fn"), ("value", "grad", "value_fn")
        for wanted in allowed:
            try:
                return tx.update(grads, state, params, **{k: extras[k] for k in wanted})
            except (TypeError, ValueError):
                continue
    return tx.update(
        grads, state, params, **{k: v for k, v in extras.items() if k in names}
    )


def _strong(state):
    """Without weak types, which some optimizers change: a compilation less."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), state)


def trajectories(tx, ours, start, steps=3):
    """Both trained side by side: (updates, state, params) of each, per step."""
    ours_state, alone_state = ours.init(start), _strong(tx.init(start))
    w, alone = start, start

    def step(w, state, alone, alone_state, data):
        grads = jax.grad(loss)(w, **data)
        updates, state = ours.update(grads, state, w, **data)
        alone_grads = jax.grad(loss)(alone, **data)
        alone_updates, alone_state = update_alone(
            tx, alone_grads, alone_state, alone, data
        )
        w = optax.apply_updates(w, updates)
        alone = optax.apply_updates(alone, alone_updates)
        return w, state, alone, _strong(alone_state), updates, alone_updates

    step, traces = traced(step)
    for i in range(steps):
        old = ours_state
        w, ours_state, alone, alone_state, updates, alone_updates = step(
            w, ours_state, alone, alone_state, batch(i)
        )
        assert_same_types(ours_state, old)
        yield updates, alone_updates, ours_state, alone_state, w
    assert len(traces) == 1


# Here terms of a gradient cancel, and its rounding is divided by a small root: what
# that leaves differs between processors.
_CANCELS = {"optax.scale_by_rms"}
# These leave parameters where they are, alone as well.
_STILL = {"optax.set_to_zero"}


@pytest.mark.parametrize("name", FACTORIES)
def test_equals_the_optimizer_alone(name):
    if name == "optax.scale_by_distance_over_gradients" and optax.__version__ < "0.2.6":
        pytest.skip("gives NaN by itself in this release of optax")
    with lenient():
        tx = FACTORIES[name]()
        ours = optax_ev3.ev3(
            {"tried": tx, "sgd": optax.sgd(0.1)},
            score,
            loss_fn=loss,
            adapt=always(0),
            history_length=2,
        )
        start = params()
        for step in trajectories(tx, ours, start):
            updates, expected, state, alone_state, w = step
            assert_finite((updates, w))
            atol = 1e-5 if name in _CANCELS else 1e-6
            assert_close(updates, expected, rtol=1e-5, atol=atol)
        assert int(state.ev3_round) == 3
        assert_same_types(w, start)
        moved = any(not np.array_equal(w[k], start[k]) for k in start)
        assert moved == (name not in _STILL)
        inner = state.explore.explorers["tried"].opt_state
        raw = jax.tree.map(_raw, alone_state)
        assert_close(inner, raw, rtol=1e-4, atol=1e-5)
        assert all(leaf.dtype.kind != "V" for leaf in jax.tree.leaves(state))


def _raw(leaf):
    leaf = jnp.asarray(leaf)
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_keys_keep_their_implementation(impl):
    if "key" not in inspect.signature(optax.noisy_sgd).parameters:
        pytest.skip("this release takes no typed key")
    tx = optax.noisy_sgd(0.05, key=jax.random.key(2, impl=impl))
    ours = optax_ev3.ev3([tx], score, adapt=always(0), history_length=1)
    for step in trajectories(tx, ours, params(), 2):
        updates, expected, state = step[:3]
        assert_close(updates, expected)
    keys = [
        x for x in jax.tree.leaves(state.explore.explorers) if x.dtype == jnp.uint32
    ]
    assert [x.shape for x in keys] == [{"rbg": (4,), "threefry2x32": (2,)}[impl]]


@pytest.mark.parametrize(
    "tx, needs",
    [
        (optax.polyak_sgd, "value"),
        (optax.lbfgs, "value"),
        (lambda: optax.scale_by_zoom_linesearch(4), "value"),
        (lambda: contrib.momo(0.1), "value"),
        (contrib.reduce_on_plateau, "value"),
    ],
    ids=["polyak_sgd", "lbfgs", "zoom", "momo", "reduce_on_plateau"],
)
def test_without_a_loss_says_how_to_give_one(tx, needs):
    ours = optax_ev3.ev3({"tried": tx()}, score)
    w = params()
    message = rf"(?s)'tried' cannot be updated.*{needs}.*loss_fn="
    with pytest.raises((TypeError, ValueError), match=message):
        jax.eval_shape(ours.update, w, ours.init(w), w, **batch(0))


def test_callers_own_value_is_used_and_overrules():
    tx = optax.polyak_sgd(max_learning_rate=100.0)
    w, grads = jnp.array([2.0]), jnp.array([4.0])
    for kwargs in ({}, {"loss_fn": lambda w: jnp.sum(w**2)}):
        ours = optax_ev3.ev3([tx], lambda w: -(w**2), adapt=always(0), **kwargs)
        updates, _ = ours.update(grads, ours.init(w), w, value=8.0)
        # Polyak: value / |grad|^2 = 1/2.
        np.testing.assert_allclose(updates, [-2.0], rtol=1e-6)


def test_value_from_the_loss():
    tx = optax.polyak_sgd(max_learning_rate=100.0)
    w, grads = jnp.array([2.0]), jnp.array([4.0])
    ours = optax_ev3.ev3(
        [tx], lambda w: -(w**2), loss_fn=lambda w: jnp.sum(w**2), adapt=always(0)
    )
    updates, _ = ours.update(grads, ours.init(w), w)
    np.testing.assert_allclose(updates, [-1.0], rtol=1e-6)  # 4 / 16 of the gradient.


def test_explorers_own_loss_gives_gradient_and_value():
    explorer = optax_ev3.explorer(
        optax.polyak_sgd(max_learning_rate=100.0),
        loss_fn=lambda w, shift: jnp.sum((w - shift) ** 2),
    )
    ours = optax_ev3.ev3(
        [explorer], lambda w: -(w**2), loss_fn=lambda w: jnp.sum(w), adapt=always(0)
    )
    w = jnp.array([2.0])
    # The caller's gradient and value belong to another loss.
    updates, _ = ours.update(jnp.array([-7.0]), ours.init(w), w, value=9.0, shift=1.0)
    np.testing.assert_allclose(updates, [-0.5], rtol=1e-6)  # (1 / 2^2) of 2.


def test_own_loss_with_complex_parameters():
    explorer = optax_ev3.explorer(
        optax.sgd(0.25), loss_fn=lambda w: jnp.sum(jnp.abs(w - (1 + 2j)) ** 2)
    )
    ours = optax_ev3.ev3([explorer], lambda w: -jnp.abs(w).sum(), adapt=always(0))
    w = jnp.zeros([1], jnp.complex64)
    updates, _ = ours.update(w, ours.init(w), w)
    np.testing.assert_allclose(updates, [0.5 + 1j], rtol=1e-6)


def test_line_search_with_data_and_other_extras():
    # Line searches reject extra arguments that nobody consumes; ev3 must not let them.
    tx = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5))
    ours = optax_ev3.ev3([tx], score, loss_fn=loss, adapt=always(0))
    w, data = params(), batch(0)
    grads = jax.grad(loss)(w, **data)
    updates, _ = ours.update(grads, ours.init(w), w, **data, nobody="asks for this")
    expected, _ = update_alone(tx, grads, tx.init(w), w, data)
    assert_close(updates, expected)


def test_callers_own_value_fn_with_data():
    tx = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5))
    ours = optax_ev3.ev3([tx], score, adapt=always(0))
    w, data = params(), batch(0)
    value, grads = jax.value_and_grad(loss)(w, **data)
    updates, _ = ours.update(
        grads, ours.init(w), w, **data, value=value, grad=grads, value_fn=loss
    )
    expected, _ = update_alone(tx, grads, tx.init(w), w, data)
    assert_close(updates, expected)


# Exceptions, each with its reason in _ELSEWHERE.


@pytest.mark.skipif(not hasattr(optax, "monitor"), reason="not in this release")
def test_monitor_changes_the_structure_of_its_state():
    w, data = params(), batch(0)
    for measure in (_norm, optax.measure_with_ema(_norm, 0.9)):
        tx = optax.monitor({"norm": measure})
        _, changed = tx.update(w, tx.init(w), w)
        if jax.tree.structure(changed) == jax.tree.structure(tx.init(w)):
            continue
        ours = optax_ev3.ev3({"tried": tx, "sgd": optax.sgd(0.1)}, score)
        with pytest.raises(ValueError, match=r"'tried' changed the structure of its"):
            ours.update(w, ours.init(w), w, **data)
        break
    else:
        pytest.fail("works in this release: try it like all others")


def test_scale_by_muon_takes_matrices():
    tx = contrib.scale_by_muon()
    ours = optax_ev3.ev3([tx], lambda w: -jnp.square(w).sum(axis=1), adapt=always(0))
    w = params()["w"]
    with lenient():
        updates, state = jax.jit(ours.update)(w, ours.init(w), w)
        expected, _ = jax.jit(tx.update)(w, tx.init(w), w)
    assert_close(updates, expected)
    assert_same_types(state, ours.init(w))


def test_lookahead_takes_pairs():
    tx = optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5)
    pair = optax.LookaheadParams.init_synced({"w": jnp.array([1.0, 2.0])})
    ours = optax_ev3.ev3(
        [tx], lambda pair: -jnp.square(pair.slow["w"]), adapt=always(0)
    )
    state, expected_state, expected = ours.init(pair), tx.init(pair), pair
    for _ in range(4):
        grads = jax.tree.map(lambda x: 2 * x, pair.fast)
        updates, state = jax.jit(ours.update)(grads, state, pair)
        same, expected_state = tx.update(grads, expected_state, expected)
        assert_close(updates, same)
        pair = optax.apply_updates(pair, updates)
        expected = optax.apply_updates(expected, same)
    assert float(pair.slow["w"][1]) < 2.0


def _dpsgd(seed):
    names = inspect.signature(contrib.dpsgd).parameters
    kwargs = {"key" if "key" in names else "seed": seed}
    return contrib.dpsgd(0.1, l2_norm_clip=1.0, noise_multiplier=0.1, **kwargs)


def test_private_optimizers_among_themselves():
    ours = optax_ev3.ev3([_dpsgd(1), _dpsgd(2)], score, adapt=always(1))
    w, data = params(), batch(0)

    def one(w, x, y):
        return loss(w, jnp.expand_dims(x, 0), jnp.expand_dims(y, 0))

    grads = jax.vmap(jax.grad(one), (None, 0, 0))(w, data["x"], data["y"])
    updates, state = jax.jit(ours.update)(grads, ours.init(w), w, **data)
    expected, _ = _dpsgd(2).update(grads, _dpsgd(2).init(w), w)
    assert_close(updates, expected)
    assert_same_types(state, ours.init(w))


def test_private_and_other_optimizers_do_not_mix():
    ours = optax_ev3.ev3({"private": _dpsgd(1), "sgd": optax.sgd(0.1)}, score)
    w = params()
    grads = jax.tree.map(lambda x: jnp.stack([x] * 8), w)
    with pytest.raises(
        ValueError, match=r"'sgd' returned updates of shapes.*\(8, 4, 3\)"
    ):
        jax.eval_shape(ours.update, grads, ours.init(w), w, **batch(0))


# States whose types the caller or the optimizer changes.

LENGTHS = {"one": (1, None), "two": (2, None), "own": (2, jnp.sum)}
RATES = [0.25, 1, np.float32(0.25), jnp.float32(0.25)]
DTYPES = ["float16", "bfloat16", "float32", "float64"]


def diagonally(rows, columns, third):
    """Every pair of a row and a column, and of each with one of the third kind."""
    pairs = itertools.product(enumerate(rows), enumerate(columns))
    return [
        (row, column, third[(i + j) % len(third)]) for (i, row), (j, column) in pairs
    ]


@pytest.mark.parametrize("rate, dtype, length", diagonally(RATES, DTYPES, [*LENGTHS]))
def test_learning_rate_set_in_mid_run(rate, dtype, length):
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    length, loss_fn = LENGTHS[length]
    ours = optax_ev3.ev3(
        [tx],
        lambda w: -w,
        adapt=always(0),
        explore=explore.rounds(length),
        loss_fn=loss_fn,
    )
    with x64(dtype == "float64"):
        w = jnp.array([4.0, 2.0], dtype)
        state = ours.init(w)
        kinds = types(state)
        for number in range(2):
            changed = optax.tree.set(state, learning_rate=rate) if number else state
            _, new = jax.eval_shape(ours.update, w, changed, w)
            assert types(new) == kinds
        if length == 1:
            updates, _ = jax.jit(ours.update)(w, changed, w)
            np.testing.assert_array_equal(updates, -rate * np.array([4.0, 2.0]))


def counting(start, step):
    """Counts in its state, and lowers parameters by what it has counted."""

    def update(updates, state, params=None):
        state = state + step
        return jax.tree.map(lambda u: -state * jnp.ones_like(u), updates), state

    return optax.GradientTransformation(lambda params: start, update)


COUNTS = {
    "int to float": (np.int32(0), 0.5),
    "Python int": (0, 0.5),
    "bool to int": (np.bool_(False), 2),
    "bool to float": (np.bool_(False), 0.25),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_inner_state_that_turns_from_integer_to_float(length, count):
    (start, step), (length, loss_fn) = COUNTS[count], LENGTHS[length]
    tx, w = counting(start, step), jnp.array([1.0])
    ours = optax_ev3.ev3(
        [tx],
        lambda w: -w,
        adapt=always(0),
        explore=explore.rounds(length),
        loss_fn=loss_fn,
    )
    (update, traces), state = traced(ours.update), ours.init(w)
    expected, alone = w, tx.init(w)
    for _ in range(4):
        updates, state = update(w, state, w)
        w = optax.apply_updates(w, updates)
        updates, alone = tx.update(expected, alone, expected)
        expected = optax.apply_updates(expected, updates)
        assert_close(w, expected)
    assert float(state.explore.explorers["explorer_0"].opt_state) == 4 * step == alone
    assert len(traces) == 1


def test_members_of_a_sweep_whose_state_turns_to_float():
    sweep = optax_ev3.sweep(lambda step: counting(0, step), step=[0.5, 0.25])
    ours, w = optax_ev3.ev3([sweep], lambda w: -w, adapt=always(1)), jnp.array([1.0])
    state = ours.init(w)
    for _ in range(4):
        _, state = jax.jit(ours.update)(w, state, w)
    (group,) = state.explore.explorers.values()
    np.testing.assert_array_equal(group.opt_state, [2.0, 1.0])


def test_adam_of_integers_that_are_not_frozen():
    # Its moments of integers become floats in the first step.
    w = {"n": jnp.arange(3), "w": jnp.array([1.0, -2.0])}
    tx = optax.adam(0.1)
    ours = optax_ev3.ev3([tx], lambda w: -w["w"], adapt=always(0))
    state, alone, grads = ours.init(w), tx.init(w), jax.tree.map(jnp.ones_like, w)
    for _ in range(3):
        _, state = jax.jit(ours.update)(grads, state, w)
        _, alone = tx.update(grads, alone, w)
    (one,) = state.explore.explorers.values()
    assert_close(one.opt_state, alone)


@pytest.mark.parametrize("length", [1, 2])
def test_state_that_needs_more_than_a_gradient_says_that_it_changes(length):
    def update(updates, state, params=None, *, value, **extra_args):
        return updates, {"seen": [state["seen"][0] + value]}

    tx = optax.GradientTransformationExtraArgs(
        lambda params: {"seen": [jnp.int32(0)]}, update
    )
    ours = optax_ev3.ev3({"odd": tx}, lambda w: -w, explore=explore.rounds(length))
    w = jnp.ones([3])
    with says(ValueError, "'odd'", "['seen'][0]", "int32[]", "float32[]", "init"):
        jax.eval_shape(ours.update, w, ours.init(w), w, value=0.5)


# What the caller says of the visible parameters.

NEEDY = {
    "polyak_sgd": lambda: optax.polyak_sgd(10.0),
    "lbfgs": lambda: optax.lbfgs(memory_size=3),
    "line_search": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)
    ),
    "plateau": lambda: optax.chain(
        optax.sgd(0.05), contrib.reduce_on_plateau(patience=1, rtol=0.01)
    ),
}


def bowl(w):
    return jnp.sum(jnp.array([1.0, 3.0]) * w**2)


@functools.cache
def bowl_alone(name, steps=4):
    """Plain optax, each step with its own value and gradient."""
    tx = NEEDY[name]()

    @jax.jit
    def step(w, state):
        value, grad = jax.value_and_grad(bowl)(w)
        extras = {"value": value, "grad": grad, "value_fn": bowl}
        updates, state = tx.update(grad, state, w, **extras)
        return optax.apply_updates(w, updates), state

    w = jnp.array([1.0, -0.5])
    state = _strong(tx.init(w))
    for _ in range(steps):
        w, state = step(w, state)
    return w


def bowl_with(tx, first, steps, share=1.0, **kwargs):
    """Where ``tx`` is after some steps beside one that hardly moves.

    The caller passes the value at the visible parameters, times ``share``.
    """
    slow = {"slow": optax.sgd(1e-4)}
    inner = {"needy": tx, **slow} if first else {**slow, "needy": tx}
    tx = optax_ev3.ev3(
        inner, lambda w: -bowl(w), loss_fn=bowl, adapt=always(0), **kwargs
    )
    w = jnp.array([1.0, -0.5])
    state = tx.init(w)

    @jax.jit
    def step(w, state):
        value, grad = jax.value_and_grad(bowl)(w)
        extras = {"value": share * value, "grad": grad, "value_fn": bowl}
        updates, state = tx.update(grad, state, w, **extras)
        return optax.apply_updates(w, updates), state

    for _ in range(steps):
        w, state = step(w, state)
    return w, state


@pytest.mark.parametrize(
    "name, strategy, first",
    diagonally(NEEDY, ["rounds", "branches"], [True, False]),
)
def test_value_of_the_caller_is_not_for_branches_elsewhere(name, strategy, first):
    with lenient():
        strategy = getattr(explore, strategy)(5)
        _, state = bowl_with(NEEDY[name](), first, 4, explore=strategy)
        expected = bowl_alone(name)
    np.testing.assert_allclose(
        state.explore.branches.ends["needy"], expected, rtol=1e-4
    )


def test_with_shared_gradients_the_value_goes_with_them():
    _, state = bowl_with(
        optax.polyak_sgd(10.0), False, 3, explore=explore.rounds(5, gradients="shared")
    )
    visible = expected = np.array([1.0, -0.5])
    for _ in range(3):
        grad = np.array([2.0, 6.0]) * visible
        value = np.sum(np.array([1.0, 3.0]) * visible**2)
        expected = expected - value / np.sum(grad**2) * grad
        visible = visible - 1e-4 * grad
    np.testing.assert_allclose(
        state.explore.branches.ends["needy"], expected, rtol=1e-5
    )


def test_in_one_step_rounds_the_value_is_the_callers():
    w, _ = bowl_with(optax.polyak_sgd(10.0), True, 1, share=0.5)
    start = np.array([1.0, -0.5])
    grad = np.array([2.0, 6.0]) * start
    expected = start - 0.5 * 1.75 / np.sum(grad**2) * grad
    np.testing.assert_allclose(w, expected, rtol=1e-6)
