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


@pytest.mark.parametrize("count", [0, 1, 64, 8192, 8208, 16384, 65536, 3 * 8192, 63232, 10007, 16 * 10007, 2 * 9973])
def test_the_parts_of_a_picture_are_equal_and_small(count):
    parts = measure._parts(count)
    if parts:
        assert count % parts == 0 and count // parts <= measure._PART
        assert count < 1024 or count // parts >= measure._PART // 16
    assert parts == {10007: 0, 2 * 9973: 0, 16 * 10007: 0, 65536: 8, 63232: 8, 8208: 2, 0: 1}.get(count, parts)


@pytest.mark.parametrize("batch", [1, 3])
def test_what_a_model_returns_may_be_anything_with_numbers(batch):
    """Not contiguous, with a gradient, of another dtype, of no numbers at all."""
    x = torch.randn(batch, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    m = measure.kind(x)
    plain = m.inner(m.rows(x), m.rows(x))
    for other in (x.contiguous(memory_format=torch.channels_last), x.clone().requires_grad_(), x.double()):
        assert np.array_equal(m.inner(m.rows(other), m.rows(other)), plain)
    for none in (x[..., :0], x[:0]):
        empty = measure.kind(none)
        assert np.all(empty.inner(empty.rows(none), empty.rows(none)) == 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad):
    """And in its own picture: what is measured of the others does not change."""
    x = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    m = measure.kind(x)
    want = m.inner(m.rows(x), m.rows(x)).ravel()[1]
    x[0, 0, 0, 0] = bad
    found = m.inner(m.rows(x), m.rows(x)).ravel()
    assert not math.isfinite(found[0]) and found[1] == want


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(4, 8), (3, 5)])         # in parts, and not in whole cache lines
def test_what_is_too_large_is_infinite_without_a_warning(batch, shape):
    x = torch.full((batch, *shape), 1e200, dtype=torch.float64)
    m = measure.kind(x)
    with m.quiet():
        assert np.all(m.inner(m.rows(x), m.rows(x)) == math.inf)
