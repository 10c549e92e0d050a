"""The noise scale functions and their eta."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ersde.noise_scale import NOISE_SCALES, from_callable, get_noise_scale

G = {      # design.md, section 1
    "ode": lambda v: 1.0,
    "sde": lambda v: v,
    "sde_1": lambda v: math.exp(-1 / v) + 10,
    "sde_2": lambda v: v ** 0.5,
    "sde_3": lambda v: v ** 1.5,
    "sde_4": lambda v: v ** -0.1 * math.log10(1 + 100 * v ** 1.5),
    "sde_5": lambda v: math.exp(v ** 0.3) + 10,
}
lambdas = st.floats(1e-3, 900.0)


def test_names():
    assert list(NOISE_SCALES) == list(G)


@given(st.sampled_from(list(G)), lambdas, st.floats(0, 3))
def test_log_g_and_phi(name, lam, eta):
    scale = NOISE_SCALES[name]
    assert scale.log_g(lam).item() == pytest.approx(math.log(G[name](lam)), rel=1e-10, abs=1e-12)
    assert scale.phi(lam, eta).item() == pytest.approx(lam * G[name](lam) ** eta, rel=1e-9)
    assert scale.log_g(lam).dtype == torch.float64
    assert scale(torch.tensor(lam)) == scale.phi(torch.tensor(lam))


@given(st.sampled_from(list(G)), st.floats(1e-8, 1e12), st.floats(1.0, 1e6))
def test_g_never_falls(name, lam, ratio):
    scale = NOISE_SCALES[name]
    assert scale.log_g(lam * ratio) >= scale.log_g(lam) - 1e-12


def test_sde_4_is_held_at_its_peak():
    scale = NOISE_SCALES["sde_4"]
    assert 500 < scale.peak < 1e6
    near = [G["sde_4"](scale.peak * f) for f in (0.99, 1.0, 1.01)]
    assert near[1] > near[0] and near[1] > near[2]
    assert scale.log_g(1e9) == scale.log_g(scale.peak) == scale.log_g(math.inf)


@pytest.mark.parametrize("name", G)
def test_extremes_are_not_nan(name):
    value = NOISE_SCALES[name].log_g(torch.tensor([1e-300, 1e-12, 1e5, 1e300, math.inf]))
    assert not value.isnan().any()
    limit = {"ode": 0.0, "sde_1": math.log(11.0)}.get(name)
    if limit is not None:
        assert value[-1].item() == pytest.approx(limit)


def test_callable():
    scale = get_noise_scale(lambda lam: lam ** 2)
    lam = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
    torch.testing.assert_close(scale.log_g(lam), lam.log())
    assert scale.name == "<lambda>" and scale.log_g(math.inf) > 20
    overflowing = from_callable(lambda lam: lam * lam.exp())
    assert overflowing.log_g(math.inf) == math.inf
