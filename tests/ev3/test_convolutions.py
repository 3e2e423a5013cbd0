"""Convolutions within conditionals and loops: as quick as at the top of a program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import optax_ev3
from optax_ev3 import adapt, explore
from optax_ev3._src.base import xla

LAST, FIRST = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
# By name: dimension numbers, shapes of operand and kernel, more arguments.
FORMS = {
    "features last": (LAST, (4, 6, 5, 3), (3, 2, 3, 4), {}),
    "features first": (FIRST, (4, 3, 6, 5), (4, 3, 3, 2), {}),
    "odd": (("HCNW", "IWOH", "CWHN"), (6, 3, 4, 5), (3, 2, 4, 3), {}),
    "strides": (LAST, (4, 6, 5, 3), (3, 2, 3, 4), {"window_strides": (2, 1)}),
    "padding": (FIRST, (4, 3, 6, 5), (4, 3, 3, 2), {"padding": ((2, 0), (-1, 3))}),
    "wide kernel": (LAST, (4, 8, 9, 3), (3, 2, 3, 4), {"rhs_dilation": (2, 3)}),
    "transposed": (
        LAST,
        (4, 6, 5, 3),
        (3, 2, 3, 4),
        {"lhs_dilation": (2, 3), "padding": ((1, 1), (2, 1))},
    ),
    "grouped": (FIRST, (4, 6, 6, 5), (4, 3, 3, 2), {"feature_group_count": 2}),
    "depthwise": (LAST, (4, 6, 5, 3), (3, 2, 1, 6), {"feature_group_count": 3}),
    "batch groups": (LAST, (4, 6, 5, 3), (3, 2, 3, 4), {"batch_group_count": 2}),
    "one axis": (("NCW", "OIW", "NCW"), (4, 3, 8), (4, 3, 3), {"window_strides": (2,)}),
    "three axes": (
        ("NDHWC", "DHWIO", "NDHWC"),
        (2, 4, 3, 5, 2),
        (2, 2, 3, 2, 3),
        {"window_strides": (1, 2, 1)},
    ),
    "no axis": (("NC", "OI", "NC"), (4, 3), (5, 3), {"window_strides": ()}),
    "float16": (LAST, (4, 6, 5, 3), (3, 2, 3, 4), {}),
}


def drawn(*shape, seed=0):
    numbers = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(numbers, jnp.float32)


def convolution(form):
    """``(kernel, x) -> [...]`` and where it is evaluated."""
    numbers, x, kernel, more = FORMS[form]
    more = {"window_strides": (1,) * (len(x) - 2), "padding": "SAME", **more}

    def fn(kernel, x):
        return lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **more)

    dtype = jnp.float16 if form == "float16" else jnp.float32
    return fn, (drawn(*kernel, seed=1).astype(dtype), drawn(*x).astype(dtype))


def energy(fn):
    return lambda *args: jnp.square(fn(*args).astype(jnp.float32)).mean()


@pytest.mark.parametrize("form", FORMS)
def test_the_same_numbers_in_all_forms(form):
    fn, args = convolution(form)
    assert_close(jax.jit(xla.quick_convolutions(fn))(*args), fn(*args))
    slope = jax.grad(energy(fn), argnums=(0, 1))
    assert_close(jax.jit(xla.quick_convolutions(slope))(*args), slope(*args))


def in_scan(fn):
    return lambda k, x: lax.scan(lambda c, _: (c, fn(k, x + c)), 0.5, None, 2)[1]


def in_while(fn):
    def both(k, x):
        start = (0, jnp.zeros(jax.eval_shape(fn, k, x).shape))
        return lax.while_loop(
            lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] + fn(k, x)), start
        )[1]

    return both


def in_cond(fn):
    return lambda k, x: lax.cond(x.sum() < 1e9, fn, lambda k, x: 0 * fn(k, x), k, x)


def in_custom_jvp(fn):
    wrapped = jax.custom_jvp(fn)
    wrapped.defjvp(
        lambda args, tangents: jax.jvp(lambda *a: 2 * fn(*a), args, tangents)
    )
    return wrapped


def in_custom_vjp(fn):
    wrapped = jax.custom_vjp(fn)
    wrapped.defvjp(
        lambda *args: (fn(*args), args),
        lambda args, g: tuple(3 * x for x in jax.vjp(fn, *args)[1](g)),
    )
    return wrapped


INSIDE = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "vmap": lambda fn: lambda k, x: jax.vmap(fn)(jnp.stack([k, -k]), jnp.stack([x, x])),
    "scan": in_scan,
    "while": in_while,
    "cond": in_cond,
    "custom_jvp": in_custom_jvp,
    "custom_vjp": in_custom_vjp,
    "scan of remat": lambda fn: in_scan(jax.checkpoint(fn)),
}


@pytest.mark.parametrize("inside", INSIDE)
def test_the_same_numbers_wherever_they_stand(inside):
    convolve, args = convolution("features first")
    # Closed over, as losses close over their arguments.
    fn = energy(INSIDE[inside](lambda kernel, x: convolve(kernel, x + args[1])))
    assert_close(xla.quick_convolutions(fn)(*args), fn(*args))
    if inside != "while":
        slope = jax.grad(fn)
        quick = xla.quick_convolutions(slope)
        assert_close(jax.jit(quick)(*args), slope(*args))
        # Still differentiable, with the rules that a function brings.
        again = jax.jit(jax.grad(xla.quick_convolutions(fn)))
        assert_close(again(*args), slope(*args))


def test_the_same_numbers_under_vmap_and_over_devices():
    fn, (kernel, x) = convolution("features first")
    slope = jax.grad(energy(fn))
    kernels = jnp.stack([kernel, 2 * kernel])
    mapped = jax.jit(jax.vmap(xla.quick_convolutions(slope), (0, None)))
    assert_close(mapped(kernels, x), jax.vmap(slope, (0, None))(kernels, x))

    def mean_slope(kernel, x):
        return lax.pmean(xla.quick_convolutions(slope)(kernel, x), "i")

    spread = jax.shard_map(
        mean_slope,
        mesh=Mesh(jax.devices()[:4], "i"),
        in_specs=(PartitionSpec(), PartitionSpec("i")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    assert_close(jax.jit(spread)(kernel, x), slope(kernel, x))


def test_structures_of_trees_are_kept():
    def fn(tree):
        return {"sum": tree["a"] + 1, "nothing": None}, ()

    assert_close(xla.quick_convolutions(fn)({"a": 1.0}), fn({"a": jnp.float32(1)}))


def test_programs_without_convolutions_stay_as_they_are():
    def fn(x):
        return jnp.sin(x) @ x

    x = drawn(3, 3)
    found = jax.make_jaxpr(xla.quick_convolutions(fn))(x)
    assert str(found) == str(jax.make_jaxpr(fn)(x))


@pytest.mark.usefixtures("for_all_platforms")
def test_other_devices_get_the_program_as_it_is():
    fn, args = convolution("features first")
    slope = jax.grad(energy(fn))

    def forms(fn, platform):
        lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,))
        return re.findall(r"dim_numbers = (.*?), window", lowered.as_text())

    quick = xla.quick_convolutions(slope)
    assert set(forms(quick, "cpu")) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
    for platform in ("cuda", "tpu"):
        assert forms(quick, platform) == forms(slope, platform) != forms(quick, "cpu")


# EV3: the compiled program has all of its convolutions in the form of XLA's quick
# kernel. Elsewhere than in that form they are ten times as slow.


def score(params, x, y):
    x = lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "SAME", dimension_numbers=FIRST
    )
    return -((jax.nn.relu(x).mean([2, 3]) @ params["out"] - y) ** 2)


def loss(params, x, y):
    return -score(params, x, y).mean()


RACE = {"explore": explore.branches(2, racing=explore.Racing(1, 4))}
ADAMS = [optax.adam(0.1), optax.adam(0.2)]
OWN = [optax_ev3.explorer(tx, loss) for tx in ADAMS]
SWEEP = optax_ev3.sweep(optax.adam, learning_rate=[0.1, 0.2])
SETTINGS = {
    "one step": {},
    "one step, own losses": {"inner": OWN},
    "assessed in a loop": {"assess_mode": "map"},
    "assessed at once": {"assess_mode": "vmap"},
    "assessed in chunks": {"assess_fn": optax_ev3.in_chunks(score, 2, ["x", "y"])},
    "own gradients": {"loss_fn": loss, "explore": explore.rounds(2)},
    "own gradients, a race": {"loss_fn": loss, **RACE},
    "own losses, a race": {"inner": OWN, **RACE},
    "shared gradients, a race": RACE,
    "a sweep": {"inner": [SWEEP]},
    "a sweep, own losses, a race": {"inner": [optax_ev3.explorer(SWEEP, loss)], **RACE},
    "recommended": {
        "inner": OWN,
        "explore": explore.branches(
            2,
            restart=explore.never(inner_state="copy"),
            averages=[explore.trajectory_average(), explore.branch_average()],
            racing=explore.Racing(1, 4),
        ),
        "adapt": adapt.greedy(),
    },
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_all_convolutions_are_in_the_quick_form(setting):
    kwargs = {"inner": ADAMS, "assess_fn": score, **SETTINGS[setting]}
    params = {"kernel": drawn(4, 2, 3, 3), "out": drawn(4)}
    tx = optax_ev3.ev3(**kwargs)
    update = jax.jit(lambda *args: tx.update(*args, x=drawn(6, 2, 5, 5), y=drawn(6)))
    program = update.lower(params, tx.init(params), params).compile().as_text()
    forms = re.findall(r" convolution\(.*dim_labels=([^, ]+)", program)
    assert forms
    assert set(forms) == {"b01f_01io->b01f"}
