"""The rules: against NumPy, and what they promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_ev3 import adapt
from optax_ev3._src import evidence

KEY = jax.random.key(0)
ALL_RULES = {
    "greedy": adapt.greedy(),
    "lower_bound": adapt.lower_bound(),
    "choose_and_confirm": adapt.choose_and_confirm(),
    "confident": adapt.confident(),
}


def gather(values, finite=None, uphill=None):
    values = jnp.asarray(values, jnp.float32)
    count = len(values)
    finite = jnp.ones([count], bool) if finite is None else jnp.asarray(finite)
    uphill = [*(uphill or [])] + [False] * (count - len(uphill or []))
    return evidence.gather({"score": values}, finite, jnp.asarray(uphill))


@functools.cache
def _jitted(rule):
    return jax.jit(rule.decide)


def decide(rule, values, memory=None, key=KEY, **kwargs):
    seen = gather(values, **kwargs)
    memory = rule.init(len(values) - 2) if memory is None else memory
    decision, memory = _jitted(rule)(seen, memory, key)
    return int(decision.adopted), bool(decision.significant), memory


def choices(rule, values, count=200, **kwargs):
    """How often each candidate is adopted over ``count`` keys."""
    seen = gather(values, **kwargs)
    memory = rule.init(len(values) - 2)
    keys = jax.random.split(KEY, count)
    adopted = jax.jit(jax.vmap(lambda k: rule.decide(seen, memory, k)[0].adopted))(keys)
    return np.bincount(np.asarray(adopted), minlength=len(values))


def draws(gains, spread=0.1, examples=128, seed=0):
    """Scores with a part shared by all candidates and the given mean differences."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=examples)
    own = spread * rng.normal(size=(len(gains), examples))
    own -= own.mean(1, keepdims=True)
    return shared + own + np.asarray(gains)[:, None]


RULES = {(s, d): adapt.lower_bound(s, d) for s in (0.0, 0.5, 4.0) for d in (0.0, 1.96)}


def papers_rule(scores, select_alpha, decide_alpha):
    """The published select and decide, in NumPy."""
    mean = scores.mean(1)
    error = scores.std(axis=1, ddof=1) / np.sqrt(scores.shape[1])
    current, stable = len(scores) - 2, len(scores) - 1
    chosen = np.argmax((mean - select_alpha * error)[:current])
    finalists = [chosen, current, stable]
    adopted = finalists[np.argmax((mean - decide_alpha * error)[finalists])]
    lower = mean[adopted] - decide_alpha * error[adopted]
    upper = mean[stable] + decide_alpha * error[stable]
    return adopted, lower > upper


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 3]),  # Few shapes: each is compiled anew.
    st.sampled_from([2, 40]),
    st.sampled_from([0.0, 0.5, 4.0]),
    st.sampled_from([0.0, 1.96]),
)
@settings(deadline=None, max_examples=60)
def test_lower_bound_is_the_papers(seed, explorers, examples, select, decision):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(explorers + 2, examples))
    scores[:explorers] += rng.normal(size=(explorers, 1))
    scores = scores.astype(np.float32).astype(np.float64)
    rule = RULES[select, decision]
    seen = gather(scores)
    found, _ = _jitted(rule)(seen, rule.init(explorers), KEY)
    adopted, significant = papers_rule(scores, select, decision)
    assert int(found.adopted) == adopted
    assert bool(found.significant) == significant


def test_lower_bound_ties_go_to_the_first():
    assert decide(adapt.lower_bound(), np.ones([4, 8]))[0] == 0


def test_lower_bound_exact_figures():
    adopted, significant, _ = decide(adapt.lower_bound(), [1.0, 3.0, 2.0, 2.0])
    assert (adopted, significant) == (1, True)
    adopted, significant, _ = decide(adapt.lower_bound(), [1.0, 1.5, 2.0, 3.0])
    assert (adopted, significant) == (3, False)


@pytest.mark.parametrize("alphas", [(-1, 0), (0, -0.1), (float("nan"), 1)])
def test_lower_bound_rejects_negative_alphas(alphas):
    with pytest.raises(ValueError, match="_alpha must be at least 0, got"):
        adapt.lower_bound(*alphas)


def test_lower_bound_needs_two_examples():
    with pytest.raises(ValueError, match=r"at least 2 examples.*shape \(1,\)"):
        decide(adapt.lower_bound(), np.ones([4, 1]))


def test_greedy_takes_the_highest_mean():
    for one in np.random.default_rng(0).normal(size=(5, 5, 16)):
        assert decide(adapt.greedy(), one)[0] == np.argmax(one.mean(1))


def test_greedy_breaks_ties_by_lot_among_explorers():
    counts = choices(adapt.greedy(), np.ones([5, 8]))
    assert counts[3:].sum() == 0
    assert (counts[:3] > 40).all()


def test_greedy_prefers_current_to_stable():
    assert decide(adapt.greedy(), [0.0, 0.0, 1.0, 1.0])[0] == 2


@pytest.mark.parametrize("rule", [adapt.greedy, adapt.confident])
@pytest.mark.parametrize("confidence", [0.5, 1.0, 95, -1, float("nan")])
def test_confidence_out_of_range(rule, confidence):
    with pytest.raises(ValueError, match=r"confidence must be above 0\.5 and below 1"):
        rule(confidence)


@pytest.mark.parametrize("rule", ALL_RULES.values(), ids=ALL_RULES)
class TestEveryRule:
    def test_takes_one_objective(self, rule):
        seen = evidence.gather(
            {"a": jnp.ones([4]), "b": jnp.ones([4])},
            jnp.ones([4], bool),
            jnp.zeros([4], bool),
        )
        with pytest.raises(ValueError, match="takes one objective, assess_fn returned"):
            rule.decide(seen, rule.init(2), KEY)

    def test_never_adopts_what_is_not_valid(self, rule):
        values = draws([5, 5, 0, 0], seed=1)
        values[0, 3] = np.nan
        counts = choices(rule, values, finite=[True, False, True, True])
        assert counts[:2].sum() == 0

    def test_nothing_valid_stays(self, rule):
        adopted, significant, _ = decide(rule, np.full([4, 8], np.nan))
        assert (adopted, significant) == (2, False)

    def test_only_stable_valid_goes_back(self, rule):
        values = np.full([4, 8], np.nan)
        values[3] = np.arange(8)
        adopted, significant, _ = decide(rule, values)
        assert (adopted, significant) == (3, False)

    def test_invalid_current_does_not_hold_explorers_back(self, rule):
        values = draws([0, 0, 0, 0], seed=2)
        values[2] = -np.inf
        values[3] -= 1
        assert choices(rule, values)[:2].sum() == 200

    def test_clear_gain_is_adopted_and_made_stable(self, rule):
        adopted, significant, _ = decide(rule, draws([-1, 4, 0, 0]))
        assert (adopted, significant) == (1, True)

    def test_clear_harm_is_not_adopted(self, rule):
        counts = choices(rule, draws([-1, -2, 0, 0]))
        assert counts[:2].sum() == 0

    def test_goes_back_to_a_clearly_better_stable(self, rule):
        adopted, significant, _ = decide(rule, draws([-1, -1.5, -1, 1]))
        assert (adopted, significant) == (3, False)

    def test_memory_keeps_its_types(self, rule):
        memory = rule.init(2)
        for values in (draws([0, 1, 0, 0]), np.array([0.0, 1, 0, 0])):
            _, _, new = decide(rule, values, memory)
            specs = [
                jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), m)
                for m in (memory, new)
            ]
            assert specs[0] == specs[1]
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(new))


class TestConfident:
    rule = adapt.confident()

    def run(self, rounds, memory=None):
        adopted = []
        for number, values in enumerate(rounds):
            key = jax.random.fold_in(KEY, number)
            index, _, memory = decide(self.rule, values, memory, key)
            adopted.append(index)
        return adopted, memory

    def test_moves_on_in_spite_of_a_loss_that_may_be_noise(self):
        values = draws([-0.01, -0.01, 0, 0], spread=0.1)
        assert choices(self.rule, values)[:2].sum() == 200

    def test_ties_favour_nobody(self):
        counts = choices(self.rule, np.ones([5, 32]), count=600)
        assert counts[3:].sum() == 0
        assert (abs(counts[:3] - 200) < 60).all()

    def test_small_gains_add_up(self):
        # 0.8 standard errors a round between the two: too little for one round.
        rounds = [draws([0.007, 0.0, 0, 0], seed=s) for s in range(60)]
        adopted, _ = self.run(rounds)
        assert np.mean(np.array(adopted[20:]) == 0) > 0.8

    def test_small_harm_adds_up(self):
        rounds = [draws([-0.008, 0.0, 0, 0], seed=s) for s in range(60)]
        adopted, _ = self.run(rounds)
        assert np.mean(np.array(adopted[30:]) == 0) < 0.05

    def test_harm_beside_stable_adds_up(self):
        # Explorers no worse than current, all of them a little worse than stable.
        rounds = [draws([0.0, 0.0, 0.0, 0.012], seed=s) for s in range(60)]
        adopted, _ = self.run(rounds)
        assert 3 not in adopted[:5]
        assert 3 in adopted

    def test_leaps_need_proof(self):
        # As good on average, but on quite other examples.
        rng = np.random.default_rng(0)
        values = draws([0.0, 0.0, 0, 0])
        values[0] = rng.permutation(values[0])
        assert choices(self.rule, values)[0] == 0
        alone = np.delete(values, 1, axis=0)
        assert choices(self.rule, alone)[0] == 200  # Nobody else can move.

    def test_uphill_moves_need_proof(self):
        values = draws([0.0, 0.0, 0, 0])
        assert choices(self.rule, values, uphill=[True, False])[0] == 0
        alone = np.delete(values, 1, axis=0)
        assert choices(self.rule, alone, uphill=[True])[0] == 200

    def test_proof_lets_uphill_moves_in(self):
        memory = None
        for seed in range(30):
            values = draws([0.05, 0.0, 0, 0], seed=seed)
            _, _, memory = decide(self.rule, values, memory, uphill=[True, False])
        adopted, _, _ = decide(self.rule, values, memory, uphill=[True, False])
        assert adopted == 0

    def test_exact_figures_count_at_once_without_a_past(self):
        assert decide(self.rule, [1.0, 2.0, 3.0, 3.0])[0] == 2
        assert decide(self.rule, [1.0, 2.0, 3.0, 4.0])[0] in (2, 3)
        assert decide(self.rule, [4.0, 2.0, 3.0, 3.0])[:2] == (0, True)

    def test_exact_figures_do_not_stall_for_ever(self):
        rng = np.random.default_rng(0)
        rounds = [np.append(rng.normal(size=2), [0.0, 0.0]) for _ in range(40)]
        adopted, _ = self.run(rounds)
        assert np.mean(np.array(adopted) < 2) > 0.5

    @pytest.mark.parametrize("clip", [1.5, 0.2])
    def test_tally_is_stouffers_sum(self, clip):
        seeds = range(4)
        rule, memory = adapt.confident(clip=clip), None
        for s in seeds:
            _, _, memory = decide(rule, draws([0.01, 0, 0, 0], seed=s), memory)
        total = weight = 0.0
        for s in seeds:
            seen = gather(draws([0.01, 0, 0, 0], seed=s))
            z = float(evidence.compare(seen, "score", 2).z[0])
            total = 0.95 * total + np.clip(z, -clip, clip)
            weight = 0.95**2 * weight + 1
        assert float(memory.current.total[0]) == pytest.approx(total, rel=1e-4)
        assert float(memory.current.weight[0]) == pytest.approx(weight, rel=1e-4)

    @pytest.mark.parametrize("prior_rounds, decided", [(0.5, True), (1e4, False)])
    def test_doubt_delays_the_choice(self, prior_rounds, decided):
        """One of two explorers is better by two standard errors in each round."""
        rule = adapt.confident(clip=5.0, prior_rounds=prior_rounds)
        memory, adopted = None, []
        for s in range(40):
            values = draws([0.025, 0.0, 0, 0], seed=s)
            choice, _, memory = decide(rule, values, memory, key=jax.random.key(s))
            adopted.append(int(choice))
        share = np.mean(np.array(adopted[10:]) == 0)
        assert (share > 0.9) == decided

    @pytest.mark.parametrize("explorers", [1, 2, 8])
    def test_noise_seldom_replaces_stable(self, explorers):
        rng = np.random.default_rng(5)
        shape = (2000, explorers + 2, 64)
        scores = rng.normal(size=(2000, 1, 64)) + 0.3 * rng.normal(size=shape)
        finite = jnp.ones([explorers + 2], bool)

        def significant(values, key):
            seen = evidence.gather({"score": values}, finite, ~finite)
            memory = self.rule.init(explorers)
            return self.rule.decide(seen, memory, key)[0].significant

        keys = jax.random.split(KEY, 2000)
        scores = jnp.asarray(scores, jnp.float32)
        share = float(jax.jit(jax.vmap(significant))(scores, keys).mean())
        assert 0 < share < 0.05 + 2 * np.sqrt(0.05 * 0.95 / 2000)
