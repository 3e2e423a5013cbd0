"""For Flax: a ``TrainState`` that hands extra arguments to the optimizer."""

import dataclasses
import functools
from typing import Any

import optax
from flax.training import train_state


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
          grads: Gradients, a tree like ``params``.
          **kwargs: New values of fields, and extra arguments for ``tx.update``.

        Returns:
          The state with new ``params``, ``opt_state`` and ``step``.

        Raises:
          TypeError: If ``tx`` needs an extra argument that is not given.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        replaced = {k: v for k, v in kwargs.items() if k in fields}
        extra_args = {k: v for k, v in kwargs.items() if k not in fields}
        # Flax's own method, with an optimizer that knows the extra arguments.
        update = functools.partial(self.tx.update, **extra_args)
        tx = optax.GradientTransformationExtraArgs(self.tx.init, update)
        stepped = super(TrainState, self.replace(tx=tx)).apply_gradients(
            grads=grads, **replaced
        )
        return stepped.replace(tx=replaced.get("tx", self.tx))
