"Selective answering against scikit-learn, enumeration of orders, and numbers worked by hand."
import importlib
import itertools
import math
from math import nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import beta, binom
from sklearn.metrics import brier_score_loss, precision_recall_curve
from torch import tensor

from capo.calibration import auc
from capo.selective import (_binomial_tail, area, at_threshold, brier, certified_threshold, coverage_at, ece,
                            precision_bound, precision_coverage, prr, split_questions, threshold_for)
from helpers import refuses, same, shuffle

plain = importlib.import_module("capo_as_installed.selective")  # without the hook, as a user has it
inf = math.inf


@st.composite
def replies(draw, N=12, least=1):
    "Scores in quarters, so that ties are common, and correctness."
    n = draw(st.integers(least, N))
    row = lambda x: tensor(draw(st.lists(x, min_size=n, max_size=n)))
    return row(st.integers(-6, 0)) / 4, row(st.booleans())


@given(replies(N=6))
def test_precision_is_the_mean_over_orders(case):
    score, correct = case
    right, falls = correct.double().numpy(), lambda o: all(score[a] >= score[b] for a, b in zip(o, o[1:]))
    hits = np.mean([right[list(o)].cumsum() for o in itertools.permutations(range(len(score))) if falls(o)], axis=0)
    k = np.arange(1, len(score) + 1)
    coverage, precision = precision_coverage(score, correct)
    same(coverage, k / len(score)), same(precision, hits / k)


@given(replies(N=40))
def test_the_curve_is_sklearns_where_a_tie_ends(case):
    score, correct = case
    if not correct.any(): return
    precision, recall, thresholds = precision_recall_curve(correct.numpy(), score.numpy())
    answered = [(score >= t).sum().item() for t in thresholds]
    mine = precision_coverage(score, correct)[1]
    same([mine[n - 1] for n in answered], precision[:-1], 1e-12)
    same([mine[n - 1] * n / correct.sum() for n in answered], recall[:-1], 1e-12)
    for t, n, p in zip(thresholds, answered, precision):
        same(at_threshold(score, correct, float(t)), (n / len(score), p), 1e-12)


@given(replies(N=30), st.integers(0, 99))
@settings(max_examples=25)
def test_order_and_monotone_maps_change_nothing(case, seed):
    score, correct = case
    p = shuffle(len(score), seed)
    for s, c in ((score[p], correct[p]), (score.exp(), correct), (score.double() * 3 - 7, correct)):
        for f in (area, prr): same(f(s, c), f(score, correct), 1e-12)
        for required in (.3, .5, .8): same(coverage_at(s, c, required), coverage_at(score, correct, required))
    for required, sure in ((.3, .5), (.5, .6)):
        one, other = (certified_threshold(s, c, required, sure) for s, c in ((score[p], correct[p]), (score, correct)))
        assert one == other


@given(replies())
def test_area_between_its_marks(case):
    score, correct = case
    share = correct.double().mean().item()
    same(area(torch.zeros_like(score), correct), share)
    oracle, none = correct.float(), torch.zeros_like(score)
    assert area(-oracle, correct) - 1e-12 <= area(score, correct) <= area(oracle, correct) + 1e-12
    if not 0 < share < 1:
        assert math.isnan(prr(score, correct)) and area(score, correct) == share
    else:
        assert prr(score, correct) <= 1 + 1e-12
        assert prr(oracle, correct) == pytest.approx(1) and abs(prr(none, correct)) < 1e-12


def test_prr_by_hand():
    """Right, wrong, right, wrong: area 2/3, random 1/2, oracle 19/24.

    And right, wrong, wrong, right: (1 + 1/2 + 1/3 + 1/2)/4 = 7/12."""
    score, alternating = tensor([4., 3., 2., 1.]), tensor([1, 0, 1, 0])
    assert area(score, alternating) == pytest.approx(2 / 3)
    assert area(alternating.float(), alternating) == pytest.approx(19 / 24)
    assert prr(score, alternating) == pytest.approx(4 / 7)
    assert prr(score, tensor([1, 0, 0, 1])) == pytest.approx((7 / 12 - 1 / 2) / (19 / 24 - 1 / 2))
    assert prr(tensor([2., 2., 1., 1.]), alternating) == pytest.approx(0)


@given(replies(N=30, least=2))
def test_area_and_auc(case):
    "A sum of harmonic numbers over ranks; the share answered and right, averaged, is a straight line in the AUC."
    _, correct = case
    N, right = len(correct), int(correct.sum())
    score = -torch.arange(N, dtype=torch.float64)
    H = np.concatenate([[0], (1 / np.arange(1, N + 1)).cumsum()])
    same(area(score, correct), sum(H[N] - H[i] for i in correct.nonzero()[:, 0].tolist()) / N, 1e-12)
    coverage, precision = precision_coverage(score, correct)
    if not 0 < right < N: return
    line = right * (right + 1) / (2 * N ** 2) + right * (N - right) / N ** 2 * auc(score, correct)
    same((coverage * precision).mean(), line, 1e-12)


@given(replies(), st.sampled_from([.1, .5, 2 / 3, .75, .9, 1.]))
def test_threshold_by_search(case, required):
    score, correct = case
    good = [t for t in score.tolist() if correct[score >= t].double().mean() >= required]
    assert threshold_for(score, correct, required) == min(good, default=inf)
    assert coverage_at(score, correct, required) == (score >= min(good, default=inf)).double().mean()


def test_thresholds_survive_the_type_of_the_score():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64):
        score, correct = tensor([-1, -3, -7, -9]).to(dtype), tensor([1, 1, 0, 0])
        assert at_threshold(score, correct, threshold_for(score, correct, 1.)) == (.5, 1)
    third = torch.full((3,), 1 / 3)
    assert at_threshold(third, tensor([1, 1, 1]), threshold_for(third, tensor([1, 1, 1]), 1.)) == (1, 1)


def test_no_replies_and_one_class():
    none = torch.zeros(0)
    assert all(math.isnan(f(none, none)) for f in (area, prr, ece, brier))
    assert threshold_for(none, none, .5) == certified_threshold(none, none, .5) == inf
    assert precision_coverage(none, none)[0].numel() == 0
    s, wrong = tensor([-1., -2.]), tensor([0, 0])
    assert threshold_for(s, tensor([1, 1]), 1.) == -2 and threshold_for(s, wrong, .1) == inf
    coverage, precision = at_threshold(s, wrong, inf)
    assert coverage == coverage_at(s, wrong, .1) == 0 and math.isnan(precision)


@given(st.integers(0, 60), st.integers(-1, 61), st.floats(0, 1))
def test_the_tail_is_scipys(n, r, p): same(_binomial_tail(n, r, p), binom.sf(r - 1, n, p) if r <= n else 0., 1e-10)


@given(st.integers(1, 300), st.floats(0, 1), st.sampled_from([.5, .9, .95, .999]))
def test_the_bound_is_clopper_and_pearsons(n, share, confidence):
    r = round(share * n)
    same(precision_bound(r, n, confidence), beta.ppf(1 - confidence, r, n - r + 1) if r else 0., 1e-9)


@pytest.mark.parametrize("score", ["informative", "useless", "in five steps"])
def test_the_guarantee_holds(score):
    "Falls short in the population at most as often as it says; 150 samples, and three standard errors."
    g = torch.Generator().manual_seed(0)
    short = answered = 0
    for i in range(150):
        s = torch.rand(300, generator=g, dtype=torch.float64)
        if score == "in five steps": s = (s * 5).ceil() / 5
        chance = .5 + .5 * s if score != "useless" else torch.full_like(s, .75)
        right = torch.rand(300, generator=g, dtype=torch.float64) < chance
        t = certified_threshold(s, right, .76, confidence=.9, levels=20, seed=i)
        if t == inf: continue
        reached = [x for x in (.2, .4, .6, .8, 1.) if x >= t - 1e-9] if score == "in five steps" else [t, 1]
        truth = .75 if score == "useless" else .5 + .5 * np.mean(reached)
        answered, short = answered + 1, short + (truth < .76)
    assert short <= 15 + 3 * (150 * .1 * .9) ** .5
    assert score == "useless" or answered > 75


def test_plain_thresholds_fall_short_about_half_the_time():
    g = torch.Generator().manual_seed(0)
    short = 0
    for _ in range(200):
        s = torch.rand(300, generator=g, dtype=torch.float64)
        t = threshold_for(s, torch.rand(300, generator=g, dtype=torch.float64) < .2 + .8 * s, .8)
        short += .2 + .4 * (1 + t) < .8
    assert 70 < short < 140


@given(st.lists(st.integers(0, 9), min_size=2, max_size=30), st.sampled_from([.2, .5, .7]), st.integers(0, 9))
def test_questions_stay_whole(ids, share, seed):
    n = len(set(ids))
    if not 0 < round(share * n) < n: return
    part = split_questions(ids, share, seed)
    chosen = {i for i, p in zip(ids, part.tolist()) if p}
    assert len(chosen) == round(share * n) and part.tolist() == [i in chosen for i in ids]
    p = shuffle(len(ids), seed)
    assert split_questions(tensor(ids)[p], share, seed).equal(part[p])
    names = split_questions([f"q{i}" for i in ids], share, seed)
    assert len({i for i, p in zip(ids, names.tolist()) if p}) == len(chosen)


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=40), st.integers(1, 12))
def test_absolute_calibration_by_hand(rows, bins):
    p, c = tensor([x / 20 for x, _ in rows], dtype=torch.float64), tensor([y for _, y in rows])
    same(brier(p, c), brier_score_loss(c.numpy(), p.numpy(), labels=[0, 1]), 1e-12)
    total = 0
    for b in range(bins):
        inside = (p <= (b + 1) / bins) & ((p > b / bins) | (b == 0))
        if inside.any(): total += inside.sum().item() * abs(p[inside].mean() - c[inside].double().mean()).item()
    same(ece(p, c, bins), total / len(p), 1e-12)


s, c = tensor([-1., -2., -3.]), tensor([1, 0, 1])
TAKES = {f.__name__: f for f in (plain.precision_coverage, plain.area, plain.prr)} | {
    f.__name__: lambda s, c, f=f: f(s, c, .5)
    for f in (plain.threshold_for, plain.certified_threshold, plain.at_threshold, plain.coverage_at)}


@pytest.mark.parametrize("f", TAKES.values(), ids=TAKES)
def test_bad_replies(f):
    refuses(lambda: f(s, c[:2]), "must have one shape")
    refuses(lambda: f(s[None], c[None]), "one list")
    refuses(lambda: f(s * nan, c), "holds NaN")
    refuses(lambda: f(s, c * 2), "0 and 1 only")


BAD = {
    "precision": (lambda: plain.threshold_for(s, c, 90), "precision must be above 0"),
    "no precision": (lambda: plain.threshold_for(s, c, 0), "precision must be above 0"),
    "confidence": (lambda: plain.certified_threshold(s, c, .9, confidence=95), "confidence must lie between 0 and 1"),
    "levels": (lambda: plain.certified_threshold(s, c, .9, levels=0), "levels must be at least 1"),
    "more right than answered": (lambda: plain.precision_bound(3, 2), "right must lie between 0 and answered"),
    "confidence of the bound": (lambda: plain.precision_bound(1, 2, 95), "confidence must lie"),
    "share": (lambda: plain.split_questions([1, 2], 1.), "share must lie between 0 and 1"),
    "one question": (lambda: plain.split_questions(["a", "a"]), "leaves one part empty"),
    "lpm for ece": (lambda: plain.ece(s, c), "Was lpm passed instead of exp(lpm)?"),
    "more than 1": (lambda: plain.brier(-s, c), "probability must lie between 0 and 1"),
    "bins": (lambda: plain.ece(s.exp(), c, 0), "bins must be at least 1"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input(case): refuses(*case)
