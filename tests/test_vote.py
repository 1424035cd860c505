"Votes against a count by hand, subsets against enumeration, pruning against a direct search."
import importlib
import itertools
import math
from math import nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import weibull_min
from torch import tensor

from capo.vote import (_fit_weibull, _log_weibull, _weibull_mixture, bottom_confidence, deepconf, group_confidence,
                       majority_vote, most_confident, pass_at_k, perplexity_consistency, pruned, rpc, tail_confidence,
                       vote_curve, vote_share, weighted_vote)
from helpers import groups, refuses, same, shuffle

plain = importlib.import_module("capo_as_installed.vote")  # without the hook, as a user has it


@st.composite
def ballots(draw, B=4, G=7, K=4):
    "Answers (some none), weights in quarters, correctness (by answer), valid, texts (some equal)."
    b, g = draw(st.integers(1, B)), draw(st.integers(1, G))
    table = lambda x: tensor(draw(st.lists(st.lists(x, min_size=g, max_size=g), min_size=b, max_size=b)))
    answer, right = table(st.integers(-1, K - 1)), draw(st.integers(0, K - 1))
    text = answer * 3 + table(st.integers(0, 2))  # a text has one answer
    return answer, table(st.integers(0, 12)).double() / 4, (answer == right).long(), table(st.booleans()), text


def by_hand(answer, weight, correct, valid):
    "The vote of one question: total weight of each answer, the answers at the top, the mean of their correctness."
    rows = [(a, w, c) for a, w, c, v in zip(answer, weight, correct, valid) if v and a >= 0]
    total = {a: sum(w for b, w, _ in rows if b == a) for a, _, _ in rows}
    top = [a for a in total if abs(total[a] - max(total.values())) < 1e-9]
    return sum(np.mean([c for b, _, c in rows if b == a]) for a in top) / len(top) if top else math.nan


def question_by_question(f, *tables): return [f(*rows) for rows in zip(*(t.tolist() for t in tables))]


@given(ballots())
def test_votes_by_hand(case):
    answer, weight, correct, valid, _ = case
    def expect(weight): return question_by_question(by_hand, answer, weight, correct, valid)
    for w in (weight, -weight): same(weighted_vote(answer, w, correct, valid), expect(w), 1e-6)
    same(majority_vote(answer, correct, valid), expect(weight * 0 + 1), 1e-6)


@given(ballots())
def test_perplexity_consistency_by_hand(case):
    answer, lpm, correct, valid, text = case
    lpm, valid = -lpm, valid & (answer >= 0)
    for q in range(len(answer)):  # equal texts have one probability
        for t in text[q].tolist(): lpm[q, text[q] == t] = lpm[q, text[q] == t][0]

    def first(texts, valid):
        before = lambda i: [t for t, v in zip(texts[:i], valid[:i]) if v]
        return [v and t not in before(i) for i, (t, v) in enumerate(zip(texts, valid))]

    once = tensor([first(t, v) for t, v in zip(text.tolist(), valid.tolist())])
    def expect(valid): return question_by_question(by_hand, answer, lpm.exp(), correct, valid)
    same(perplexity_consistency(answer, lpm, correct, valid, text), expect(once), 1e-6)
    same(perplexity_consistency(answer, lpm, correct, valid), expect(valid), 1e-6)


@given(ballots(), st.sampled_from([.1, .3, .5, .9, 1.]))
def test_deepconf_by_hand(case, keep):
    answer, conf, correct, valid, _ = case
    valid &= answer >= 0
    stays = []
    for c, v in zip(conf, valid):
        cut = np.quantile(c[v].numpy(), 1 - keep, method="linear") if v.any() else 0
        stays.append((v & (c >= cut - 1e-9)).tolist())
    expected = question_by_question(by_hand, answer, conf, correct, tensor(stays))
    same(deepconf(answer, conf, correct, valid, keep), expected, 1e-6)


VOTES = {
    "majority": lambda a, x, c, v, t: majority_vote(a, c, v),
    "most confident": lambda a, x, c, v, t: most_confident(x, c, v),
    "weighted": lambda a, x, c, v, t: weighted_vote(a, x, c, v),
    "PC": lambda a, x, c, v, t: perplexity_consistency(a, -x, c, v, t),
    "RPC": lambda a, x, c, v, t: rpc(a, -x, c, v, t),
    "DeepConf": lambda a, x, c, v, t: deepconf(a, x, c, v, .4),
    "share": lambda a, x, c, v, t: vote_share(a, x, v)}


@pytest.mark.parametrize("vote", VOTES.values(), ids=VOTES)
@given(case=ballots(), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_what_changes_nothing(vote, case, seed):
    "The order of responses, the numbers given to answers, and what stands where nobody votes."
    p = shuffle(case[0].shape[1], seed)
    answer, weight, correct, valid, text = case
    before = vote(*case)
    same(vote(*(x[:, p] for x in case)), before, 1e-6)
    names = tensor([907, 3, 55, 11])[shuffle(4, seed)]
    same(vote(names[answer.clamp(min=0)].where(answer >= 0, -7), weight, correct, valid, text * 5 - 99), before, 1e-6)
    same(vote(answer.where(valid, 2), weight.where(valid, nan), correct, valid, text.where(valid, 0)), before, 1e-6)


def test_equal_sums_in_another_order_tie():
    w = tensor([[.1, .2, .3, .7, 1e-3]], dtype=torch.float64).repeat(1, 2)
    answer, correct = tensor([[0] * 5 + [1] * 5]), tensor([[1] * 5 + [0] * 5])
    for seed in range(50):
        p = torch.cat([shuffle(5, seed), 5 + shuffle(5, seed + 1)])
        for q in (p, p[shuffle(10, seed)]): assert weighted_vote(answer[:, q], w[:, q], correct[:, q]).item() == .5


@given(groups())
def test_most_confident_is_a_vote_of_one_each(case):
    score, correct, valid = case
    everyone = torch.arange(score.shape[1]).expand_as(score).contiguous()
    same(most_confident(score, correct, valid), weighted_vote(everyone, score, correct, valid), 1e-6)


def test_share_of_the_winner():
    same(vote_share(tensor([[0, 0, 1, -1], [2, 2, 2, 2], [-1, -1, -1, -1]])), [2 / 3, 1, nan], 1e-6)
    same(vote_share(tensor([[0, 0, 1]]), tensor([[.1, .1, .6]])), [.75], 1e-6)


@given(st.integers(1, 8), st.integers(0, 8), st.integers(1, 9))
def test_pass_at_k_by_enumeration(n, c, k):
    c = min(c, n)
    right = [1] * c + [0] * (n - c)
    want = np.mean([any(s) for s in itertools.combinations(right, k)]) if k <= n else nan
    same(pass_at_k(tensor([right]), k), [want], 1e-6)
    same(pass_at_k(tensor([right + [1, 0]]), k, tensor([[1] * n + [0, 0]])), [want], 1e-6)


def test_pass_at_k_of_many():
    c = torch.zeros(1, 2000)
    c[0, :3] = 1
    want = 1 - math.comb(1997, 700) / math.comb(2000, 700)
    same(pass_at_k(c, 700), [want], 1e-6)


@given(ballots(B=3, G=6), st.integers(1, 6))
def test_vote_curve_by_enumeration(case, n):
    answer, weight, correct, valid, _ = case
    n = min(n, answer.shape[1])
    want = []
    for a, w, c, v in zip(answer, weight, correct, valid):
        there = v.nonzero()[:, 0].tolist()
        subsets = [list(s) for s in itertools.combinations(there, n)]
        chances = [by_hand(*(x[s].tolist() for x in (a, w, c)), [True] * n) for s in subsets]
        chances = [x for x in chances if not math.isnan(x)]
        want.append([np.mean(chances) if chances else nan])
    same(vote_curve(weighted_vote, [n], answer, weight, correct, valid=valid), want, 1e-6)


def test_vote_curve_by_drawing():
    g = torch.Generator().manual_seed(0)
    answer = torch.randint(-1, 3, (20, 12), generator=g)
    correct = (answer == 1).long()
    def curve(**options): return vote_curve(majority_vote, [6], answer, correct, **options)
    exact, drawn = curve(draws=924), curve(draws=400)
    assert (exact - drawn).abs().max() < .1 and (exact - drawn).mean().abs() < .01
    assert drawn.equal(curve(draws=400)) and not drawn.equal(curve(draws=400, seed=1))
    before = torch.get_rng_state()
    curve()
    assert torch.get_rng_state().equal(before)


def test_vote_curve_splits_its_work_without_a_trace():
    "More questions than fit in one piece."
    answer = torch.arange(12).expand(800, 12).contiguous()
    correct = (answer < 3).long()
    same(vote_curve(majority_vote, [6], answer, correct, draws=924), torch.full((800, 1), .25), 1e-6)


def test_the_law_of_weibull():
    x = np.array([.01, .2, .5, .99])
    for k, scale in ((.5, .3), (1., .5), (7., .6), (40., .9)):
        shape, log_scale = torch.tensor([k, math.log(scale)], dtype=torch.float64)
        found = _log_weibull(torch.from_numpy(np.log(x)), shape, log_scale)
        same(found, weibull_min.logpdf(x, k, scale=scale), 1e-9)


@pytest.mark.parametrize("k", [.3, 1., 4., 30.])
def test_one_component_is_maximum_likelihood(k):
    x = weibull_min.rvs(k, scale=.4, size=300, random_state=0)
    one = torch.ones(300, dtype=torch.float64)
    shape, log_scale = _fit_weibull(torch.from_numpy(np.log(x)), one, one[:1], steps=30)
    want, _, scale = weibull_min.fit(x, floc=0)
    assert shape.item() == pytest.approx(want, rel=1e-3) and log_scale.exp().item() == pytest.approx(scale, rel=1e-3)


def test_each_step_of_em_is_likelier():
    u = -torch.rand(30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    u, every = u.sort(1).values, torch.ones_like(u, dtype=torch.bool)
    fits = [_weibull_mixture(u, every, steps)[3] for steps in (1, 3, 10, 40, 100)]
    for a, b in zip(fits, fits[1:]): assert (b >= a - 1e-6).all()


def test_pruning_finds_the_low_component():
    rng = np.random.default_rng(0)
    for _ in range(5):
        low, high = ((4, .15, 20), (12, .7, 30))
        x = np.concatenate([weibull_min.rvs(k, scale=s, size=n, random_state=rng) for k, s, n in (low, high)])
        dropped = pruned(torch.from_numpy(np.log(x))[None])[0]
        assert (dropped.numpy() == (np.arange(50) < 20)).mean() > .95


@given(groups(B=3, G=12))
@settings(max_examples=10)
def test_pruning_keeps_the_surest_and_the_absent(case):
    lpm, _, valid = case
    dropped = pruned(lpm, valid)
    surest = lpm == lpm.where(valid, -torch.inf).amax(1, keepdim=True)
    assert not dropped[~valid].any() and not (dropped & surest).any()
    for row, d, v in zip(lpm, dropped, valid):
        assert d.sum() == 0 or row[v].unique().numel() > 2
        assert (row.exp()[d] < row.exp()[v].mean() + 1e-6).all()


def test_pruning_where_there_is_no_mixture():
    for row in ([-.5], [-.5] * 16, [-.5, -.9] * 4, [-.5, -.5000001, -.9]): assert not pruned(tensor([row])).any()
    far = pruned(tensor([[-5000., -.1, -.2, -.3, -700.]], dtype=torch.float64))
    assert not far[0, 1] and far.sum() <= 3


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 9))
def test_groups_of_tokens(length, size, seed):
    c, T = torch.rand(9, generator=torch.Generator().manual_seed(seed)), 9
    mask = (torch.arange(T) < length).long()[None, None]
    x = c.where(mask[0, 0] == 1, nan)[None, None]
    starts = range(max(length - size, 0) + 1)
    means = [c[i:min(i + size, length)].mean().item() for i in starts]
    same(group_confidence(x, mask, size)[0, 0], means + [nan] * (T - len(means)), 1e-5)
    same(bottom_confidence(x, mask, size, share=0)[0, 0], min(means), 1e-5)
    same(bottom_confidence(x, mask, size, share=.3)[0, 0], np.mean(sorted(means)[:max(1, int(.3 * len(means)))]), 1e-5)
    same(tail_confidence(x, mask, size)[0, 0], c[max(length - size, 0):length].mean(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_type_of_weight_and_id(dtype):
    weight = tensor([[1, 2, 4]], dtype=dtype)
    for ids in (torch.int8, torch.int32, torch.int64):
        assert weighted_vote(tensor([[0, 0, 1]], dtype=ids), weight, tensor([[1, 1, 0]])).item() == 0


a, w, c = tensor([[0, 1, 1]]), tensor([[-1., -2., -3.]]), tensor([[0, 1, 1]])
t = torch.ones(1, 2, 4)
BAD = {
    "answers that are not integers": (lambda: plain.majority_vote(w, c), "answer must hold integer ids", TypeError),
    "answers that are bool": (lambda: plain.weighted_vote(a == 1, w, c), "answer must hold integer ids", TypeError),
    "shapes": (lambda: plain.weighted_vote(a, w, c[:, :2]), "must have one shape"),
    "shape of weights": (lambda: plain.weighted_vote(a, w[:, :2], c), "weight, correct and valid must have one shape"),
    "shape of valid": (lambda: plain.majority_vote(a, c, tensor([[True]])), "(1, 1)"),
    "one axis": (lambda: plain.majority_vote(a[0], c[0]), "(B, G)"),
    "weights that are nan": (lambda: plain.weighted_vote(a, w * nan, c), "weight holds NaN"),
    "lpm that is infinite": (lambda: plain.rpc(a, w * math.inf, c), "lpm holds NaN or infinity"),
    "rewards": (lambda: plain.majority_vote(a, c * 2), "correct must hold 0 and 1 only"),
    "texts": (lambda: plain.perplexity_consistency(a, w, c, response=a[:, :2]), "response must hold integer ids"),
    "texts of floats": (lambda: plain.rpc(a, w, c, response=w), "response must hold integer ids"),
    "lpm for confidence": (lambda: plain.deepconf(a, w, c), "Was lpm passed?"),
    "keep": (lambda: plain.deepconf(a, -w, c, keep=0), "keep is a fraction"),
    "negative share": (lambda: plain.vote_share(a, w), "weight must not be negative"),
    "k": (lambda: plain.pass_at_k(c, 0), "k must be at least 1"),
    "size": (lambda: plain.group_confidence(t, t, 0), "size is a number of tokens"),
    "share": (lambda: plain.bottom_confidence(t, t, share=10), "share lies between 0 and 1"),
    "mask": (lambda: plain.tail_confidence(t, tensor([[[0, 1, 1, 1], [1, 1, 0, 0]]])), "a token follows padding"),
    "shape of tokens": (lambda: plain.tail_confidence(t, t[..., :2]), "token_confidence and mask must have one shape"),
    "n": (lambda: plain.vote_curve(plain.majority_vote, [4], a, c), "ns must lie between 1 and G = 3"),
    "draws": (lambda: plain.vote_curve(plain.majority_vote, [1], a, c, draws=0), "draws be at least 1"),
    "columns": (lambda: plain.vote_curve(plain.majority_vote, [1], a, c[:, :2]), "columns must be tensors"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input(case): refuses(*case)
