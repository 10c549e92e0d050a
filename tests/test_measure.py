"""Sums over each picture on the CPU."""
import math

import numpy as np
import pytest
import torch

from ersde import measure

SHAPES = [(4, 64, 64), (16, 64, 64), (4, 104, 152), (3, 40, 52), (4, 8, 9), (3, 7, 11), (10007, 16), (30011,), (1,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", [measure.Few, measure.Arrays])
def test_an_inner_product_is_the_same_in_a_batch_and_alone(shape, dtype, form):
    """Bit for bit, also of pictures that lie behind one another in a larger tensor; and it is the inner product."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, *shape, generator=generator, dtype=torch.float64).to(dtype)
    x, y = x[1:5], y[2:]
    batch = form(x)
    found = batch.inner(batch.rows(x), batch.rows(y))
    if form is measure.Few:
        assert isinstance(found, measure.Several) and len(found) == 4 and all(isinstance(value, float) for value in found)
    else:
        assert found.shape == (4, *(1,) * len(shape)) and found.dtype == np.float64
    found = np.ravel(found)
    for i, value in enumerate(found):
        alone = measure.kind(x[i:i + 1])
        assert alone.inner(alone.rows(x[i:i + 1]), alone.rows(y[i:i + 1])) == value
    want = (x.double() * y.double()).flatten(1).sum(1)
    scale = x.double().flatten(1).norm(dim=1) * y.double().flatten(1).norm(dim=1)
    assert ((torch.from_numpy(found) - want).abs() / scale).max() < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("form", [measure.Few, measure.Arrays])
def test_what_is_not_finite_stays_so(bad, form):
    """And in its own picture: what is measured of the others does not change."""
    x = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    m = form(x)
    want = np.ravel(m.inner(m.rows(x), m.rows(x)))[1]
    x[0, 0, 0, 0] = bad
    found = np.ravel(m.inner(m.rows(x), m.rows(x)))
    assert not math.isfinite(found[0]) and found[1] == want


def test_the_form_of_the_numbers_goes_by_the_pictures():
    """Of none, one, few and many pictures, and of pictures without a number."""
    forms = [type(measure.kind(torch.zeros(n, 4, 8))) for n in (0, 1, 2, 8, 9)]
    assert forms == [measure.Arrays, measure.Floats, measure.Few, measure.Few, measure.Arrays]
    assert type(measure.kind(torch.zeros(3, 0))) is measure.Arrays


def test_several_numbers_are_those_of_each_picture():
    a, b = measure.Several([3.0, -2.0]), measure.Several([0.5, 4.0])
    assert a * b == b * a == [1.5, -8.0] and a * 2.0 == 2.0 * a == [6.0, -4.0] and a - b == [2.5, -6.0]
    m = measure.Few(torch.zeros(2, 4))
    assert m.div(a, measure.Several([0.0, 4.0])) == [math.inf, -0.5] and m.minimum(a, b) == [0.5, -2.0]
    assert m.clamp(a, min=-1.0) == [3.0, -1.0] and m.clamp(a, 0.0, 1.0) == [1.0, 0.0]
    assert m.addcmul(1.0, a, b, value=-1.0) == [-0.5, 9.0] and m.sqrt(measure.Several([4.0, 9.0])) == [2.0, 3.0]
    assert m.none(measure.Several([0.0, 0.0])) and not m.none(b)
    x, change = torch.ones(2, 4), torch.full((2, 4), 2.0)
    assert m.add(x, change, a, 0.5).tolist() == [[4.0] * 4, [-1.0] * 4]
    assert m.add_(x.clone(), change, b).tolist() == [[2.0] * 4, [9.0] * 4]
