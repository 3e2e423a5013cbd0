"""Losses of knowledge distillation, and the teachers that they learn from.

Dimensions: ``n`` examples of a batch, ``N`` examples of the data.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import core, lax
from jax.tree_util import Partial

from optax_ev3._src.base import callbacks, checks, trees


def soft_target_loss(
    logits: Any,
    teacher_logits: Any,
    temperature: Any = 1.0,
    *,
    reverse: bool = False,
    power: int = 2,
    standardize: bool = False,
) -> jax.Array:
    r"""How far a student's softened probabilities are from the teacher's.

    With :math:`p = \mathrm{softmax}(z / T)` of the student's logits z, and q likewise
    of the teacher's, it is :math:`T^k` times

    .. math:: \mathrm{KL}(q \,\|\, p) = \sum_c q_c (\log q_c - \log p_c)

    or, reversed, :math:`\mathrm{KL}(p \,\|\, q)`, under which the student keeps to the
    teacher's likeliest classes rather than covering all of them.

    Args:
      logits: The student's, ``[..., classes]`` real and finite.
      teacher_logits: The teacher's, likewise. No gradient flows to them.
      temperature: T, a number above 0, or a scalar that JAX traces, such as a
        hyperparameter of :func:`optax_ev3.evolve`.
      reverse: Whether the divergence is that of the student from the teacher.
      power: k: 0, 1 or 2. Softening divides gradients by about :math:`T^2`; with 2
        they keep their size.
      standardize: Whether the logits of both are first brought to mean 0 and standard
        deviation 1 over the classes (equal ones to 0), so that the student need not
        match the size of the teacher's.

    Returns:
      ``[...]``, one loss for each example, in nats, at least 0 up to rounding; float32,
      or float64 where logits are.

    Raises:
      TypeError: If an argument is of the wrong kind, such as complex logits.
      ValueError: If the shapes of the logits differ, there are fewer than two classes,
        the temperature is not above 0 and finite, or ``power`` is another one.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import distillation
      >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 2.0]])
      >>> print(distillation.soft_target_loss(student, teacher))
      [0.3278]
      >>> print(distillation.soft_target_loss(student, teacher, 2.0, reverse=True))
      [0.4804]
      >>> print(distillation.soft_target_loss(teacher, 5 * teacher, standardize=True))
      [0.]

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network
      <https://arxiv.org/abs/1503.02531>`_, 2015: the divergence from the teacher.

      Ding et al., `EV3: Ever Evolving Evaluator
      <https://arxiv.org/abs/2310.18893>`_, 2023: the reverse one.

      Sun et al., `Logit Standardization in Knowledge Distillation
      <https://arxiv.org/abs/2403.01427>`_, 2024.
    """
    temperature, power = _temperature(temperature), _power(power)
    logits = _logits(logits, "the student's logits")
    teacher_logits = lax.stop_gradient(_logits(teacher_logits, "the teacher's logits"))
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher must have logits of one shape, got {logits.shape} "
            f"and {teacher_logits.shape}."
        )

    def log_softened(logits: jax.Array) -> jax.Array:
        logits = _standardized(logits) if standardize else logits
        return jax.nn.log_softmax(logits / jnp.asarray(temperature, logits.dtype))

    student, teacher = log_softened(logits), log_softened(teacher_logits)
    predicted, target = (teacher, student) if reverse else (student, teacher)
    divergence = optax.losses.kl_divergence_with_log_targets(predicted, target)
    return divergence * jnp.asarray(temperature, divergence.dtype) ** power


def loss(
    student: Callable[..., Any],
    teacher: Callable[..., Any],
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    power: int = 2,
    standardize: bool = False,
    hard: float = 0.0,
    labels: str = "labels",
) -> Callable[..., Any]:
    r"""A loss function by which a student learns from a teacher.

    It is the mean over the examples of

    .. math:: (1 - h)\,\mathrm{soft} + h\,\mathrm{hard},

    where soft is :func:`soft_target_loss` and hard is the cross-entropy with the
    labels. It names all parameters that the student and the teacher name, so that
    :func:`optax_ev3.ev3` hands each of them its own; a ``key`` is the same for both.

    Args:
      student: ``student(params, **named)`` -> logits ``[..., classes]``, or
        ``(logits, aux)``.
      teacher: ``teacher(**named)`` -> logits of the same shape: any function, such as
        ``lambda images: resnet.apply(variables, images)``, or, of logits that the loop
        computes, ``lambda teacher_logits: teacher_logits``; or one made by
        :func:`stored` or :func:`archived`.
      temperature: T of :func:`soft_target_loss`, a number above 0.
      reverse: Whether the divergence is that of the student from the teacher.
      power: The power of the temperature that the divergence is multiplied by.
      standardize: Whether logits are standardized.
      hard: h, from 0 to 1: how much cross-entropy is mixed in. With 1 the teacher is
        not asked.
      labels: How the labels are called among the extra arguments of ``update``, used
        where ``hard`` is above 0: integers ``[...]`` from 0 to ``classes - 1``.

    Returns:
      ``loss_fn(params, **named)`` -> ``[]``, or ``([], aux)`` where the student has
      auxiliary outputs; float32, or float64 where logits are. The named arguments are
      keywords only, and the function's name says what it is, such as
      ``soft_T2_reverse``. It is for :func:`optax_ev3.product`,
      :func:`optax_ev3.explorer` and the ``loss_fn`` of :func:`optax_ev3.ev3`.

    Raises:
      TypeError: If an argument is of the wrong kind; at trace time, if labels or logits
        are.
      ValueError: If a number is out of its range, or anything but the student's first
        argument is called ``params``; at trace time, if shapes do not go together.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> from optax_ev3 import distillation
      >>> def student(w, x):
      ...     return x @ w
      >>> def teacher(x):
      ...     return 3 * x
      >>> plain = distillation.loss(student, teacher)
      >>> print(plain(jnp.zeros([2, 2]), x=jnp.eye(2)))
      0.5023
      >>> mixed = distillation.loss(student, teacher, temperature=2, hard=0.1)
      >>> print(mixed(3 * jnp.eye(2), x=jnp.eye(2), labels=jnp.array([0, 1])))
      0.0049
      >>> [e.name for e in optax_ev3.product({"sgd": optax.sgd(0.1)}, [plain, mixed])]
      ['sgd/soft_T1', 'sgd/soft_T2_hard0.1']

      One loss for each teacher, the last one an earlier student:

      >>> teachers = {"big": teacher, "old": distillation.archived(student, jnp.eye(2))}
      >>> losses = {k: distillation.loss(student, v) for k, v in teachers.items()}
    """
    options = _Options(reverse, _power(power), standardize)
    temperature = _temperature(checks.real(temperature, "temperature"))
    hard = checks.real(hard, "hard")
    if not 0 <= hard <= 1:
        raise ValueError(f"hard must be from 0 to 1, got {hard}.")
    callbacks.check_callback(student, "student")
    if not callable(teacher):
        raise TypeError(
            f"teacher must be callable as teacher(**named), got {teacher!r}."
        )
    wanted = callbacks.free(student, 1).parameters
    if hard < 1:
        wanted += callbacks.free(teacher, 0).parameters
    if hard > 0:
        wanted.append(inspect.Parameter(labels, inspect.Parameter.KEYWORD_ONLY))
    signature = _signature(wanted, _PARAMS)

    def mean(logits: Any, given: Mapping[str, Any]) -> Any:
        total = 0.0
        if hard < 1:
            target = callbacks.bind(teacher, "teacher", given, positional=0)()
            soft = soft_target_loss(logits, target, temperature, **options._asdict())
            total += (1 - hard) * soft.mean()
        if hard > 0:
            total += hard * _cross_entropy(logits, given[labels], labels).mean()
        return total

    def loss_fn(params: optax.Params, /, **given: Any) -> Any:
        signature.bind(params, **given)  # Or misspelt arguments would be ignored.
        made = callbacks.bind(student, "student", given)(params)
        if not isinstance(made, tuple):
            return mean(made, given)
        if len(made) != 2:
            raise TypeError(
                f"student must return logits or (logits, aux), got {len(made)} values."
            )
        return mean(made[0], given), made[1]

    loss_fn.__name__ = _name(temperature, hard, options)
    vars(loss_fn)["__signature__"] = signature
    return loss_fn


def stored(logits: Any, size: int | None = None) -> Callable[..., jax.Array]:
    """A teacher whose logits were computed beforehand.

    Args:
      logits: ``[N, classes]``, real and finite; kept in their dtype, integers as
        float32.
      size: How many examples the data has, to be sure that it is N.

    Returns:
      ``teacher(index)`` -> ``[n, classes]``, for :func:`loss`, where ``index``, ``[n]``
      integer, says which examples of the data the batch holds. Where it is negative or
      N or more, the logits are NaN, and so is the loss: :func:`optax_ev3.ev3` adopts no
      update from it. A pytree of its logits: a jitted function that takes it as an
      argument holds no copy of them, and does not compile again for other ones.

    Raises:
      TypeError: If ``logits`` are no real numbers; at trace time, if ``index`` is not
        integer.
      ValueError: If ``logits`` have another shape, are not finite, or there are not
        ``size`` of them.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import distillation
      >>> teacher = distillation.stored([[0.0, 1.0], [2.0, 3.0]], size=2)
      >>> print(teacher(jnp.array([1, 1, -1])))
      [[ 2.  3.]
       [ 2.  3.]
       [nan nan]]
    """
    rows = _real(logits, "logits")
    if rows.ndim != 2:
        raise ValueError(f"logits must have shape [N, classes], got {rows.shape}.")
    if size is not None and checks.integer(size, "size") != len(rows):
        raise ValueError(
            f"there are logits of {len(rows)} examples for data of {size}."
        )
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        rows = rows.astype(jnp.float32)
    wrong = jnp.flatnonzero(~jnp.isfinite(rows).all(axis=1))
    if wrong.size:
        raise ValueError(
            f"logits must be finite, those of {wrong.size} examples are not; the first "
            f"is example {wrong[0]}."
        )

    # The last row stands for missing examples. NaN from a select or from jnp.take had
    # finite exponentials in optimized code of XLA for CPUs.
    rows = jnp.pad(rows, [(0, 1), (0, 0)], constant_values=jnp.nan)
    return Partial(_look_up, rows)


def _look_up(rows: jax.Array, index: Any) -> jax.Array:
    index, size = _integers(index, "index"), len(rows) - 1
    return rows[jnp.where((index >= 0) & (index < size), index, size)]


def archived(student: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """A teacher that is a student with the parameters it has now.

    So a later student learns from earlier ones, as in the EV3 paper, where every pass
    adds one loss for each of them.

    Args:
      student: ``student(params, **named)`` -> logits, or ``(logits, aux)``, whose
        ``aux`` is dropped. With dropout or BatchNorm, rather the function that
        evaluates than the one that is trained.
      params: Its parameters. They are not copied: where the training step donates
        them, give it a copy.

    Returns:
      ``teacher(**named)`` -> logits, for :func:`loss`. A pytree of its parameters, as
      of logits in :func:`stored`.

    Raises:
      TypeError: If ``student`` is not callable with parameters.
      ValueError: If it names another argument ``params``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import distillation
      >>> def student(w, x):
      ...     return x @ w
      >>> teacher = distillation.archived(student, 2 * jnp.eye(2))
      >>> print(teacher(x=jnp.array([[1.0, 3.0]])))
      [[2. 6.]]

    References:
      Ding et al., `EV3: Ever Evolving Evaluator
      <https://arxiv.org/abs/2310.18893>`_, 2023.
    """
    callbacks.check_callback(student, "student")
    return Partial(_Archived(student), params)


@dataclasses.dataclass(frozen=True)
class _Archived:
    """Equal if its student is, so that a jitted function does not compile again."""

    student: Callable[..., Any]

    def __post_init__(self) -> None:
        found = _signature(callbacks.free(self.student, 1).parameters, _PARAMS)
        object.__setattr__(self, "__signature__", found)

    def __call__(self, params: optax.Params, /, **given: Any) -> Any:
        made = callbacks.bind(self.student, "archived student", given)(params)
        return made[0] if isinstance(made, tuple) else made


class _Options(NamedTuple):
    """Keyword arguments of :func:`soft_target_loss`."""

    reverse: bool
    power: int
    standardize: bool


_PARAMS = inspect.Parameter("params", inspect.Parameter.POSITIONAL_ONLY)


def _signature(
    wanted: Sequence[inspect.Parameter], *positional: inspect.Parameter
) -> inspect.Signature:
    """Takes all wanted parameters by keyword; those without any default are required.

    The defaults are only shown: a callback that is not given an argument uses its own.
    """
    by_name, rest = {}, []
    for parameter in wanted:
        if parameter.kind == inspect.Parameter.VAR_KEYWORD:
            rest = [parameter]
        elif parameter.kind != inspect.Parameter.VAR_POSITIONAL:
            required = parameter.default is inspect.Parameter.empty
            if required or parameter.name not in by_name:
                by_name[parameter.name] = parameter
    if _PARAMS.name in by_name:
        raise ValueError(
            "an argument called 'params' cannot be handed over by name, since that is "
            "what update calls the parameters in training. A teacher with parameters "
            "of its own is a function of the data, such as lambda images: "
            "apply(params, images), or archived(student, params)."
        )
    keywords = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=p.empty)
        for p in by_name.values()
    ]
    return inspect.Signature([*positional, *keywords, *rest])


def _name(temperature: float, hard: float, options: _Options) -> str:
    """Such as soft_T2_reverse: the temperature, and what differs from the default."""
    if hard == 1:
        return "hard"
    return "".join(
        [
            f"soft_T{temperature:g}",
            "_reverse" * options.reverse,
            f"_power{options.power}" * (options.power != 2),
            "_standardized" * options.standardize,
            f"_hard{hard:g}" * (hard > 0),
        ]
    )


def _standardized(logits: jax.Array) -> jax.Array:
    """Mean 0 and standard deviation 1 over the classes; 0 where all are equal.

    The result does not depend on the offset and the scale of the logits. So both are
    removed first, without gradients: then equal logits are exactly equal, squares
    neither overflow nor vanish, and the gradient of the root stays finite.
    """
    highest = lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    spread = lax.stop_gradient((highest - logits).max(axis=-1, keepdims=True))
    unit = (logits - highest) / jnp.where(spread > 0, spread, 1)
    centred = unit - unit.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.where(spread > 0, variance, 1))


def _cross_entropy(logits: Any, labels: Any, name: str) -> jax.Array:
    """``[...]``, of integer labels."""
    logits, labels = _logits(logits, "the student's logits"), _integers(labels, name)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name} must have shape {logits.shape[:-1]}, one for each example of "
            f"logits of shape {logits.shape}, got {labels.shape}."
        )
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def _temperature(value: Any) -> Any:
    if isinstance(value, core.Tracer):
        if value.shape:
            raise ValueError(f"temperature must be a scalar, got shape {value.shape}.")
        return value
    value = checks.real(value, "temperature")
    if not 0 < value < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {value}.")
    return value


def _power(value: Any) -> int:
    if checks.integer(value, "power") not in (0, 1, 2):
        raise ValueError(f"power must be 0, 1 or 2, got {value}.")
    return int(value)


def _logits(values: Any, what: str) -> jax.Array:
    """``[..., classes]``, float32 at the least."""
    values = _real(values, what)
    if values.ndim == 0 or values.shape[-1] < 2:
        raise ValueError(
            f"{what} must have shape [..., classes], at least two classes, got "
            f"{values.shape}."
        )
    return values.astype(trees.wide_dtype(values))


def _real(values: Any, what: str) -> jax.Array:
    if isinstance(values, tuple):
        raise TypeError(f"{what} must be one array, got a tuple of {len(values)}.")
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.number) or jnp.iscomplexobj(values):
        raise TypeError(f"{what} must be real numbers, got dtype {values.dtype}.")
    return values


def _integers(values: Any, what: str) -> jax.Array:
    """As they are, int32 at the least, so that any size can be compared with them."""
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"{what} must be integer, got dtype {values.dtype}.")
    return values if values.dtype.itemsize >= 4 else values.astype(jnp.int32)
