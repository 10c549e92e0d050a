"""The noise scale functions and their eta."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator

from ersde import sample_er_sde
from ersde.noise_scale import NOISE_SCALES, from_callable, from_points, get_noise_scale, parse_points

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


points = st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-2, 1e2)), min_size=2, max_size=8,
                  unique_by=lambda point: round(math.log(point[0]), 2))


def rising(pairs):
    """The same lambdas with the g's sorted."""
    return list(zip(sorted(lam for lam, _ in pairs), sorted(g for _, g in pairs)))


@settings(deadline=None)           # the machine may be busy
@given(points)
def test_a_curve_goes_through_its_points_never_falls_and_is_flat_outside(pairs):
    pairs = rising(pairs)
    scale = from_points(reversed(pairs))
    for lam, g in pairs:
        assert scale.log_g(lam).item() == pytest.approx(math.log(g), abs=1e-9)
    grid = torch.logspace(-4, 4, 2001, dtype=torch.float64)
    assert (scale.log_g(grid).diff() >= -1e-12).all()
    assert scale.log_g(1e-300).item() == pytest.approx(math.log(pairs[0][1]), abs=1e-9)
    assert scale.log_g(math.inf).item() == pytest.approx(math.log(pairs[-1][1]), abs=1e-9)


@settings(deadline=None)
@given(points)
def test_the_curve_is_scipys_monotone_cubic(pairs):
    x, y = torch.tensor(rising(pairs), dtype=torch.float64).log().T.numpy()
    grid = torch.linspace(x[0], x[-1], 101, dtype=torch.float64)
    want = PchipInterpolator(x, y)(grid.clamp(max=x[-1]).numpy())
    assert from_points(rising(pairs)).log_g(grid.exp()).numpy() == pytest.approx(want, abs=1e-7)


def test_two_points_are_a_power_of_lambda():
    scale = from_points([(0.01, 0.01), (100.0, 100.0)])
    grid = torch.logspace(-2, 2, 50, dtype=torch.float64)
    assert torch.allclose(scale.log_g(grid), NOISE_SCALES["sde"].log_g(grid), atol=1e-12)


def test_a_curve_through_a_functions_values_samples_as_the_function():
    lam = torch.logspace(-2, 2, 60, dtype=torch.float64)
    curve = from_points(zip(lam.tolist(), NOISE_SCALES["sde_5"].log_g(lam).exp().tolist()))
    sigmas = torch.cat((torch.logspace(1, -1.5, 15, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)))
    x = torch.full((2, 8), 10.0, dtype=torch.float64)
    run = lambda scale: sample_er_sde(lambda x, sigma, seed: x / (1 + sigma[0] ** 2), x, sigmas, {"seed": 1}, disable=True,
                                      noise_scale=scale, process="ve")
    assert torch.allclose(run(curve), run("sde_5"), atol=1e-4)


@pytest.mark.parametrize("pairs, error, words", [
    ([(1, 2), (3, 1)], ValueError, ["must not fall", "g = 2 at lambda = 1", "g = 1 at lambda = 3"]),
    ([(5, 1), (1, 1), (3, 2)], ValueError, ["must not fall", "g = 2 at lambda = 3", "g = 1 at lambda = 5"]),
    ([(1, 1)], ValueError, ["at least 2 points", "1"]),
    ([], ValueError, ["at least 2 points", "0"]),
    ([(1, 1), (1, 2)], ValueError, ["lambda = 1", "twice"]),
    ([(0, 1), (1, 2)], ValueError, ["lambda of point 1", "positive", "0"]),
    ([(1, 1), (2, float("inf"))], ValueError, ["g of point 2", "finite", "inf"]),
    ([(1, 1), 2], TypeError, ["point 2", "pair", "2"]),
    ([(1, 1), ("2", 2)], TypeError, ["lambda of point 2", "'2'"]),
])
def test_a_bad_curve_names_its_points(pairs, error, words):
    with pytest.raises(error) as caught:
        from_points(pairs, "mine")
    assert all(word in str(caught.value) for word in ["'mine'", *words]) and "\n" not in str(caught.value)


def test_points_from_text():
    assert parse_points("0.1 1\n\n# comment\n1, 2 ; 10  3e1  # end") == [(0.1, 1.0), (1.0, 2.0), (10.0, 30.0)]
    with pytest.raises(ValueError, match="line 2 must be two numbers, lambda and g, got '1 2 3'"):
        parse_points("1 2\n1 2 3")
