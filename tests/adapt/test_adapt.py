"""The rules: against NumPy, and what they promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from optax_ev3 import adapt
from optax_ev3 import evidence as public
from optax_ev3._src.base import evidence
from optax_ev3._src.base.decision import enforce_validity

KEY = jax.random.key(0)
ALL_RULES = {
    "greedy": adapt.greedy(),
    "lower_bound": adapt.lower_bound(),
    "choose_and_confirm": adapt.choose_and_confirm(),
    "confident": adapt.confident(),
    "farsighted": adapt.farsighted(),
}


def gather(values, finite=None, is_ascent=None):
    values = jnp.asarray(values, jnp.float32)
    count = len(values)
    finite = jnp.ones([count], bool) if finite is None else jnp.asarray(finite)
    is_ascent = [*(is_ascent or [])]
    is_ascent += [False] * (count - len(is_ascent))
    return evidence.gather({"score": values}, finite, jnp.asarray(is_ascent))


@functools.cache
def _jitted(rule):
    return jax.jit(rule.decide)


def decide(rule, values, state=None, key=KEY, **kwargs):
    """What the composer does: the decision with validity enforced."""
    seen = gather(values, **kwargs)
    state = rule.init(len(values) - 2) if state is None else state
    decision, state = _jitted(rule)(seen, state, key)
    decision, _ = enforce_validity(decision, seen)
    return int(decision.adopted), bool(decision.significant), state


def choices(rule, values, count=200, **kwargs):
    """How often each candidate is adopted over ``count`` keys."""
    seen = gather(values, **kwargs)
    state = rule.init(len(values) - 2)
    keys = jax.random.split(KEY, count)
    adopted = jax.jit(jax.vmap(lambda k: rule.decide(seen, state, k)[0].adopted))(keys)
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


def max_t_p(values, reference, samples=4000):
    """Westfall and Young's, with a bootstrap of its own."""
    difference = values[:reference] - values[reference]
    n = difference.shape[1]
    mean = difference.mean(1)
    error = difference.std(axis=1, ddof=1) / np.sqrt(n)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, np.full(n, 1 / n), samples)
    deviation = (counts @ difference.T / n - mean) / error
    return (deviation.max(1)[:, None] >= mean / error).mean(0)


CORRECTED = {
    "bonferroni": lambda values, p: np.minimum(len(p) * p, 1),
    "max_t": lambda values, p: max_t_p(values, len(values) - 1),
}


@pytest.mark.parametrize("correction", CORRECTED)
def test_greedy_corrects_for_all_that_may_become_stable(correction):
    rule = adapt.greedy(correction=correction)
    decided, expected = [], []
    for seed, gain in enumerate(np.linspace(0.005, 0.045, 24)):
        # Explorers that are alike, and current.
        values = draws([gain, gain / 2, 0, 0, 0, 0], seed=seed)
        values[1:5] += 0.9 * (values[0] - values[0].mean()) * [[1], [1], [0], [0]]
        p = stats.ttest_rel(values[:5], values[5:], axis=1, alternative="greater")
        corrected = CORRECTED[correction](values, p.pvalue)
        adopted = np.argmax(values.mean(1))
        if 0.037 < corrected[adopted] < 0.067:
            continue  # Too close for another bootstrap, or Wallace's approximation.
        found = decide(rule, values)
        assert found[0] == adopted
        decided.append(found[1])
        expected.append(corrected[adopted] < 0.05)
    assert decided == expected
    assert 0 < sum(decided) < len(decided)


def test_a_correction_makes_proof_harder():
    """The same p value, between the level and a part of it."""
    values = draws([0.0, -1, 0, 0], examples=60)
    own = values[0] - values[3]
    values[0] += 2.0 * own.std(ddof=1) / np.sqrt(60)  # p = 0.025, 0.075 with three
    assert public.paired_t().p_value(gather(values), "score", 3)[0] < 0.03
    assert decide(adapt.greedy(), values)[:2] == (0, False)


def test_max_t_takes_no_bound():
    with pytest.raises(ValueError, match="'max_t' is a test of its own"):
        adapt.greedy(bound=public.paired_t(), correction="max_t")


@pytest.mark.parametrize("wins, losses", [(9, 1), (8, 1), (7, 1), (5, 0), (4, 0)])
def test_greedy_with_boolean_scores(wins, losses):
    values = np.zeros([3, 40], bool)
    values[0, :wins] = True
    values[1:, wins : wins + losses] = True
    scores = {"score": jnp.asarray(values, jnp.float32)}
    true = jnp.ones([3], bool)
    seen = evidence.gather(scores, true, ~true, binary=frozenset({"score"}))
    p = stats.binomtest(wins, wins + losses, alternative="greater").pvalue
    for bound in (None, public.mcnemar()):
        decision, _ = adapt.greedy(bound=bound).decide(seen, (), KEY)
        assert int(decision.adopted) == 0
        assert bool(decision.significant) == (2 * p < 0.05)


def test_greedy_with_another_bound():
    bound = public.betting(0, 1)
    rule = adapt.greedy(bound=bound)
    rng = np.random.default_rng(0)
    decided = []
    for gain in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5):
        values = rng.uniform(0, 0.5, size=(3, 50))
        values[0] += gain
        p = float(bound.p_value(gather(values), "score", 2)[0])
        decided.append(2 * p < 0.05)
        assert decide(rule, values)[:2] == (0, decided[-1])
    assert 0 < sum(decided) < len(decided)


@pytest.mark.parametrize("rule", [adapt.greedy, adapt.choose_and_confirm])
class TestBounds:
    def test_mcnemar_needs_boolean_scores(self, rule):
        with pytest.raises(TypeError, match="needs boolean scores"):
            decide(rule(bound=public.mcnemar()), draws([0, 1, 0, 0]))

    @pytest.mark.parametrize("bound", ["t", public.paired_t, 0.05])
    def test_a_bound_must_be_one(self, rule, bound):
        with pytest.raises(TypeError, match="bound must be a bound, such as"):
            rule(bound=bound)


@pytest.mark.parametrize("correction", ["sidak", "holm", None, 3, True])
def test_greedy_knows_its_corrections(correction):
    with pytest.raises(ValueError, match="correction must be one of"):
        adapt.greedy(correction=correction)


def parts(first, second, examples=60, seed=0):
    """Scores with the given gains on the two halves of the examples."""
    halves = [
        draws(gains, spread=0.1, examples=examples, seed=seed + number)
        for number, gains in enumerate((first, second))
    ]
    return np.concatenate(halves, axis=1)


class TestChooseAndConfirm:
    rule = adapt.choose_and_confirm()

    def test_the_first_part_chooses(self):
        values = parts([0.1, 0.5, 0, 0], [9, 0.2, 0, 0])
        assert decide(self.rule, values)[:2] == (1, True)

    def test_the_second_part_confirms(self):
        assert decide(self.rule, parts([9, 1, 0, 0], [0, 9, 0, 0]))[:2] == (0, False)
        # Neither better nor worse: it is adopted all the same.
        assert decide(self.rule, parts([-1, -9, 0, 0], [0, 0, 0, 0]))[:2] == (0, False)

    def test_the_second_part_sends_back(self):
        # Where both are better it goes back to the better one.
        for stable, adopted in {0.2: 3, 0.5: 3, -0.3: 2, -1.0: 2, -2.0: 2}.items():
            values = parts([9, 0, 0, 0], [-1, 9, 0, stable])
            assert decide(self.rule, values)[:2] == (adopted, False)
        values = parts([9, 0, 0, 0], [0.5, 9, 0.5, 1])
        assert decide(self.rule, values)[:2] == (3, False)

    def test_the_first_part_proves_nothing(self):
        values = parts([9, 0, 0, 0], [0, 0, 0, 0])
        other = parts([1, 0, 0, 0], [0, 0, 0, 0])
        assert decide(self.rule, values)[:2] == decide(self.rule, other)[:2]
        assert decide(self.rule, values)[:2] == (0, False)

    def test_ties_by_lot(self):
        counts = choices(self.rule, np.ones([5, 8]))
        assert counts[3:].sum() == 0
        assert (counts[:3] > 40).all()

    @pytest.mark.parametrize("fraction", [0.1, 0.25, 0.9])
    def test_fraction_of_the_examples(self, fraction):
        rule = adapt.choose_and_confirm(fraction=fraction)
        first = round(fraction * 80)
        values = draws([0, 0, 0, 0], examples=80)
        values[1, :first] += 1
        values[0, first:] += 30
        assert decide(rule, values)[0] == 1
        # The test is SciPy's on the rest.
        rest = values[:, first:]
        for gain in (0.03, 0.06):
            again = values.copy()
            again[1, first:] += gain - (rest[1] - rest[3]).mean()
            pair = again[1, first:], again[3, first:]
            p = stats.ttest_rel(*pair, alternative="greater").pvalue
            assert decide(rule, again)[1] == (p < 0.05)

    @pytest.mark.parametrize("explorers", [1, 8])
    def test_noise_is_seldom_confirmed(self, explorers):
        """Without a correction, however many there are to choose from."""
        rng = np.random.default_rng(6)
        values = rng.normal(size=(4000, explorers + 2, 40))

        def one(values, key):
            seen = gather(values)
            return self.rule.decide(seen, (), key)[0].significant

        keys = jax.random.split(KEY, 4000)
        found = jax.jit(jax.vmap(one))(jnp.asarray(values, jnp.float32), keys)
        error = np.sqrt(0.05 * 0.95 / 4000)
        assert 0.03 < float(found.mean()) < 0.05 + 3 * error

    @pytest.mark.parametrize("fraction", [0, 1, -0.5, 50, float("nan")])
    def test_fraction_out_of_range(self, fraction):
        with pytest.raises(ValueError, match="fraction must be between 0 and 1, got"):
            adapt.choose_and_confirm(fraction=fraction)

    @pytest.mark.parametrize(
        "values, fraction",
        [
            (np.ones([4, 1]), 0.5),
            (np.ones([4]), 0.5),
            (np.ones([4, 8]), 0.01),
            (np.ones([4, 8]), 0.99),
        ],
        ids=["one example", "figures", "no first part", "no second part"],
    )
    def test_too_few_examples(self, values, fraction):
        rule = adapt.choose_and_confirm(fraction=fraction)
        with pytest.raises(ValueError, match="needs scores of examples that can be"):
            decide(rule, values)


@pytest.mark.parametrize(
    "rule",
    [adapt.greedy, adapt.confident, adapt.farsighted, adapt.choose_and_confirm],
)
@pytest.mark.parametrize("confidence", [0.5, 1.0, 95, -1, float("nan")])
def test_confidence_out_of_range(rule, confidence):
    with pytest.raises(ValueError, match=r"confidence must be above 0\.5 and below 1"):
        rule(confidence=confidence)


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
        if rule is ALL_RULES["farsighted"]:
            rule = adapt.farsighted(length=1)  # It waits for the end of a stretch.
            state = decide(rule, draws([0, 0, 0, 0]))[2]
            assert decide(rule, draws([-1, -1.5, -1, 1]), state)[0] == 3
            return
        adopted, significant, _ = decide(rule, draws([-1, -1.5, -1, 1]))
        assert (adopted, significant) == (3, False)

    def test_state_keeps_its_types(self, rule):
        state = rule.init(2)
        second = np.array([0.0, 1, 0, 0])
        if rule is ALL_RULES["choose_and_confirm"]:  # It takes no figures.
            second = draws([0, -1, 0, 0], seed=1)
        for values in (draws([0, 1, 0, 0]), second):
            _, _, new = decide(rule, values, state)
            specs = [
                jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), m)
                for m in (state, new)
            ]
            assert specs[0] == specs[1]
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(new))


class TestConfident:
    rule = adapt.confident()

    def run(self, rounds, state=None):
        adopted = []
        for number, values in enumerate(rounds):
            key = jax.random.fold_in(KEY, number)
            index, _, state = decide(self.rule, values, state, key)
            adopted.append(index)
        return adopted, state

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
        assert choices(self.rule, values, is_ascent=[True, False])[0] == 0
        alone = np.delete(values, 1, axis=0)
        assert choices(self.rule, alone, is_ascent=[True])[0] == 200

    def test_proof_lets_uphill_moves_in(self):
        state = None
        for seed in range(30):
            values = draws([0.05, 0.0, 0, 0], seed=seed)
            _, _, state = decide(self.rule, values, state, is_ascent=[True, False])
        adopted, _, _ = decide(self.rule, values, state, is_ascent=[True, False])
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
        rule, state = adapt.confident(clip=clip), None
        for s in seeds:
            _, _, state = decide(rule, draws([0.01, 0, 0, 0], seed=s), state)
        total = weight = 0.0
        for s in seeds:
            seen = gather(draws([0.01, 0, 0, 0], seed=s))
            z = float(evidence.compare(seen, "score", 2).z[0])
            total = 0.95 * total + np.clip(z, -clip, clip)
            weight = 0.95**2 * weight + 1
        assert float(state.current.total[0]) == pytest.approx(total, rel=1e-4)
        assert float(state.current.weight[0]) == pytest.approx(weight, rel=1e-4)

    @pytest.mark.parametrize("prior_rounds, decided", [(0.5, True), (1e4, False)])
    def test_doubt_delays_the_choice(self, prior_rounds, decided):
        """One of two explorers is better by two standard errors in each round."""
        rule = adapt.confident(clip=5.0, prior_rounds=prior_rounds)
        state, adopted = None, []
        for s in range(40):
            values = draws([0.025, 0.0, 0, 0], seed=s)
            choice, _, state = decide(rule, values, state, key=jax.random.key(s))
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
            state = self.rule.init(explorers)
            return self.rule.decide(seen, state, key)[0].significant

        keys = jax.random.split(KEY, 2000)
        scores = jnp.asarray(scores, jnp.float32)
        share = float(jax.jit(jax.vmap(significant))(scores, keys).mean())
        assert 0 < share < 0.05 + 2 * np.sqrt(0.05 * 0.95 / 2000)


def log_e(total, rounds):
    """Of a one-sided normal mixture with V = rounds, by integration.

    The prior on the mean of a round's z values is half-normal, of the precision that
    is about the best at 30 rounds and level 0.05.
    """
    log = 2 * np.log(1 / 0.05)
    rho = 30 / (log + np.log1p(log))
    mean = np.linspace(0, 40 / np.sqrt(rho), 400_001)
    prior = 2 * stats.norm.pdf(mean, scale=1 / np.sqrt(rho))
    inner = mean * total - mean**2 * rounds / 2
    highest = inner.max()
    area = integrate.trapezoid(np.exp(inner - highest) * prior, mean)
    return highest + np.log(area)


class TestTrial:
    """The visible parameters against the stable ones, over rounds."""

    rule = adapt.confident()

    def rounds(self, gain, count=60, explorer=0.0, seed=0):
        """``current`` is better than ``stable`` by the same true gain in all rounds."""
        rng = np.random.default_rng(seed)
        for _ in range(count):
            shared = rng.normal(size=128)
            own = 0.1 * rng.normal(size=(4, 128))
            yield shared + own + [[gain + explorer], [gain + explorer], [gain], [0]]

    def z(self, values):
        difference = values[2] - values[3]
        t, freedom = stats.ttest_1samp(difference, 0).statistic, len(difference) - 1
        return stats.norm.isf(stats.t.sf(abs(t), freedom)) * np.sign(t)

    def step(self, values, state, number):
        seen = gather(values)
        state = self.rule.init(2) if state is None else state
        key = jax.random.fold_in(KEY, number)
        return _jitted(self.rule)(seen, state, key)

    def test_small_gains_add_up_and_current_becomes_stable(self):
        state, total, promoted = None, 0.0, None
        for number, values in enumerate(self.rounds(0.008)):
            decision, state = self.step(values, state, number)
            total += np.clip(self.z(values), -10, 10)
            proof = log_e(total, number + 1)
            assert abs(proof - np.log(40)) > 0.02  # Or else round off decides.
            assert bool(decision.significant) == (proof >= np.log(40))
            if decision.significant:
                promoted = int(decision.promoted)
                break
            assert float(state.stable.total) == pytest.approx(total, abs=0.02)
            assert float(state.stable.weight) == number + 1
            assert float(state.stable.rounds) == number + 1
        assert promoted == 2
        assert int(decision.adopted) < 2  # What is visible moves on.
        assert number > 3
        np.testing.assert_array_equal(jax.tree.leaves(state.stable), 0)

    def test_small_harm_adds_up_and_stable_comes_back(self):
        state, total = None, 0.0
        for number, values in enumerate(self.rounds(-0.012)):
            decision, state = self.step(values, state, number)
            total += np.clip(self.z(values), -10, 10)
            back = log_e(-total, number + 1) >= np.log(1e4 / 0.05)
            assert (int(decision.adopted) == 3) == back
            assert not decision.significant
            if back:
                break
        assert back and number > 3
        # The trial begins anew, and the same stable parameters stand.
        np.testing.assert_array_equal(state.stable, [0, 0, number + 1])

    def test_one_clear_round_promotes_what_is_adopted(self):
        values = next(self.rounds(0.0, explorer=0.1))
        decision, state = self.step(values, None, 0)
        assert decision.significant
        assert int(decision.promoted) == int(decision.adopted) < 2
        np.testing.assert_array_equal(jax.tree.leaves(state.stable), 0)

    def test_one_round_has_a_limit(self):
        """A round counts ten standard errors at most, either way."""
        values = draws([0, 0, -50, 0], spread=0.1)
        values[:2] -= 50
        _, _state = self.step(values, None, 0)
        values = draws([0.0, 0.0, 0.0, 0.0])
        values[3] = values[2]
        _, tied = self.step(values, None, 0)
        assert (float(tied.stable.total), float(tied.stable.weight)) == (0, 0)
        assert float(tied.stable.rounds) == 1

    def test_what_a_single_round_must_show_grows_with_the_rounds(self):
        """Level (0.025 / 3) 6 / (pi t)^2 in round t: z 2.6 at first, 4.2 at t = 20."""
        shares = {}
        for t in (1.0, 20.0):
            state = self.rule.init(2)
            trial = state.stable._replace(rounds=jnp.float32(t - 1))
            state = state._replace(stable=trial)
            needed = stats.norm.isf(0.025 / 3 * 6 / (np.pi * t) ** 2)
            for z in (needed - 0.15, needed + 0.15):
                values = draws([0, -9, 0, 0], examples=400)
                values[3] = values[2]
                own = values[0] - values[2]
                values[0] += z * own.std(ddof=1) / np.sqrt(400)
                decision, _ = self.step(values, state, 0)
                assert int(decision.adopted) == 0
                shares[t, z > needed] = bool(decision.significant)
        assert shares == {
            (1.0, False): False,
            (1.0, True): True,
            (20.0, False): False,
            (20.0, True): True,
        }

    @pytest.mark.parametrize("explorers", [1, 4])
    def test_false_proof_over_many_rounds(self, explorers):
        """Nothing is ever better: at most 5 % of runs replace stable in 300 rounds."""
        runs, count = 400, explorers + 2

        def run(key):
            def one(state, key):
                data, rule_key = jax.random.split(key)
                values = jax.random.normal(data, [count, 24])
                decision, state = self.rule.decide(gather(values), state, rule_key)
                return state, decision.significant

            keys = jax.random.split(key, 300)
            return jax.lax.scan(one, self.rule.init(explorers), keys)[1].any()

        found = jax.jit(jax.vmap(run))(jax.random.split(KEY, runs))
        assert float(found.mean()) < 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
