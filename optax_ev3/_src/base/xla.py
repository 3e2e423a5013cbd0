"""Workarounds for XLA, each with what it waits for.

``jax.extend`` is imported where it is used: it brings Pallas, and takes about as long
as all of this package.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import layout

from optax_ev3._src.base import control, sharding

# Numbers in a leaf that a kernel of its own would not keep busy.
_SMALL = 2**16

# Earlier releases of JAX have no rule for constraints of layouts under jax.vmap.
_LAYOUTS_UNDER_VMAP = jax.__version_info__ >= (0, 10)


def quick_convolutions(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` with convolutions that CPUs compute quickly in conditionals and loops.

    XLA's CPU back end has a quick kernel for convolutions of one form: features last,
    kernels with their outputs last. It brings others to that form where they stand at
    the top of a program, but not within a conditional or a loop, where they take ten
    times as long: gradients with respect to kernels always, channels-first ones in any
    case. Here all are in that form from the start, with explicit transpositions.

    Waits for https://github.com/jax-ml/jax/issues/12868.

    Args:
      fn: A function of trees of arrays that JAX can trace.

    Returns:
      The function with the same results, on other devices with the same program.
    """

    def quick(*args: Any):
        if not control.is_traced(args):
            return fn(*args)  # Outside of any conditional.
        from jax.extend import core

        traced, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        leaves, structure = jax.tree.leaves(args), jax.tree.structure(shapes)
        plain, changed = core.jaxpr_as_fun(traced), _changed(traced)
        if changed is None:
            return jax.tree.unflatten(structure, plain(*leaves))
        results = control.platform_dependent(
            *leaves, cpu=core.jaxpr_as_fun(changed), default=plain
        )
        return jax.tree.unflatten(structure, results)

    return quick


def _changed(found: Any) -> Any:
    """What an equation has as a parameter, its convolutions changed; None for none.

    That are programs, alone or in a sequence, such as the bodies of loops.
    """
    from jax.extend import core

    if isinstance(found, core.ClosedJaxpr):
        inner = _changed(found.jaxpr)
        return None if inner is None else found.replace(jaxpr=inner)
    if type(found) in (list, tuple):
        parts = [_changed(one) for one in found]
        if all(part is None for part in parts):
            return None
        pairs = zip(parts, found, strict=True)
        return type(found)(one if part is None else part for part, one in pairs)
    if not isinstance(found, core.Jaxpr):
        return None
    equations, any_changed = [], False
    for equation in found.eqns:
        if equation.primitive is core.primitives.conv_general_dilated_p:
            equations += _transposed(equation)
            any_changed = True
            continue
        params = {name: _changed(value) for name, value in equation.params.items()}
        params = {name: value for name, value in params.items() if value is not None}
        if params:
            equation = equation.replace(params={**equation.params, **params})
            any_changed = True
        equations.append(equation)
    return found.replace(eqns=equations) if any_changed else None


def _transposed(equation: Any) -> list[Any]:
    """The equations of :func:`_convolve` in the place of a convolution."""

    def convolve(*operands: Any):
        return _convolve(*operands, **equation.params)

    inner = jax.make_jaxpr(convolve)(*[v.aval for v in equation.invars]).jaxpr
    outer = [*equation.invars, *equation.outvars]
    names = dict(zip([*inner.invars, *inner.outvars], outer, strict=True))
    return [
        one.replace(
            invars=[names.get(v, v) for v in one.invars],
            outvars=[names.get(v, v) for v in one.outvars],
            source_info=equation.source_info,
        )
        for one in inner.eqns
    ]


def _convolve(lhs: Any, rhs: Any, dimension_numbers: Any, **params: Any):
    """A convolution in the form that has a quick kernel, between transpositions."""
    from jax.extend import core

    given, last = dimension_numbers, lhs.ndim - 1
    spatial = tuple(range(1, last))
    quick = lax.ConvDimensionNumbers(
        lhs_spec=(0, last, *spatial),
        rhs_spec=(last, last - 1, *range(last - 1)),
        out_spec=(0, last, *spatial),
    )
    batch, features, *rest = given.lhs_spec
    lhs = lax.transpose(lhs, (batch, *rest, features))
    outputs, inputs, *rest = given.rhs_spec
    rhs = lax.transpose(rhs, (*rest, inputs, outputs))
    convolution = core.primitives.conv_general_dilated_p
    out = convolution.bind(lhs, rhs, dimension_numbers=quick, **params)
    batch, features, *rest = given.out_spec
    order = (batch, *rest, features)
    return lax.transpose(out, [order.index(axis) for axis in range(lhs.ndim)])


def _on_one_device() -> bool:
    """Whether a program surely runs on one device: the process has no other.

    How arrays are spread is known at trace time by explicit sharding alone, and XLA
    does not know how a layout constraint, or a concatenation of arrays, is spread. So
    :func:`row_major` and :func:`joined`, which make programs for one GPU faster, do
    nothing in processes with several devices, even if a program uses one of them. A
    program exported from a process with one device is made for one.
    """
    return jax.device_count() == 1


def row_major(tree: Any) -> Any:
    """The tree in the layout of arrays outside of programs, with one GPU.

    XLA would keep the kernels of convolutions in a layout of theirs, and copy them back
    and forth.
    """
    leaves, structure = jax.tree.flatten(tree)
    deep = [
        i
        for i, x in enumerate(leaves)
        if jnp.ndim(x) > 2 and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    if not (deep and _LAYOUTS_UNDER_VMAP and _on_one_device()):
        return tree

    def constrain(leaves: Any):
        return [
            layout.with_layout_constraint(leaf, layout.Layout(tuple(range(leaf.ndim))))
            for leaf in leaves
        ]

    constrained = control.platform_dependent(
        [leaves[i] for i in deep],
        cuda=constrain,
        rocm=constrain,
        default=lambda leaves: leaves,
    )
    for i, leaf in zip(deep, constrained, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


def joined(leaves: Any):
    """The leaves, of which the small ones are put into one: a kernel, not dozens."""
    if not _on_one_device():
        return leaves
    small, others = [], []
    for leaf in leaves:
        alone = leaf.size > _SMALL or sharding.is_explicit(leaf)
        (others if alone else small).append(leaf)
    if len(small) < 2:
        return leaves
    joined = jnp.concatenate([x.ravel() for x in small])
    # Without the barrier XLA reduces them one by one all the same.
    return [*others, lax.optimization_barrier(joined)]
