"""The experiment of `distillation.py`: a teacher, students that grow, fixed students.

A student's variables, one tree, are its parameters and the running statistics of
BatchNorm: whatever is chosen, averaged or grown takes both along. Every step is a
jitted call of its own, since convolutions in loops of XLA are slow on CPUs. Data and
teachers are arguments of these calls, so that models compile once for all seeds.
"""

import dataclasses
import functools
import inspect
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import _checkpoint
import _cifar
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_ev3
from optax_ev3 import distillation, evidence, explore, growth
from optax_ev3.models.linen import ResNet


class Loss(NamedTuple):
    """A loss of distillation, see `optax_ev3.distillation.loss`."""

    temperature: float = 1.0
    reverse: bool = False
    hard: float = 0.0


class Setting(NamedTuple):
    """All that differs between data sets. Sizes are blocks in each of three stages."""

    data: str  # digits, cifar10 or cifar100
    classes: int
    augment: bool  # Whether each batch is cropped and flipped at random.
    sizes: tuple[int, ...]  # Of students: n blocks a stage make 6 n + 2 layers.
    filters: int  # Of students, in the first stage.
    losses: tuple[Loss, ...]  # By the teacher; the first one also by former students.
    rates: tuple[float, ...]  # Learning rates of AdamW: each with every loss.
    batch: int
    held_out: int  # Examples that are kept from training.
    assessed: int  # Of them, how many a round draws, with replacement.
    length: int  # Steps of a trajectory.
    rounds: int  # Without significant progress, after which a student grows.
    most: int  # Rounds at one size, at most.
    passes: int  # Of multi pass.
    teacher_size: int
    teacher_filters: int
    teacher_steps: int
    teacher_rate: float  # The highest; it falls to 0 along a cosine.


_PAPER = Setting(
    data="cifar100",
    classes=100,
    augment=True,
    sizes=(1, 2, 4, 8),
    filters=16,
    losses=(Loss(reverse=True),),
    rates=(1e-3,),
    batch=128,
    held_out=5000,
    assessed=2048,
    length=5000,
    rounds=2,
    most=20,
    passes=3,
    teacher_size=9,
    teacher_filters=32,
    teacher_steps=60_000,
    teacher_rate=3e-3,
)
SETTINGS = {
    # Small enough for any machine.
    "digits": Setting(
        data="digits",
        classes=10,
        augment=False,
        sizes=(1, 2, 4),
        filters=4,
        losses=(Loss(),),
        rates=(3e-2, 3e-3),
        batch=64,
        held_out=300,
        assessed=300,
        length=100,
        rounds=6,
        most=40,
        passes=2,
        teacher_size=1,
        teacher_filters=16,
        teacher_steps=1500,
        teacher_rate=5e-3,
    ),
    # As the paper trains, but for the teacher, which was a vision transformer.
    "cifar100": _PAPER,
    "cifar10": _PAPER._replace(data="cifar10", classes=10),
    # Shorter rounds, and more to choose from in them.
    "cifar100-diverse": _PAPER._replace(
        losses=tuple(Loss(temperature, reverse=True) for temperature in (0.5, 1, 2)),
        rates=(1e-3, 1e-2),
        length=500,
        rounds=8,
        most=200,
    ),
}


def configured(name: str, override: str = "{}") -> Setting:
    """A setting, with other values from a JSON object.

    Raises:
      ValueError: There is no such field, or the sizes don't rise.
    """
    others = json.loads(override)
    unknown = others.keys() - set(Setting._fields)
    if unknown:
        raise ValueError(
            f"a setting has {', '.join(Setting._fields)}; got "
            f"{', '.join(sorted(unknown))}."
        )
    if "losses" in others:
        others["losses"] = [Loss(**loss) for loss in others["losses"]]
    others = {k: tuple(v) if isinstance(v, list) else v for k, v in others.items()}
    setting = SETTINGS[name]._replace(**others)
    sizes = setting.sizes
    if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"sizes must rise from at least 1, got {list(sizes)}.")
    return setting


# Data.


class Data(NamedTuple):
    """Images ``[n, height, width, channels]`` uint8, labels ``[n]`` int32."""

    train: tuple[Any, Any]  # For gradients.
    held_out: tuple[Any, Any]  # For assessments.
    test: tuple[Any, Any]  # For nothing but the final figures.
    mean: Any  # Of the channels, in [0, 1].
    std: Any
    rows: Any  # Where the training examples are in the official training part.

    def pixels(self, images: Any) -> jax.Array:
        return _cifar.normalize(images, self.mean, self.std)


def load(setting: Setting, folder: str, seed: int, checksums: bool = True) -> Data:
    """Digits are split anew for each seed; CIFAR has its own test part."""
    if setting.data == "digits":
        parts = _digits(seed, setting.held_out)
        rows = np.arange(len(parts[0][1]))
    else:
        *parts, _, rows = _cifar.load(
            folder, setting.data, held_out=setting.held_out, checksums=checksums
        )
    arrays = jax.tree.map(jnp.asarray, tuple(parts))
    return Data(*arrays, *_cifar.statistics(parts[0][0]), rows)


def _digits(seed: int, held_out: int):
    """Scikit-learn's; images for training also shifted by a pixel, each way."""
    x, y = load_digits(return_X_y=True)
    x = np.minimum(x.reshape(-1, 8, 8, 1) * 16, 255).astype(np.uint8)
    y = y.astype(np.int32)
    split = functools.partial(train_test_split, random_state=seed)
    x, x_test, y, y_test = split(x, y, test_size=497, stratify=y)
    x, x_held_out, y, y_held_out = split(x, y, test_size=held_out, stratify=y)
    border = (1, 1)
    padded = np.pad(x, [(0, 0), border, border, (0, 0)])
    shifted = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    train = np.concatenate(shifted), np.tile(y, len(shifted))
    return train, (x_held_out, y_held_out), (x_test, y_test)


def draw(setting: Setting, data: Data, key: jax.Array) -> dict[str, jax.Array]:
    """A batch by the names of its arrays."""
    index_key, augment_key, held_out_key = jax.random.split(key, 3)
    images, labels = data.train
    index = jax.random.randint(index_key, [setting.batch], 0, len(labels))
    pixels = data.pixels(images[index])
    if setting.augment:
        pixels = _cifar.augment(augment_key, pixels)
    size = [setting.assessed]
    chosen = jax.random.randint(held_out_key, size, 0, len(data.held_out[1]))
    return {
        "images": pixels,
        "labels": labels[index],
        "index": index,
        "held_out": (data.pixels(data.held_out[0][chosen]), data.held_out[1][chosen]),
    }


# Models.


def student(setting: Setting, size: int) -> ResNet:
    return ResNet((size,) * 3, setting.classes, setting.filters)


def layers(model: ResNet) -> int:
    return 2 * sum(model.blocks) + 2


def numbers(variables: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@functools.partial(jax.jit, static_argnames="model")
def init(model: ResNet, seed: int, data: Data) -> Any:
    return model.init(jax.random.key(seed), data.pixels(data.train[0][:1]))


@functools.cache
def training(model: ResNet) -> Callable[..., Any]:
    """Logits by the batch's statistics, and the new running ones."""

    def apply(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    return apply


@functools.cache
def inference(model: ResNet) -> Callable[..., Any]:
    def apply(variables, images):
        return model.apply(variables, images)

    return apply


def merge(variables: Any, new: Any) -> Any:
    return {**variables, **new}


@functools.partial(jax.jit, static_argnames="model")
def logits_of(model: ResNet, variables: Any, data: Data, images: Any) -> jax.Array:
    """Of any number of images."""

    def one(image):
        return model.apply(variables, data.pixels(image[None]))[0]

    return jax.lax.map(one, images, batch_size=min(len(images), 1000))


def log_likelihoods(model: ResNet, variables: Any, data: Data, part: str) -> np.ndarray:
    """Of the labels of a part of the data, one for each example."""
    images, labels = getattr(data, part)
    logits = logits_of(model, variables, data, images)
    return -np.asarray(
        optax.softmax_cross_entropy_with_integer_labels(logits, labels), np.float64
    )


def figures(model: ResNet, variables: Any, data: Data, part: str) -> dict[str, float]:
    """Accuracy and negative log-likelihood on a part of the data."""
    images, labels = getattr(data, part)
    logits = logits_of(model, variables, data, images)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    accuracy = (logits.argmax(-1) == labels).mean()
    return {"accuracy": float(accuracy), "nll": float(nll)}


def teacher_from(setting: Setting, model: ResNet, variables: Any, data: Data):
    """A network as a teacher, asked beforehand where images stay the same."""
    if setting.augment:
        return distillation.archived(inference(model), variables)
    images, _ = data.train
    return distillation.stored(logits_of(model, variables, data, images), len(images))


def teacher_from_logits(setting: Setting, logits: np.ndarray, data: Data):
    """A teacher whose logits of the official training part are known.

    Raises:
      ValueError: They are of another number of classes or examples.
    """
    size = len(data.train[1]) + len(data.held_out[1])
    if setting.data == "digits":
        raise ValueError("digits have no official training part that logits are of.")
    if logits.shape != (size, setting.classes):
        raise ValueError(
            f"the teacher's logits must have shape [{size}, {setting.classes}], a row "
            f"for each example of {setting.data}'s training part, got "
            f"{list(logits.shape)}."
        )
    return distillation.stored(logits[data.rows], len(data.rows))


# Students, and a teacher, of a fixed size.


@functools.partial(
    jax.jit,
    static_argnames=("setting", "model", "loss", "steps"),
    donate_argnames=("variables", "state"),
)
def fixed_steps(
    setting,
    model,
    loss,
    variables,
    state,
    data,
    teacher,
    rate,
    total,
    seed,
    count,
    steps,
):
    """As many steps in one call, after ``count`` earlier ones."""
    tx = cosine_adamw(rate, total)

    def step(i, trained):
        variables, state = trained
        batch = draw(setting, data, jax.random.fold_in(jax.random.key(seed), count + i))
        loss_fn = distillation.loss(training(model), teacher, **loss._asdict())
        wanted = inspect.signature(loss_fn).parameters.keys() & batch.keys()
        named = {name: batch[name] for name in wanted}
        grads, new = jax.grad(loss_fn, has_aux=True)(variables, **named)
        updates, state = tx.update(grads, state, variables)
        return merge(optax.apply_updates(variables, updates), new), state

    return _repeat(step, steps, (variables, state))


def _repeat(step, steps, trained):
    if steps == 1:
        return step(0, trained)
    return jax.lax.fori_loop(0, steps, step, trained)


def steps_per_call(steps: int) -> int:
    """All of them on GPUs, which take less time for a small step than their host.

    XLA's loops on CPUs run convolutions on one core.
    """
    return 1 if jax.default_backend() == "cpu" else steps


def cosine_adamw(rate, total):
    """With a rate that falls to 0 in ``total`` steps, infinitely many for never."""
    return optax.adamw(
        lambda count: rate * (1 + jnp.cos(jnp.pi * jnp.minimum(count / total, 1))) / 2
    )


@jax.tree_util.Partial
def nobody():
    """The teacher of those who learn from labels alone, who is not asked."""
    raise NotImplementedError


def train_fixed(
    setting: Setting,
    model: ResNet,
    data: Data,
    teacher: Any,
    folder: _checkpoint.Folder,
    *,
    loss: Loss,
    rate: float,
    steps: int,
    falls: bool,
    seed: int,
    marks: tuple[int, ...] = (),
    progress: Callable[[int], Any] = lambda done: None,
) -> tuple[Any, list[dict]]:
    """Trains with AdamW, by a constant or falling learning rate.

    Returns:
      The final variables, and figures after as many steps as each of ``marks`` says.
    """
    variables = init(model, seed, data)
    state = cosine_adamw(rate, steps).init(variables)
    done, found = 0, []
    if last := folder.resume():
        done, found = last["done"], last["found"]
        trees = folder.restore(variables=variables, state=state)
        variables, state = trees["variables"], trees["state"]
    progress(done)
    total = float(steps) if falls else math.inf
    while done < steps:
        stops = [steps, done + setting.length - done % setting.length, *marks]
        count = steps_per_call(min(stop for stop in stops if stop > done) - done)
        variables, state = fixed_steps(
            setting,
            model,
            loss,
            variables,
            state,
            data,
            teacher,
            rate,
            total,
            seed,
            done,
            count,
        )
        done += count
        if done in marks:
            found.append({"steps": done, **figures(model, variables, data, "test")})
        if done % setting.length == 0 or done == steps:
            progress(setting.length)
            about = {"done": done, "found": found}
            folder.save(about, variables=variables, state=state, now=done == steps)
    return variables, found


def train_teacher(setting, data, folder, seed, progress=lambda done: None):
    """A network of the teacher's size that learns from the labels alone."""
    size, filters = (setting.teacher_size,) * 3, setting.teacher_filters
    model = ResNet(size, setting.classes, filters)
    variables, _ = train_fixed(
        setting,
        model,
        data,
        nobody,
        folder,
        loss=Loss(hard=1.0),
        rate=setting.teacher_rate,
        steps=setting.teacher_steps,
        falls=True,
        seed=seed + 1_000_000,  # Another one than students have.
        progress=progress,
    )
    return model, variables


# Students that grow.


def transformation(setting, model, teachers, decide, seed):
    """EV3 with every loss by every teacher and every learning rate as explorers."""
    losses = {}
    # In the order that jit gives to the keys of its arguments: the state has one, too.
    for name, teacher in sorted(teachers.items()):
        kinds = setting.losses if name == TEACHER else setting.losses[:1]
        for kind in kinds:
            loss_fn = distillation.loss(training(model), teacher, **kind._asdict())
            losses[f"{name} {loss_fn.__name__}"] = loss_fn
    optimizers = {f"adamw_{rate:g}": optax.adamw(rate) for rate in setting.rates}

    def log_likelihood(variables, held_out):
        pixels, labels = held_out
        logits = inference(model)(variables, pixels)
        return -optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    return optax_ev3.ev3(
        [
            optax_ev3.explorer(one, merge_fn=merge)
            for one in optax_ev3.product(optimizers, losses)
        ],
        log_likelihood,
        explore=explore.rounds(setting.length, averages=[explore.trajectory_average()]),
        adapt=None if decide else always_on(),
        key=seed,
    )


def always_on() -> optax_ev3.adapt.Rule:
    """The paper's "no decide": the best explorer is adopted, whatever it is worth.

    Stable parameters are still replaced where it is shown to be better than they are.
    """
    bound = evidence.standard()

    def decide(scored, rule_state, key):
        del key
        name = evidence.single_objective(scored)
        mean = jnp.where(scored.valid, evidence.estimate(scored, name).mean, -jnp.inf)
        best = jnp.argmax(mean[: scored.proposals])
        adopted = jnp.where(scored.valid[best], best, scored.current)
        p_value = bound.p_value(scored, name, scored.stable)[adopted]
        significant = p_value < 0.05 / (scored.proposals + 1)
        decision = optax_ev3.adapt.Decision(adopted.astype(jnp.int32), significant)
        return decision, rule_state

    return optax_ev3.adapt.Rule(lambda proposals: (), decide)


@functools.partial(
    jax.jit,
    static_argnames=("setting", "model", "decide", "steps"),
    donate_argnames=("variables", "state"),
)
def growing_steps(
    setting, model, decide, variables, state, data, teachers, seed, count, steps
):
    """As many steps in one call, after ``count`` earlier ones."""
    tx = transformation(setting, model, teachers, decide, seed)

    def step(i, trained):
        variables, state = trained
        batch = draw(setting, data, jax.random.fold_in(jax.random.key(seed), count + i))
        # All explorers have losses of their own: no gradient of the loop is needed.
        updates, state = tx.update(None, state, variables, **batch)
        return optax.apply_updates(variables, updates), state

    return _repeat(step, steps, (variables, state))


TEACHER = "teacher"


@dataclasses.dataclass
class Course:
    """What is known of a pass, beside arrays.

    Attributes:
      size: Of the student now.
      calls: Of update.
      rounds: At this size.
      stages: Figures at the end of each size.
      final: Which stage the final student is from.
      over: Whether the pass is.
    """

    size: int
    calls: int = 0
    rounds: int = 0
    stages: list[dict] = dataclasses.field(default_factory=list)
    final: int = 0
    over: bool = False


class Pass:
    """A student that grows while it learns; interrupted, it goes on where it was saved.

    Args:
      setting: See there.
      data: As from `load`.
      teachers: By name; the first one is TEACHER.
      seed: Of parameters and batches.
      folder: Of this pass alone. The final student goes into its folder student.
      decide: Whether a round may go back to earlier parameters.
      every_size: Whether the student goes on growing where that brings nothing, to see
        what the larger ones would have reached.
    """

    def __init__(
        self, setting, data, teachers, seed, folder, *, decide=True, every_size=True
    ):
        self.setting, self.data, self.teachers = setting, data, teachers
        self.seed, self.folder = seed, folder
        self.decide, self.every_size = decide, every_size
        self.course = Course(setting.sizes[0])
        last = folder.resume()
        if last:
            self.course = Course(**last)
        self.variables = init(self.model, seed, data)
        self.state = jax.jit(self._transformation().init)(self.variables)
        if last:
            trees = folder.restore(variables=self.variables, state=self.state)
            self.variables, self.state = trees["variables"], trees["state"]

    @property
    def model(self):
        return student(self.setting, self.course.size)

    def run(self, progress: Callable[[int], Any] = lambda calls: None) -> list[dict]:
        """To the end; returns the figures of all sizes."""
        progress(self.course.calls)
        while not self.course.over:
            self._round()
            progress(self.setting.length)
            ended = self.course.rounds >= self.setting.most or bool(
                optax_ev3.should_grow(self.state, self.setting.rounds)
            )
            if ended:
                self._end()
            trees = {"variables": self.variables, "state": self.state}
            self.folder.save(dataclasses.asdict(self.course), now=ended, **trees)
        return self.course.stages

    def _transformation(self):
        return transformation(
            self.setting, self.model, self.teachers, self.decide, self.seed
        )

    def _round(self):
        course, length = self.course, self.setting.length
        steps = steps_per_call(length)
        for _ in range(length // steps):
            self.variables, self.state = growing_steps(
                self.setting,
                self.model,
                self.decide,
                self.variables,
                self.state,
                self.data,
                self.teachers,
                self.seed,
                course.calls,
                steps,
            )
            course.calls += steps
        course.rounds += 1
        shown = {k: float(v) for k, v in _summary(self.state).items()}
        self.folder.log(
            calls=course.calls,
            gradients=self._gradients(),
            layers=layers(self.model),
            **{f"held_out/{k}": v for k, v in self._figures("held_out").items()},
            **{k: v if math.isfinite(v) else None for k, v in shown.items()},
        )

    def _gradients(self):
        """One of each explorer in each call."""
        return self.course.calls * explorers(self.setting, self.teachers)

    def _figures(self, part):
        """Of the visible and of the stable variables."""
        both = {
            "visible": self.variables,
            "stable": optax_ev3.stable_params(self.state),
        }
        return {
            f"{kind}/{name}": value
            for kind, variables in both.items()
            for name, value in figures(self.model, variables, self.data, part).items()
        }

    def _end(self):
        """Takes stock of a size, and grows, if that is of use."""
        course, sizes = self.course, self.setting.sizes
        # Where one size has brought nothing, growth would have ended.
        worth = course.final == len(course.stages) - 1
        better = not course.stages or (worth and self._is_better())
        if better:
            course.final = len(course.stages)
            student_of(self.folder).save(
                {"size": course.size}, now=True, variables=self.variables
            )
        course.stages.append(
            {
                "layers": layers(self.model),
                "numbers": numbers(self.variables),
                "calls": course.calls,
                "rounds": course.rounds,
                "gradients": self._gradients(),
                "better": better,
                **{f"test/{k}": v for k, v in self._figures("test").items()},
                **{f"held_out/{k}": v for k, v in self._figures("held_out").items()},
            }
        )
        course.over = course.size == sizes[-1] or not (better or self.every_size)
        if not course.over:
            self._grow(sizes[sizes.index(course.size) + 1])

    def _is_better(self, level=0.05):
        """Whether held-out data show that this size has brought anything.

        By a paired t test against the final student so far.
        """
        before = final_student(self.setting, self.data, self.folder)
        now = self.model, self.variables
        scores = [log_likelihoods(*one, self.data, "held_out") for one in (now, before)]
        if (scores[0] == scores[1]).all():
            return False
        test = stats.ttest_rel(*scores, alternative="greater")
        return bool(test.pvalue < level)

    def _grow(self, size):
        """Takes all along to a larger student, which begins as the same function."""
        small, course = self.model, self.course
        large, how = small.deepen(count=size - course.size)
        course.size, course.rounds = size, 0
        pixels = self.data.pixels(self.data.held_out[0][: self.setting.batch])
        check = [
            functools.partial(inference(model), images=pixels)
            for model in (small, large)
        ]
        self.variables, self.state = growth.grow(
            self._transformation(),
            self.state,
            self.variables,
            init(large, self.seed + len(course.stages), self.data),
            how,
            check=check,
        )
        course.stages[-1]["grown/stable/nll"] = self._figures("held_out")["stable/nll"]


_summary = jax.jit(optax_ev3.summary)


def explorers(setting: Setting, teachers: Any) -> int:
    """How many gradients a step takes."""
    return len(setting.rates) * (len(setting.losses) + len(teachers) - 1)


def student_of(folder: _checkpoint.Folder) -> _checkpoint.Folder:
    """Where a pass keeps its final student."""
    return _checkpoint.Folder(folder.path / "student")


def final_student(setting: Setting, data: Data, folder: _checkpoint.Folder):
    """The model and the variables that a pass has left in its folder."""
    kept = student_of(folder)
    model = student(setting, kept.resume()["size"])
    return model, kept.restore(variables=init(model, 0, data))["variables"]
