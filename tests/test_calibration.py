"AUC against scikit-learn's, and what must not change it."
import math

import pytest
import torch
from hypothesis import given, strategies as st

from capo.calibration import as_correct, auc, auc_mean, group_auc, group_index, pair_auc, pooled_auc
from helpers import groups, same, shuffle, sklearn_auc


@given(groups(B=1, G=40))
def test_auc_is_sklearns(case):
    score, correct, _ = (x[0] for x in case)
    same(auc(score, correct), sklearn_auc(score, correct))


def test_auc_is_exact_on_many_responses():
    g = torch.Generator().manual_seed(0)
    score, correct = torch.randint(500, (100_000,), generator=g).float(), torch.rand(100_000, generator=g) < .3
    same(auc(score, correct), sklearn_auc(score, correct), 1e-13)


@given(groups(B=1, G=20), st.integers(0, 99))
def test_auc_depends_on_order_only(case, seed):
    score, correct, _ = (x[0] for x in case)
    p = shuffle(len(score), seed)
    for moved in (score.exp(), 3 * score - 7): same(auc(moved, correct), auc(score, correct))
    same(auc(score[p], correct[p]), auc(score, correct))
    same(auc(-score, correct), 1 - auc(score, correct))
    same(auc(score, ~correct), 1 - auc(score, correct))


@given(groups())
def test_group_auc_is_sklearns_row_by_row(case):
    score, correct, valid = case
    same(group_auc(score, correct), [sklearn_auc(s, c) for s, c in zip(score, correct)], 1e-6)
    same(group_auc(score, correct, valid), [sklearn_auc(s[v], c[v]) for s, c, v in zip(score, correct, valid)], 1e-6)


@given(groups(), st.integers(0, 99))
def test_group_auc_follows_questions_and_ignores_the_order_of_responses(case, seed):
    score, correct, valid = case
    q, p = shuffle(len(score), seed), shuffle(score.shape[1], seed)
    same(group_auc(score[q][:, p], correct[q][:, p], valid[q][:, p]), group_auc(score, correct, valid)[q], 0)


@given(groups(), st.sampled_from([math.nan, math.inf, -math.inf, 0.]), st.integers(0, 3))
def test_padding_changes_nothing(case, junk, n):
    score, correct, valid = case
    wide = lambda x, fill: torch.cat([torch.full((len(x), n), fill), x], 1)
    padded = wide(score, junk), wide(correct.float(), 7.), wide(valid, False)
    for f in (group_auc, auc_mean, pair_auc, pooled_auc): same(f(*padded), f(score, correct, valid), 0)


@given(groups())
def test_three_averages(case):
    "AUC-mean weighs questions alike, pair AUC by their pairs, pooled AUC knows no questions."
    score, correct, valid = case
    a = group_auc(score, correct, valid).double()
    pairs = ((correct & valid).sum(1) * (~correct & valid).sum(1)).double()
    n = int((pairs > 0).sum())
    same(auc_mean(score, correct, valid), (a.nansum() / n if n else math.nan, n), 1e-6)
    same(pair_auc(score, correct, valid), (a.nan_to_num() * pairs).sum() / pairs.sum(), 1e-6)
    same(pooled_auc(score, correct, valid), sklearn_auc(score[valid], correct[valid]))


@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=12))
def test_ragged_groups_go_there_and_back(ids):
    x = torch.arange(len(ids)) * 10.
    index, valid = group_index(ids)
    assert index.shape == valid.shape == (len(set(ids)), max(ids.count(i) for i in ids))
    for uid, row, there in zip(dict.fromkeys(ids), x[index], valid):
        assert row[there].tolist() == [10. * i for i, j in enumerate(ids) if j == uid]
    back = torch.full_like(x, -1)
    back[index[valid]] = x[index][valid]
    assert back.equal(x)
    assert all(a.equal(b) for a, b in zip(group_index(torch.tensor([ord(i) for i in ids])), (index, valid)))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-9, 0), st.booleans()), min_size=1, max_size=30))
def test_ragged_group_auc(rows):
    ids, score, correct = (list(x) for x in zip(*rows))
    score, correct = torch.tensor(score) / 4, torch.tensor(correct)
    index, valid = group_index(ids)
    mine = [torch.tensor([i == q for i in ids]) for q in dict.fromkeys(ids)]
    same(group_auc(score[index], correct[index], valid), [sklearn_auc(score[m], correct[m]) for m in mine], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.float64])
def test_any_type_of_score_and_label(dtype):
    score, correct = torch.tensor([[0, -3, -10_000, -1]], dtype=dtype), torch.tensor([[1, 0, 1, 0]])
    for c in (correct, correct.bool(), correct.half(), correct.double()):
        assert group_auc(score, c).item() == auc(score[0], c[0]) == .5
        assert as_correct(c).equal(correct.bool())


def test_float64_and_integers_are_not_rounded():
    large = torch.tensor([2**24 + 1, 2**24])
    score = 1 + torch.tensor([[1e-12, 0.]], dtype=torch.float64)
    for s in (score, large[None]):
        assert auc(s[0], torch.tensor([1, 0])) == group_auc(s, torch.tensor([[1, 0]])).item() == 1
