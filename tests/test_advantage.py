"The pairwise advantage: autograd as oracle, the invariants, both limits of τ, padding and ragged groups."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from capo.advantage import batch_advantage, capo_advantage, flat_advantage, pairwise_advantage, pairwise_loss
from capo.calibration import group_auc, group_index
from capo.grpo import grpo_advantage
from capo.surrogate import exponential, hinge, linear, logistic
from helpers import close, groups, shuffle

PHIS = {linear: lambda t: -t, hinge: lambda t: torch.relu(1 - t), exponential: lambda t: (-t).exp(),
        logistic(.1): lambda t: (1 + (-t / .1).exp()).log(), logistic(.6): lambda t: (1 + (-t / .6).exp()).log()}
each_phi = pytest.mark.parametrize("phi", PHIS, ids=str)
phis = st.sampled_from(list(PHIS))


def pairs(lpm, correct, valid):
    "Every pair of a right and a wrong response: question, right, wrong."
    right, wrong = (correct & valid).nonzero().tolist(), (~correct & valid).nonzero().tolist()
    return [(b, i, j) for b, i in right for c, j in wrong if b == c]


def risk(lpm, correct, valid, phi):
    "The pairwise objective, a pair at a time, of each question."
    out = [x.sum() * 0 for x in lpm]
    for b, i, j in pairs(lpm, correct, valid): out[b] = out[b] + phi(lpm[b, i] - lpm[b, j])
    return torch.stack(out)


@each_phi
@given(case=groups(B=3, G=6))
def test_autograd_of_the_objective(phi, case):
    lpm, correct, valid = case[0].double().requires_grad_(), case[1], case[2]
    loss = risk(lpm, correct, valid, PHIS[phi])
    minus, = torch.autograd.grad(-loss.sum(), lpm)
    size = 1 + minus.abs().max()
    close(pairwise_advantage(lpm, correct, phi, valid) / size, minus / size)
    torch.testing.assert_close(pairwise_loss(lpm, correct, phi, valid), loss, rtol=1e-10, atol=1e-10)
    slope, = torch.autograd.grad(pairwise_loss(lpm, correct, phi, valid).sum(), lpm)
    close(slope / size, -minus / size)


@given(groups(), st.floats(.1, 5))
def test_capo_is_the_logistic_setting(case, tau):
    lpm, correct, valid = case
    close(capo_advantage(lpm, correct, tau, valid), pairwise_advantage(lpm, correct, logistic(tau), valid), 0)
    close(capo_advantage(lpm, correct), pairwise_advantage(lpm, correct, logistic(.6)), 0)


@given(groups())
def test_grpo_is_the_linear_setting(case):
    lpm, correct, valid = case[0].double(), case[1], case[2]
    n = valid.sum(1, keepdim=True)
    close(pairwise_advantage(lpm, correct, linear, valid), n * grpo_advantage(correct.double(), False, valid))


@given(groups(), phis, st.integers(0, 99))
def test_permutations_go_through(case, phi, seed):
    lpm, correct, valid = case[0].double(), case[1], case[2]
    q, p = shuffle(len(lpm), seed), shuffle(lpm.shape[1], seed)
    mixed = pairwise_advantage(lpm[q][:, p], correct[q][:, p], phi, valid[q][:, p])
    close(mixed, pairwise_advantage(lpm, correct, phi, valid)[q][:, p], 1e-9)


@given(groups(), phis, st.lists(st.integers(-40, 40), min_size=4, max_size=4))
def test_a_shift_of_each_questions_lpm_changes_nothing(case, phi, shift):
    lpm, correct, valid = case[0].double(), case[1], case[2]
    moved = lpm + torch.tensor(shift)[:len(lpm), None] / 8
    close(pairwise_advantage(moved, correct, phi, valid), pairwise_advantage(lpm, correct, phi, valid))


@given(groups(), phis)
def test_a_group_sums_to_zero_and_signs_follow_labels(case, phi):
    lpm, correct, valid = case[0].double(), case[1], case[2]
    A = pairwise_advantage(lpm, correct, phi, valid)
    close(A.sum(1), 0, 1e-9)
    assert (A[correct] >= 0).all() and (A[~correct] <= 0).all() and (A[~valid] == 0).all()
    one_class = ~((correct & valid).any(1) & (~correct & valid).any(1))
    assert (A[one_class] == 0).all()
    if phi != hinge: assert (A[valid & ~one_class[:, None]] != 0).all()


@given(groups(), phis)
def test_turned_labels_and_confidences_turn_the_push(case, phi):
    lpm, correct, valid = case[0].double(), case[1], case[2]
    close(pairwise_advantage(-lpm, ~correct, phi, valid), -pairwise_advantage(lpm, correct, phi, valid), 1e-9)


@given(groups(), st.floats(.05, 5))
def test_capo_pushes_the_unsure_right_and_the_sure_wrong_hardest(case, tau):
    lpm, correct, valid = case[0].double(), case[1], case[2]
    A = capo_advantage(lpm, correct, tau, valid)
    for a, x, c, v in zip(A, lpm, correct, valid):
        right, wrong = a[c & v][x[c & v].argsort()], a[~c & v][x[~c & v].argsort()]
        assert (right.diff() <= 1e-12).all() and (wrong.diff() <= 1e-12).all()
    opposite = torch.where(correct, (~correct & valid).sum(1, keepdim=True), (correct & valid).sum(1, keepdim=True))
    assert (A.abs() <= opposite / tau + 1e-12).all()


@given(groups(), st.floats(.5, 1e6))
def test_for_large_tau_it_is_grpo(case, tau):
    "|2τÃ_i − n(R_i − mean)| is at most Σ|lpm_i − lpm_j|/2τ over the pairs of i."
    lpm, correct, valid = case[0].double(), case[1], case[2]
    bound = torch.zeros_like(lpm)
    for b, i, j in pairs(lpm, correct, valid):
        gap = (lpm[b, i] - lpm[b, j]).abs() / (2 * tau)
        bound[b, i] += gap
        bound[b, j] += gap
    R, n = correct.double(), valid.sum(1, keepdim=True)
    mean = (R * valid).sum(1, keepdim=True) / n.clamp(min=1)
    limit = (n * (R - mean)).where(valid, 0)
    gap = 2 * tau * capo_advantage(lpm, correct, tau, valid) - limit
    assert (gap.abs() <= bound + 1e-9).all()


@given(groups(), st.floats(.002, .02))
def test_for_small_tau_it_counts_the_lost_pairs(case, tau):
    "τÃ_i is, but for n exp(−gap/τ), the pairs that i loses, ties ½; the right ones' sum is pairs · (1 − AUC)."
    lpm, correct, valid = case[0].double(), case[1], case[2]
    lost = torch.zeros_like(lpm)
    for b, i, j in pairs(lpm, correct, valid):
        share = .5 if lpm[b, i] == lpm[b, j] else float(lpm[b, i] < lpm[b, j])
        lost[b, i] += share
        lost[b, j] -= share
    A = tau * capo_advantage(lpm, correct, tau, valid)
    bound = lpm.shape[1] * math.exp(-.25 / tau)                                                 # scores are in quarters
    close(A, lost, bound + 1e-10)
    n = (correct & valid).sum(1) * (~correct & valid).sum(1)
    close(A.clamp(min=0).sum(1), (n * (1 - group_auc(lpm, correct, valid))).nan_to_num(), bound * lpm.shape[1] + 1e-6)


@given(groups(G=8), st.floats(.1, 5))
def test_ties_push_alike(case, tau):
    "If all are equally sure, the push is half of GRPO's limit: n(R − mean)/2τ."
    correct, valid = case[1], case[2]
    A = capo_advantage(torch.full(correct.shape, -1., dtype=torch.float64), correct, tau, valid)
    close(A, valid.sum(1, keepdim=True) * grpo_advantage(correct.double(), False, valid) / (2 * tau))


@given(groups(), phis, st.sampled_from([math.nan, math.inf, -math.inf, -1e4]), st.integers(0, 3))
def test_padding_changes_nothing_group_by_group(case, phi, junk, n):
    lpm, correct, valid = case[0].double(), case[1], case[2]
    wide = lambda x, fill: torch.cat([torch.full((len(x), n), fill, dtype=x.dtype), x], 1)
    A = pairwise_advantage(wide(lpm, junk), wide(correct.double(), 7.), phi, wide(valid, False))
    assert (A[:, :n] == 0).all()
    for a, x, c, v in zip(A[:, n:], lpm, correct, valid):
        assert (a[~v] == 0).all()
        if v.any(): close(a[v], pairwise_advantage(x[v][None], c[v][None], phi)[0], 1e-9)


named = st.tuples(st.sampled_from("abcd"), st.integers(-9, 0), st.booleans())


@given(st.lists(named, min_size=1, max_size=20), st.floats(.1, 5))
def test_ragged_groups(rows, tau):
    ids, lpm, correct = (list(x) for x in zip(*rows))
    lpm, correct = torch.tensor(lpm).double() / 4, torch.tensor(correct)
    index, valid = group_index(ids)
    A = torch.full_like(lpm, math.nan)
    A[index[valid]] = capo_advantage(lpm[index], correct[index], tau, valid)[valid]
    for q in set(ids):
        mine = torch.tensor([i == q for i in ids])
        close(A[mine], capo_advantage(lpm[mine][None], correct[mine][None], tau)[0])


@each_phi
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_widened_before_the_differences(phi, dtype):
    lpm, correct = torch.tensor([[-1.25, -.001, -3.7, -.75]]).to(dtype), torch.tensor([[1, 0, 1, 0]])
    A = pairwise_advantage(lpm, correct, phi)
    assert A.dtype == torch.float32
    torch.testing.assert_close(A.double(), pairwise_advantage(lpm.double(), correct, phi), rtol=1e-5, atol=1e-6)


@each_phi
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_extreme_lpm_stays_finite(phi, dtype):
    lpm = torch.tensor([[-1e4, -.5, 0., -1e4], [0., -1e4, -1e4, 0.]], dtype=dtype)
    for correct in ([[1, 0, 1, 0], [1, 0, 1, 0]], [[0, 1, 0, 1], [1, 1, 0, 0]]):
        A = pairwise_advantage(lpm, torch.tensor(correct), phi)
        assert A.isfinite().all() and (A.sum(1).abs() <= 1e-5 * A.abs().sum(1)).all()
        assert pairwise_loss(lpm, torch.tensor(correct), phi).isfinite().all()


def test_any_type_of_label():
    lpm, correct = torch.tensor([[-1., -2., -3.]]), torch.tensor([[0, 1, 1]])
    for c in (correct.bool(), correct.float(), correct.half()):
        assert capo_advantage(lpm, c).equal(capo_advantage(lpm, correct))


def test_there_is_no_gradient_through_the_advantage():
    lpm = torch.tensor([[-1., -2.]], requires_grad=True)
    for phi in PHIS: assert not pairwise_advantage(lpm, torch.tensor([[1, 0]]), phi).requires_grad


@given(groups(), phis)
def test_a_list_is_its_rectangle_to_the_last_bit(case, phi):
    lpm, correct, valid = case[0].double(), case[1], case[2]
    row = torch.arange(len(lpm))[:, None].expand_as(lpm).flatten()
    flat = flat_advantage(lpm.flatten(), correct.flatten(), row, phi, valid.flatten())
    assert flat.view_as(lpm).equal(pairwise_advantage(lpm, correct, phi, valid))
    names = np.array([f"question {r}" for r in row], dtype=object)                              # as verl has them
    assert flat_advantage(lpm.flatten(), correct.flatten(), names, phi, valid.flatten()).equal(flat)


ragged = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(-9, 0), st.booleans(), st.booleans()), max_size=30)


@given(ragged, phis)
def test_a_list_of_ragged_groups_in_any_order(rows, phi):
    ids, lpm, correct, valid = (list(x) for x in zip(*rows)) if rows else ([], [], [], [])
    lpm, correct, valid = torch.tensor(lpm).double() / 4, torch.tensor(correct).bool(), torch.tensor(valid).bool()
    A = flat_advantage(lpm, correct, ids, phi, valid)
    assert A.shape == lpm.shape and (A[~valid] == 0).all()
    for q in set(ids):
        mine = torch.tensor([i == q for i in ids])
        close(A[mine], pairwise_advantage(lpm[mine][None], correct[mine][None], phi, valid[mine][None])[0], 1e-9)


@given(ragged, phis, st.integers(0, 99))
def test_a_shuffled_list_has_shuffled_advantages(rows, phi, seed):
    if not rows: return
    ids, lpm, correct, valid = (list(x) for x in zip(*rows))
    ids, lpm = torch.tensor([ord(c) for c in ids]), torch.tensor(lpm).double() / 4
    correct, valid, p = torch.tensor(correct), torch.tensor(valid), shuffle(len(ids), seed)
    A = flat_advantage(lpm, correct, ids, phi, valid)
    close(flat_advantage(lpm[p], correct[p], ids[p], phi, valid[p]), A[p], 1e-9)


@given(groups(), phis)
def test_the_batch_is_one_group(case, phi):
    lpm, correct, valid = case[0].double(), case[1], case[2]
    flat = [x.flatten()[None] for x in (lpm, correct, valid)]
    A = batch_advantage(lpm, correct, phi, valid)
    close(A.flatten()[None], pairwise_advantage(flat[0], flat[1], phi, flat[2]), 1e-9)
    close(A.sum(), 0, 1e-8)


@given(groups())
def test_across_the_batch_the_linear_setting_is_reinforce_with_the_batchs_mean(case):
    lpm, correct, valid = case[0].double(), case[1], case[2]
    n, R = valid.sum(), correct.double()
    mean = (R * valid).sum() / n.clamp(min=1)
    close(batch_advantage(lpm, correct, linear, valid), (n * (R - mean)).where(valid, 0))
