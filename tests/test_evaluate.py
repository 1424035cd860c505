"The numbers of an evaluation, each computed another way."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from capo.evaluate import accuracy, bootstrap, evaluate, most_confident
from capo.rollout import Rollouts
from test_calibration import groups, same, shuffle, sklearn_auc


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
