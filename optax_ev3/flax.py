"""For Flax: a ``TrainState`` that passes extra arguments on, and growth for NNX."""

import dataclasses
from typing import Any

import optax

try:
    from flax import nnx
    from flax.training import train_state
except ImportError as _error:
    raise ImportError(
        'optax_ev3.flax needs Flax: pip install "optax_ev3[flax]"'
    ) from _error

from optax_ev3._src.applications import parameter_mapping
from optax_ev3._src.applications.growth import progress, report, take_along
from optax_ev3._src.applications.parameter_mapping import Growth

__all__ = ["TrainState", "grow_nnx"]


class TrainState(train_state.TrainState):
    """``flax.training.train_state.TrainState`` with extra arguments for ``tx``.

    Keyword arguments of :meth:`apply_gradients` that name no field of the state go to
    ``tx.update``; those that do replace the field, as in Flax.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_ev3, optax_ev3.flax
      >>> def score(params, batch):
      ...     return -((params["w"] - batch) ** 2)
      >>> tx = optax_ev3.ev3([optax.sgd(0.1)], assess_fn=score)
      >>> state = optax_ev3.flax.TrainState.create(
      ...     apply_fn=None, params={"w": jnp.zeros([])}, tx=tx
      ... )
      >>> grads = {"w": jnp.array(-2.0)}
      >>> state = state.apply_gradients(grads=grads, batch=jnp.ones([8]))
      >>> print(f"{state.params['w']:.1f} after step {state.step}")
      0.2 after step 1
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """One step of the optimizer.

        Args:
          grads: Gradients, a tree like ``params``; None where every explorer of
            :func:`optax_ev3.ev3` takes its own.
          **kwargs: New values of fields, and extra arguments for ``tx.update``.

        Returns:
          The state with new ``params``, ``opt_state`` and ``step``.

        Raises:
          TypeError: If ``tx`` needs an extra argument that is not given.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        replaced = {k: v for k, v in kwargs.items() if k in fields}
        extra_args = {k: v for k, v in kwargs.items() if k not in fields}

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            # Flax cannot take None: it is given an empty tree instead.
            given: Any = None if grads is None else updates
            return self.tx.update(given, state, params, **extra_args)

        # Flax's own method, with an optimizer that knows the extra arguments.
        tx = optax.GradientTransformation(self.tx.init, update)
        stepped = super(TrainState, self.replace(tx=tx)).apply_gradients(
            grads={} if grads is None else grads, **replaced
        )
        return stepped.replace(tx=replaced.get("tx", self.tx))


def grow_nnx(
    model: Any,
    optimizer: Any,
    larger: Any,
    tx: Any,
    growth: Growth | None = None,
) -> Any:
    """:func:`optax_ev3.growth.grow` for a Flax NNX model and its ``nnx.Optimizer``.

    Args:
      model: The smaller model.
      optimizer: Its ``nnx.Optimizer``.
      larger: The larger model, freshly initialized; it takes on all variables of the
        smaller one, statistics of BatchNorm too, once all is known to fit.
      tx: The transformation of the larger model.
      growth: Where the smaller model's arrays are in the larger one; paths are those
        of the model's variables.

    Returns:
      An ``nnx.Optimizer`` for ``larger``.

    Raises:
      ValueError: If the growth does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3.flax
      >>> from flax import nnx
      >>> from optax_ev3.models.nnx import MLP
      >>> model = MLP(4, (8,), classes=3, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
      >>> larger, how = model.widen(rngs=nnx.Rngs(1))
      >>> optimizer = optax_ev3.flax.grow_nnx(
      ...     model, optimizer, larger, optax.adam(0.1), how
      ... )
      >>> jnp.allclose(model(jnp.ones([2, 4])), larger(jnp.ones([2, 4])), rtol=1e-5)
      Array(True, dtype=bool)
    """
    before = nnx.state(model)
    graph, fresh = nnx.split(larger)
    mappings = parameter_mapping.array_mappings(before, fresh, growth)
    variables = parameter_mapping.apply(mappings, before, fresh)
    grown = nnx.Optimizer(nnx.merge(graph, variables), tx, wrt=optimizer.wrt)
    counters = {f"opt_state/{x}" for x in progress(grown.opt_state)}
    state = take_along(mappings, nnx.state(optimizer), nnx.state(grown), counters)
    nnx.update(grown, state)
    nnx.update(larger, variables)
    report(mappings)
    return grown
