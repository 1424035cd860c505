"The theorems of 01, 03, 04, 06 and 07 as properties over random sizes, in float64."
import math

import pytest
import torch
from hypothesis import assume, given, strategies as st

from capo.advantage import capo_advantage, pairwise_advantage
from capo.grpo import clipped_loss, grpo_advantage
from capo.logprob import mean_logp
from capo.surrogate import exponential, hinge, linear, logistic, squared_hinge

LOG = torch.nn.functional.logsigmoid
each = pytest.mark.parametrize("phi", [linear, hinge, squared_hinge, exponential, logistic(.3), logistic(2.)], ids=str)
taus, seeds, sizes = st.floats(.05, 20), st.integers(0, 2**31), st.integers(2, 7)


def draw(seed): return torch.Generator().manual_seed(seed)


def normal(g, *shape): return torch.randn(*shape, generator=g, dtype=torch.float64)


def problem(n, seed, certain=False):
    "Probabilities, chances of being right, and scores of any scale; both classes have weight."
    g = draw(seed)
    p, eta = normal(g, n).softmax(0), torch.rand(n, generator=g, dtype=torch.float64)
    if certain: eta = (eta.argsort().argsort() < torch.randint(1, n, (1,), generator=g)).double()
    return p, eta, normal(g, n) * 10 ** (4 * torch.rand(1, generator=g, dtype=torch.float64) - 3)


def weights(p, eta):
    w = (p * eta)[:, None] * (p * (1 - eta))[None, :]
    return w / w.sum()


def margin(f): return f[:, None] - f[None, :]


def auc_regret(p, eta, f):
    loss = lambda t: (t < 0).double() + (t == 0) / 2
    return (weights(p, eta) * (loss(margin(f)) - loss(margin(eta)))).sum()


def coin_kl(s, u): return torch.xlogy(s, s) + torch.xlogy(1 - s, 1 - s) - s * LOG(u) - (1 - s) * LOG(-u)


def logistic_regret(p, eta, f, tau):
    "Above the sum of the entropies of the pairs: the infimum, attained at τ logit η or in the limit."
    a, b, t = weights(p, eta), weights(p, eta).T, margin(f) / tau
    return ((a + b) * coin_kl(a / (a + b).clamp(min=1e-300), t)).triu(1).sum()


@given(sizes, seeds)
def test_ranking_by_eta_is_optimal_and_regret_is_a_sum_over_pairs(n, seed):
    p, eta, f = problem(n, seed)
    w, agree = weights(p, eta), margin(f) * margin(eta).sign()
    lost = ((agree < 0).double() + (agree == 0) / 2) * (w - w.T).abs()
    assert auc_regret(p, eta, f) == pytest.approx(lost.triu(1).sum().item(), abs=1e-12)
    assert auc_regret(p, eta, f) >= -1e-12


@each
@given(n=sizes, seed=seeds)
def test_every_misranked_pair_feels_a_force(phi, n, seed):
    p, eta, f = problem(n, seed)
    f, acc = (f / f.abs().max() * 5).requires_grad_(), (p * eta).sum()     # the exponential in range
    slope, = torch.autograd.grad((weights(p, eta) * phi(margin(f))).sum(), f)
    u, bend = slope * acc * (1 - acc) / p, phi.d(torch.zeros(1, dtype=torch.float64)).abs()
    misranked = (margin(eta) > 0) & (margin(f) <= 0)
    gap = -margin(u) - margin(eta) * p[:, None] * bend
    assert (gap[misranked] >= -1e-9 * (1 + u.abs().max())).all()


@given(sizes, seeds, taus)
def test_square_root_bound(n, seed, tau):
    p, eta, f = problem(n, seed)
    assert auc_regret(p, eta, f) <= (2 * logistic_regret(p, eta, f, tau)).clamp(min=0).sqrt() + 1e-7


@given(sizes, seeds, taus)
def test_linear_bound_with_certain_labels(n, seed, tau):
    p, eta, f = problem(n, seed, certain=True)
    assert auc_regret(p, eta, f) <= logistic_regret(p, eta, f, tau) / math.log(2) + 1e-12
    assert auc_regret(p, eta, f) <= (weights(p, eta) * hinge(margin(f))).sum() + 1e-12
    S = f.abs().max()
    assert auc_regret(p, eta, f) <= ((weights(p, eta) * linear(margin(f))).sum() + 2 * S) / (2 * S) + 1e-12


@given(st.floats(1e-3, .15))
def test_linear_bound_fails_with_uncertain_labels(gamma):
    p, eta, f = torch.tensor([[.5, .5], [.5 + gamma, .5 - gamma], [0, 0]], dtype=torch.float64)
    assert auc_regret(p, eta, f) == pytest.approx(gamma)
    assert auc_regret(p, eta, f) > logistic_regret(p, eta, f, 1.) / math.log(2)


@given(sizes, seeds, st.integers(1, 9), taus)
def test_the_root_bound_passes_to_the_mean_over_questions(n, seed, B, tau):
    questions = [problem(n, seed + q) for q in range(B)]
    share = torch.rand(B, generator=draw(seed), dtype=torch.float64)
    share = share / share.sum()
    regret = torch.stack([auc_regret(*q) for q in questions])
    surrogate = torch.stack([logistic_regret(*q, tau) for q in questions])
    assert share @ regret <= (2 * share @ surrogate).clamp(min=0).sqrt() + 1e-7


@given(sizes, seeds)
def test_pointwise_root_bound(n, seed):
    "Agarwal's, for the logistic loss of each response alone."
    p, eta, f = problem(n, seed)
    acc = (p * eta).sum()
    assert auc_regret(p, eta, f) <= ((p * coin_kl(eta, f)).sum() / 2).clamp(min=0).sqrt() / (acc * (1 - acc)) + 1e-7


@given(sizes, seeds)
def test_full_reversal_is_a_total_variation_and_a_jensen_shannon_divergence(n, seed):
    p, eta, _ = problem(n, seed)
    w = weights(p, eta)
    tv, js = (w - w.T).abs().sum() / 2, torch.xlogy(w, 2 * w / (w + w.T)).sum()
    assert auc_regret(p, eta, -1e-9 * eta) == pytest.approx(tv.item(), abs=1e-12)
    assert logistic_regret(p, eta, -1e-9 * eta, 1.) == pytest.approx(js.item(), abs=1e-8)
    assert tv <= .85 * (2 * js).sqrt() + 1e-12


@given(sizes, seeds, taus)
def test_tau_logit_eta_serves_all_pairs(n, seed, tau):
    p, eta, f = problem(n, seed)
    eta = .02 + .96 * eta
    risk = lambda f: (weights(p, eta) * logistic(tau)(margin(f))).sum()
    assert (risk(f) - risk(tau * eta.logit())).item() == pytest.approx(logistic_regret(p, eta, f, tau).item(), abs=1e-8)
    assert logistic_regret(p, eta, tau * eta.logit(), tau).abs() < 1e-9


@given(sizes, seeds, st.floats(.1, 5))
def test_bounded_linear_minimiser_ranks_by_the_sign(n, seed, S):
    p, eta, f = problem(n, seed)
    risk = lambda f: (weights(p, eta) * linear(margin(f))).sum()
    best = S * (eta - (p * eta).sum()).sign()
    assert risk(best) <= risk(f.clamp(-S, S)) + 1e-9
    assert risk(3 * f) == pytest.approx(3 * risk(f).item(), abs=1e-9)


def tokens(G, T, seed):
    g = draw(seed)
    logp = -torch.rand(G, T, generator=g, dtype=torch.float64)
    mask = torch.arange(T) < torch.randint(1, T + 1, (G, 1), generator=g)
    right = torch.rand(G, generator=g).argsort() < torch.randint(1, G, (1,), generator=g)
    return logp.requires_grad_(), mask, right


@given(sizes, st.integers(1, 6), seeds)
def test_grpo_is_the_linear_u_statistic_and_the_token_mean_is_not(G, T, seed):
    logp, mask, right = tokens(G, T, seed)
    reward, lengths = right.double(), mask.sum(1).double()
    A = grpo_advantage(reward[None], scale=False)[0]
    grad = lambda loss: torch.autograd.grad(loss, logp, retain_graph=True)[0]
    over_pairs = lambda score: linear(score[right][:, None] - score[~right][None]).sum()
    lpm = mean_logp(logp, mask)
    by_pairs = grad(over_pairs(lpm) / G**2)
    torch.testing.assert_close(grad(clipped_loss(logp, logp.detach(), A, mask)), by_pairs, rtol=1e-10, atol=1e-12)
    gspo = -(((lpm - lpm.detach()).exp()) * A).mean()
    torch.testing.assert_close(grad(gspo), by_pairs, rtol=1e-10, atol=1e-12)
    dapo, total = grad(-(logp * A[:, None] * mask).sum() / mask.sum()), (logp * mask).sum(1)
    torch.testing.assert_close(dapo, grad(over_pairs(total)) / (G * lengths.sum()), rtol=1e-10, atol=1e-12)
    assume(lengths.min() < lengths.max())
    assert torch.cosine_similarity(dapo.flatten(), by_pairs.flatten(), dim=0) < 1 - 1e-6


@given(sizes, seeds, taus)
def test_both_limits_of_tau_with_their_errors(G, seed, tau):
    g = draw(seed)
    f = normal(g, 1, G) * 2
    R = (torch.rand(1, G, generator=g) < .5).double()
    t, opposite = (f[:, :, None] - f[:, None, :])[0], R[0][:, None] != R[0][None]
    A = capo_advantage(f, R, tau)[0]
    centred = (R - R.mean(1, keepdim=True))[0]
    assert ((2 * tau * A / G - centred).abs() <= (t.abs() * opposite).sum(1) / (2 * tau * G) + 1e-10).all()
    lost = ((t < 0).double() + (t == 0) / 2) * (R[0][:, None] > R[0][None])
    assert ((tau * A - (lost.sum(1) - lost.sum(0))).abs() <= ((-t.abs() / tau).exp() * opposite).sum(1) + 1e-10).all()


def exact_auc(P, f, R):
    w = (P * R)[:, None] * (P * (1 - R))[None, :]
    t = margin(f)
    return (w * ((t > 1e-12).double() + (t.abs() <= 1e-12) / 2)).sum() / w.sum()


@given(sizes, seeds, st.integers(1, 6), st.floats(1e-3, 3), st.sampled_from(["grpo", "capo"]), st.floats(1, 5))
def test_tables_of_equal_length_never_lose_auc(n, seed, length, size, method, wide):
    "The proposition of 06: GRPO at any rate, CAPO where τ is at least one over the length."
    g = draw(seed)
    z, R = 1.5 * normal(g, n), (torch.rand(n, generator=g).argsort() < torch.randint(1, n, (1,), generator=g)).double()
    P, f = z.softmax(0), z.log_softmax(0) / length
    A = R - (P * R).sum()
    if method == "capo":
        force = torch.sigmoid(-margin(f) * length / wide) * R[:, None] * (1 - R)[None, :]
        A = 2 * ((force * P[None, :]).sum(1) - (force * P[:, None]).sum(0))
    new = z + size * P * A / length
    assert (margin(new) - margin(z))[R == 1][:, R == 0].min() >= -1e-12
    assert exact_auc(new.softmax(0), new.log_softmax(0) / length, R) >= exact_auc(P, f, R) - 1e-12


@each
@given(G=sizes, seed=seeds)
def test_directions_are_mixtures_of_pairs(phi, G, seed):
    "Hence no advantage of a surrogate is further from GRPO's than a single pair is."
    g = draw(seed)
    f, R = normal(g, 1, G), (torch.rand(1, G, generator=g).argsort() < torch.randint(1, G, (1,), generator=g)).double()
    ours, theirs = pairwise_advantage(f, R, phi)[0], grpo_advantage(R, scale=False)[0]
    assume(ours.abs().max() > 1e-9)
    n = R.sum()
    assert torch.cosine_similarity(ours, theirs, dim=0) >= (G / (2 * n * (G - n))).sqrt() - 1e-9


@given(sizes, seeds, st.floats(0, .999))
def test_a_step_is_forgiven_up_to_a_condition_number(n, seed, mix):
    "The theorem of 06: bᵀKv ≥ 0 if cond(K) ≤ (1 + cos)/(1 − cos), and beyond that some K says otherwise."
    g = draw(seed)
    unit = lambda x: x / x.norm()
    b, other = unit(normal(g, n)), unit(normal(g, n))
    v = unit(mix * b + (1 - mix) * other)
    cos = b @ v
    assume(-.999 < cos < .999)
    limit, (Q, _) = (1 + cos) / (1 - cos), torch.linalg.qr(normal(g, n, n))
    cond = 1 + (limit - 1).clamp(min=0) * torch.rand(n, generator=g, dtype=torch.float64)
    if limit >= 1: assert b @ (Q * cond) @ Q.T @ v >= -1e-12
    along, worse = unit(b + v), 1.01 * limit.clamp(min=1)
    K = worse * torch.eye(n) - (worse - 1) * along[:, None] * along[None, :]
    if limit > 1: assert b @ K @ v < 0


@each
@given(G=sizes, seed=seeds)
def test_a_shift_of_a_question_changes_no_advantage(phi, G, seed):
    g = draw(seed)
    f, R, c = normal(g, 3, G), (torch.rand(3, G, generator=g) < .5).double(), normal(g, 3, 1) * 5
    torch.testing.assert_close(pairwise_advantage(f + c, R, phi), pairwise_advantage(f, R, phi), rtol=1e-9, atol=1e-9)


@given(sizes, seeds, st.floats(.05, 2))
def test_a_collapsed_question_has_the_auc_of_its_mode(n, seed, T):
    g = draw(seed)
    lp = (normal(g, n) / T).log_softmax(0)
    R = (torch.rand(n, generator=g).argsort() < torch.randint(1, n, (1,), generator=g)).double()
    outside = 1 - lp.max().exp()
    assert (exact_auc(lp.exp(), lp, R) - R[lp.argmax()]).abs() <= outside + 1e-9
