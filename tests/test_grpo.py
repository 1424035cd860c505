"GRPO's advantage and the clipped loss against formulas written another way."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from capo.calibration import group_index
from capo.grpo import clip_fraction, clip_range, clipped_loss, grpo_advantage, policy_ratio
from helpers import groups, shuffle

EPS = st.one_of(st.floats(0, 1), st.tuples(st.floats(0, 1), st.floats(0, 3)))


@st.composite
def tokens(draw, N=5, T=6):
    "logp, old_logp, advantage, mask in float64; some responses empty, some advantages 0."
    n, t = draw(st.integers(1, N)), draw(st.integers(1, T))
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    old = -torch.rand(n, t, dtype=torch.float64, generator=g)
    logp = old + draw(st.sampled_from([0., .3, 2.])) * torch.randn(n, t, dtype=torch.float64, generator=g)
    lengths = torch.tensor(draw(st.lists(st.integers(0, t), min_size=n, max_size=n)))
    A = torch.tensor(draw(st.lists(st.integers(-4, 4), min_size=n, max_size=n))).double() / 2
    return logp, old, A, (torch.arange(t) < lengths[:, None]).long()


def close(a, b, atol=1e-10): np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


@given(groups(), st.booleans())
def test_the_advantage_is_numpys(case, scale):
    reward, _, valid = case
    want = np.zeros(reward.shape)
    for w, r, v in zip(want, reward.double().numpy(), valid.numpy()):
        if v.sum() > 1: w[v] = (r[v] - r[v].mean()) / (r[v].std(ddof=1) + 1e-4 if scale else 1)
    close(grpo_advantage(reward.double(), scale, valid), want)


@given(groups(), st.integers(0, 99), st.integers(-20, 20), st.booleans())
def test_the_advantage_follows_permutations_and_ignores_shifts(case, seed, shift, scale):
    reward, _, valid = case[0].double(), case[1], case[2]
    q, p, A = shuffle(len(reward), seed), shuffle(reward.shape[1], seed), grpo_advantage(case[0].double(), scale, valid)
    close(grpo_advantage(reward[q][:, p], scale, valid[q][:, p]), A[q][:, p])
    close(grpo_advantage(reward + shift, scale, valid), A, 1e-8)
    close(A.sum(1), 0)


@given(groups(), st.booleans())
def test_right_is_pushed_up_and_wrong_down(case, scale):
    _, correct, valid = case
    A = grpo_advantage(correct.float(), scale, valid)
    mixed = ((correct & valid).any(1) & (~correct & valid).any(1))[:, None]
    assert (A[mixed & correct & valid] > 0).all() and (A[mixed & ~correct & valid] < 0).all()
    assert (A[~(mixed & valid)] == 0).all()


@given(groups(), st.sampled_from([math.nan, math.inf, 5.]), st.integers(0, 3), st.booleans())
def test_padding_changes_nothing(case, junk, n, scale):
    reward, _, valid = case
    wide = lambda x, fill: torch.cat([torch.full((len(x), n), fill), x], 1)
    padded = grpo_advantage(wide(reward, junk), scale, wide(valid, False))
    close(padded, wide(grpo_advantage(reward, scale, valid), 0.), 1e-6)


@pytest.mark.parametrize("reward", [.1, 1e6 + .1, -3.3, 0., 1.])
@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_give_exactly_0(reward, scale):
    assert (grpo_advantage(torch.full((1, 7), reward), scale) == 0).all()
    one_left_out = torch.tensor([[9.] + [reward] * 7])
    assert (grpo_advantage(one_left_out, scale, one_left_out != 9) == 0).all()


def test_ragged_groups():
    reward = torch.tensor([1., 0., 0., 1., 1., 0.])
    index, valid = group_index("abacba")
    A = torch.empty(6)
    A[index[valid]] = grpo_advantage(reward[index], valid=valid)[valid]
    for q in "abc":
        mine = torch.tensor([x == q for x in "abacba"])
        close(A[mine], grpo_advantage(reward[mine][None])[0], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_any_type_of_reward(dtype):
    A = grpo_advantage(torch.tensor([[1, 0, 0, 1]]).to(dtype))
    close(A, grpo_advantage(torch.tensor([[1., 0., 0., 1.]])), 0)
    assert A.dtype == torch.float32


def by_loop(logp, old, A, mask, low, high):
    "The clipped objective by token: a gain is capped at 1 + high when A > 0, a loss floored at 1 − low when A < 0."
    total = 0.
    for new_row, old_row, a, m in zip(logp.tolist(), old.tolist(), A.tolist(), mask.tolist()):
        ratios = [math.exp(x - y) for x, y, there in zip(new_row, old_row, m) if there]
        gains = [a * (min(r, 1 + high) if a > 0 else max(r, 1 - low)) for r in ratios]
        total += sum(gains) / len(gains) if gains else 0.
    return -total / len(A)


@given(tokens(), EPS)
def test_the_loss_is_a_loop_over_tokens(case, eps):
    close(clipped_loss(*case, eps), by_loop(*case, *(eps if isinstance(eps, tuple) else (eps, eps))))


@given(tokens(), EPS)
def test_the_loss_is_trls(case, eps):
    "TRL's `loss_type='grpo'`: per-token maximum of two losses, token mean, mean over responses."
    logp, old, A, mask = case
    low, high = eps if isinstance(eps, tuple) else (eps, eps)
    coef = torch.exp(logp - old)
    per_token = torch.max(-coef * A.unsqueeze(1), -coef.clamp(1 - low, 1 + high) * A.unsqueeze(1))
    want = ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    close(clipped_loss(*case, eps), want)


@given(tokens())
def test_without_a_move_the_gradient_is_the_policy_gradient(case):
    "At ratio 1 a token of response i gets −A_i over its length and the number of responses."
    _, old, A, mask = case
    logp = old.clone().requires_grad_()
    loss = clipped_loss(logp, old, A, mask)
    loss.backward()
    length = mask.sum(1).clamp(min=1)
    close(logp.grad, -(A / length / len(A))[:, None] * mask)
    close(loss.detach(), -(A * (mask.sum(1) > 0)).mean())


@given(tokens(), EPS, st.integers(0, 99), st.integers(0, 3))
def test_the_loss_ignores_padding_and_order(case, eps, seed, n):
    logp, old, A, mask = case
    p, loss = shuffle(len(A), seed), clipped_loss(*case, eps)
    close(clipped_loss(logp[p], old[p], A[p], mask[p], eps), loss)
    wide = lambda x, fill: torch.cat([x, torch.full((len(x), n), fill, dtype=x.dtype)], 1)
    junk = clipped_loss(wide(logp, math.nan), wide(old, -math.inf), A, wide(mask, 0), eps)
    close(junk, loss)
    for m in (mask.bool(), 3 * mask, mask / 2): close(clipped_loss(logp, old, A, m, eps), loss)   # nonzero is on


@given(tokens(), EPS)
def test_the_clipped_share_is_where_the_gradient_is_gone(case, eps):
    logp, old, A, mask = case
    logp = logp.clone().requires_grad_()
    clipped_loss(logp, old, A, mask, eps).backward()
    live = mask.bool() & (A != 0)[:, None]
    ratio, (low, high) = (logp - old).detach().exp(), clip_range(eps)
    kinks = ((ratio - low).abs() < 1e-9) | ((ratio - high).abs() < 1e-9)
    if kinks[live].any(): return                                            # at a kink either is right
    close(clip_fraction(*case, eps), ((logp.grad == 0) & live).sum() / max(1, int(live.sum())), 1e-6)


@given(tokens())
def test_nothing_is_clipped_before_the_first_update(case):
    _, old, A, mask = case
    assert clip_fraction(old, old, A, mask) == 0


def test_the_range_is_asymmetric_on_request():
    logp, old = torch.tensor([[math.log(1.25)], [math.log(.75)]]), torch.zeros(2, 1)
    ones = torch.ones(2, 1)
    for A, wide, narrow in (([1., -1.], (.2, .28), (.2, .2)), ([1., -1.], (.3, .2), (.2, .2))):
        A = torch.tensor(A)
        assert clip_fraction(logp, old, A, ones, narrow) == 1 and clip_fraction(logp, old, A, ones, wide) == .5
    assert clip_range((.1, .4)) == (.9, 1.4) and clip_range(.25) == (.75, 1.25)


def test_the_sampling_policy_and_the_advantage_get_no_gradient():
    logp, old, A = (torch.full(s, -1., requires_grad=True) for s in ((2, 3), (2, 3), (2,)))
    clipped_loss(logp, old, A, torch.ones(2, 3)).backward()
    assert logp.grad is not None and old.grad is None and A.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("A", [-1., 0., 1.])
def test_extreme_ratios_stay_finite(dtype, A):
    logp = torch.tensor([[-1e4, -1., 0.], [0., -1., -1e4]], dtype=dtype, requires_grad=True)
    loss = clipped_loss(logp, logp.detach().flip(0), torch.full((2,), A, dtype=dtype), torch.ones(2, 3))
    loss.backward()
    ratio = policy_ratio(logp, logp.detach().flip(0), torch.ones(2, 3))
    assert loss.isfinite() and ratio.isfinite().all() and logp.grad.isfinite().all()
    assert ratio.dtype == torch.float32                                           # exp(20) is above float16's largest
