"""Noise scale functions: which member of the ER-SDE family is solved.

A member is chosen by phi(lambda) = lambda * g(lambda), g non-decreasing (Cui et al., arXiv 2309.06169, section 4 and
appendix A.8), and `eta` turns it continuously, phi_eta = lambda * g^eta: eta = 0 is the probability flow ODE whatever
g is, eta = 1 the function as published.  The solver needs only log g, so that is what this module computes.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Callable, Iterable, List, Mapping, Optional, Tuple, Union

import numpy as np
import torch

from .errors import check_choice, check_eta, shown

Tensor = torch.Tensor

# Stands for lambda = infinity (sigma = 1 of a flow model) where a user's phi is not defined there.
_LAMBDA_FAR = 1e12
_VECTORS = 64       # a multiple of what any processor's vector loops take at a time
_BLOCK = 1 << 15    # the most that torch does not share out to threads


@dataclass(frozen=True)
class NoiseScale:
    """One noise scale function phi(lambda) = lambda * g(lambda).

    Attributes:
        name: its name in `NOISE_SCALES`, or the name of the user's callable.
        formula: g as a person would write it.
        log_g_fn: log g of a float64 tensor of positive, finite lambda.
        log_g_far: the limit of log g for lambda -> infinity (may be infinite).
        power: q where g = lambda^q exactly, so that integrals have a closed form; else None.
        peak: lambda above which g would fall.  g keeps its value at the peak from there on: the family needs g
            non-decreasing, so that rho = (g(lambda_t) / g(lambda_s))^eta never exceeds 1.
        from_user: whether the function is a user's callable, and so must be checked on each schedule.
    """

    name: str
    formula: str
    log_g_fn: Callable[[Tensor], Tensor]
    log_g_far: float
    power: Optional[float] = None
    peak: float = math.inf
    from_user: bool = False

    def log_g(self, lam) -> Tensor:
        """log g(lambda), float64, of lambda's shape; lambda = inf gives the limit, lambda = 0 counts as 1e-300.

        The same bits for a lambda in any company: parts of a run have the weights of the whole.
        """
        return torch.from_numpy(self.log_g_array(_cpu(lam).detach().numpy()))

    def log_g_array(self, lam: np.ndarray) -> np.ndarray:
        """`log_g` of a float64 numpy array."""
        if not (lam >= 0).all():
            raise ValueError(f"lambda must be at least 0, got {lam[~(lam >= 0)].flat[0]}")
        far = np.isinf(lam) & math.isinf(self.peak)
        inner = np.where(far, _LAMBDA_FAR, np.clip(lam, 1e-300, self.peak)).ravel()
        # torch takes whole vectors at a time and the rest one by one, which rounds differently: no rest then.
        inner = np.pad(inner, (0, -len(inner) % _VECTORS), mode="edge" if len(inner) else "constant")
        out = np.empty(len(inner))
        for start in range(0, len(inner), _BLOCK):
            out[start:start + _BLOCK] = _cpu(self.log_g_fn(torch.from_numpy(inner[start:start + _BLOCK]))).numpy()
        return np.where(far, self.log_g_far, out[:lam.size].reshape(lam.shape))

    def phi(self, lam, eta: float = 1.0) -> Tensor:
        """phi_eta(lambda) = lambda * g(lambda)^eta, float64, of lambda's shape."""
        lam, eta = _cpu(lam), check_eta(eta)
        return lam * (eta * self.log_g(lam)).exp() if eta else lam.clone()

    def __call__(self, lam) -> Tensor:
        """phi(lambda), so that an entry of `NOISE_SCALES` is itself a callable as `noise_scale` takes one."""
        return self.phi(lam)


def _cpu(values) -> Tensor:
    """`values` as float64 on the CPU, whatever torch's default device is; TypeError if they are not real numbers."""
    try:
        if not (values.is_complex() if isinstance(values, Tensor) else np.iscomplexobj(values)):
            return torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise TypeError(f"lambda must be real numbers, got {shown(values)}")


def _power(name: str, formula: str, q: float) -> NoiseScale:
    far = math.inf if q > 0 else 0.0
    return NoiseScale(name, formula, lambda lam: q * lam.log() if q else torch.zeros_like(lam), far, power=q)


def _log_g_sde_1(lam: Tensor) -> Tensor:
    return torch.log((-1.0 / lam).exp() + 10.0)


def _log_g_sde_4(lam: Tensor) -> Tensor:
    # log10(1 + y) by log1p: at small lambda the 1 would swallow y.
    return -0.1 * lam.log() + torch.log(torch.log1p(100.0 * lam ** 1.5) / math.log(10.0))


def _log_g_sde_5(lam: Tensor) -> Tensor:
    # log(exp(a) + 10), written so that it does not overflow where exp(a) does.
    return torch.logaddexp(lam ** 0.3, torch.full_like(lam, math.log(10.0)))


def _peak_sde_4() -> float:
    """Where lambda^-0.1 log10(1 + 100 lambda^1.5) is largest: the zero of d log g / d log lambda, by bisection."""
    def slope(lam):
        y = 100.0 * lam ** 1.5
        return 1.5 * y / (1.0 + y) / math.log1p(y) - 0.1

    low, high = 1.0, 1e9
    for _ in range(200):
        mid = math.sqrt(low * high)
        low, high = (mid, high) if slope(mid) > 0 else (low, mid)
    return low


NOISE_SCALES: Mapping[str, NoiseScale] = MappingProxyType({
    scale.name: scale for scale in (
        _power("ode", "1", 0.0),
        _power("sde", "lambda", 1.0),
        NoiseScale("sde_1", "exp(-1/lambda) + 10", _log_g_sde_1, math.log(11.0)),
        _power("sde_2", "lambda^0.5", 0.5),
        _power("sde_3", "lambda^1.5", 1.5),
        NoiseScale("sde_4", "lambda^-0.1 log10(1 + 100 lambda^1.5)", _log_g_sde_4, math.nan, peak=_peak_sde_4()),
        NoiseScale("sde_5", "exp(lambda^0.3) + 10", _log_g_sde_5, math.inf),
    )
})
"""The functions of the paper's official code (customized_func, func_type 1 to 7) by name."""


def from_callable(phi: Callable[[Tensor], Tensor]) -> NoiseScale:
    """A noise scale from a user's phi(lambda) on float64 tensors of any shape; g = phi / lambda.

    Raises:
        TypeError: phi does not return a tensor of the same shape.
        ValueError: phi is not positive where it is evaluated (a falling g is found on the schedule, by the weights).
    """
    name = getattr(phi, "__name__", type(phi).__name__)

    def log_g(lam: Tensor) -> Tensor:
        value = phi(lam)
        if not isinstance(value, Tensor) or value.shape != lam.shape or not value.is_floating_point():
            got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"noise_scale {name!r}: phi(lambda) must return a floating point tensor of lambda's shape "
                            f"{tuple(lam.shape)}, got {got}")
        value = _cpu(value).detach()
        positive = lam > 0
        bad = positive & ~(value > 0)
        if bad.any():
            at = lam[bad].flatten()[0].item()
            raise ValueError(f"noise_scale {name!r}: phi(lambda) must be positive for lambda > 0, got "
                             f"{value[bad].flatten()[0].item()} at lambda = {at:.6g}")
        return torch.log(value) - torch.log(lam)

    far = float(log_g(_cpu([_LAMBDA_FAR]))[0])
    return NoiseScale(name, "phi / lambda", log_g, far, from_user=True)


def _pchip_slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Slopes at x of the monotone piecewise cubic through (x, y), y not falling.

    Inside, the weighted harmonic mean of the neighbouring secants, 0 where one of them is; at the ends the parabola through
    three points, but not falling (Fritsch and Butland, SIAM J. Sci. Stat. Comput. 5, 1984).
    """
    h = np.diff(x)
    secant = np.diff(y) / h
    if len(h) == 1:
        return np.repeat(secant, 2)

    def end(h0, h1, d0, d1):
        return max(0.0, ((2 * h0 + h1) * d0 - h0 * d1) / (h0 + h1))         # at most 2 d0 where y does not fall

    slopes = np.zeros_like(x)
    left, right = secant[:-1], secant[1:]
    w1, w2 = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    with np.errstate(divide="ignore"):
        slopes[1:-1] = (w1 + w2) / (w1 / left + w2 / right)
    slopes[0] = end(h[0], h[1], secant[0], secant[1])
    slopes[-1] = end(h[-1], h[-2], secant[-1], secant[-2])
    return slopes


def from_points(points: Iterable[Tuple[float, float]], name: str = "points") -> NoiseScale:
    """A noise scale from points (lambda, g): a monotone cubic of log g over log lambda, constant beyond its ends.

    Where g is constant no noise is added.  Only ratios of g matter, so that its unit is free.  Two points make a power of
    lambda.

    Args:
        points: at least two pairs of positive, finite numbers, in any order, no lambda twice.
        name: what the curve is called in messages and charts.

    Raises:
        TypeError: not pairs of numbers.
        ValueError: too few points, a number that is not allowed, a lambda twice, or a g that falls as lambda grows, where
            rho would exceed 1; names the points.
    """
    pairs = list(points)
    for i, pair in enumerate(pairs, 1):
        try:
            lam, g = pair
        except (TypeError, ValueError):
            raise TypeError(f"noise scale {name!r}: point {i} must be a pair (lambda, g), got {pair!r}") from None
        for what, value in (("lambda", lam), ("g", g)):
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"noise scale {name!r}: {what} of point {i} must be a number, got {value!r}")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"noise scale {name!r}: {what} of point {i} must be positive and finite, got {value!r}")
    if len(pairs) < 2:
        raise ValueError(f"noise scale {name!r}: a curve needs at least 2 points (lambda, g), got {len(pairs)}")
    pairs.sort()
    for (low, g_low), (high, g_high) in zip(pairs, pairs[1:]):
        if low == high:
            raise ValueError(f"noise scale {name!r}: lambda = {low:g} stands twice, with g = {g_low:g} and g = {g_high:g}")
        if g_high < g_low:
            raise ValueError(f"noise scale {name!r}: g = phi / lambda must not fall as lambda grows, but it falls from g = "
                             f"{g_low:g} at lambda = {low:g} to g = {g_high:g} at lambda = {high:g}")
    x, y = np.log(np.array(pairs, dtype=np.float64)).T
    slopes = _pchip_slopes(x, y)

    def log_g(lam: Tensor) -> Tensor:
        u = np.clip(np.log(lam.numpy()), x[0], x[-1])
        i = np.clip(np.searchsorted(x, u, side="right") - 1, 0, len(x) - 2)
        h = x[i + 1] - x[i]
        t = (u - x[i]) / h
        value = (y[i] * (1 + 2 * t) * (1 - t) ** 2 + y[i + 1] * t * t * (3 - 2 * t)
                 + h * (slopes[i] * t * (1 - t) ** 2 - slopes[i + 1] * t * t * (1 - t)))
        return torch.from_numpy(np.asarray(value))

    return NoiseScale(name, "a curve through points", log_g, float(y[-1]))


def parse_points(text: str) -> List[Tuple[float, float]]:
    """The points of a text with one "lambda g" per line (or separated by ";"), blank lines and # comments left out.

    Raises:
        ValueError: a line that is not two numbers; names it.
    """
    points = []
    for number, line in enumerate(text.replace(";", "\n").splitlines(), 1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        try:
            lam, g = map(float, words)
        except ValueError:
            raise ValueError(f"points: line {number} must be two numbers, lambda and g, got {line.strip()!r}") from None
        points.append((lam, g))
    return points


def get_noise_scale(noise_scale: Union[str, NoiseScale, Callable]) -> NoiseScale:
    """The `NoiseScale` of a name of `NOISE_SCALES`, of a callable phi(lambda), or itself.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a callable.
    """
    if isinstance(noise_scale, NoiseScale):
        return noise_scale
    if isinstance(noise_scale, str):
        return NOISE_SCALES[check_choice("noise_scale", noise_scale, NOISE_SCALES)]
    if callable(noise_scale):
        return from_callable(noise_scale)
    raise TypeError(f"noise_scale must be one of {', '.join(NOISE_SCALES)} or a callable phi(lambda), "
                    f"got {shown(noise_scale)}")
