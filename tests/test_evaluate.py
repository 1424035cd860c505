"The numbers of an evaluation, each computed another way."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from capo.evaluate import (NUMBERS, Responses, accuracy, assess, bootstrap, correlation, counts, estimate, evaluate, mean_of, mean_over, most_confident, paired, ranked, resamples, size_of, statistics, weighted_area, weighted_auc, weighted_ece, weighted_prr)
from capo.rollout import Rollouts
from capo.selective import area, brier, ece, prr, split_questions
from helpers import groups, responses, same, shuffle, sklearn_auc, two_runs


def mean(x): return sum(x) / len(x) if x else math.nan


@given(groups())
def test_accuracy_and_most_confident_by_counting(case):
    score, correct, valid = case
    rows = [[(s, c) for s, c, v in zip(*row) if v] for row in zip(score.tolist(), correct.tolist(), valid.tolist())]
    same(accuracy(correct, valid), [mean([c for _, c in row]) for row in rows], 1e-6)
    same(most_confident(score, correct, valid), [mean([c for s, c in row if s == max(row)[0]]) for row in rows], 1e-6)


@given(groups(), st.integers(0, 99))
def test_order_and_monotone_maps_change_nothing(case, seed):
    score, correct, valid = case
    p = shuffle(score.shape[1], seed)
    same(most_confident(score[:, p].exp(), correct[:, p], valid[:, p]), most_confident(score, correct, valid), 1e-6)
    same(accuracy(correct[:, p], valid[:, p]), accuracy(correct, valid), 1e-6)


@given(groups(B=5, G=5), st.integers(0, 99))
def test_every_number_of_the_report(case, seed):
    lpm, correct, valid = case
    valid[0, 0] = True                                                           # something to speak of
    lengths = torch.randint(1, 4, valid.shape, generator=torch.Generator().manual_seed(seed)) * valid
    mask = (torch.arange(3) < lengths[..., None]).long()
    B, G = valid.shape
    r = Rollouts(torch.ones(B, 1, dtype=torch.long), torch.ones(B, 1, dtype=torch.long), mask, mask, lpm[..., None] * mask,
                 (correct & valid).float(), lengths == 3, [[""] * G] * B)
    found = evaluate(r)
    aucs = [a for s, c, v in zip(lpm, correct, valid) if not math.isnan(a := sklearn_auc(s[v], c[v]))]
    pairs = [int((c & v).sum() * (~c & v).sum()) for c, v in zip(correct, valid)]
    weighted = sum(p * sklearn_auc(s[v], c[v]) for p, s, c, v in zip(pairs, lpm, correct, valid) if p)
    nan_mean = lambda x: x[~x.isnan()].mean().item()
    want = {"accuracy": nan_mean(accuracy(correct, valid)), "auc_mean": mean(aucs), "mixed_questions": len(aucs),
            "pair_auc": weighted / sum(pairs) if sum(pairs) else math.nan, "pooled_auc": sklearn_auc(lpm[valid], correct[valid]),
            "most_confident": nan_mean(most_confident(lpm, correct, valid)), "lpm": lpm[valid].mean().item(),
            "entropy": -(lpm * lengths).sum().item() / lengths.sum().item(), "length": lengths[valid].float().mean().item(),
            "truncated": (lengths == 3)[valid].float().mean().item()}
    assert list(found) == list(want)
    same(list(found.values()), list(want.values()), 1e-5)


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for level, z in ((.95, 1.96), (.5, .674)):
        low, high = bootstrap(lambda d: d.mean(), x, n=4000, level=level)
        half = z * x.std().item() / 20
        assert low == pytest.approx(x.mean().item() - half, abs=.1 * half) and high == pytest.approx(x.mean().item() + half, abs=.1 * half)


def test_the_interval_depends_on_the_seed_alone():
    x = torch.arange(20.)
    before = torch.get_rng_state()
    assert bootstrap(torch.mean, x, n=50, seed=1) == bootstrap(torch.mean, x, n=50, seed=1) != bootstrap(torch.mean, x, n=50, seed=2)
    assert torch.get_rng_state().equal(before)


def test_questions_are_resampled_together_and_whole():
    x = torch.arange(60.).view(20, 3)
    assert bootstrap(lambda a, b: (a - b).sum(), x, x, n=20) == (0, 0)           # pairs stay pairs
    assert bootstrap(lambda a: (a[:, 1] - a[:, 0]).mean(), x, n=20) == (1, 1)    # rows stay rows
    low, high = bootstrap(lambda a: float(len(a)), x, n=20)
    assert low == high == 20


def test_resamples_without_a_value_are_left_out():
    x = torch.tensor([0., 1.])
    auc_like = lambda d: d.mean() if 0 < d.sum() < 2 else math.nan
    assert bootstrap(auc_like, x, n=100) == (.5, .5)
    assert all(math.isnan(v) for v in bootstrap(lambda d: math.nan, x, n=10))


def test_a_wider_level_holds_a_narrower_one():
    x = torch.arange(30.)
    (a, b), (c, d) = (bootstrap(torch.mean, x, n=200, level=level) for level in (.5, .99))
    assert c < a < b < d and np.isfinite([a, b, c, d]).all()


# Everything as a statistic of the weights of the questions.

def one(statistic, B): return statistic(torch.ones(1, B, dtype=torch.float64)).item()


def area_by_hand(score, correct):
    "Mean over m of the expected share of right ones among the m most confident, a run of ties in random order."
    pairs, total = sorted(zip(score, correct), reverse=True), 0
    for m in range(1, len(pairs) + 1):
        edge = pairs[m - 1][0]
        above, tied = [c for s, c in pairs if s > edge], [c for s, c in pairs if s == edge]
        total += (sum(above) + (m - len(above)) * sum(tied) / len(tied)) / m
    return total / len(pairs)


@settings(max_examples=15)
@given(groups(B=5, G=6), st.lists(st.integers(0, 3), min_size=5, max_size=5), st.integers(0, 99))
def test_a_weight_is_that_many_copies(case, weights, seed):
    lpm, correct, valid = case
    valid[0, 0] = True
    B, G = valid.shape
    g = torch.Generator().manual_seed(seed)
    r = responses(lpm, correct, valid, torch.randint(-1, 3, (B, G), generator=g), length=torch.randint(1, 9, (B, G), generator=g).double(), confidence=-lpm.double(),
                  truncated=torch.rand(B, G, generator=g) < .2)
    weights = torch.tensor(weights[:B])
    weights[0] = max(1, weights[0])
    copies = r[torch.arange(B).repeat_interleave(weights).tolist()]
    copies = Responses(**vars(copies) | {"id": [str(i) for i in range(len(copies))]})
    here, there = statistics(r)[0], statistics(copies)[0]
    for k in set(NUMBERS) - {"coverage", "precision", "pass_at_n"}:                   # of halves that differ, and of an n that may
        f, h = here[k], there[k]
        if isinstance(f, str) or isinstance(h, str): continue
        same(f(weights[None].double()).item(), one(h, len(copies)), 1e-9)


@given(groups(B=5, G=6))
def test_every_pooled_number_against_a_plain_one(case):
    lpm, correct, valid = case
    valid[0, 0] = True
    r = responses(lpm, correct, valid)
    s, c, B = r.lpm[valid], r.correct[valid], len(valid)
    points, right = ranked(r.lpm, r.correct, valid), c.double().mean().item()
    same(one(weighted_auc(points), B), sklearn_auc(s, c), 1e-9)
    by_hand, best = area_by_hand(s.tolist(), c.tolist()), area_by_hand(c.tolist(), c.tolist())
    same(one(weighted_area(points), B), by_hand, 1e-9)
    if 0 < right < 1: same(one(weighted_prr(points), B), (by_hand - right) / (best - right), 1e-9)
    same(one(weighted_area(points), B), area(s, c), 1e-9); same(one(weighted_prr(points), B), prr(s, c), 1e-9)
    same(one(weighted_ece(r.lpm.exp(), r.correct, valid), B), ece(s.exp(), c), 1e-9)
    same(one(mean_over((r.lpm.exp() - r.correct.double()) ** 2, valid), B), brier(s.exp(), c), 1e-9)


def test_prr_by_hand():
    s, c = torch.tensor([[-.1, -.2, -.3, -.4]]), torch.tensor([[True, False, True, False]])
    # precision 1, 1/2, 2/3, 1/2: mean 2/3; at best 1, 1, 2/3, 1/2: mean 19/24; at random 1/2
    same(one(weighted_prr(ranked(s, c, torch.ones(1, 4).bool())), 1), (2 / 3 - 1 / 2) / (19 / 24 - 1 / 2), 1e-12)


def test_the_correlation_is_numpys_and_nan_for_a_constant():
    g = torch.Generator().manual_seed(0)
    x, y = (1e4 + torch.randn(7, 5, generator=g, dtype=torch.float64) for _ in "xy")
    valid = torch.rand(7, 5, generator=g) < .8
    same(one(correlation(x, y + x, valid), 7), np.corrcoef(x[valid], (y + x)[valid])[0, 1], 1e-7)
    assert math.isnan(one(correlation(x * 0 + 3, y, valid), 7))


def test_fast_and_plain_bootstrap_draw_the_same():
    x = torch.rand(30, generator=torch.Generator().manual_seed(0))
    fast = estimate(mean_of(x), resamples(30, 200, seed=3))
    same((fast.low, fast.high), bootstrap(torch.mean, x, n=200, seed=3), 1e-6)
    same(fast.value, x.mean().item(), 1e-6)
    assert resamples(30, 5).sum(1).tolist() == [30] * 5


def test_the_threshold_is_chosen_on_one_half_and_checked_on_the_other():
    B, G = 40, 8
    g = torch.Generator().manual_seed(0)
    lpm = -torch.rand(B, G, generator=g).double()
    r = responses(lpm, torch.rand(B, G, generator=g) < lpm.exp() ** 2, torch.ones(B, G).bool())
    a, choose = assess(r, n=50, precision=.7), split_questions(r.id)
    check = ~choose
    kept = r.lpm[choose] >= a.threshold
    assert choose.sum() == check.sum() == 20 and not (choose & check).any()
    assert r.correct[choose][kept].double().mean() >= .7
    assert all(r.correct[choose][r.lpm[choose] >= t].double().mean() < .7 for t in r.lpm[choose].flatten() if t < a.threshold)      # the largest coverage
    above = r.lpm[check] >= a.threshold
    same(a["coverage"].value, above.double().mean().item()); same(a["precision"].value, r.correct[check][above].double().mean().item())
    p = shuffle(B, 1).tolist()
    assert assess(r[p], n=2, precision=.7).threshold == a.threshold                 # whatever the order of the questions


@pytest.mark.parametrize("right, note", [(True, "all responses are right"), (False, "all responses are wrong")])
def test_one_class_is_a_sentence(right, note):
    r = responses(-torch.rand(4, 3), torch.full((4, 3), right), torch.ones(4, 3).bool())
    a = assess(r, n=20)
    assert a["accuracy"].value == right and a["auc_mean"].note == a["pooled_auc"].note == a["prr"].note == note and str(a["auc_mean"]) == "–"
    assert a["precision"].value == 1 if right else "no threshold" in a["precision"].note
    assert "token_confidence" in a["deepconf"].note and "length" in a["length"].note and a["truncated"].note
    assert a.counts["mixed"] == 0 and a.counts["all right" if right else "all wrong"] == 4


def test_one_question_and_one_response():
    a = assess(responses(torch.tensor([[-.5]]), torch.tensor([[True]]), torch.tensor([[True]])), n=5)
    assert a["accuracy"].value == a["majority"].value == a["coverage_area"].value == 1 and (a["accuracy"].low, a["accuracy"].high) == (1, 1)


def test_nothing_but_empty_responses():
    a = assess(responses(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 2).bool()), n=5)
    assert all(e.note for e in a.numbers.values()) and a.counts["responses"] == 0


def test_questions_with_fewer_responses():
    valid = torch.tensor([[True] * 4, [True] * 4, [True, False, False, False]])
    r = responses(torch.tensor([[-.1, -.2, -.3, -.4]] * 3), torch.tensor([[1, 0, 0, 0], [0] * 4, [1] * 4]), valid)
    a = assess(r, n=20)
    assert size_of(r) == 4 and a["pass_at_n"].value == .5 and a["accuracy"].value == pytest.approx((1/4 + 0 + 1) / 3)
    assert (a.counts["fewest"], a.counts["most"], a.counts["mixed"], a.counts["all right"], a.counts["all wrong"]) == (1, 4, 1, 1, 1)
    assert counts(r)["responses"] == 9


def test_a_run_against_itself_does_not_differ():
    r, _ = two_runs()
    for k, e in paired(assess(r, n=5), assess(r, n=5), n=50).differences.items(): assert e.note or e.value == e.low == e.high == 0, k


def test_runs_are_paired_by_question_whatever_the_order():
    r, other = two_runs()
    p = shuffle(30, 3).tolist()
    one, two = (paired(assess(r, n=5), assess(x, n=5), n=100) for x in (other, other[p]))
    assert one.shared == two.shared == 30 and one.unmatched == (0, 0)
    for k in NUMBERS: same([one[k].value, one[k].low, one[k].high], [two[k].value, two[k].low, two[k].high], 1e-9)
    x = accuracy(other.correct).double() - accuracy(r.correct).double()
    same((one["accuracy"].low, one["accuracy"].high), bootstrap(torch.mean, x, n=100), 1e-9)
    far = assess(other, n=200)["accuracy"]
    assert one["accuracy"].high - one["accuracy"].low < far.high - far.low + assess(r, n=200)["accuracy"].high - assess(r, n=200)["accuracy"].low


def test_questions_that_only_one_run_has_are_counted():
    r, other = two_runs()
    c = paired(assess(r[range(20)], n=5), assess(other[range(5, 30)], n=5), n=20)
    assert c.shared == 15 and c.unmatched == (5, 10)
    same(c["accuracy"].value, (accuracy(other.correct) - accuracy(r.correct))[5:20].double().mean().item(), 1e-6)
    with pytest.raises(ValueError, match="share no question"): paired(assess(r[range(5)], n=2), assess(other[range(5, 9)], n=2))


@pytest.mark.parametrize("options, words", [({"n": 0}, "n must be at least 1"), ({"level": 95}, "level must lie"), ({"level": math.nan}, "level must"), ({"precision": 90}, "precision must lie in"), ({"precision": 0}, "precision")])
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words): assess(two_runs()[0], **options)
