"""A model known in closed form: handwritten digits as a Gaussian mixture, with its probability flow as a fine solution.

For data x_0 ~ 1/K sum_k N(m_k, s^2 I) and x = alpha x_0 + sigma eps, x is a mixture of N(alpha m_k, v I) with
v = alpha^2 s^2 + sigma^2, and the posterior mean is

    D(x, sigma) = (alpha s^2 / v) x + (sigma^2 / v) sum_k p_k(x) m_k,
    p = softmax((alpha <x, m_k> - alpha^2 |m_k|^2 / 2) / v).
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Callable, List, Optional, Sequence

import torch

Tensor = torch.Tensor

SIGMA_MAX, SIGMA_MIN = 14.6, 0.03       # of Stable Diffusion's schedule, rounded
FLOW_SHIFT = 3.0                        # of SD3


@dataclass
class Mixture:
    """Equally weighted Gaussians of one standard deviation as a denoiser `model(x, sigma, **extra) -> D`.

    Args:
        means: shape (components, dim).
        std: of every component, positive.
        target: label of each component, shape (components,), or None.
        process: "ve" or "flow".
        guidance: classifier-free guidance, D = D_all + guidance (D_label - D_all); None: no guidance.
        label: the label that guidance leads to.
    """

    means: Tensor
    std: float
    target: Optional[Tensor] = None
    process: str = "ve"
    guidance: Optional[float] = None
    label: int = 3
    _cast: dict = field(default_factory=dict, init=False, repr=False)

    def _tensors(self, dtype):
        if dtype not in self._cast:
            means = self.means.to(dtype)
            keep = None if self.guidance is None else self.target == self.label
            # Rows m_k and -|m_k|^2 / 2 of one matrix, so that the logits are one product.
            rows = torch.cat([means.T, -0.5 * (means ** 2).sum(1)[None]])
            self._cast[dtype] = (means, rows.contiguous(), keep)
        return self._cast[dtype]

    def __call__(self, x: Tensor, sigma: Tensor, **_) -> Tensor:
        flat = x.reshape(x.shape[0], -1)
        means, rows, keep = self._tensors(flat.dtype)
        sigma = sigma.to(flat).reshape(-1, 1).expand(flat.shape[0], 1)
        alpha = 1 - sigma if self.process == "flow" else torch.ones_like(sigma)
        var = alpha ** 2 * self.std ** 2 + sigma ** 2
        logit = torch.cat([flat * (alpha / var), alpha ** 2 / var], 1) @ rows
        centre = logit.softmax(1) @ means
        if keep is not None:
            centre = centre + self.guidance * (logit[:, keep].softmax(1) @ means[keep] - centre)
        return ((alpha * self.std ** 2 / var) * flat + (sigma ** 2 / var) * centre).reshape(x.shape)

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` exact samples of x_0, shape (count, dim), float64."""
        pick = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means.double()[pick] + self.std * noise

    def nearest(self, x: Tensor) -> Tensor:
        """RMS distance per pixel of each picture to the nearest mean, shape (batch,)."""
        flat = x.reshape(x.shape[0], -1)
        return torch.cdist(flat, self.means.to(flat)).min(1).values / flat.shape[1] ** 0.5


def digits(process: str = "ve", std: float = 0.1, guidance: Optional[float] = None, label: int = 3) -> Mixture:
    """scikit-learn's handwritten digits (UCI, 1797 pictures of 8x8) in [-1, 1], dim 64.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the demo needs scikit-learn for its pictures, which this Python does not have") from error
    pictures, target = load_digits(return_X_y=True)
    means = torch.tensor(pictures / 8.0 - 1.0, dtype=torch.float64)
    return Mixture(means, std, torch.tensor(target), process, guidance, label)


def karras(steps: int, sigma_max: float = SIGMA_MAX, sigma_min: float = SIGMA_MIN, rho: float = 7.0) -> Tensor:
    """The schedule of Karras et al. with a final 0, shape (steps + 1,), float64."""
    ramp = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps, dtype=torch.float64) ** rho
    return torch.cat([ramp, ramp.new_zeros(1)])


def flow_schedule(steps: int, low: Optional[float] = None, shift: float = FLOW_SHIFT) -> Tensor:
    """Equal steps of time from sigma 1, shifted as SD3 does, with a final 0, shape (steps + 1,), float64.

    low: the last sigma above 0; None: that of time 1 / steps.
    """
    last = 1 / steps if low is None else low / (shift - (shift - 1) * low)
    time = torch.linspace(1, last, steps, dtype=torch.float64)
    return torch.cat([shift * time / (1 + (shift - 1) * time), time.new_zeros(1)])


_SHIFT = {"ve": 0.0, "flow": 0.05}


def fine_steps(process: str, high: float, lows: Sequence[float], steps: int) -> List[int]:
    """How many RK4 steps `fine_solution` takes to each of `lows`."""
    at = [math.log(sigma + _SHIFT[process]) for sigma in (high, *lows)]
    return [max(1, math.ceil((a - b) * steps)) for a, b in zip(at, at[1:])]


def fine_solution(model: Mixture, x: Tensor, high: float, lows: Sequence[float], steps: int,
                  tick: Callable[[int], None] = lambda calls: None) -> List[Tensor]:
    """The probability flow from x at sigma `high` to each of `lows`, then D there: classical RK4 in float64.

    ve: in u = log sigma, where dx/du = x - D.  flow: in u = log(sigma + 0.05), where dx/du = (x - D)(1 + 0.05 / sigma):
    D changes little below sigma = 0.05, so fewer steps are spent there.

    Args:
        x: shape (batch, ...).
        lows: where to end, falling, all below high and above 0; one path serves them all.
        steps: RK4 steps per unit of u (4 model calls each); at least one between two ends.
        tick: called with a number of model calls done.

    Returns:
        D at each of `lows`, of x's shape, float64.
    """
    x = x.double()
    batch = x.shape[0]
    shift = _SHIFT[model.process]

    def slope(x: Tensor, u: float) -> Tensor:
        # Rounding must not lead above sigma = 1.
        sigma = min(math.exp(u) - shift, high)
        return (x - model(x, x.new_full((batch,), sigma))) * (1.0 + shift / sigma)

    out = []
    at = math.log(high + shift)
    for low, count in zip(lows, fine_steps(model.process, high, lows, steps)):
        end = math.log(low + shift)
        h = (end - at) / count
        for i in range(count):
            u = at + i * h
            k1 = slope(x, u)
            k2 = slope(x + 0.5 * h * k1, u + 0.5 * h)
            k3 = slope(x + 0.5 * h * k2, u + 0.5 * h)
            k4 = slope(x + h * k3, u + h)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            tick(4)
        out.append(model(x, x.new_full((batch,), low)))
        at = end
    return out
