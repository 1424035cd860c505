"The surrogates: φ′ is the derivative of φ, and the family has the limits that the paper uses."
import math

import pytest
import torch
from hypothesis import given, strategies as st

from capo.surrogate import Surrogate, exponential, hinge, linear, logistic, squared_hinge

numbers = st.lists(st.floats(-40, 40, allow_subnormal=False), min_size=1, max_size=20)
margins = numbers.map(lambda x: torch.tensor(x, dtype=torch.float64))
taus = st.floats(.05, 50)
SURROGATES = [linear, hinge, squared_hinge, exponential, logistic(.05), logistic(.6), logistic(30.)]
each = pytest.mark.parametrize("phi", SURROGATES, ids=str)


@each
@given(t=margins)
def test_d_is_the_derivative(phi, t):
    t.requires_grad_()
    torch.testing.assert_close(phi.d(t.detach()), torch.autograd.grad(phi(t).sum(), t)[0], rtol=1e-10, atol=1e-10)


@each
@given(t=margins, s=margins, w=st.floats(0, 1))
def test_falling_and_convex(phi, t, s, w):
    n = min(len(t), len(s))
    low, high = torch.minimum(t[:n], s[:n]), torch.maximum(t[:n], s[:n])
    mixed, chord = phi(w * low + (1 - w) * high), w * phi(low) + (1 - w) * phi(high)
    assert (mixed <= chord + 1e-9 * (1 + chord.abs())).all()
    assert (phi(high) <= phi(low)).all() and (phi.d(low) <= phi.d(high) + 1e-12).all() and (phi.d(t) <= 0).all()


@given(margins, taus)
def test_logistic_is_log1p_exp(t, tau):
    x = (t / tau).clamp(-500, 500)
    torch.testing.assert_close(logistic(tau)(tau * x), (-x).exp().log1p(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logistic(tau).d(tau * x), -1 / (1 + x.exp()) / tau, rtol=1e-9, atol=1e-12)


@given(margins, taus)
def test_wide_logistic_is_linear(t, tau):
    "2τφ′ differs from −1 by at most |t|/2τ, and 2τ(φ(t) − log 2) from −t by at most t²/4τ."
    assert ((2 * tau * logistic(tau).d(t) - linear.d(t)).abs() <= t.abs() / (2 * tau) + 1e-9).all()
    level = 2 * tau * (logistic(tau)(t) - math.log(2))
    assert ((level - linear(t)).abs() <= t.square() / (4 * tau) + 1e-9 * (1 + tau)).all()


@given(margins, st.floats(1e-4, .05))
def test_narrow_logistic_counts_the_depth_of_a_mistake(t, tau):
    "τφ(t) differs from max(0, −t) by at most τ log 2; −τφ′ from the step by at most exp(−|t|/τ), and is ½ at a tie."
    gap = tau * logistic(tau)(t) - (-t).clamp(min=0)
    assert (gap >= -1e-12).all() and (gap <= tau * math.log(2) + 1e-12).all()
    step = torch.where(t == 0, .5, (t < 0).double())
    assert ((-tau * logistic(tau).d(t) - step).abs() <= torch.where(t == 0, 0, (-t.abs() / tau).exp()) + 1e-12).all()


def test_the_exponential_goes_on_as_its_tangent():
    for t in (-30., -31., -1e4):
        x = torch.tensor([t], dtype=torch.float64)
        torch.testing.assert_close(exponential(x), math.exp(30) * (1 - 30 - x), rtol=1e-12, atol=0)
        torch.testing.assert_close(exponential.d(x), torch.full_like(x, -math.exp(30)), rtol=1e-12, atol=0)


def test_values_and_slopes_at_zero():
    zero = torch.zeros(1, dtype=torch.float64)
    found = [[x.item() for x in (phi(zero), phi.d(zero))] for phi in (linear, hinge, exponential, logistic(.5))]
    assert found == [[0, -1], [1, -1], [1, -1], [pytest.approx(math.log(2)), -1]]


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_margins_stay_finite(phi, dtype):
    t = torch.tensor([-1e4, -1., 0., 1., 1e4], dtype=dtype)
    assert isinstance(phi, Surrogate) and phi(t).isfinite().all() and phi.d(t).isfinite().all()
    assert phi(t).dtype == phi.d(t).dtype == dtype


def test_half_precision_stays_finite():
    t = torch.tensor([-1e4, 0., 1e4], dtype=torch.float16)
    for phi in (linear, hinge, logistic(.6)): assert phi(t).isfinite().all() and phi.d(t).isfinite().all()
