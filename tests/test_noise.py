"""The default noise: what it depends on, and that it is normal."""
import numpy as np
import pytest
import torch
from scipy import stats

from ersde.noise import SeededNoise, philox_normal, step_key


def test_known_values():
    """The streams may never change: pictures depend on them."""
    got = philox_normal(seed=42, image=0, step=step_key(14.6), count=4)
    np.testing.assert_allclose(got, KNOWN, rtol=1e-6)


KNOWN = [0.40106332, -0.91545612, 0.98530513, -0.30955005]


def test_normal_and_independent():
    n = 200_000
    base = philox_normal(1, 0, 7, n)
    assert stats.kstest(base, "norm").pvalue > 1e-3
    for other in ((2, 0, 7), (1, 1, 7), (1, 0, 8)):
        assert abs(np.corrcoef(base, philox_normal(*other, n))[0, 1]) < 5 / n ** 0.5
    assert abs(np.corrcoef(base[:-1], base[1:])[0, 1]) < 5 / n ** 0.5
    # Nor related to the host's starting noise of the same seed.
    start = torch.randn(n, generator=torch.Generator().manual_seed(1)).numpy()
    assert abs(np.corrcoef(base, start)[0, 1]) < 5 / n ** 0.5


def test_depends_on_seed_image_and_sigma_alone():
    x = torch.zeros(3, 4, 8, 8)
    whole = SeededNoise(x, 5)(2.5)
    assert torch.equal(whole, SeededNoise(x, 5)(torch.tensor(2.5), torch.tensor(1.0)))
    assert torch.equal(whole[:1], SeededNoise(x[:1], 5)(2.5))
    assert not torch.equal(whole, SeededNoise(x, 5)(2.4)) and not torch.equal(whole, SeededNoise(x, 6)(2.5))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, SeededNoise(x, 5 + 2 ** 32)(2.5)) and not torch.equal(whole, SeededNoise(x, -5)(2.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_has_the_same_numbers(dtype):
    x = torch.zeros(2, 5)
    torch.testing.assert_close(SeededNoise(x.to(dtype), 1)(1.0), SeededNoise(x, 1)(1.0).to(dtype))


@pytest.mark.parametrize("seed", [0, -1, 2 ** 63, 2 ** 64 - 1, 2 ** 70])
def test_any_seed(seed):
    assert torch.isfinite(SeededNoise(torch.zeros(1, 3), seed)(1.0)).all()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 1), (2, 3, 1, 5, 7)])
def test_any_shape(shape):
    assert SeededNoise(torch.zeros(shape), 1)(1.0).shape == shape
