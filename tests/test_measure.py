"""Sums over each picture on the CPU."""
import math

import numpy as np
import pytest
import torch

from ersde import measure

SHAPES = [(4, 64, 64), (16, 64, 64), (4, 104, 152), (3, 40, 52), (4, 8, 9), (3, 7, 11), (10007, 16), (30011,), (1,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_inner_product_is_the_same_in_a_batch_and_alone(shape, dtype):
    """Bit for bit, also of pictures that lie behind one another in a larger tensor; and it is the inner product."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, *shape, generator=generator, dtype=torch.float64).to(dtype)
    x, y = x[1:5], y[2:]
    batch = measure.kind(x)
    found = batch.inner(batch.rows(x), batch.rows(y))
    assert found.shape == (4, *(1,) * len(shape)) and found.dtype == np.float64
    for i, value in enumerate(found.ravel()):
        alone = measure.kind(x[i:i + 1])
        assert alone.inner(alone.rows(x[i:i + 1]), alone.rows(y[i:i + 1])) == value
    want = (x.double() * y.double()).flatten(1).sum(1)
    scale = x.double().flatten(1).norm(dim=1) * y.double().flatten(1).norm(dim=1)
    assert ((torch.from_numpy(found).flatten() - want).abs() / scale).max() < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad):
    """And in its own picture: what is measured of the others does not change."""
    x = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    m = measure.kind(x)
    want = m.inner(m.rows(x), m.rows(x)).ravel()[1]
    x[0, 0, 0, 0] = bad
    found = m.inner(m.rows(x), m.rows(x)).ravel()
    assert not math.isfinite(found[0]) and found[1] == want
