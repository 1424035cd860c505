"The rivals: each against its formula written out, parts of a batch against the whole, and a step of the loop."
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from capo.advantage import pairwise_loss
from capo.baselines import (METHODS, by_class, method, mixed, over_length, over_responses, over_tokens, pairwise,
                            question_weight, sequence_ratio, staircase, worthwhile)
from capo.grpo import grpo_advantage
from capo.recipe import Likeliest, capo, grpo, grpo_size, refilled, supplied, takes
from capo.rollout import HFSampler, rollout
from capo.run import RunConfig
from capo.surrogate import exponential, hinge, linear, logistic, squared_hinge
from capo.task import arithmetic, base_model, verify
from capo.train import Learner, TrainConfig, accumulate, fitted, train
from helpers import lib, refuses, rollouts

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
    assert [staircase(3, .1, 2)(step) for step in (1, 2, 3)] == pytest.approx([3, 3, .3])
    assert by_class(r).tolist() == [[.5, .5, -.5, -.5]]


def test_pairs_with_a_surrogate():
    r = batch(3)[0]
    assert torch.allclose(pairwise(linear).advantage(r, 1), grpo().advantage(r, 1), atol=1e-4)
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
    r = batch(seed)[0]
    mine = lambda tau: capo(tau, scale=grpo_size, across=share, **UNMASKED["capo"]).advantage(r, 1)
    assert torch.allclose(mine(1e6), grpo(across=share).advantage(r, 1), atol=1e-3)
    paper = capo(.5, across=share, **UNMASKED["capo"]).advantage(r, 1)
    assert abs(paper.sum()) < 1e-4 and (paper * (2 * r.reward - 1) >= 0).all()


@given(st.integers(0, 99), st.floats(.5, 5))
def test_cispo_written_out(seed, cap):
    r, logp, old, mask = batch(seed)
    x, A, n = logp.requires_grad_(), made("cispo").advantage(r, 1).flatten().double(), mask.sum()
    rho = (logp - old).detach().exp()
    grad, = torch.autograd.grad(made("cispo", cap=cap).loss(x, old, A, mask), x)
    assert torch.allclose(-grad * n, rho.clamp(max=cap) * A[:, None] * mask)


@given(st.integers(0, 99), st.floats(0, 1), st.sampled_from([0., .4, .8, 1.]), st.floats(0, 3), st.floats(.05, .9))
def test_simko_written_out(seed, gamma, quantile, boost, eps):
    "Its value, and its slopes in the token that was sampled and in the three likeliest."
    r, logp, old, mask = batch(seed)
    recipe = made("simko", gamma=gamma, quantile=quantile, boost=boost, eps=eps)
    A, seen, n = recipe.advantage(r, 1).flatten().double(), more_for(recipe, r, mask)["likeliest"], mask.sum().item()
    x, top, total = logp.requires_grad_(), seen.logp.requires_grad_(), 0.
    loss = recipe.loss(x, old, A, mask, likeliest=replace(seen, logp=top))
    own, likely = torch.autograd.grad(loss, (x, top))
    for i, t in mask.nonzero().tolist():
        fork = bool(seen.entropy[i, t] > seen.entropy[i, mask[i].bool()].quantile(quantile))
        a, rho = A[i].item(), math.exp((logp - old)[i, t].item())
        if fork and a < 0 and seen.first[i, t]: a *= boost
        lent = gamma if fork and a > 0 else 0
        live = not (rho > 1 + eps and a > 0 or rho < 1 - eps and a < 0)
        total += min(rho * a, max(1 - eps, min(1 + eps, rho)) * a)
        assert -own[i, t].item() * n == pytest.approx(live * a * rho * (1 - lent), abs=1e-6)
        assert (-likely[i, t] * n).tolist() == pytest.approx([live * a * rho * lent / 3] * 3, abs=1e-6)
    assert loss.item() == pytest.approx(-total / n, abs=1e-6)


@pytest.mark.parametrize("name", ["gspo", "cispo", "simko"])
def test_what_differs_in_the_loss_has_grpos_advantage(name):
    r = batch(5)[0]
    assert made(name).advantage(r, 1).equal(grpo().advantage(r, 1))


@given(st.permutations(range(5)))
def test_the_less_likely_a_right_answer_the_more_it_earns(order):
    r = rollouts(-torch.tensor([order]) / 10 - .1, torch.tensor([[1, 1, 1, 1, 0]]))
    want = [1 - .25 * sorted(r.lpm[0].tolist()).index(x) / 5 for x in r.lpm[0].tolist()[:4]] + [0]
    assert torch.allclose(made("unlikeliness").advantage(r, 1), grpo_advantage(torch.tensor([want])), atol=1e-5)


@given(st.integers(0, 99), st.integers(1, 400), st.floats(.1, 2), st.floats(.5, 5))
def test_codapo_and_cde_written_out(seed, step, alpha, kappa):
    r = batch(seed)[0]
    codapo, cde = made("codapo").advantage(r, step), made("cde", alpha=alpha, kappa=kappa).advantage(r, step)
    centred = made("codapo", scale=False).advantage(r, step)
    unsigned = made("cde", alpha=alpha, kappa=kappa, signed=False).advantage(r, step)
    for i, (lpm, R) in enumerate(zip(r.lpm.tolist(), r.reward.tolist())):
        d, plain = R.count(0) / len(R), grpo_advantage(r.reward[i:i + 1])[0]
        weight = math.exp(sum(lpm) / len(lpm)) * (1 - 4 * (d - .5) ** 2) + .1
        assert torch.allclose(codapo[i], weight * plain, atol=1e-5)
        assert torch.allclose(centred[i], weight * (r.reward[i] - r.reward[i].mean()), atol=1e-5)
        omega = .5 ** ((step - 1) // 100)
        for found, sign in ((cde, lambda x: 2 * x - 1), (unsigned, lambda x: x)):
            shaded = [sign(x) + omega * min(abs(sign(x)) / kappa, -alpha * y) for x, y in zip(R, lpm)]
            room = 2e-2 if min(R) == max(R) else 1e-4            # the std of nearly equal rewards amplifies rounding
            assert torch.allclose(found[i], grpo_advantage(torch.tensor([shaded]))[0], atol=room)


def test_codapos_empty_response_counts_as_certain():
    lpm, right = torch.tensor([[-.4, -.8, -.6, -.2]]), torch.tensor([[1, 0, 0, 1]])
    r = rollouts(lpm, right, torch.tensor([[1, 1, 1, 0]]).bool())
    assert question_weight(r, 0.).item() == pytest.approx(math.exp(-1.8 / 4) * 4 * .75 * .25)


@given(st.integers(0, 99), st.integers(1, 20), st.integers(1, 5))
def test_codapos_second_round_written_out(seed, B, times):
    "Questions at or above the third quartile, each so often in a row, from the first again, cut to the batch's size."
    r = batch(seed, B, G=4)[0]
    weight = question_weight(r, .1)[:, 0]
    best = [i for i, w in enumerate(weight.tolist()) if w >= torch.quantile(weight, .75).item()]
    want, i = [], 0
    while len(want) < B: want, i = want + [best[i % len(best)]] * times, i + 1
    assert worthwhile(r, .1, times).tolist() == want[:B]
    assert made("codapo", again=times).again(r).tolist() == want[:B] and made("codapo").again is None


class Watched:
    "A sampler that remembers what it was asked, and by which weights."
    def __init__(self, model, tokenizer):
        self.inner, self.model, self.asked = HFSampler(model, tokenizer, 12), model, []

    def __call__(self, prompts, n, seed):
        self.asked.append((list(prompts), seed, next(self.model.parameters()).detach().clone()))
        return self.inner(prompts, n, seed)


def test_a_second_round_asks_the_chosen_of_a_policy_that_has_learned():
    model, tokenizer = base_model()
    config = TrainConfig(steps=2, questions=8, group_size=4, lr=1e-3, max_new_tokens=12)
    sampler, recipe, seen = Watched(model, tokenizer), made("codapo", again=4), []
    spied = replace(recipe, again=lambda r: seen.append((r, recipe.again(r))) or seen[-1][1])
    rows = train(model, tokenizer, arithmetic(40, seed=2), spied, sampler, config=config).rows
    assert len(sampler.asked) == 4 == len({seed for _, seed, _ in sampler.asked}) and all("again" in x for x in rows)
    for (first, _, before), (second, _, later), (r, chosen) in zip(sampler.asked[::2], sampler.asked[1::2], seen):
        assert chosen.tolist() == worthwhile(r, .1, 4).tolist() and second == [first[i] for i in chosen]
        assert len(second) == 8 and not before.equal(later)


def test_dapo_draws_ten_batches_at_most(sampled):
    _, r = sampled
    none, asked = replace(r, reward=torch.zeros_like(r.reward)), []
    whole, drawn = refilled(none, made("dapo").refill, lambda k: asked.append(k) or none)
    assert drawn == 10 and asked == list(range(1, 10)) and whole.text == none.text
    first = replace(none, reward=torch.eye(6, 8) * torch.tensor([1, 0, 1, 1, 0, 1.])[:, None])   # four of six are mixed
    whole, drawn = refilled(first, made("dapo").refill, lambda k: first)
    assert drawn == 2 and whole.text == [first.text[i] for i in (0, 2, 3, 5, 0, 2)]


OUT_OF_RANGE = {
    "capo": [dict(tau=0), dict(ref_low=.5), dict(ref_high=0), dict(across=2)],
    "grpo": [dict(across=-1), dict(ref_low=0)], "dr_grpo": [dict(longest=0), dict(eps=-1)],
    "dapo": [dict(eps=(2, .1)), dict(dual=.5), dict(buffer=0), dict(buffer=30000)],
    "gspo": [dict(eps=(-.1, 0))], "cispo": [dict(cap=0)], "disco": [dict(tau=0), dict(beta=-1), dict(delta=math.nan)],
    "real": [dict(tau=-1)], "c2gspg": [dict(beta=-1)], "unlikeliness": [dict(beta=2), dict(beta=-.1)],
    "codapo": [dict(offset=-1), dict(again=-1)], "cde": [dict(kappa=0), dict(alpha=-1)],
    "simko": [dict(gamma=2), dict(top=0), dict(quantile=1.5), dict(boost=-1), dict(eps=3)]}


@pytest.mark.parametrize("name, bad", [(name, x) for name in METHODS for x in OUT_OF_RANGE[name]], ids=str)
def test_a_parameter_out_of_range_is_refused_when_the_recipe_is_made(name, bad):
    refuses(lambda: method(name, **bad), next(iter(bad)))


def test_stairs_out_of_range_are_refused():
    for bad in (dict(start=-1), dict(factor=2), dict(every=0)): refuses(lambda: staircase(**bad), next(iter(bad)))


@pytest.mark.parametrize("name, lacks", [("simko", "likeliest"), ("disco", "question"), ("real", "question"),
                                         ("c2gspg", "reward")])
def test_a_loss_says_what_it_lacks(name, lacks):
    r, logp, old, mask = batch(0)
    refuses(lambda: made(name).loss(logp, old, made(name).advantage(r, 1).flatten(), mask), f"needs {lacks}=")


def test_across_with_one_question_is_refused_before_anything_is_sampled():
    model, tokenizer = base_model()
    sampler, config = Watched(model, tokenizer), TrainConfig(steps=1, questions=1, updates=1, group_size=4)
    for name in ("capo", "grpo"):
        refuses(lambda: train(model, tokenizer, arithmetic(4), made(name, across=.5), sampler, config=config), "across")
    assert not sampler.asked


# Each from its source: see the notebook.
DEFAULTS = {"dr_grpo": dict(longest=3000, eps=.2), "gspo": dict(eps=(3e-4, 4e-4)), "cispo": dict(cap=5.),
            "dapo": dict(eps=(.2, .28), dual=10., longest=20480, buffer=4096, refill=True), "real": dict(tau=.5),
            "disco": dict(tau=10., beta=1e3, delta=1e-4), "c2gspg": dict(beta=.01), "unlikeliness": dict(beta=.25),
            "codapo": dict(offset=.1, scale=True, again=0), "cde": dict(alpha=1., kappa=3., signed=True, start=1.),
            "simko": dict(gamma=.01, top=3, quantile=.8, boost=1.1, eps=.2)}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_defaults_are_the_sources(name):
    recipe = method(name)
    assert recipe.settings == DEFAULTS[name] and recipe.name == name
    g = torch.Generator().manual_seed(1)
    r, logp, _, mask = batch(1)
    old, more = logp + .5 * torch.randn(logp.shape, generator=g), more_for(recipe, r, mask)
    told, A = method(name, **{k: x for k, x in DEFAULTS[name].items() if k != "start"}), recipe.advantage(r, 1)
    assert A.equal(told.advantage(r, 1))
    assert recipe.loss(logp, old, A.flatten(), mask, **more).equal(told.loss(logp, old, A.flatten(), mask, **more))


@pytest.mark.parametrize("surrogate", [linear, hinge, squared_hinge, exponential, logistic(.7)], ids=str)
@given(seed=st.integers(0, 99))
def test_any_surrogate_is_its_risks_slope_at_grpos_size(surrogate, seed):
    r = batch(seed)[0]
    lpm = r.lpm.double().requires_grad_()
    slope, = torch.autograd.grad(pairwise_loss(lpm, r.reward, surrogate).sum(), lpm)
    std = r.reward.double().std(1, keepdim=True) + 1e-4
    assert torch.allclose(pairwise(surrogate).advantage(r, 1).double(), -slope / 6 / std, atol=1e-4)


@given(st.integers(0, 99), st.sampled_from([1e-4, 1e-3, .3]))
def test_gspo_written_out(seed, far):
    "A response is clipped as a whole, and its gradient is spread evenly over its tokens; one of no tokens counts 0."
    r, logp, _, mask = batch(seed)
    mask[0] = 0
    g = torch.Generator().manual_seed(seed)
    x, old = logp.requires_grad_(), logp.detach() + far * torch.randn(logp.shape, generator=g)
    A = made("gspo").advantage(r, 1).flatten()
    loss = made("gspo").loss(x, old, A, mask)
    grad, = torch.autograd.grad(loss, x)
    want = []
    for i, row in enumerate(mask.bool()):
        s = (x - old)[i, row].mean().exp().item() if row.any() else 1.
        want.append(min(s * A[i].item(), min(max(s, 1 - 3e-4), 1 + 4e-4) * A[i].item()) if row.any() else 0.)
        live = not (s > 1 + 4e-4 and A[i] > 0 or s < 1 - 3e-4 and A[i] < 0)
        slope = live * s * A[i].double() / row.sum().clamp(min=1) / len(mask)
        assert torch.allclose(-grad[i, row], slope.expand(int(row.sum())), atol=1e-7)
    assert loss.item() == pytest.approx(-sum(want) / len(want), abs=1e-6)


def test_gspos_ratio_stays_finite():
    logp, mask = torch.zeros(1, 2, requires_grad=True), torch.tensor([[1, 0]])
    ratio = sequence_ratio(logp, torch.tensor([[-40., -500.]]), mask)
    assert ratio[0, 0].item() == pytest.approx(math.exp(10)) and ratio[0, 1] == 1


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "simko"])
def test_a_weight_multiplies_each_token_and_others_refuse_it(name):
    r, logp, _, mask = batch(2)
    recipe, weight = made(name), torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)).double()
    A, more = recipe.advantage(r, 1).flatten().double(), more_for(recipe, r, mask)
    slope = lambda **w: torch.autograd.grad(recipe.loss(x, logp.detach(), A, mask, **w, **more), x)[0]
    x = logp.requires_grad_()
    assert torch.allclose(slope(weight=weight), weight * slope(), atol=1e-7)


class Elsewhere:
    "Another engine; nobody may ask it."
    external = True
    def __call__(self, prompts, n, seed): raise AssertionError("asked")


@pytest.mark.parametrize("name", ["disco", "real", "c2gspg"])
def test_what_takes_no_weights_is_refused_before_anything_is_sampled(name):
    "Where another engine samples, or half precision; the model is as it was, and without weights both will do."
    (model, tokenizer), brief = base_model(), dict(steps=1, questions=2, updates=1, group_size=4, max_new_tokens=12)
    go = lambda sampler=None, **k: train(model, tokenizer, arithmetic(4), made(name), sampler,
                                         config=TrainConfig(**brief, **k))
    refuses(lambda: go(Elsewhere(), lora_rank=2), f"{name} takes no importance weights")
    refuses(lambda: go(dtype="bfloat16", lora_rank=2), "set importance_cap to 0")
    assert not any("lora" in k or p.dtype != torch.float32 for k, p in model.named_parameters())
    with pytest.raises(AssertionError, match="asked"): go(Elsewhere(), importance_cap=0.)
    assert len(go(dtype="bfloat16", importance_cap=0.).rows) == 1
    for how in (dict(vllm=True), dict(dtype="bfloat16")):
        refuses(lambda: RunConfig(model="tiny", data="arithmetic", method=name, **how), "set importance_cap to 0")
        RunConfig(model="tiny", data="arithmetic", method=name, importance_cap=0., **how)


@every
def test_every_other_method_takes_weights(name):
    assert takes(made(name).loss, "weight") == (name not in ("disco", "real", "c2gspg"))


def test_a_loss_of_ones_own_says_by_its_signature_whether_it_takes_weights():
    without, anything = lambda logp, old, A, mask: logp.sum(), lambda logp, old, A, mask, **more: logp.sum()
    assert not takes(without, "weight") and takes(anything, "weight")
    model, tokenizer = base_model()
    refuses(lambda: train(model, tokenizer, arithmetic(64), replace(made("grpo"), name="mine", loss=without),
                          Elsewhere()), "mine takes no importance weights")
    refuses(lambda: replace(made("grpo"), needs={"entropy": 1}), "needs must be one of question")


def test_what_a_run_cannot_give_is_refused_before_anything_is_sampled():
    "Too small a part for a group that stays together; more likely tokens than the model has."
    (model, tokenizer), asked = base_model(), arithmetic(4)
    longest = max(len(tokenizer(p.prompt).input_ids) for p in asked)
    go = lambda recipe, **k: train(model, tokenizer, asked, recipe, Elsewhere(), config=TrainConfig(
        steps=1, questions=2, group_size=4, max_new_tokens=12, importance_cap=0., **k))
    for name in ("disco", "real"):
        least = 4 * (longest + 12)
        refuses(lambda: go(made(name), token_budget=least - 1), f"at least {least}; it is {least - 1}")
        with pytest.raises(AssertionError, match="asked"): go(made(name), token_budget=least)
    words = model.config.vocab_size
    refuses(lambda: go(made("simko", top=words + 1)), f"simko looks at {words + 1} likeliest tokens")
    with pytest.raises(AssertionError, match="asked"): go(made("simko", top=words))


def test_memory_does_not_part_what_stays_together(monkeypatch):
    "A token budget that is chosen from free memory holds a group, where the loss compares its responses."
    monkeypatch.setattr("capo.train.budget_for", lambda *_: 20)
    model, config = base_model()[0], TrainConfig(questions=6, group_size=4, max_new_tokens=12)
    assert [fitted(config, model, made(name), 5).token_budget for name in ("grpo", "real", "disco")] == [20, 68, 68]


@pytest.mark.parametrize("name", ["dr_grpo", "dapo", "gspo", "cispo", "disco", "real", "c2gspg", "simko"])
def test_tensors_that_do_not_fit_together_are_refused(name):
    "The other methods have `clipped_loss`, which `test_bad_input` tries."
    r, logp, old, mask = batch(2)
    recipe = made(name)
    A, more = recipe.advantage(r, 1), more_for(recipe, r, mask)
    refuses(lambda: recipe.loss(logp, old, A, mask, **more), "advantage (18,)")
    refuses(lambda: recipe.loss(logp, old[:1], A.flatten(), mask, **more), "must be (18, 4) like logp")
    refuses(lambda: recipe.loss(logp[0], old[0], A[0], mask[0], **more), "logp must be (N, T)")
    if takes(recipe.loss, "weight"):
        refuses(lambda: recipe.loss(logp, old, A.flatten(), mask, weight=logp[:1], **more), "weight must be (18, 4)")
    short = {k: x[:6] if k != "likeliest" else replace(x, logp=x.logp[:6], entropy=x.entropy[:6], first=x.first[:6])
             for k, x in more.items()}
    for k in more: refuses(lambda: recipe.loss(logp, old, A.flatten(), mask, **short), f"{k} must have an entry")


@pytest.mark.parametrize("question", [[0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 1, 0]], ids=str)
@pytest.mark.parametrize("name", ["disco", "real"])
def test_questions_that_are_mixed_up_are_refused(name, question):
    x, A, mask = -torch.rand(4, 2), torch.tensor([.5, -.5, .5, -.5]), torch.ones(4, 2)
    refuses(lambda: made(name).loss(x, x, A, mask, question=torch.tensor(question)), "question must number whole")


OF_ANOTHER_TYPE = [("dapo", dict(eps=[1, 2, 3])), ("dapo", dict(refill="no")), ("dapo", dict(buffer=8.5)),
                   ("gspo", dict(eps="wide")), ("cispo", dict(cap="x")), ("disco", dict(tau="None")),
                   ("cde", dict(omega=.5)), ("cde", dict(signed=0)), ("simko", dict(top=True)),
                   ("capo", dict(scale="grpo")),
                   ("grpo", dict(scale="grpo")), ("codapo", dict(again="often")), ("unlikeliness", dict(beta=None))]


@pytest.mark.parametrize("name, bad", OF_ANOTHER_TYPE, ids=str)
def test_a_parameter_of_another_type_is_refused_when_the_recipe_is_made(name, bad):
    refuses(lambda: method(name, **bad), f"{next(iter(bad))} must be")


def test_parameters_as_they_are_typed():
    run = lambda name, typed, **k: RunConfig(model="tiny", data="arithmetic", method=name, method_options=typed, **k)
    made = lambda *a, **k: run(*a, **k).recipe().settings
    assert made("dapo", "eps=[0.1, 0.3], dual=null, refill=false")["eps"] == (.1, .3)
    assert made("gspo", "eps=0.1")["eps"] == .1 and made("cispo", "cap=inf")["cap"] == math.inf
    assert made("disco", "tau=null")["tau"] is None and made("disco", "", tau=3.)["tau"] == 3
    assert made("simko", 'top="5"')["top"] == 5 and made("grpo", "scale=false")["scale"] is False
    refuses(lambda: run("disco", "tau=3", tau=3.), "tau is a setting of its own")
    refuses(lambda: run("capo", "scale=grpo"), "scale is a setting of its own")
    refuses(lambda: run("real", "across=.5"), "real takes no across; it takes tau")


def test_what_is_no_surrogate_no_size_no_step_is_refused():
    for bad in ("hinge", logistic, None): refuses(lambda: lib.baselines.pairwise(bad), "surrogate must be one of capo.")
    refuses(lambda: lib.recipe.capo(scale="grpo"), "scale must be a function")
    refuses(lambda: made("cde").advantage(batch(0)[0], 0), "step must be at least 1; it is 0")


@every
def test_what_a_loss_is_a_mean_over_is_what_it_counts(name):
    mask = batch(4)[-1]
    assert made(name).count(mask) == (mask.sum() if name in ("dapo", "cispo", "simko") else len(mask))


@every
def test_an_empty_response_changes_nothing_for_the_others(name):
    "But CoDaPO's, whose weight counts it, and Unlikeliness's, whose ranks are shares of the whole group."
    lpm, right = -torch.tensor([[.2, .5, .9, .1, .7]]), torch.tensor([[1, 0, 1, 1, 0]]).bool()
    valid, recipe = torch.tensor([[1, 1, 1, 0, 1]]).bool(), made(name)
    A = recipe.advantage(rollouts(lpm, right, valid), 1)
    fewer = recipe.advantage(rollouts(lpm[valid][None], right[valid][None]), 1)
    assert A[0, 3] == 0 and A.isfinite().all()
    if name not in ("codapo", "unlikeliness"): assert torch.allclose(A[valid], fewer[0], atol=1e-4)
    if name == "unlikeliness":
        want = grpo_advantage(torch.tensor([[1 - .25 * 3 / 5, 0, 1, 0]]))
        assert torch.allclose(A[valid], want[0], atol=1e-4)


def test_a_question_is_mixed_by_what_was_answered():
    lpm = -torch.ones(3, 3)
    right = torch.tensor([[1, 1, 0], [0, 0, 1], [1, 0, 1]]).bool()
    r = rollouts(lpm, right, torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool())
    assert mixed(replace(r, reward=right.float())).tolist() == [False, False, True]


def test_the_kl_of_disco_is_free_below_delta():
    r, logp, _, mask = batch(6)
    recipe, free = made("disco", beta=7., delta=.05), made("disco", beta=0.)
    A, more = recipe.advantage(r, 1).flatten().double(), more_for(recipe, r, mask)
    for up in (-.2, .02, .3):                                           # KL of that many nats a token
        x = (logp.detach() - up).requires_grad_()
        loss, plain = (f.loss(x, logp.detach(), A, mask, **more) for f in (recipe, free))
        over = 7 * max(0, up - .05)
        assert (loss - plain).item() == pytest.approx(over * up, abs=1e-6)
        a, b = (torch.autograd.grad(y, x)[0] for y in (loss, plain))
        assert torch.allclose(a - b, -over * mask.double() / mask.sum(), atol=1e-6)
    uneven = torch.zeros_like(logp.detach())
    uneven[0] = 1.
    gap = recipe.loss(logp.detach() - uneven, logp.detach(), A, mask, **more) - free.loss(
        logp.detach() - uneven, logp.detach(), A, mask, **more)
    kl = mask[0].sum().item() / mask.sum().item()
    assert gap.item() == pytest.approx(7 * max(0, kl - .05) * kl, abs=1e-6)


def test_c2gspg_of_a_certain_response_is_finite():
    r = rollouts(torch.zeros(1, 2), torch.tensor([[1, 0]]))
    r = replace(r, logp=torch.zeros_like(r.logp))
    A = made("c2gspg").advantage(r, 1)
    assert torch.allclose(A, torch.tensor([[5e5, -5e5]]), rtol=.1)
    x = torch.zeros(2, 2, requires_grad=True)
    loss = made("c2gspg").loss(x, x.detach(), A.flatten(), torch.ones(2, 2).long(), reward=r.reward[0])
    assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()


def test_simko_asks_for_as_many_tokens_as_it_uses():
    assert made("simko", top=5).needs == {"likeliest": 5} and made("simko").needs == {"likeliest": 3}


def test_a_method_is_named_and_takes_what_it_takes():
    refuses(lambda: method("ppo"), "method must be one of capo")
    refuses(lambda: method("gspo", tau=1), "gspo takes no tau; it takes eps")


def test_any_surrogate_takes_the_mask():
    lpm, right = torch.tensor([[-.2, -.9, -.3, -1.1]]), torch.tensor([[1, 1, 0, 0]]).bool()
    r = rollouts(lpm, right, ref_ppl=torch.tensor([[9., 2., 1.5, 2.5]]))
    plain, both = pairwise(hinge).advantage(r, 1), pairwise(hinge, 2., 3.).advantage(r, 1)
    assert both.equal(plain * torch.tensor([[0, 1, 0, 1]])) and pairwise(hinge, 2., 3.).keep is not None
    assert pairwise(logistic(.5), 2.).settings == dict(surrogate="logistic(tau=0.5)", ref_low=2., ref_high=math.inf)


@pytest.mark.parametrize("surrogate", [squared_hinge, logistic(.7)], ids=str)
def test_an_empty_response_is_in_no_pair(surrogate):
    lpm, right = -torch.tensor([[.2, .5, .9, .1, .7]]), torch.tensor([[1, 0, 1, 1, 0]]).bool()
    valid = torch.tensor([[1, 1, 1, 0, 1]]).bool()
    A, fewer = (pairwise(surrogate).advantage(r, 1) for r in (
        rollouts(lpm, right, valid), rollouts(lpm[valid][None], right[valid][None])))
    assert A[0, 3] == 0 and torch.allclose(A[valid], fewer[0], atol=1e-5)


def test_means_of_one_token_and_of_none():
    x = torch.tensor([[3., 5.]])
    for mean, one in ((over_tokens, 3), (over_responses, 3), (over_length(2), 1.5)):
        assert mean(x, torch.tensor([[1, 0]])) == one and mean(x, torch.tensor([[0, 0]])) == 0


def test_dapo_without_refilling(): assert made("dapo", refill=False).refill is None and made("dapo").refill is mixed


def test_a_recipe_does_not_both_refill_and_ask_again():
    refuses(lambda: replace(made("dapo"), again=made("codapo", again=4).again), "not both")


def test_c2gspg_counts_an_empty_response_as_0():
    loss = made("c2gspg", beta=1.).loss
    logp, mask = torch.tensor([[-.5, -.5], [-9., -9.]]), torch.tensor([[1, 1], [0, 0]])
    found = loss(logp, logp, torch.tensor([2., 0.]), mask, reward=torch.tensor([1., 0.]))
    assert found.item() == pytest.approx((2 * .5 + .5) / 2)


def test_real_leaves_an_empty_response_out():
    x, old = torch.tensor([[-.5], [-.7], [-9.]]), torch.tensor([[-.6], [-.4], [-9.]])
    loss = lambda n: made("real").loss(x[:n], old[:n], torch.tensor([.5, -.5, 0.])[:n],
                                       torch.tensor([[1], [1], [0]])[:n], question=torch.zeros(n, dtype=torch.long))
    assert loss(3).item() == pytest.approx(loss(2).item())
