"""Analytic problems: data distributions whose denoiser is known in closed form, in both processes.

For data x_0 ~ sum_k p_k N(m_k, s_k^2 I) and x = alpha (x_0 + lambda eps), y = x / alpha is a mixture of N(m_k, s_k^2 +
lambda^2), so the posterior mean E[x_0 | x] is a softmax-weighted sum of Wiener filters.  At sigma = 1 of a flow model
(alpha = 0, x tells nothing) it is the mean of the data.  Benchmarks and tests share this module.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import torch

from ersde.demo.mixture import flow_schedule, karras  # noqa: F401 (the schedules of the problems)

Tensor = torch.Tensor


@dataclass
class Mixture:
    """An isotropic Gaussian mixture as a denoiser `model(x, sigma, **extra) -> D`.

    Args:
        means: shape (components, dim); std: shape (components,); weights: shape (components,), or None for equal ones.
        process: "ve" or "flow".
        guidance: classifier-free guidance of the components `label` against the whole mixture:
            D = D_all + guidance (D_label - D_all).  None: no guidance.
        label: bool mask of shape (components,), for guidance.
    """

    means: Tensor
    std: Tensor
    weights: Optional[Tensor] = None
    process: str = "ve"
    guidance: Optional[float] = None
    label: Optional[Tensor] = None
    calls: int = field(default=0, init=False)

    def __post_init__(self):
        self.weights = torch.ones(len(self.means)) if self.weights is None else self.weights
        self.weights = self.weights.to(self.means) / self.weights.sum()

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    def _denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor, keep: Optional[Tensor] = None) -> Tensor:
        # All in x's frame (no division by alpha): x = alpha x_0 + sigma eps has variance alpha^2 s^2 + sigma^2.
        means, std, weights = self.means.to(x), self.std.to(x), self.weights.to(x)
        if keep is not None:
            means, std, weights = means[keep], std[keep], weights[keep]
        var = alpha ** 2 * std ** 2 + sigma ** 2                        # (batch, components)
        square = (x ** 2).sum(1, keepdim=True) - 2 * alpha * (x @ means.T) + alpha ** 2 * (means ** 2).sum(1)
        logit = weights.log() - 0.5 * square / var - 0.5 * self.dim * var.log()
        part = logit.softmax(1)
        gain = alpha * std ** 2 / var                                   # Wiener gain on x
        return (part * gain).sum(1, keepdim=True) * x + (part * (1 - alpha * gain)) @ means

    def __call__(self, x: Tensor, sigma: Tensor, **_) -> Tensor:
        self.calls += 1
        flat = x.reshape(x.shape[0], -1)
        sigma = sigma.to(x).reshape(-1, 1).expand(x.shape[0], 1)
        alpha = 1 - sigma if self.process == "flow" else torch.ones_like(sigma)
        out = self._denoise(flat, alpha, sigma)
        if self.guidance is not None:
            out = out + self.guidance * (self._denoise(flat, alpha, sigma, self.label) - out)
        return out.reshape(x.shape)

    def data(self, count: int, generator: Optional[torch.Generator] = None) -> Tensor:
        """`count` samples of the data, shape (count, dim), float64."""
        pick = torch.multinomial(self.weights.double(), count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dim, generator=generator, dtype=torch.float64)
        return self.means.double()[pick] + self.std.double()[pick, None] * noise

    def start(self, count: int, sigma: float, generator: Optional[torch.Generator] = None) -> Tensor:
        """`count` exact samples of x at `sigma`, shape (count, dim), float64."""
        alpha = 1 - sigma if self.process == "flow" else 1.0
        noise = torch.randn(count, self.dim, generator=generator, dtype=torch.float64)
        return alpha * self.data(count, generator) + sigma * noise


def gaussian(std: float = 0.5, mean: float = 0.0, dim: int = 4, process: str = "ve") -> Mixture:
    """Isotropic Gaussian data: the flow, and every moment under every member, are known in closed form."""
    return Mixture(torch.full((1, dim), float(mean), dtype=torch.float64), torch.tensor([float(std)], dtype=torch.float64),
                   process=process)


def separated(process: str = "ve", dim: int = 8, parts: int = 6, std: float = 0.15, seed: int = 3) -> Mixture:
    """Well separated parts: means of unit scale per coordinate, narrow parts of unequal weight."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(parts, dim, generator=g, dtype=torch.float64)
    return Mixture(means, torch.full((parts,), std, dtype=torch.float64),
                   torch.linspace(1, 2, parts, dtype=torch.float64), process)


def digits(process: str = "ve", std: float = 0.1, guidance: Optional[float] = None, label: int = 3) -> Mixture:
    """scikit-learn's handwritten digits (UCI, 1797 pictures of 8x8) in [-1, 1] as a 64-dimensional mixture."""
    from sklearn.datasets import load_digits

    pictures, target = load_digits(return_X_y=True)
    means = torch.tensor(pictures / 8.0 - 1.0, dtype=torch.float64)
    return Mixture(means, torch.full((len(means),), std, dtype=torch.float64), process=process, guidance=guidance,
                   label=torch.tensor(target == label))


def flow_exact(model: Mixture, x: Tensor, sigmas: Tensor, steps: int = 4000) -> Tensor:
    """The probability flow from sigmas[0] to the last positive sigma, then D there if the schedule ends in 0: float64 RK4.

    Integrated in log lambda, where dy/dlog lambda = y - D for y = x / alpha; for flow in sigma from sigma = 1, where
    dx/dsigma = (x - D) / sigma.
    """
    x = x.double()
    positive = sigmas[sigmas > 0].double()
    high, low = positive[0].item(), positive[-1].item()
    if model.process == "flow":
        # Graded towards the small end, where D changes fastest in sigma.
        grid = torch.linspace(high ** 0.5, low ** 0.5, steps + 1, dtype=torch.float64) ** 2

        def slope(x, sigma):
            return (x - model(x, sigma.expand(x.shape[0]))) / sigma
    else:
        grid = torch.linspace(torch.tensor(high).double().log(), torch.tensor(low).double().log(), steps + 1,
                              dtype=torch.float64)

        def slope(x, log_sigma):
            return x - model(x, log_sigma.exp().expand(x.shape[0]))
    for a, b in zip(grid[:-1], grid[1:]):
        h, mid = b - a, (a + b) / 2
        k1 = slope(x, a)
        k2 = slope(x + h / 2 * k1, mid)
        k3 = slope(x + h / 2 * k2, mid)
        k4 = slope(x + h * k3, b)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    if sigmas[-1] == 0:
        x = model(x, torch.full((x.shape[0],), low, dtype=torch.float64))
    return x


def rms(a: Tensor, b: Tensor) -> float:
    """Root mean square difference."""
    return ((a - b) ** 2).mean().sqrt().item()


def published(model, x, sigmas, noise, phi, process, points):
    """The published third order formulas written down again (vp_3 of the paper), integrals by `points` left points of a
    Riemann sum in x's dtype, or adaptive quadrature for points = None.  noise[i] is the noise of step i."""
    kind = torch.float64 if points is None else x.dtype
    sigmas = sigmas.to(kind)
    alpha = 1 - sigmas if process == "flow" else torch.ones_like(sigmas)
    lam = sigmas / alpha
    d1 = old = None
    for i in range(len(sigmas) - 1):
        den = model(x, sigmas[i].to(x.dtype).expand(len(x)))
        if sigmas[i + 1] == 0:
            return den
        s, t = lam[i], lam[i + 1]
        p = (lambda v: phi(v).to(kind))
        ratio = p(t) / p(s)
        new = alpha[i + 1] / alpha[i] * ratio * x + alpha[i + 1] * (1 - ratio) * den
        slope_now = None
        if i >= 1:
            if points is None:
                from scipy.integrate import quad  # the benchmarks do without

                first = quad(lambda v: float(phi(t)) / float(phi(v)), float(t), float(s), epsabs=1e-13, epsrel=1e-13)[0]
                second = quad(lambda v: (v - float(s)) * float(phi(t)) / float(phi(v)), float(t), float(s), epsabs=1e-13,
                              epsrel=1e-13)[0]
            else:
                at = t + torch.arange(points, dtype=kind) * (s - t) / points
                first = (p(t) / p(at)).sum() * (s - t) / points
                second = ((at - s) * p(t) / p(at)).sum() * (s - t) / points
            slope_now = (den - old) / (s - lam[i - 1])
            new = new + alpha[i + 1] * (t - s + first) * slope_now
            if i >= 2:
                bend = (slope_now - d1) / ((s - lam[i - 2]) / 2)
                new = new + alpha[i + 1] * ((t - s) ** 2 / 2 + second) * bend
        d1, old = slope_now, den
        spread = (t ** 2 - s ** 2 * ratio ** 2).clamp(min=0).sqrt()
        x = (new + alpha[i + 1] * spread * noise[i]).to(x.dtype)
    return x
