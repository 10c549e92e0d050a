"""The weights of one ER-SDE step, and the plan of a whole run: everything that depends on the schedule alone.

One exact step of the member phi = lambda g^eta from s to t (design: variation of constants, the exponential integrator
of the reverse-time SDE) is

    x_t = (sigma_t / sigma_s) rho x_s + alpha_t I + sigma_t sqrt(1 - rho^2) s_noise z,
    rho = (g(lambda_t) / g(lambda_s))^eta,    I = phi_t int_{lambda_t}^{lambda_s} D(lambda) phi' / phi^2 dlambda.

D is replaced by its Newton polynomial through the nodes tau_0 = tau(lambda_s), tau_1, ... of the last evaluations, with
N_k(tau) = (tau - tau_0) ... (tau - tau_{k-1}).  Integrating by parts, and writing -N_k(tau_t) as an integral too,

    I = sum_k c_k D[tau_0, ..., tau_k],    c_0 = 1 - phi_t / phi_s,
    c_k = int_{lambda_t}^{lambda_s} N_k'(tau) (phi_t / phi(lambda) - 1) dtau        (k >= 1).

No term of c_k cancels: by Rolle N_k' has one sign below its nodes, and phi_t / phi - 1 is an expm1 of a difference of
logarithms.  Only log phi is needed, so nothing overflows, and lambda_s may be infinite (sigma = 1 of a flow model).

The corrector adds the new evaluation at tau_t as one more node, behind the others.  The first k coefficients stay as they
are, so its change of x_t is the single term alpha_t c_k D[tau_0, ..., tau_{k-1}, tau_t].

Two rules keep a polynomial from amplifying what is not one, by the schedule alone.  Terms of second and higher order are
weighted by the share of the state's noise that is common to their nodes (`_shared`), since fresh noise makes D rough.  And
the order drops where the weights would amplify errors (`_AMPLIFICATION`).  Neither changes the order of convergence.

All arithmetic is numpy float64 on the CPU.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Callable, Dict, List, Mapping, Sequence, Tuple

import numpy as np
import torch

from .errors import check_choice
from .noise_scale import NoiseScale
from .process import Process

MAX_ORDER = 5
METHODS: Mapping[str, int] = MappingProxyType({"exact": MAX_ORDER, "paper": 3, "comfyui": 3})
"""Method name -> its highest order."""

_RIEMANN_POINTS = 200      # of ComfyUI's er_sde
_PANEL = 1.5               # largest Gauss-Legendre panel in log lambda: every log g of the table is analytic within 1.5
_GAUSS_X, _GAUSS_W = np.polynomial.legendre.leggauss(20)
_LOG_FAR = 45.0            # exp(-45) is below float64's rounding: where an infinite range may be cut


@dataclass(frozen=True)
class Variable:
    """The variable tau(lambda) in which D is interpolated, and d tau / d log lambda."""

    name: str
    tau: Callable[[np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray], np.ndarray]


def _unit(lam):
    lam = np.asarray(lam, dtype=np.float64)
    return np.where(np.isinf(lam), 1.0, lam / (1.0 + np.where(np.isinf(lam), 0.0, lam)))


VARIABLES: Mapping[str, Variable] = MappingProxyType({v.name: v for v in (
    Variable("lambda", lambda lam: np.asarray(lam, dtype=np.float64), lambda lam: lam),
    Variable("asinh", np.arcsinh, lambda lam: lam / np.sqrt(1.0 + lam * lam)),
    Variable("log", np.log, np.ones_like),
    Variable("unit", _unit, lambda lam: lam / (1.0 + lam) ** 2),
)})


class StepIntegrals:
    """log phi and the integrals of a batch of steps lambda_s[i] -> lambda_t[i].

    Args:
        lam_s, lam_t: shape (steps,), positive and different; lam_s may be infinite.
        scale: the noise scale; eta: shape (steps,), the eta of each step.

    Raises:
        ValueError: a user's phi / lambda falls somewhere on a step.
    """

    def __init__(self, lam_s: np.ndarray, lam_t: np.ndarray, scale: NoiseScale, eta: np.ndarray):
        self.lam_s, self.lam_t, self.scale, self.eta = lam_s, lam_t, scale, eta
        log_t = np.log(lam_t)
        far = np.isinf(lam_s)
        log_s = np.where(far, log_t + _LOG_FAR, np.log(np.where(far, 1.0, lam_s)))
        panels = np.maximum(1, np.ceil(np.abs(log_s - log_t) / _PANEL)).astype(int)
        self._start = np.concatenate(([0], np.cumsum(panels)))[:-1]
        step = np.repeat(np.arange(len(lam_s)), panels)
        nth = np.arange(len(step)) - np.repeat(self._start, panels)
        width = ((log_s - log_t) / panels)[step]
        # Shape (panels of all steps, 20): log lambda, the quadrature weight in log lambda, lambda.
        self._u = (log_t[step] + nth * width)[:, None] + 0.5 * width[:, None] * (_GAUSS_X + 1.0)
        self._du = 0.5 * width[:, None] * _GAUSS_W
        self._lam = np.exp(self._u)
        self._step = step
        self.log_g_s = self._log_g(lam_s)
        self.log_g_t = self._log_g(lam_t)
        log_g = self._log_g(self._lam)
        if scale.from_user:
            self._check_rising(log_g)
        # log of phi_t / phi_s and of phi_t / phi(lambda); at lambda_s = infinity the ratio is 0.
        with np.errstate(invalid="ignore"):
            self.log_rho = np.where(eta == 0, 0.0, eta * (self.log_g_t - self.log_g_s))
        self.log_ratio = np.where(far, -np.inf, np.log(lam_t) - np.log(np.where(far, 1.0, lam_s))) + self.log_rho
        rel = eta[step][:, None] * (self.log_g_t[step][:, None] - log_g)
        self._drop = np.expm1(log_t[step][:, None] - self._u + rel)

    def _log_g(self, lam: np.ndarray) -> np.ndarray:
        return self.scale.log_g(torch.from_numpy(np.ascontiguousarray(lam))).numpy()

    def _check_rising(self, log_g: np.ndarray) -> None:
        lam = np.concatenate((self._lam.ravel(), self.lam_s, self.lam_t))
        value = np.concatenate((log_g.ravel(), self.log_g_s, self.log_g_t))
        at = np.argsort(lam)
        lam, value = lam[at], value[at]
        with np.errstate(invalid="ignore"):
            fall = np.diff(value) < -1e-9
        if fall.any():
            i = int(np.flatnonzero(fall)[0])
            raise ValueError(f"noise_scale {self.scale.name!r}: phi(lambda) / lambda must not fall as lambda grows, but "
                             f"it falls from {math.exp(value[i]):.6g} at lambda = {lam[i]:.6g} to "
                             f"{math.exp(value[i + 1]):.6g} at lambda = {lam[i + 1]:.6g}")

    def integrate(self, factor: np.ndarray) -> np.ndarray:
        """int factor (phi_t / phi - 1) dlog lambda per step; factor has the shape of `lam_nodes`."""
        return np.add.reduceat((factor * self._drop * self._du).sum(1), self._start)

    @property
    def lam_nodes(self) -> np.ndarray:
        """lambda at the quadrature nodes, shape (panels of all steps, 20)."""
        return self._lam

    def spread(self, per_step: np.ndarray) -> np.ndarray:
        """A value per step, broadcast to the quadrature nodes."""
        return per_step[self._step][:, None]

    def newton(self, nodes: np.ndarray, variable: Variable) -> np.ndarray:
        """c_1 .. c_K of every step, shape (K, steps), for nodes of shape (K, steps) in tau; unused ones may be nan."""
        tau = variable.tau(self._lam)
        weight = variable.slope(self._lam)
        out = np.zeros(nodes.shape)
        value, slope = np.ones_like(tau), np.zeros_like(tau)
        for k, node in enumerate(nodes):
            gap = tau - self.spread(node)
            slope = slope * gap + value
            value = value * gap
            out[k] = self.integrate(slope * weight)
        if variable.name == "lambda" and self.scale.power is not None:
            closed, exact = self._closed(nodes)
            out = np.where(exact, closed, out)
        return out

    def _closed(self, nodes: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """`newton` in closed form for phi = lambda^p, and where rounding left it exact to 1e-13 of itself.

        With y = lambda / lambda_t and N_k'(y) = sum_m e_m y^m,
        c_k = lambda_t^k sum_m e_m (E(m + 1 - p) - E(m + 1)), E(q) = int_1^R y^(q-1) dy = (R^q - 1) / q.
        The terms cancel as the step gets short: there the quadrature, which does not, is the better of the two.
        """
        power = 1.0 + self.eta * self.scale.power
        length = np.log(self.lam_s) - np.log(self.lam_t)

        def moment(q):
            return np.where(q == 0, length, np.expm1(q * length) / np.where(q == 0, 1.0, q))

        closed, size = np.zeros(nodes.shape), np.zeros(nodes.shape)
        coef = np.zeros((len(nodes) + 1, len(length)))       # of N_k in y, ascending powers
        coef[0] = 1.0
        with np.errstate(invalid="ignore", over="ignore"):
            for k, node in enumerate(nodes / self.lam_t):
                coef = np.concatenate((np.zeros((1, len(length))), coef[:-1])) - node * coef
                for m in range(k + 1):
                    slope = (m + 1) * coef[m + 1]
                    lower, upper = moment(m + 1 - power), moment(np.full_like(power, m + 1.0))
                    closed[k] += slope * (lower - upper)
                    size[k] += np.abs(slope) * (np.abs(lower) + np.abs(upper))
            scaled = self.lam_t ** np.arange(1, len(nodes) + 1)[:, None]
            exact = np.isfinite(closed) & (size * np.finfo(np.float64).eps < 1e-13 * np.abs(closed))
        return closed * scaled, exact

    def riemann(self) -> Tuple[np.ndarray, np.ndarray]:
        """The two correction integrals of the published formulas by ComfyUI's left sums of 200 points.

        Returns:
            phi_t int 1 / phi - (lambda_s - lambda_t), and the same of (lambda - lambda_s) / phi.  Source: the vp_3
            solver of the official code (100 points) with ComfyUI's number of points.
        """
        # At lambda_s = infinity no step of order 2 starts: D' is 0 across it, and the sum is not needed.
        span = np.where(np.isinf(self.lam_s), 0.0, self.lam_s - self.lam_t)[:, None]
        lam = self.lam_t[:, None] + np.arange(_RIEMANN_POINTS) * span / _RIEMANN_POINTS
        log_phi = np.log(lam) + self.eta[:, None] * self._log_g(lam)
        ratio = np.exp(log_phi[:, :1] - log_phi)
        first = ratio.mean(1) * span[:, 0] - span[:, 0]
        second = (ratio * (lam - self.lam_t[:, None] - span)).mean(1) * span[:, 0] + 0.5 * span[:, 0] ** 2
        return first, second


def divided_difference(nodes: Sequence[float]) -> List[float]:
    """The weights of D[tau_0, ..., tau_k] on D(tau_0), ..., D(tau_k), for distinct nodes."""
    weights: List[float] = [1.0]
    for k in range(1, len(nodes)):
        weights = _one_more(weights, nodes[:k], nodes[k])
    return weights


def _one_more(weights: Sequence[float], nodes: Sequence[float], new: float) -> List[float]:
    """`divided_difference` of nodes and a new one, from that of the nodes."""
    last = 1.0
    for node in nodes:
        last *= new - node
    return [*(w / (node - new) for w, node in zip(weights, nodes)), 1.0 / last]


@dataclass(frozen=True)
class Step:
    """x_next = x_scale * x + sum of weight * D over `denoised` + noise_scale * z.

    `denoised` holds (lag, weight): lag 0 is the evaluation just made, lag 1 the one before.  The weights of the corrector,
    which amends the step before this one, are merged in: x is the state the evaluation was made at.
    """

    x_scale: float
    denoised: Tuple[Tuple[int, float], ...]
    noise: float


@dataclass(frozen=True)
class Plan:
    """All steps of a run.

    Attributes:
        sigmas: shape (steps + 1,), float64: the checked schedule, up to its first zero.
        steps: one `Step` per model call.
        orders: how many evaluations each step's predictor interpolates.
        history: how many evaluations a run must keep, the newest included.
    """

    sigmas: np.ndarray
    steps: Tuple[Step, ...]
    orders: Tuple[int, ...]
    history: int


# A step may not amplify errors of the evaluations without bound: the sum of |weights|, over the sum of the weights, is at
# most three times that of the Adams-Bashforth method of the same order.  Regular schedules stay below half of it; after a
# step much shorter than its successor (a nearly repeated sigma) the order drops instead.
_AMPLIFICATION = (1.0, 3 * 2.0, 3 * 44 / 12, 3 * 160 / 24, 3 * 8794 / 720, 3 * 32812 / 1440)
# A step longer than this in log lambda reaches beyond what a denoiser's polynomial is good for: there even the sum for equal
# steps of order 3 is too much.  It is the last steps of flow schedules, equal in sigma, that the rule is about.
_LONG, _AMPLIFICATION_LONG = 0.5, 2.5
# Two evaluations closer than this fraction of the step count as one: the newer one stands for both.
_SAME = 1e-3


def make_plan(sigmas: np.ndarray, process: Process, scale: NoiseScale, eta: np.ndarray, s_noise: float = 1.0,
              order: int = 3, corrector: bool = True, method: str = "exact", variable: str = "lambda",
              history: Sequence[float] = ()) -> Plan:
    """The weights of every step of a run.

    Args:
        sigmas: shape (steps + 1,), checked by `process.check_sigmas`.
        eta: shape (steps,), the eta of each step (0 outside the stochastic window).
        s_noise: factor of the noise's standard deviation.
        order: 1 to `METHODS[method]`; the first steps use as many evaluations as there are.  Without the corrector a step
            interpolates `order` evaluations.  With it, the corrected step interpolates `order` and the new one, and the
            predictor `order + 1`: both are of order `order + 1`.
        corrector: whether each evaluation also corrects the step that led to it ("exact" only).
        variable: in which D is interpolated, a name of `VARIABLES` ("exact" only).
        history: sigmas of evaluations made before the first step, newest first, that the run starts with.
    """
    check_choice("method", method, METHODS)
    n = len(sigmas) - 1
    lam = process.lam(sigmas)
    eta = np.asarray(eta, dtype=np.float64)
    # Steps that move: neither of length zero nor to sigma = 0, which returns D, nor to sigma = 1 of an inverted flow.
    moving = [i for i in range(n) if sigmas[i] != sigmas[i + 1] and sigmas[i + 1] > 0 and np.isfinite(lam[i + 1])]
    row = {i: r for r, i in enumerate(moving)}
    at = np.array(moving, dtype=int)
    integrals = StepIntegrals(lam[at], lam[at + 1], scale, eta[at])

    past = process.lam(np.asarray(history, dtype=np.float64))
    first = len(past)           # the evaluation of step i is number first + i
    lam_of = np.concatenate((past[::-1], lam))
    if method == "exact":
        rule = _Exact(lam_of, first, moving, integrals, VARIABLES[check_choice("variable", variable, VARIABLES)], order,
                      corrector)
    else:
        rule = _Published(lam_of, first, moving, integrals, order, method)

    # Plain floats from here: numpy's scalars are slow one by one.
    sigma, alpha, log_rho = sigmas.tolist(), process.alpha(sigmas).tolist(), integrals.log_rho.tolist()
    steps, orders = [], []
    correction: Dict[int, float] = {}       # evaluation number -> weight: what the new D changes in the state x
    for i in range(n):
        weights: Dict[int, float] = {}
        used, noise, x_scale, s, t = 1, 0.0, 1.0, sigma[i], sigma[i + 1]
        if t == 0:
            x_scale, weights, correction = 0.0, {first + i: 1.0}, {}
        elif i in row:
            r = row[i]
            x_scale = t / s * math.exp(log_rho[r])
            noise = s_noise * t * math.sqrt(max(0.0, -math.expm1(2.0 * log_rho[r])))
            weights, used = rule.predict(r)
            weights = {e: alpha[i + 1] * w for e, w in weights.items()}
        elif s != t:
            # Inversion to sigma = 1 of a flow model, order 1: alpha_t (1 - lambda_t / lambda_s) -> -sigma_t / lambda_s.
            x_scale, weights = t / s, {first + i: -t / float(lam[i])}
        for e, w in correction.items():
            weights[e] = weights.get(e, 0.0) + x_scale * w
        # The evaluation that corrects a step is the next step's, unless the run ends there or returns it.
        correction = {}
        if i in row and i + 1 < n and sigma[i + 2] > 0:
            correction = {e: alpha[i + 1] * w for e, w in rule.correct(row[i], used).items()}
        lags = sorted((first + i - e, w) for e, w in weights.items() if w != 0.0)
        steps.append(Step(x_scale, tuple(lags), noise))
        orders.append(used)
    keep = max((lag + 1 for step in steps for lag, _ in step.denoised), default=1)
    return Plan(sigmas, tuple(steps), tuple(orders), keep)


class _Exact:
    """Predictor and corrector weights of the moving steps, by row, as {evaluation number: weight} of I."""

    def __init__(self, lam: np.ndarray, first: int, moving: Sequence[int], integrals: StepIntegrals, variable: Variable,
                 order: int, corrector: bool):
        self.order, self.corrector, self.integrals = order, corrector, integrals
        with np.errstate(divide="ignore"):
            self.tau: List[float] = variable.tau(lam).tolist()
        self.now = [first + i for i in moving]
        # The corrector drops the oldest node for the new one, so the predictor may use one more at no memory of its own.
        most = order + 1 if corrector else order
        self.nodes = [_distinct(self.tau, e, e + 1, most) for e in self.now]
        grid = np.full((most, len(moving)), np.nan)
        for r, nodes in enumerate(self.nodes):
            grid[:len(nodes), r] = [self.tau[e] for e in nodes]
        with np.errstate(invalid="ignore"):
            newton = integrals.newton(grid, variable).T.tolist()
        # c_0, c_1, ... of each step.
        self.coef = [[-math.expm1(ratio), *row] for ratio, row in zip(integrals.log_ratio.tolist(), newton)]
        self.length = np.abs(np.log(integrals.lam_s) - np.log(integrals.lam_t)).tolist()
        # eta log g at the new state and at the nodes, with the step's eta: what the noise of the nodes has in common.
        known = dict(enumerate(integrals.scale.log_g(torch.from_numpy(lam[:first])).tolist())) if first else {}
        for r, e in enumerate(self.now):
            known[e], known[e + 1] = float(integrals.log_g_s[r]), float(integrals.log_g_t[r])
        self.level = [[eta * known[e] if eta else 0.0 for e in (self.now[r] + 1, *self.nodes[r])]
                      for r, eta in enumerate(integrals.eta.tolist())]
        self.kept = [[c * _shared(level[1], level[k + 1]) if 1 < k < len(nodes) else c for k, c in enumerate(coef)]
                     for coef, level, nodes in zip(self.coef, self.level, self.nodes)]

    def predict(self, r: int) -> Tuple[Dict[int, float], int]:
        """The weights of the highest order that does not amplify, and that order."""
        nodes, coef, long = self.nodes[r], self.kept[r], self.length[r] > _LONG
        where = [self.tau[e] for e in nodes]
        total, part, used = [coef[0]], [1.0], 1
        for k in range(1, len(nodes)):
            part = _one_more(part, where[:k], where[k])
            higher = [t + coef[k] * d for t, d in zip((*total, 0.0), part)]
            if sum(map(abs, higher)) > (_AMPLIFICATION_LONG if long else _AMPLIFICATION[k]) * abs(coef[0]):
                break
            total, used = higher, k + 1
        return dict(zip(nodes, total)), used

    def correct(self, r: int, used: int) -> Dict[int, float]:
        """What the evaluation at the step's end changes: the polynomial through the newest `order` of the `used` nodes and
        the new one, less the predictor's through all of them; the terms below are common to both."""
        # A start-up step of too low an order is corrected even without the corrector: the next D is there anyway.
        if not (self.corrector or used < self.order):
            return {}
        new, nodes, tau = self.now[r] + 1, self.nodes[r][:used], self.tau
        if not math.isfinite(tau[nodes[0]]):
            return self._correct_from_far(r)
        k = min(used, self.order)
        last = self.coef[r][k] * (_shared(self.level[r][0], self.level[r][k]) if k > 1 else 1.0)
        with_new = (*nodes[:k], new)
        change = {e: last * d for e, d in zip(with_new, divided_difference([tau[e] for e in with_new]))}
        if used > self.order:
            for e, d in zip(nodes, divided_difference([tau[e] for e in nodes])):
                change[e] = change.get(e, 0.0) - self.kept[r][k] * d
        return change

    def _correct_from_far(self, r: int) -> Dict[int, float]:
        """From lambda = infinity no polynomial in lambda leads on: a line in lambda / (1 + lambda) does."""
        line, now = VARIABLES["unit"], self.now[r]
        s, t = line.tau(np.array([np.inf, self.integrals.lam_t[r]])).tolist()
        weight = float(self.integrals.newton(np.full((1, len(self.now)), s), line)[0, r]) / (t - s)
        return {now: -weight, now + 1: weight}


class _Published:
    """The published second and third order formulas, with exact integrals ("paper") or ComfyUI's sums ("comfyui").

    D' = (D_0 - D_1) / (lambda_0 - lambda_1) and D'' = (D'_0 - D'_1) / ((lambda_0 - lambda_2) / 2).  Source: vp_2 and
    vp_3 of the official code.
    """

    def __init__(self, lam: np.ndarray, first: int, moving: Sequence[int], integrals: StepIntegrals, order: int,
                 method: str):
        self.lam: List[float] = lam.tolist()
        self.nodes = [_distinct(self.lam, first + i, first + i + 1, order) for i in moving]
        self.first = [-math.expm1(ratio) for ratio in integrals.log_ratio.tolist()]
        if method == "comfyui":
            terms = integrals.riemann()
        else:
            with np.errstate(invalid="ignore"):
                one, two = integrals.newton(np.stack((integrals.lam_s, integrals.lam_s)), VARIABLES["lambda"])
            terms = one, 0.5 * two
        self.terms = [term.tolist() for term in terms]
        self.before: Dict[int, float] = {}      # D' of the step before, on evaluations

    def predict(self, r: int) -> Tuple[Dict[int, float], int]:
        """The weights of step r and their order; the steps are asked for one after the other."""
        nodes, lam = self.nodes[r], self.lam
        weights = {nodes[0]: self.first[r]}
        before, self.before = self.before, {}
        if len(nodes) > 1:
            gap = lam[nodes[0]] - lam[nodes[1]]
            slope = self.before = {nodes[0]: 1.0 / gap, nodes[1]: -1.0 / gap}
            parts = [(self.terms[0][r], slope)]
            if len(nodes) > 2 and before:
                half = 0.5 * (lam[nodes[0]] - lam[nodes[2]])
                parts.append((self.terms[1][r], {e: (slope.get(e, 0.0) - before.get(e, 0.0)) / half
                                                 for e in {*slope, *before}}))
            for c, part in parts:
                for e, d in part.items():
                    weights[e] = weights.get(e, 0.0) + c * d
        return weights, len(nodes)

    def correct(self, r: int, used: int) -> Dict[int, float]:
        """Nothing: the published formulas have no corrector."""
        return {}


def _distinct(tau: Sequence[float], now: int, nxt: int, order: int) -> List[int]:
    """Up to `order` evaluation numbers, newest first, whose nodes are finite and apart; at least the newest."""
    out = [now]
    if not math.isfinite(tau[now]):
        return out
    apart = _SAME * abs(tau[nxt] - tau[now])
    for e in range(now - 1, -1, -1):
        if len(out) == order or not math.isfinite(tau[e]):
            break
        if abs(tau[e] - tau[out[-1]]) > apart:
            out.append(e)
    return out


def _shared(log_g_new: float, log_g_old: float) -> float:
    """rho^2 between two states: the share of their noise, in variance, that is the same.

    Differences of the evaluations of second and higher order are weighted by it.  They extrapolate a smooth D; what fresh
    noise did to D is not smooth, and they would amplify it.  1 for the ODE, and for every member as steps get short.
    """
    return math.exp(min(0.0, 2.0 * (log_g_new - log_g_old)))
