import math

import pytest
import torch

from aimnet2mult import ops


def test_cutoffs_at_their_ends():
    rc = torch.tensor(5.0, dtype=torch.float64)
    d = torch.tensor([0.0, 2.5, 5.0, 7.0], dtype=torch.float64)
    torch.testing.assert_close(ops.cosine_cutoff(d, rc), torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64))
    expected = [1.0, math.exp(1 - 1 / (1 - 0.25)), 0.0, 0.0]
    torch.testing.assert_close(ops.exp_cutoff(d, rc), torch.tensor(expected, dtype=torch.float64))


def test_cutoffs_have_finite_second_derivatives_everywhere():
    d = torch.tensor([0.3, 2.0, 4.999, 5.0, 100.0], dtype=torch.float64, requires_grad=True)
    rc = torch.tensor(5.0, dtype=torch.float64)
    for cutoff in (ops.cosine_cutoff, ops.exp_cutoff):
        (first,) = torch.autograd.grad(cutoff(d, rc).sum(), d, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), d)
        assert torch.isfinite(first).all()
        assert torch.isfinite(second).all()


def test_derivatives_of_the_basis():
    d = torch.linspace(0.5, 4.5, 7, dtype=torch.float64, requires_grad=True)
    rc, eta = torch.tensor(5.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    shift = torch.tensor(1.3, dtype=torch.float64)

    def radial(x):
        return ops.gaussian_basis(x, eta, shift) * ops.cosine_cutoff(x, rc)

    assert torch.autograd.gradcheck(radial, d)
    assert torch.autograd.gradgradcheck(radial, d)


def test_nse_spreads_the_missing_charge():
    data = {"coord": torch.zeros(2, 3, 3), "charge": torch.zeros(2)}
    q = torch.tensor([[[0.1], [0.2], [0.0]], [[0.5], [-0.5], [0.3]]], dtype=torch.float64)
    f = torch.tensor([[[1.0], [3.0], [0.0]], [[0.5], [0.5], [1.0]]], dtype=torch.float64)
    Q = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    out = ops.nse(Q, q, f, data)
    torch.testing.assert_close(out.sum(1), Q, atol=2e-6, rtol=0)
    moved = out - q
    torch.testing.assert_close(moved[0, 1] / moved[0, 0], torch.tensor([3.0], dtype=torch.float64))
    assert moved[0, 2] == 0


def test_dsf_value_and_slope_vanish_at_the_cutoff():
    d = torch.tensor([9.999999, 12.0], dtype=torch.float64, requires_grad=True)
    kernel = ops.coulomb_kernel_dsf(d, 10.0, 0.2)
    (slope,) = torch.autograd.grad(kernel.sum(), d)
    torch.testing.assert_close(kernel, torch.zeros_like(kernel), atol=1e-12, rtol=0)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-8, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_radial_functions_make_no_denormal_numbers(dtype):
    """Neither they, nor their derivatives, nor products of two of them: arithmetic with such numbers is slow."""
    d = torch.linspace(0.6, 5.0, 400, dtype=dtype).requires_grad_()
    shifts = torch.linspace(0.8, 4.7375, 16, dtype=dtype)
    eta = torch.tensor((16 / 4.2) ** 2, dtype=dtype)
    g = ops.gaussian_basis(d.unsqueeze(1), eta, shifts)
    (slope,) = torch.autograd.grad(g.sum(), d, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), d)
    smallest = torch.finfo(dtype).tiny
    for values in (g, g * g, slope, curvature):
        assert not ((values != 0) & (values.abs() < smallest)).any()
    exact = torch.exp(-eta.double() * (d.double().unsqueeze(1) - shifts.double()) ** 2)
    largest_error = (g - exact).abs().max()
    assert largest_error < 2 * torch.finfo(dtype).eps
