"GRPO and CAPO as recipes: the limit that joins them, and what the mask does and does not do."
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from capo.advantage import capo_advantage
from capo.grpo import clipped_loss, grpo_advantage
from capo.mask import noise_mask
from capo.recipe import Recipe, capo, grpo, grpo_size, paper_size
from helpers import close, groups, rollouts

ALL = dict(ref_low=1, ref_high=math.inf)                                          # thresholds that drop nothing


recipes_under_test = [grpo(), grpo(scale=False), capo(**ALL), capo(.2, scale=grpo_size, **ALL),
                      grpo(ref_low=2., ref_high=3.), capo(.5, 2., 3.)]
each_recipe = pytest.mark.parametrize("recipe", recipes_under_test,
                                      ids=["grpo", "centred", "capo", "capo, GRPO's size", "grpo, mask", "capo, mask"])


@given(groups(), st.floats(20, 1e5))
def test_for_large_tau_capo_at_grpos_size_is_grpo(case, tau):
    "Every margin is at most 3: each of n pairs is off by at most 3/2τ, over n times a std of at least 1/√n."
    r = rollouts(*case)
    gap = capo(tau, scale=grpo_size, **ALL).advantage(r, 0) - grpo().advantage(r, 0)
    assert (gap.abs() <= 3 / (2 * tau) * r.valid.sum(1, keepdim=True).sqrt() + 1e-5).all()


@given(groups(), st.floats(.1, 5))
def test_the_two_sizes(case, tau):
    "The paper's is Ã itself; GRPO's is 2τÃ over n and the std of the rewards, with n − 1."
    lpm, correct, valid = case
    r, A = rollouts(*case), capo_advantage(lpm.double(), correct, tau, valid)
    close(capo(tau, **ALL).advantage(r, 0), A, 1e-4)
    assert capo(tau, **ALL).advantage(r, 0).equal(capo(tau, scale=paper_size, **ALL).advantage(r, 0))
    for found, a, c, v in zip(capo(tau, scale=grpo_size, **ALL).advantage(r, 0), A, correct, valid):
        n = int(v.sum())
        close(found, 2 * tau * a / n / (c[v].double().std() + 1e-4) if n > 1 else a * 0, 1e-4)


@given(groups(), st.integers(0, 99))
def test_the_mask_multiplies(case, seed):
    "So a masked response still takes part in the pairs, and in the mean and std, of the others."
    ppl = 1 + 3 * torch.rand(case[0].shape, generator=torch.Generator().manual_seed(seed))
    r = rollouts(*case, ref_ppl=ppl)
    keep = torch.where(case[1] & case[2], ppl <= 3, ppl >= 2) & case[2]
    for plain, with_mask in ((grpo(), grpo(ref_low=2., ref_high=3.)), (capo(.5, **ALL), capo(.5, 2., 3.)),
                             (capo(.5, scale=grpo_size, **ALL), capo(.5, 2., 3., grpo_size))):
        assert with_mask.advantage(r, 0).equal(plain.advantage(r, 0) * keep) and with_mask.keep(r).equal(keep)


def test_a_masked_member_is_not_a_missing_one():
    lpm, correct = torch.tensor([[-1., -.5, -2.]]), torch.tensor([[1, 0, 0]]).bool()
    ppl = torch.tensor([[1.5, 1.5, 9.]])
    found = capo(.5, 2., 3.).advantage(rollouts(lpm, correct, ref_ppl=ppl), 0)     # the second is a near miss: masked
    close(found, capo_advantage(lpm, correct, .5) * torch.tensor([[1, 0, 1]]), 1e-5)
    without = capo_advantage(lpm, correct, .5, valid=torch.tensor([[1, 0, 1]]))
    assert found[0, 0] > without[0, 0] + .1 and found.sum() > .1


def test_a_fully_masked_group_has_no_gradient_and_leaves_the_others_theirs():
    lpm = torch.tensor([[-1., -.5, -2.], [-.3, -.4, -.9]])
    correct, ppl = torch.tensor([[1, 0, 0], [1, 0, 1]]).bool(), torch.tensor([[9., 1.5, 1.5], [1., 9., 1.]])
    r, plain = rollouts(lpm, correct, ref_ppl=ppl), rollouts(lpm, correct)
    slopes = []
    for recipe, x in ((capo(.5, 2., 3.), r), (capo(.5, **ALL), plain)):
        logp = x.logp.flatten(0, 1).clone().requires_grad_()
        recipe.loss(logp, x.old_logp.flatten(0, 1), recipe.advantage(x, 0).flatten(), x.mask.flatten(0, 1)).backward()
        slopes.append(logp.grad.view(2, 3, 2))
    assert (slopes[0][0] == 0).all() and (slopes[1] != 0).all() and slopes[0][1].equal(slopes[1][1])


@each_recipe
@given(case=groups(B=3), seed=st.integers(0, 99))
def test_an_empty_response_leaves_the_group(recipe, case, seed):
    lpm, correct, valid = case
    ppl = 1 + 3 * torch.rand(lpm.shape, generator=torch.Generator().manual_seed(seed))
    A = recipe.advantage(rollouts(lpm, correct, valid, ppl), 0)
    assert (A[~valid] == 0).all()
    for a, x, c, v, p in zip(A, lpm, correct, valid, ppl):
        if v.any(): close(a[v], recipe.advantage(rollouts(x[v][None], c[v][None], ref_ppl=p[v][None]), 0)[0], 1e-4)


@each_recipe
@given(case=groups())
def test_degenerate_groups_get_zero(recipe, case):
    lpm, correct, valid = case
    for c in (torch.zeros_like(correct), torch.ones_like(correct)):
        assert (recipe.advantage(rollouts(lpm, c, valid, 2 - lpm), 0) == 0).all()
    alone = rollouts(lpm[:, :1], correct[:, :1], ref_ppl=2 - lpm[:, :1])
    assert (recipe.advantage(alone, 0) == 0).all()


@each_recipe
def test_an_extreme_lpm_gives_finite_advantages(recipe):
    lpm, correct = torch.tensor([[-1e4, -1., 0., -1e4]]), torch.tensor([[1, 0, 1, 0]]).bool()
    A = recipe.advantage(rollouts(lpm, correct, ref_ppl=torch.tensor([[math.inf, 1., 1., math.inf]])), 0)
    assert A.isfinite().all() and (A != 0).any()


def test_the_defaults():
    "CAPO: the paper's τ, thresholds and size. GRPO: scaled and unmasked. Both: the clipped loss."
    g = torch.Generator().manual_seed(0)
    lpm, correct = -torch.rand(6, 8, generator=g), torch.rand(6, 8, generator=g) < .5
    ppl = torch.tensor([1.04, 1.06, 2.45, 2.55])[torch.randint(4, (6, 8), generator=g)]
    r = rollouts(lpm, correct, ref_ppl=ppl)
    close(capo().advantage(r, 0), capo_advantage(lpm, correct, .6) * noise_mask(ppl, correct, 1.05, 2.5), 1e-5)
    close(grpo().advantage(r, 0), grpo_advantage(correct.float()), 1e-6)
    close(grpo(scale=False).advantage(r, 0), correct.float() - correct.float().mean(1, keepdim=True), 1e-6)
    assert capo().loss is grpo().loss is clipped_loss and (capo().name, grpo().name) == ("capo", "grpo")


def test_the_reference_is_asked_for_only_when_something_can_be_dropped():
    r = rollouts(torch.tensor([[-1., -.5]]), torch.tensor([[True, False]]))
    for recipe in (grpo(), capo(**ALL)):
        assert recipe.keep is None and recipe.advantage(r, 0)[0, 0] > 0
    for recipe in (grpo(ref_low=1.1), grpo(ref_high=9.), capo(ref_low=1), capo(ref_high=math.inf)):
        assert recipe.keep is not None
        with pytest.raises(ValueError, match="ref_logp"): recipe.advantage(r, 0)


def test_a_recipe_of_ones_own():
    r = rollouts(torch.tensor([[-1., -.5]]), torch.tensor([[True, False]]))
    mine = Recipe("mine", lambda r, step: r.reward * step)
    assert replace(mine, name="other").advantage(r, 3).tolist() == [[3., 0.]] and mine.keep is None
    assert mine.loss is clipped_loss
