"The rivals: each against its formula written out, parts of a batch against the whole, and a step of the loop."
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from capo.baselines import METHODS, by_class, method, mixed, pairwise, question_weight, sequence_ratio, staircase
from capo.grpo import grpo_advantage
from capo.recipe import Likeliest, capo, grpo, refilled, supplied
from capo.rollout import HFSampler, rollout
from capo.surrogate import linear, logistic
from capo.task import arithmetic, base_model, verify
from capo.train import Learner, TrainConfig, accumulate, train
from helpers import rollouts

UNMASKED = {"capo": dict(ref_low=1, ref_high=math.inf)}
every = pytest.mark.parametrize("name", METHODS)


def made(name, **given): return method(name, **UNMASKED.get(name, {}) | given)


def batch(seed, B=3, G=6, T=4):
    "Advantages' and losses' arguments of a random batch."
    g = torch.Generator().manual_seed(seed)
    r = rollouts(-torch.rand(B, G, generator=g) - .05, torch.rand(B, G, generator=g) < .5)
    mask = (torch.rand(B * G, T, generator=g) < .8).long()
    mask[:, 0] = 1
    logp, old = (-torch.rand(B * G, T, generator=g, dtype=torch.float64) for _ in range(2))
    return r, logp, old, mask


def more_for(recipe, r, mask):
    N, T = mask.shape
    g = torch.Generator().manual_seed(0)
    top = -torch.rand(N, T, 3, generator=g).double()
    likely = Likeliest(top, torch.rand(N, T, generator=g), torch.rand(N, T, generator=g) < .5)
    given = {"question": torch.arange(len(r)).repeat_interleave(N // len(r)), "reward": r.reward.flatten().double(),
             "likeliest": likely}
    return {k: given[k] for k in recipe.needs}


@every
@given(seed=st.integers(0, 99))
def test_advantages_are_finite_and_losses_have_gradients(name, seed):
    recipe, (r, logp, old, mask) = made(name), batch(seed)
    A = recipe.advantage(r, 1)
    assert A.shape == r.reward.shape and A.isfinite().all()
    x = logp.requires_grad_()
    loss = recipe.loss(x, old, A.flatten(), mask, **more_for(recipe, r, mask))
    grad, = torch.autograd.grad(loss, x)
    assert loss.ndim == 0 and grad.isfinite().all() and (grad[~mask.bool()] == 0).all()


@every
def test_at_the_first_update_right_answers_are_lifted_and_wrong_ones_lowered(name):
    recipe = made(name)
    for seed in range(20):
        r, logp, _, mask = batch(seed)
        x = logp.requires_grad_()
        loss = recipe.loss(x, logp.detach(), recipe.advantage(r, 1).flatten(), mask, **more_for(recipe, r, mask))
        push = -torch.autograd.grad(loss, x)[0].sum(1).view_as(r.reward)
        live = mixed(r)[:, None].expand_as(r.reward)
        lifted, lowered = push[live & (r.reward > 0)], push[live & (r.reward == 0)]
        if name in ("unlikeliness", "cde"):                 # a reward of shades may lower the likeliest of the right
            assert (push[live] * recipe.advantage(r, 1)[live] >= 0).all()
        else: assert (lifted > 0).all() and (lowered < 0).all()


@every
def test_groups_of_one_class_teach_nothing_but_where_a_method_says_so(name):
    r = replace(batch(0)[0], reward=torch.ones(3, 6))
    zero = made(name).advantage(r, 1).abs().max() == 0
    assert zero == (name not in ("unlikeliness", "cde"))    # these tell right answers apart


@given(st.integers(0, 99), st.integers(1, 9))
def test_dr_grpo_and_dapo_written_out(seed, longest):
    r, logp, old, mask = batch(seed)
    A = (r.reward - r.reward.mean(1, keepdim=True)).flatten().tolist()
    gain = lambda i, t, low, high: min(rho(i, t) * A[i], max(1 - low, min(1 + high, rho(i, t))) * A[i])
    rho = lambda i, t: math.exp(logp[i, t] - old[i, t])
    there = [(i, t) for i, t in mask.nonzero().tolist()]
    recipe = made("dr_grpo", longest=longest)
    want = -sum(gain(i, t, .2, .2) for i, t in there) / longest / len(mask)
    assert recipe.loss(logp, old, recipe.advantage(r, 1).flatten(), mask).item() == pytest.approx(want, abs=1e-5)
    want = -sum(max(gain(i, t, .2, .28), 10 * A[i]) if A[i] < 0 else gain(i, t, .2, .28) for i, t in there) / len(there)
    assert made("dapo").loss(logp, old, torch.tensor(A), mask).item() == pytest.approx(want, abs=1e-5)


def test_dapos_long_responses_pay():
    mask = (torch.arange(8) < torch.tensor([2, 8, 2, 8])[:, None])[None].long()
    r = rollouts(torch.tensor([[-.1] * 4]), torch.tensor([[1, 1, 0, 0]]))
    r = replace(r, mask=mask, response_ids=mask, logp=-.1 * mask)
    want = grpo_advantage(torch.tensor([[1., 1 - .75, -1., -1 - .75]]))
    assert torch.allclose(made("dapo", longest=9, buffer=4).advantage(r, 1), want)
    assert torch.allclose(made("dapo").advantage(r, 1), grpo_advantage(2 * r.reward - 1))


@given(st.integers(0, 99))
def test_gspos_ratio_is_the_mean_and_its_slope_the_sequences(seed):
    _, logp, old, mask = batch(seed)
    ratio = sequence_ratio(logp, old, mask)
    for i, row in enumerate(mask.bool()):
        assert torch.allclose(ratio[i, row], (logp - old)[i, row].mean().exp().expand(row.sum()))


@given(st.integers(0, 99), st.floats(.1, 5))
def test_disco_and_real_written_out(seed, tau):
    r, logp, old, mask = batch(seed)
    mean = lambda x: ((x * mask).sum(1) / mask.sum(1)).view_as(r.reward).tolist()
    s, u, right = mean(logp), mean(logp - old), r.reward.bool().tolist()
    disco = real = 0.
    for i in range(len(r)):
        if len(set(right[i])) < 2: continue
        p, n = ([x for x, y in zip(s[i], right[i]) if y is z] for z in (True, False))
        disco -= sum(p) / len(p) - tau * math.log(sum(math.exp(x / tau) for x in n) / len(n))
        p, n = ([x for x, y in zip(u[i], right[i]) if y is z] for z in (True, False))
        real += math.log(1 + sum(math.exp(-x / tau) for x in p)) + math.log(1 + sum(math.exp(x / tau) for x in n))
    for recipe, want in ((made("disco", tau=tau, beta=0.), disco), (made("real", tau=tau), real)):
        A, more = recipe.advantage(r, 1).flatten().double(), more_for(recipe, r, mask)
        assert recipe.loss(logp, old, A, mask, **more).item() == pytest.approx(want / len(r), abs=1e-5)


@given(st.integers(0, 99), st.floats(0, 1))
def test_c2gspg_written_out(seed, beta):
    r, logp, old, mask = batch(seed)
    recipe = made("c2gspg", beta=beta)
    A, R = recipe.advantage(r, 1).flatten().tolist(), r.reward.flatten().tolist()
    lpm = ((logp * mask).sum(1) / mask.sum(1)).tolist()
    want = [x * a + beta * (x if y else math.log(1 - math.exp(x))) for x, a, y in zip(lpm, A, R)]
    got = recipe.loss(logp, old, torch.tensor(A).double(), mask, reward=torch.tensor(R).double())
    assert got.item() == pytest.approx(-sum(want) / len(want), abs=1e-6)
    centred = r.reward - r.reward.mean(1, keepdim=True)
    assert torch.allclose(recipe.advantage(r, 1), centred / (1 - r.lpm.exp() + 1e-6), rtol=1e-4)


def test_rewards_of_rank_weight_and_bonus():
    r = rollouts(torch.tensor([[-.2, -.9, -.3, -1.1]]), torch.tensor([[1, 1, 0, 0]]))
    want = grpo_advantage(torch.tensor([[1 - .25 * 3 / 4, 1 - .25 * 1 / 4, 0, 0]]))
    assert torch.allclose(made("unlikeliness").advantage(r, 1), want)
    c = math.exp(-(.2 + .9 + .3 + 1.1) / 4)
    assert question_weight(r, .1).item() == pytest.approx(c + .1)
    assert torch.allclose(made("codapo").advantage(r, 1), (c + .1) * grpo_advantage(r.reward))
    bonus = torch.tensor([[.2, 1 / 3, .3, 1 / 3]])
    assert torch.allclose(made("cde").advantage(r, 150), grpo_advantage(2 * r.reward - 1 + .5 * bonus), atol=1e-4)
    assert [staircase()(step) for step in (1, 100, 101, 201)] == [1, 1, .5, .25]
    assert by_class(r).tolist() == [[.5, .5, -.5, -.5]]


def test_pairs_with_a_surrogate():
    r = batch(3)[0]
    assert torch.allclose(pairwise(linear).advantage(r, 1), grpo().advantage(r, 1), atol=1e-4)
    from capo.recipe import grpo_size
    ours = capo(.5, scale=grpo_size, **UNMASKED["capo"]).advantage(r, 1)
    assert torch.allclose(pairwise(logistic(.5)).advantage(r, 1), ours, atol=1e-4)


@pytest.fixture(scope="module")
def sampled():
    model, tokenizer = base_model()
    r = rollout(HFSampler(model, tokenizer, 12), arithmetic(6, seed=5), 8, verify)
    return model, replace(r, ref_logp=r.logp)


@every
def test_parts_of_a_batch_add_up_to_the_whole(name, sampled):
    "The gradient of an update is the same, however many parts the token budget cuts it into."
    model, r = sampled
    recipe, grads = method(name, **{"disco": dict(beta=0.)}.get(name, {})), []
    for budget in (0, 180):
        config = TrainConfig(questions=6, token_budget=budget)
        learner = Learner(model, config)
        learner.clear()
        accumulate(model, learner, recipe, r, recipe.advantage(r, 1), config)
        grads.append(torch.cat([m.grad.flatten() for m in learner.masters.values()]))
    assert torch.allclose(*grads, atol=1e-5, rtol=1e-3) and grads[0].abs().max() > 0


def test_a_group_that_is_cut_is_refused(sampled):
    model, r = sampled
    config = TrainConfig(questions=6, token_budget=20)
    for name in ("disco", "real"):
        with pytest.raises(ValueError, match="token_budget"):
            accumulate(model, Learner(model, config), made(name), r, made(name).advantage(r, 1), config)


@every
def test_the_loop_takes_each(name):
    model, tokenizer = base_model()
    config = TrainConfig(steps=2, questions=4, group_size=4, updates=2, lr=1e-3, max_new_tokens=12)
    rows = train(model, tokenizer, arithmetic(40, seed=2), method(name), config=config).rows
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    if name == "dapo": assert rows[0]["batches"] >= 1 and rows[0]["mixed"] >= .5


def test_batches_are_filled_with_what_is_kept(sampled):
    _, r = sampled
    whole, drawn = refilled(r, mixed, lambda k: r)
    assert len(whole) == 6 and mixed(whole).sum() >= mixed(r).sum() and drawn <= 10


def test_the_likeliest_tokens_are_those_of_the_logits(sampled):
    model, r = sampled
    top = supplied(made("simko"), model, r, range(48), 8)["likeliest"]
    assert torch.allclose(top.logp[..., 0][top.first & r.mask.flatten(0, 1).bool()],
                          r.logp.flatten(0, 1)[top.first & r.mask.flatten(0, 1).bool()], atol=1e-4)
    assert (top.logp.diff(dim=-1) <= 0).all() and (top.entropy >= 0).all()


@pytest.mark.parametrize("share", [0., .25, 1.])
@given(seed=st.integers(0, 99))
def test_pairs_across_questions(share, seed):
    "In the limit of a large τ CAPO is GRPO at every share, the batch sums to 0, and right answers are lifted."
    from capo.recipe import grpo_size
    r = batch(seed)[0]
    mine = lambda tau: capo(tau, scale=grpo_size, across=share, **UNMASKED["capo"]).advantage(r, 1)
    assert torch.allclose(mine(1e6), grpo(across=share).advantage(r, 1), atol=1e-3)
    paper = capo(.5, across=share, **UNMASKED["capo"]).advantage(r, 1)
    assert abs(paper.sum()) < 1e-4 and (paper * (2 * r.reward - 1) >= 0).all()


@given(st.integers(0, 99), st.floats(.5, 5))
def test_cispo_and_simko_written_out(seed, cap):
    r, logp, old, mask = batch(seed)
    x, A, n = logp.requires_grad_(), made("cispo").advantage(r, 1).flatten().double(), mask.sum()
    rho = (logp - old).detach().exp()
    grad, = torch.autograd.grad(made("cispo", cap=cap).loss(x, old, A, mask), x)
    assert torch.allclose(-grad * n, rho.clamp(max=cap) * A[:, None] * mask)
    recipe = made("simko")
    more = more_for(recipe, r, mask)
    grad, = torch.autograd.grad(recipe.loss(x, old, A, mask, **more), x)
    H, first = more["likeliest"].entropy, more["likeliest"].first
    for i, row in enumerate(mask.bool()):
        fork = H[i] > H[i, row].quantile(.8)
        for t in row.nonzero()[:, 0].tolist():
            boosted = A[i] * (1.1 if fork[t] and A[i] < 0 and first[i, t] else 1)
            kept = 0 if (rho[i, t] > 1.2 and A[i] > 0) or (rho[i, t] < .8 and A[i] < 0) else 1
            share = .01 if fork[t] and A[i] > 0 else 0
            want = kept * boosted * rho[i, t] * (1 - share)
            assert -grad[i, t] * n == pytest.approx(want.item(), abs=1e-6)


@given(st.permutations(range(5)))
def test_the_less_likely_a_right_answer_the_more_it_earns(order):
    r = rollouts(-torch.tensor([order]) / 10 - .1, torch.tensor([[1, 1, 1, 1, 0]]))
    want = [1 - .25 * sorted(r.lpm[0].tolist()).index(x) / 5 for x in r.lpm[0].tolist()[:4]] + [0]
    assert torch.allclose(made("unlikeliness").advantage(r, 1), grpo_advantage(torch.tensor([want])), atol=1e-5)
