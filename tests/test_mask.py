"The noise mask against its definition, and the quantile thresholds against numpy's."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from capo.mask import noise_mask, quantile_thresholds
from helpers import groups

thresholds = st.sampled_from([1, 1.25, 1.5, 2., 2.5, 3.75, math.inf])


def perplexities(case):
    "Between 1 and 4 in quarters, so that thresholds are often met exactly."
    return 1 - case[0], *case[1:]


@given(groups().map(perplexities), thresholds, thresholds)
def test_the_definition(case, low, high):
    ppl, correct, present = case
    ppl = ppl.where(present, math.nan)
    trusted = lambda p, c, there: bool(there) and (p <= high if c else p >= low)
    want = [[trusted(*o) for o in zip(*row)] for row in zip(ppl.tolist(), correct.tolist(), present.tolist())]
    assert noise_mask(ppl, correct, low, high).tolist() == want
    assert noise_mask(ppl.double(), correct.long(), low, high).tolist() == want


@given(groups().map(perplexities), thresholds, thresholds, thresholds, thresholds)
def test_looser_thresholds_keep_more(case, a, b, c, d):
    ppl, correct, _ = case
    loose, tight = noise_mask(ppl, correct, min(a, b), max(c, d)), noise_mask(ppl, correct, max(a, b), min(c, d))
    assert (tight <= loose).all() and noise_mask(ppl, correct, 1, math.inf).all()


def test_the_thresholds_of_the_paper_are_the_defaults():
    ppl, correct = torch.tensor([[1.04, 1.06, 2.4, 2.6] * 2]), torch.tensor([[1] * 4 + [0] * 4])
    assert noise_mask(ppl, correct).tolist() == [[True, True, True, False, False, True, True, True]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_infinite_perplexity_is_a_lucky_guess_or_a_sure_mistake(dtype):
    ppl = torch.tensor([[math.inf, math.inf, 1., 1.]], dtype=dtype)
    correct = torch.tensor([[1, 0, 1, 0]])
    assert noise_mask(ppl, correct).tolist() == [[False, True, True, False]]
    assert noise_mask(ppl, correct, 1, math.inf).all()


@given(groups().map(perplexities), st.floats(0, 1), st.floats(0, 1))
def test_quantiles_are_per_class_and_numpys(case, lower, upper):
    ppl, correct, valid = case
    low, high = quantile_thresholds(ppl.where(valid, math.nan), correct, lower, upper, valid)
    wrong, right = ppl[~correct & valid].double().numpy(), ppl[correct & valid].double().numpy()
    assert low == pytest.approx(np.quantile(wrong, lower) if len(wrong) else 1)
    assert high == pytest.approx(np.quantile(right, upper) if len(right) else math.inf)


def test_quartiles_leave_three_quarters_of_each_class():
    g = torch.Generator().manual_seed(0)
    correct = torch.rand(40, 50, generator=g) < .3
    ppl = 1 + torch.rand(40, 50, generator=g) + correct
    kept = noise_mask(ppl, correct, *quantile_thresholds(ppl, correct))
    for group in (correct, ~correct):
        assert kept[group].float().mean().item() == pytest.approx(.75, abs=2 / group.sum().item())
