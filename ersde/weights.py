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

The corrector adds the new evaluation at tau_t as one more node, behind the newest k of the others, whose coefficients stay
as they are: the corrected I is sum_{j < k} c_j D[tau_0, ..., tau_j] + c_k D[tau_0, ..., tau_{k-1}, tau_t].

The interpolation variable is lambda.  Others (asinh lambda, log lambda, lambda / (c + lambda)) are more accurate without
guidance, but their worst cells with guidance on a trained network are worse; benchmarks/variables.py measures them.

**The order adapts**, by the schedule and by what the run shows.  With the corrector a step of log length
h = |log(lambda_s / lambda_t)| up to `_FULL` interpolates one evaluation more.  A step longer than `_SHORT` is the part that
holds D constant, and a bend V = sum_{k >= 1} c_k D[...] of which only theta V is added.  The trust theta in [0, 1] is
measured for each picture of a batch by the newest evaluations, at no model call:

    theta = clamp(2 - m^2, 0, 1) / (1 + s^2),    m = |R - T| / |R|,  s = |R| / |D_0|,

with R = D_0 - D_1 the newest change, and T = (tau_0 - tau_1) D[tau_1, tau_2] what the line through the two before it had
predicted of it.  R - T is the corrector's estimate of the local error, over what it multiplies.

* m compares the prediction that is to be repeated with the prediction of no change at all, whose error is R: m <= 1 where
  bending was right the last time.  Beyond, an overshoot, the bend fades, and is gone at m^2 = 2, what two unrelated
  changes of one size have.
* s says how far from a small perturbation the change is.  If V is off by an error of relative size s, uncorrelated with what
  is right, |theta V - V_right|^2 is least in the mean at Wiener's gain theta = 1 / (1 + s^2).  Interpolation is of no use
  where D changes by as much as it is, as in the first steps at high guidance, where the bend and the correction of the step
  before would both take the same change into account.  It needs no third evaluation, which the first bend has not got.

The corrector of such a step replaces all of V, so that what theta left out is not lost, only late.  Fresh noise changes D
without any fault of the prediction: if all changes were the noise's, m^2 would be 1 + |T|^2 / |D_1 - D_2|^2.  That is taken
off m^2, times the noise's share of the step from D_1 to D_0,

    f = N / (N + (1 - b)^2 lambda_1^2),    N = lambda_0^2 (1 - rho^2),  b = rho lambda_0 / lambda_1,

since y moves by (1 - b) (D_1 - y), in the mean by no more than (1 - b) lambda_1, and by noise of variance N.  As steps get
short f goes to 1, for the noise moves y by the root of their length, while 1 - rho^2 goes to 0.  Of s it is no excuse: a
bend as large as D is of no use whatever it comes from.

Two more rules depend on the schedule alone.  Terms of second and higher order are weighted by the share of the state's noise
that is common to their nodes (`_shared`), since fresh noise makes D rough.  And the order drops where the weights would
amplify errors, after steps much shorter than their successors; with noise third and higher differences drop sooner, wherever
steps grow (`_ADAMS_BASHFORTH`).  None changes the order of convergence of the ODE, or with noise that of orders up to 3.

**Long steps**, longer than `_FULL`, or than `_SHORT` for a member with much noise, are no matter for polynomials, which want a
smooth D; few steps are all of this kind.  They use what a polynomial does not know: that D is an estimate of x_0.  By Tweedie's
formula D = y - lambda^2 e, y = x / alpha, with e = (y - D) / lambda^2 minus the score of y.  For data of variance v around some
mean, e = (y - mean) / (v + lambda^2), so that D = mean + v e: between any two states, on one trajectory or not and whatever
noise came between them, D changes by v times what e changes by.  So two evaluations measure v, for each picture, in the
directions in which D changes (`Amend`):

    1 / v = <R, e_0 - e_1> / |R|^2.

Along the directions of one scale this is exact; over many scales it is an average that counts those that move D.  Trained
networks show it, with guidance less of it.  Where the product is not positive (strong guidance, whose D is no such estimate;
the moment at which a picture decides for one of two things) there is no v.

* The bend of the step is c R, c such that the predicted state has the variance v + lambda_t^2 that a state at t has, with
  the noise that the step adds: a model knows D at states like those alone.  Of the ODE this is the exact integral, since D
  moves by (v + lambda^2)^-1/2 along the probability flow, like 1 / lambda while lambda^2 >> v, like lambda^2 where lambda^2
  << v.  Of a member with noise the mean of D hardly moves, and a step that holds D constant looks right; its state lacks
  what D does not know yet of the data, and D there lies too near to the mean.  `_bend` has the equation.
* The larger of c and of the line's share c_1 / (1 + s^2) is taken.  Where there is no v, the line alone.
* Without noise there is less of that line where R is small against what the line had predicted of it, T: D is coming to
  rest, as after a picture has decided.  Its share is divided by 1 + (|T| / |R|)^4.
* With noise that line goes by how much of D changes in a direction that could not be foreseen: (s (1 - r))^2 for the cosine
  r = <R, T> / (|R| |T|), which is -1 where D turns back.  T tells of R as far as the noise of both is common, rho^2, and the
  line's share is c_1 / (1 + (1 - rho^2) s^2 + rho^2 (s^2 (1 - r)^2 / 0.14)^2).  The number is from the trained network of
  the demo, with guidance 4, where the line is of use, and 7.5, where it is not.
* The corrector of the step is k R, k such that the variance v + lambda^2 of y is kept from s to t, with the noise that the
  step adds and with D at the new state: for b = rho lambda_t / lambda_s and J = v / (v + lambda^2),

      (v + lambda_t^2) (1 - k J_t)^2 = (v + lambda_s^2) (b + (1 - b - k) J_s)^2 + lambda_t^2 (1 - rho^2).

  Of the ODE this is the exact solution; of a member with noise any other k loses variance, half of it in six steps.
* Both are computed with one square root.  In q = sqrt((v + lambda_t^2) / (v + lambda_s^2)) the k of every member is a
  fraction of degree one, exactly, and c nearly: the variance it gives is right to 0.2 % for the ODE and to 4 % for the
  members with most noise.  Three points tell each (`Curve`).
* J_t is the derivative of D at the new state.  By E, what the correction moves y by, D moves by J E, and so the evaluation
  is corrected too, to first order, for this step and as the past of the next ones.  That the only evaluation of a step is
  made at a state that is then corrected is the larger part of all error in few steps.
* Past an infinite v, where the product above is negative, D has changed by more than y has: J_s = v / (v + lambda_s^2) is
  above 1, and infinite at v = -lambda_s^2.  No k and no bend follow from that, but the derivative at the new state does not
  vanish at once.  It is taken for J_t / J_s = (v + lambda_s^2) / (v + lambda_t^2), which falls from 1 to 0 in between, so
  that guidance which grows does not switch the correction of the evaluations off in one go.  A second model call in each
  step shows 0.06 to 0.44 there, on mixtures and on the trained network, and less beyond (`benchmarks.slopes`).  From lambda =
  infinity D has no such slope, and the last evaluation has one from a positive v alone: in few dimensions it overshoots.
* v is that of the direction in which D changed, on the whole step.  Where a picture has just decided, the step still has the
  large v of the decision, and D at its end has not.  For the steps before the last that matters little; the last evaluation
  is the result.  There v is at most that of all directions together, which the length of lambda e tells: it is the noise
  in the picture less what D takes for data, E |lambda e|^2 = n lambda^2 / (v + lambda^2).  With that of the step before,
  which rho^2 of the noise is common to (`Limit`),

      v = (rho^2 lambda_s^2 |e_1|^2 + n (1 - rho^2) s_noise^2 - lambda_t^2 |e_0|^2) / (|e_0|^2 - rho^2 |e_1|^2).

  On mixtures with a known J the smaller of the two is J along E without bias; the first alone is too large by half.  And
  E moves D, and thereby k R: E (1 + k J + ...) = E / (1 - k J).  This enters as k J^3, where J is near 1 and sure, up to 2.

From lambda = infinity (sigma = 1 of a flow model) D is the mean of the data, and all of it holds with e_1 = 0.

**Guidance** has no such law: D = D_c + A, and the excess A = D - D_c = (w - 1) (D_c - D_u) is an estimate of nothing.  But
its two parts are, of one picture, and come together as lambda falls: A goes to 0, and a step that holds D constant goes by
an excess that will not be there.  For Gaussian data of variance v, with means that the condition moves, A is in proportion
to lambda^2 / (v + lambda^2), whatever y does.  Where the host tells D_c, a long step adds c_A A,

    c_A = int_{lambda_t}^{lambda_s} f' (phi_t / phi - 1) dlambda,    f = (1 + v / lambda_s^2) / (1 + v / lambda^2),

which is negative, with v = lambda_s lambda_t / 2.  Pictures have variances of all sizes, and what a step decides is what has
about the step's own; the half is from the trained network of the demo, whose steps ask for 0.3 to 1.3 of lambda_s lambda_t.
It counts as far as v has not explained how D changes, with 1 - cos^2 of R and e_0 - e_1: guidance between Gaussians of one
variance is a Gaussian, and the law above has all of it.  And it counts less what the bend w R has of it already: R is what
D has changed by, A's fall since the step before with it, and where w R points against A the step would take the same fall
twice.  So that the bend and the addition together have c_A A's part along A, what is added is

    G c_A A clamp(1 - w <R, A> / (c_A |A|^2), 1/4, 1),    G = |A|^2 / (|A|^2 + |D|^2 / 20).

The quarter is what A may fall by beyond a bend that points against it for another reason, and 1 keeps a bend that points
along A, as of a picture that grows into what guidance wants, from being undone.  Gaussian data of four variances, whose line
has most of A's fall, ask for it (`benchmarks/members.py --told`).

G is Wiener's gain again, as if the step were off by a share of D whatever A is: where A is small beside D its fall is no
more than that.  In few steps with noise pictures lack contrast, for which too much guidance makes up; told all of A's fall
they keep the lack.  The 20 is from the trained network of the demo, where |A| with guidance 4 and 7.5 is a half and two
thirds of |D| in the second step of six, a fifth and a third in the fourth (`benchmarks/results/README.md`, 16).  And of the
change that could not be foreseen G is told: what cuts the line of a step with noise and no v counts 1 - G as much, since
the overshoot that it is there for, with guidance 7.5, was A's fall.

A is asked for neither in a run's first step, at whose lambda nothing may be decided yet, nor after a step that has measured
nothing.

**The last correction** of a short step.  The step to sigma = 0 returns D, and no evaluation follows to use the correction E
of the state that D was made at.  To first order D changes by J E.  For Gaussian data dD / dlog lambda = -J (y - D), so that
J along the last change is about |w|^2 / <w, D - y> for w = dD / dlog lambda there, which is taken from the chord in lambda,
R / (lambda_s / lambda_t - 1).  It is clamped to [0, 1], and weighted by 1 / (1 + |E|^2 / |w|^2), since a correction larger
than the change itself says that the line does not hold, and by the noise shared over the step.

All arithmetic is numpy float64 on the CPU.
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import zip_longest
from types import MappingProxyType
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

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


def _rational(lam):
    lam = np.asarray(lam, dtype=np.float64)
    return np.where(np.isinf(lam), 1.0, lam / (2.0 + np.where(np.isinf(lam), 0.0, lam)))


VARIABLES: Mapping[str, Variable] = MappingProxyType({v.name: v for v in (
    Variable("lambda", lambda lam: np.asarray(lam, dtype=np.float64), lambda lam: lam),
    Variable("asinh", np.arcsinh, lambda lam: lam / np.sqrt(1.0 + lam * lam)),
    Variable("log", np.log, np.ones_like),
    Variable("unit", _unit, lambda lam: lam / (1.0 + lam) ** 2),
    Variable("rational", _rational, lambda lam: 2.0 * lam / (2.0 + lam) ** 2),
)})
"""The interpolation variables by name; "rational" is lambda / (2 + lambda), "unit" lambda / (1 + lambda)."""


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
        self.lam = np.exp(self._u)
        self._step = step
        self.log_g_s = self._log_g(lam_s)
        self.log_g_t = self._log_g(lam_t)
        log_g = self._log_g(self.lam)
        if scale.from_user:
            self._check_rising(log_g)
        # log of phi_t / phi_s and of phi_t / phi(lambda); at lambda_s = infinity the ratio is 0.
        with np.errstate(invalid="ignore"):
            self.log_rho = np.where(eta == 0, 0.0, eta * (self.log_g_t - self.log_g_s))
            # g rises with lambda; between two lambdas an ulp apart rounding may make it fall.
            self.log_rho = np.where(lam_t < lam_s, np.minimum(self.log_rho, 0.0), self.log_rho)
        self.log_ratio = np.where(far, -np.inf, np.log(lam_t) - np.log(np.where(far, 1.0, lam_s))) + self.log_rho
        rel = eta[step][:, None] * (self.log_g_t[step][:, None] - log_g)
        self._drop = np.expm1(log_t[step][:, None] - self._u + rel)

    def _log_g(self, lam: np.ndarray) -> np.ndarray:
        return self.scale.log_g_array(lam)

    def _check_rising(self, log_g: np.ndarray) -> None:
        lam = np.concatenate((self.lam.ravel(), self.lam_s, self.lam_t))
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
        """int factor (phi_t / phi - 1) dlog lambda per step; factor: at the nodes, shape (panels of all steps, 20)."""
        return np.add.reduceat((factor * self._drop * self._du).sum(1), self._start)

    def spread(self, per_step: np.ndarray) -> np.ndarray:
        """A value per step, broadcast to the quadrature nodes."""
        return per_step[self._step][:, None]

    def newton(self, nodes: np.ndarray, variable: Variable) -> np.ndarray:
        """c_1 .. c_K of every step, shape (K, steps), for nodes of shape (K, steps) in tau; unused ones may be nan."""
        tau = variable.tau(self.lam)
        weight = variable.slope(self.lam)
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
class Curve:
    """A function of the variance v that the law of a long step asks for,

        f = (top_0 + top_1 q) / (bottom_0 + bottom_1 q),    q = sqrt((start + end / v) / (1 + scale / v)).

    With start = 1, end = lambda_t^2 and scale = lambda_s^2, q is the root of (v + lambda_t^2) / (v + lambda_s^2), from
    lambda_t / lambda_s at v = 0 to 1 at infinity.
    """

    top: Tuple[float, float]
    bottom: Tuple[float, float]
    start: float
    end: float
    scale: float


@dataclass(frozen=True)
class Limit:
    """At the last evaluation v is at most that of the mean over all directions,

        v = (held level |e_1|^2 + n fresh - level_0 |e_0|^2) / (|e_0|^2 - held |e_1|^2),    n the numbers in a picture.

    Attributes:
        level: lambda_s^2.
        held: rho^2 of the step.
        fresh: (1 - rho^2) s_noise^2; 1 from lambda = infinity, where there is no e_1.
    """

    level: float
    held: float
    fresh: float


@dataclass(frozen=True)
class Amend:
    """How an evaluation D_0 corrects the long step that led to it, with 1 / v = <R_0, e_0 - e_1> / |R_0|^2:

        E = k R_0 - V,  alpha k = curve(v),  x += alpha E,  D_0 += E v / (v + level).

    V is the bend of that step.  Where the product is not positive, k is that of v = usual, and D_0 += E (v + room) /
    (v + level) while v < -room, and is left alone beyond that.  In half precision, where lambda is so small that y - D is
    lost in rounding, v is that of the step before.

    Attributes:
        alpha: of the new state, y = x / alpha.
        level: lambda^2 of the new state.
        curve: alpha k.
        usual: the v without a measurement, lambda_s lambda_t.
        measure: whether v is measured.
        limit: of v in D_0's correction, where D_0 is the result.
        room: lambda_s^2, down to minus which a negative v corrects D_0 too; 0 where none does.
    """

    alpha: float
    level: float
    curve: Curve
    usual: float
    measure: bool = True
    limit: Optional[Limit] = None
    room: float = 0.0

    @property
    def factor(self) -> float:
        """1 / (alpha lambda^2), of e = (x - alpha D) / (alpha lambda^2)."""
        return 1.0 / (self.alpha * self.level)


@dataclass(frozen=True)
class Settle:
    """The last correction: D_0 + J share E / (1 + |E|^2 / |slope R_0|^2), see the module's text.

    Attributes:
        changes: weights of E on R_0, R_1, ..., less the bend of the step before if it had one.
        slope: of D in log lambda at the new state, over R_0.
        share: of the noise common to both ends of the step before.
        alpha: of the new state, y = x / alpha.
    """

    changes: Tuple[float, ...]
    slope: float
    share: float
    alpha: float


@dataclass(frozen=True)
class Step:
    """x_next = x_scale * x + denoised * D_0 + sum of changes_j R_j + noise * z + trust * sum of bend_j R_j.

    D_0 is the evaluation just made, D_1 the one before, and R_j = D_j - D_{j+1}.  The weights of the corrector, which amends
    the step before this one, are merged in; those of a long step are in `amend`, whose work is done before.

    Attributes:
        bend: weights that the trust multiplies, or () where all is in `changes`.
        ratio: of the change R_0 that the line through the two evaluations before predicts, to R_1; 0 where there is none.
        common: the share of the noise, in variance, that is the same at D_0 and D_1.
        fresh: the share of noise in what the state changed by from D_1 to D_0, in variance.
        from_base: x is the state without the bend of the step before, not the state the evaluation was made at.
        last: the step to sigma = 0, x_next = D_0 but for `settle`.
        amend: the correction of a long step before this one.
        score: alpha and 1 / (alpha lambda^2) of the state, where the next step needs its e = (y - D) / lambda^2; else None.
        long: whether the step goes by the variance of the data.
        reach: the weight on R_0 of the bend of a long step after a long step; `bend` is then its line alone.
        excess: the weight on A, what guidance adds to the conditional evaluation, of a long step's bend.
        hold: alpha_t of x_scale x + denoised D_0 = x_scale (x - alpha_s D_0) + alpha_t D_0, where x - alpha_s D_0 is made
            anyway, for `amend` or `score`, and no correction is merged in; else None.
    """

    x_scale: float
    denoised: float
    changes: Tuple[float, ...]
    noise: float
    bend: Tuple[float, ...] = ()
    ratio: float = 0.0
    common: float = 1.0
    fresh: float = 0.0
    from_base: bool = False
    last: bool = False
    settle: Optional[Settle] = None
    amend: Optional[Amend] = None
    score: Optional[Tuple[float, float]] = None
    long: bool = False
    reach: Optional[Curve] = None
    excess: float = 0.0
    hold: Optional[float] = None

    @property
    def evaluations(self) -> Tuple[Tuple[int, float], ...]:
        """The weights on D_0, D_1, ... as (lag, weight), those of a trust of 1."""
        total = [a + b for a, b in zip_longest(self.changes, self.bend, fillvalue=0.0)]
        weights = [new - old for new, old in zip((*total, 0.0), (-self.denoised, *total))]
        return tuple((lag, w) for lag, w in enumerate(weights) if w != 0.0)


@dataclass(frozen=True, eq=False)
class Plan:
    """All steps of a run; equal to itself alone.

    Attributes:
        sigmas: shape (steps + 1,), float64: the checked schedule, up to its first zero.
        steps: one `Step` per model call.
        orders: how many evaluations each step's predictor interpolates.
        history: how many changes R_j a run must keep.
    """

    sigmas: np.ndarray
    steps: Tuple[Step, ...]
    orders: Tuple[int, ...]
    history: int

    @functools.cached_property
    def extent(self) -> Tuple[float, float]:
        """The smallest sigma above 0, and the largest sigma or deviation of a step's noise."""
        return float(self.sigmas[self.sigmas > 0].min()), max(float(self.sigmas.max()), *(step.noise for step in self.steps))


# Steps up to this log length are at full trust, so that the order of convergence is the polynomials'.  Not longer ones: with
# guidance 7.5 a network's D moves so fast that of 50 steps, of 0.13 each, a high order still runs wild.
_SHORT = 0.05
# Steps up to this log length take one node more with the corrector; longer ones go by the variance of the data.
_FULL = 0.5
# The same where the noise is new by more than a fifth, or would be at its rate in a step of `_RATED`: there it is `_SHORT`,
# since a high order is of no use, and the variance is.
_HELD, _RATED = 0.8, 0.2
# Rounding counts lambda_s / lambda_t times in what a step measures of the variance: a longer step does not ask for it.
_LONGEST = 30.0
# Below this lambda pictures of unit size are done.
_FINEST = 0.02
# A larger s_noise is noise alone, and its square may be too large for a float.
_LOUD = 1e6
# The v of guidance's excess over lambda_s lambda_t, see the module's text.
_EXCESS = 0.5
# Times the root of the rounding: the lambda where y - D, of size lambda^2, is lost in it.
_LOST = 3.0
# A step may not amplify errors of the evaluations without bound: the sum of |weights|, over the sum of the weights, is
# compared with that of the Adams-Bashforth method of the same order, and the order drops instead.  Regular schedules stay
# below one and a half times as much; a step much longer than the one before it (after a nearly repeated sigma) does not.
# Where the step adds noise, third and higher differences may not amplify by more than they do with equal steps: guidance
# makes of them an instability of the finest scale, which the trust, whose norms are the noise's, does not see.
_ADAMS_BASHFORTH = (1.0, 2.0, 44 / 12, 160 / 24, 8794 / 720, 32812 / 1440)
_UNEQUAL = 3.0
# Two evaluations closer than this fraction of the step count as one: the newer one stands for both.
_SAME = 1e-3


def make_plan(sigmas: np.ndarray, process: Process, scale: NoiseScale, eta: np.ndarray, s_noise: float = 1.0,
              order: int = 3, corrector: bool = True, method: str = "exact", variable: str = "lambda",
              adapt: bool = True, history: Sequence[float] = (), rounding: float = 1.2e-7) -> Plan:
    """The weights of every step of a run.

    Args:
        sigmas: shape (steps + 1,), checked by `process.check_sigmas`.
        eta: shape (steps,), the eta of each step (0 outside the stochastic window).
        s_noise: factor of the noise's standard deviation.
        order: 1 to `METHODS[method]`; the first steps use as many evaluations as there are.  A step interpolates `order`
            evaluations, and with the corrector again `order`, the newest among them.  Short steps with the corrector
            interpolate `order + 1`.
        corrector: whether each evaluation also corrects the step that led to it ("exact" only).
        variable: in which D is interpolated, a name of `VARIABLES` ("exact" only).
        adapt: whether steps measure their trust; False: full trust in all ("exact" only).
        history: sigmas of evaluations made before the first step, newest first, that the run starts with.
        rounding: of what the model returns, relative (`torch.finfo.eps` of the state).  Where y - D is finer, long steps do
            not measure the variance, but take it over from the step before.

    Raises:
        ValueError: sigmas rise, which is inversion, but a step adds noise.
    """
    check_choice("method", method, METHODS)
    if sigmas[-1] > sigmas[0] and np.any(eta) and scale.power != 0:
        raise ValueError("sigmas that rise (inversion) need the ODE: eta=0 or noise_scale='ode', got "
                         f"eta={np.max(eta):g} and noise_scale={scale.name!r}")
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
                      corrector, adapt, _LOST * math.sqrt(rounding))
    else:
        rule = _Published(lam_of, first, moving, integrals, order, method)

    # Plain floats from here: numpy's scalars are slow one by one.
    sigma, alpha, log_rho = sigmas.tolist(), process.alpha(sigmas).tolist(), integrals.log_rho.tolist()
    steps, orders = [], []
    correction: Optional[Correction] = None     # of the state x, by the new D
    for i in range(n):
        now = first + i
        weights: Dict[int, float] = {}
        bends: Tuple[float, ...] = ()
        used, noise, x_scale, past, s, t = 1, 0.0, 1.0, _NO_PAST, sigma[i], sigma[i + 1]
        amend = rule.amend(row[i - 1], alpha[i], s_noise if t == 0 else None) if i - 1 in row else None
        if t == 0:
            settle = None
            if correction is not None and corrector:
                settle = _settle(correction, now, log_rho[row[i - 1]], alpha[i])
            steps.append(Step(0.0, 1.0, (), 0.0, last=True, settle=settle, amend=amend))
            orders.append(1)
            break
        score, long, reach, excess = None, False, None, 0.0
        if i in row:
            r = row[i]
            long, line, reach = rule.reach(r, alpha[i + 1], amend is not None)
            excess = rule.excess(r, alpha[i + 1])
            if rule.amend(r, 1.0) is not None and lam[i] < math.inf:
                score = alpha[i], 1.0 / (alpha[i] * float(lam[i]) ** 2)
            x_scale = t / s * math.exp(log_rho[r])
            noise = s_noise * t * math.sqrt(max(0.0, -math.expm1(2.0 * log_rho[r])))
            weights, bend, past, used = rule.predict(r)
            weights = {e: alpha[i + 1] * w for e, w in weights.items()}
            bend = {e: alpha[i + 1] * w for e, w in bend.items()}
            bends = _changes(bend, now)[1] if reach is None else (line,) if line else ()
        elif s != t:
            # Inversion to sigma = 1 of a flow model, order 1: alpha_t (1 - lambda_t / lambda_s) -> -sigma_t / lambda_s.
            x_scale, weights = t / s, {now: -t / float(lam[i])}
        if correction is not None:
            for e, w in correction.weights.items():
                weights[e] = weights.get(e, 0.0) + x_scale * alpha[i] * w
        denoised, changes = _changes(weights, now)
        hold = alpha[i + 1] if correction is None and (amend is not None or score is not None) else None
        steps.append(Step(x_scale, denoised, changes, noise, bends, *past, correction is not None and correction.from_base,
                          amend=amend, score=score, long=long, reach=reach, excess=excess, hold=hold))
        orders.append(max(used, 2) if reach else used)
        # The evaluation that corrects a step is the next step's.
        correction = rule.correct(row[i]) if i in row and i + 1 < n else None
    keep = max(max(len(s.changes), len(s.bend), len(s.settle.changes) if s.settle else 0,
                   (2 if s.ratio else 1) if s.reach else 0,
                   1 + max(len(before.bend), 1 if before.reach else 0) if s.amend else 0)
               for before, s in zip((None, *steps), steps))
    return Plan(sigmas, tuple(steps), tuple(orders), keep)


@functools.lru_cache(maxsize=32)
def _known_plan(sigmas: bytes, eta: bytes, *settings) -> Plan:
    process, scale, s_noise, order, corrector, method, rounding = settings
    return make_plan(np.frombuffer(sigmas), process, scale, np.frombuffer(eta), s_noise, order, corrector, method,
                     rounding=rounding)


def known_plan(sigmas: np.ndarray, process: Process, scale: NoiseScale, eta: np.ndarray, s_noise: float, order: int,
               corrector: bool, method: str, rounding: float) -> Plan:
    """`make_plan`, which is asked once for the same schedule and settings: the next picture or tile has the same plan.

    A user's function is asked anew each time, since what it returns may change.
    """
    if scale.from_user:
        return make_plan(sigmas, process, scale, eta, s_noise, order, corrector, method, rounding=rounding)
    return _known_plan(sigmas.tobytes(), eta.tobytes(), process, scale, s_noise, order, corrector, method, rounding)


@dataclass(frozen=True)
class Correction:
    """What the evaluation at a step's end changes in I, as {evaluation number: weight}.

    Attributes:
        weights: of the corrected I less the predicted one, or less the predicted one without its bend.
        from_base: which of the two.
        length: of the step in log lambda.
    """

    weights: Dict[int, float]
    from_base: bool
    length: float


def _changes(weights: Mapping[int, float], newest: int) -> Tuple[float, Tuple[float, ...]]:
    """Weights by evaluation number as those of D_0 and of R_0, R_1, ...: D_j = D_0 - R_0 - ... - R_{j-1}."""
    if not weights:
        return 0.0, ()
    by_lag = [weights.get(newest - lag, 0.0) for lag in range(newest - min(weights) + 1)]
    tails = [0.0]
    for w in reversed(by_lag[1:]):
        tails.append(tails[-1] - w)
    return by_lag[0] - tails[-1], tuple(reversed(tails[1:]))


def _settle(correction: Correction, newest: int, log_rho: float, alpha: float) -> Optional[Settle]:
    """The last correction, of the step before the one to sigma = 0; None where the line in lambda tells no slope."""
    if not 1e-9 < correction.length <= _LOG_FAR:
        return None
    return Settle(_changes(correction.weights, newest)[1],
                  1.0 / math.expm1(correction.length), math.exp(2.0 * log_rho), alpha)


class Past(NamedTuple):
    """`ratio`, `common` and `fresh` of a `Step`."""

    ratio: float
    common: float
    fresh: float


_NO_PAST = Past(0.0, 1.0, 0.0)
# Weights of I, those the trust multiplies, what the trust goes by, and how many evaluations are interpolated.
Prediction = Tuple[Dict[int, float], Dict[int, float], Past, int]


class _Exact:
    """Predictor and corrector weights of the moving steps, by row, as {evaluation number: weight} of I."""

    def __init__(self, lam: np.ndarray, first: int, moving: Sequence[int], integrals: StepIntegrals, variable: Variable,
                 order: int, corrector: bool, adapt: bool, lost: float):
        self.order, self.corrector, self.integrals = order, corrector, integrals
        with np.errstate(divide="ignore"):
            self.tau: List[float] = variable.tau(lam).tolist()
        self.lam: List[float] = lam.tolist()
        self.now = [first + i for i in moving]
        self.length = np.abs(np.log(integrals.lam_s) - np.log(integrals.lam_t)).tolist()
        self.short = [length <= _SHORT or not adapt for length in self.length]
        self.full = [length <= (_SHORT if _noisy(length, log_rho) else _FULL)
                     for length, log_rho in zip(self.length, integrals.log_rho.tolist())]
        self.law = _Law(integrals, self.now, lost) if adapt and variable.name == "lambda" else None
        # The corrector of a short step drops the oldest node for the new one, so its predictor may have one more.
        most = [order + 1 if corrector and full else order for full in self.full]
        self.nodes = [_distinct(self.tau, e, e + 1, m) for e, m in zip(self.now, most)]
        grid = np.full((order + 1, len(moving)), np.nan)
        for r, nodes in enumerate(self.nodes):
            grid[:len(nodes), r] = [self.tau[e] for e in nodes]
        with np.errstate(invalid="ignore"):
            newton = integrals.newton(grid, variable).T.tolist()
        # c_0, c_1, ... of each step.
        self.coef = [[-math.expm1(ratio), *row] for ratio, row in zip(integrals.log_ratio.tolist(), newton)]
        # eta log g at the new state and at the nodes, with the step's eta: what the noise of the nodes has in common.
        known = dict(enumerate(integrals.scale.log_g(torch.from_numpy(lam[:first])).tolist())) if first else {}
        for r, e in enumerate(self.now):
            known[e], known[e + 1] = float(integrals.log_g_s[r]), float(integrals.log_g_t[r])
        self.level = [[eta * known[e] if eta else 0.0 for e in (self.now[r] + 1, *self.nodes[r])]
                      for r, eta in enumerate(integrals.eta.tolist())]
        self.kept = [[c * _shared(level[1], level[k + 1]) if 1 < k < len(nodes) else c for k, c in enumerate(coef)]
                     for coef, level, nodes in zip(self.coef, self.level, self.nodes)]
        self._predicted: Dict[int, Prediction] = {}

    def predict(self, r: int) -> Prediction:
        """The weights of the highest order that does not amplify, those the trust multiplies, their `Past`, the order."""
        if r in self._predicted:
            return self._predicted[r]
        nodes, coef = self.nodes[r], self.kept[r]
        where = [self.tau[e] for e in nodes]
        noisy = self.level[r][0] != self.level[r][1]
        total, part, used = [coef[0]], [1.0], 1
        for k in range(1, len(nodes)):
            part = _one_more(part, where[:k], where[k])
            higher = [t + coef[k] * d for t, d in zip((*total, 0.0), part)]
            bound = _ADAMS_BASHFORTH[k] * (1.0 if noisy and k > 2 else _UNEQUAL)
            if sum(map(abs, higher)) > bound * abs(coef[0]):
                break
            total, used = higher, k + 1
        flat, bend = {nodes[0]: coef[0]}, {}
        if used > 1:
            bend = {e: w - flat.get(e, 0.0) for e, w in zip(nodes, total)}
        now, reach = self.now[r], min(used, 3)
        if used == 1 or self.short[r] or nodes[:reach] != [now, now - 1, now - 2][:reach]:
            found = _sum(flat, bend), {}, _NO_PAST, used
        else:
            ratio = (where[0] - where[1]) / (where[1] - where[2]) if used > 2 else 0.0
            held = _shared(self.level[r][1], self.level[r][2])
            found = flat, bend, Past(ratio, held, _fresh(self.lam[now - 1], self.lam[now], held)), used
        self._predicted[r] = found
        return found

    def corrects(self, used: int) -> bool:
        """A start-up step of too low an order is corrected even without the corrector: the next D is there anyway."""
        return self.corrector or used < self.order

    def long(self, r: int) -> bool:
        """Whether the step goes by the variance of the data: longer than `_FULL`, not too fine, and not inversion."""
        lam_s, lam_t = self.integrals.lam_s[r], self.integrals.lam_t[r]
        falls = lam_s > lam_t >= _FINEST and not _LONGEST < lam_s / lam_t < math.inf
        return self.law is not None and not self.full[r] and falls

    def amend(self, r: int, alpha: float, s_noise: Optional[float] = None) -> Optional[Amend]:
        """The correction of a long step by the evaluation at its end, where alpha is that; s_noise where it is the last."""
        return self.law.amend(r, alpha, s_noise) if self.long(r) and self.corrects(self.predict(r)[3]) else None

    def reach(self, r: int, alpha: float, amended: bool) -> Tuple[bool, float, Optional[Curve]]:
        """Whether step r is long, and then the weight of its first difference and its bend by the variance; alpha is at its
        end.
        """
        if not self.long(r):
            return False, 0.0, None
        nodes, used, line = self.nodes[r], self.predict(r)[3], 0.0
        if used > 1:
            line = alpha * self.kept[r][1] / (self.tau[nodes[0]] - self.tau[nodes[1]])
        # The order is 1 without a choice after a step from lambda = infinity, which is no node of a polynomial.
        measured = amended and self.order > 1 and (used > 1 or len(nodes) == 1)
        return True, line, self.law.reach(r, alpha) if measured else None

    def excess(self, r: int, alpha: float) -> float:
        """The weight on A of step r, at whose end alpha is that; 0 in short steps, a run's first step, and with order 1."""
        return alpha * float(self.law.excess[r]) if self.long(r) and self.order > 1 and self.now[r] > 0 else 0.0

    def correct(self, r: int) -> Optional[Correction]:
        """Of the polynomial through the newest nodes of the predictor and the new one."""
        flat, bend, _, used = self.predict(r)
        if self.long(r) or not self.corrects(used):
            return None
        new, nodes, tau, coef = self.now[r] + 1, self.nodes[r][:used], self.tau, self.coef[r]
        if not math.isfinite(tau[nodes[0]]):
            return Correction(self._from_far(r), False, math.inf)
        k = min(used, self.order if self.full[r] else max(1, self.order - 1))
        corrected = {nodes[0]: coef[0]}
        for j in range(1, k):
            part = divided_difference([tau[e] for e in nodes[:j + 1]])
            corrected = _sum(corrected, dict(zip(nodes, (self.kept[r][j] * d for d in part))))
        last = coef[k] * (_shared(self.level[r][0], self.level[r][k]) if k > 1 else 1.0)
        with_new = (*nodes[:k], new)
        part = divided_difference([tau[e] for e in with_new])
        corrected = _sum(corrected, {e: last * d for e, d in zip(with_new, part)})
        return Correction(_sum(corrected, {e: -w for e, w in flat.items()}), bool(bend), self.length[r])

    def _from_far(self, r: int) -> Dict[int, float]:
        """From lambda = infinity no polynomial in lambda leads on: a line in lambda / (1 + lambda) does."""
        line, now = VARIABLES["unit"], self.now[r]
        s, t = line.tau(np.array([np.inf, self.integrals.lam_t[r]])).tolist()
        weight = float(self.integrals.newton(np.full((1, len(self.now)), s), line)[0, r]) / (t - s)
        return {now: -weight, now + 1: weight}


def _sum(a: Mapping[int, float], b: Mapping[int, float]) -> Dict[int, float]:
    """The sum of two sets of weights."""
    out = dict(a)
    for e, w in b.items():
        out[e] = out.get(e, 0.0) + w
    return out


class _Law:
    """The long steps' `Amend` and bend, from the law that Gaussian data follow."""

    def __init__(self, integrals: StepIntegrals, now: Sequence[int], lost: float):
        lam_s, lam_t, far = integrals.lam_s, integrals.lam_t, np.isinf(integrals.lam_s)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            rho2 = np.exp(2.0 * integrals.log_rho)
            # k of the correction in lambda_s = 1: q = lambda_t, b = rho q, noise = q^2 (1 - rho^2).
            q = np.where(far, 0.0, lam_t / lam_s)
            b, noise = np.exp(integrals.log_ratio), q * q * (1.0 - rho2)
            self.near = 0.5 * (1.0 - b)
            # v -> infinity: (1 - k) (1 + q^2 - 2 b - k (1 - q^2)) = noise.
            self.far = np.where(far, 1.0, _lower_root(1.0 - q * q, 2.0 * b - 2.0, 1.0 + q * q - 2.0 * b - noise))
            # v = lambda_s lambda_t, and lambda_t^2 from lambda = infinity, where k = sqrt(v + q^2) (sqrt(v + q^2) - q) / v.
            j_t, j_s = 1.0 / (1.0 + q), q / (1.0 + q)
            hold, var_s, var_t = b + (1.0 - b) * j_s, 1.0 + q, q * (1.0 + q)
            middle = _lower_root(var_t * j_t ** 2 - var_s * j_s ** 2, 2.0 * (var_s * hold * j_s - var_t * j_t),
                                 var_t - var_s * hold ** 2 - noise)
            self.middle = np.where(far, 2.0 - math.sqrt(2.0), middle)
            matched = np.where(far, lam_t ** 2, lam_s * lam_t)
            # Without a measurement; most of the way from infinity D does not change.
            self.usual = np.where(far, 0.25, 1.0) * matched
        # A of guidance, for the v that it is taken to have; a first step, from infinity, has no use for it.
        s, t, lam = (integrals.spread(np.where(far, 0.0, lam_s)), integrals.spread(lam_t), integrals.lam)
        v, tiny = _EXCESS * s * t, np.finfo(np.float64).tiny
        self.excess = integrals.integrate(2.0 * (v + s * s) / np.maximum(s * s, tiny) * v * lam ** 2 / (v + lam ** 2) ** 2)
        self.integrals, self.measure, self.rho2 = integrals, lam_t >= lost, rho2
        self.row = {e: r for r, e in enumerate(now)}
        self.now = now

    def _step(self, r: int) -> Tuple[float, float, float]:
        """lambda_s, lambda_t and rho^2 of step r."""
        return float(self.integrals.lam_s[r]), float(self.integrals.lam_t[r]), float(self.rho2[r])

    def amend(self, r: int, alpha: float, s_noise: Optional[float]) -> Amend:
        """Of step r, at whose end alpha is that; s_noise where that is the last evaluation."""
        s, t, held = self._step(r)
        near, middle, far = (alpha * float(k[r]) for k in (self.near, self.middle, self.far))
        if math.isinf(s):       # q = sqrt(lambda_t^2 / (v + lambda_t^2)), 1 for v = 0
            curve = _curve((1.0, math.sqrt(0.5), 0.0), (near, middle, far), 0.0, t * t, t * t)
        else:
            curve = _curve((t / s, math.sqrt(t / s), 1.0), (near, middle, far), 1.0, t * t, s * s)
        limit = None
        if s_noise is not None:
            limit = Limit(0.0, 0.0, 1.0) if math.isinf(s) else Limit(s * s, held, (1.0 - held) * min(s_noise, _LOUD) ** 2)
        room = s * s if limit is None and math.isfinite(s) else 0.0
        return Amend(alpha, t * t, curve, float(self.usual[r]), bool(self.measure[r]), limit, room)

    def reach(self, r: int, alpha: float) -> Curve:
        """Of step r after the step before it, both long."""
        s, t, held = self._step(r)
        before = self._step(self.row[self.now[r] - 1])
        q, f = [], []
        for v in (0.05 * s * s, 0.5 * s * s, 10.0 * s * s):
            q.append(math.sqrt((v + t * t) / (v + s * s)))
            f.append(alpha * _bend(v, before, (s, t, held)))
        return _curve((q[0], q[1], q[2]), (f[0], f[1], f[2]), 1.0, t * t, s * s)


def _kept(v: float, s: float, t: float, held: float) -> Tuple[float, float]:
    """What a corrected long step keeps of y - mean, and the variance of what is new, for the variance v of the data."""
    if math.isinf(s):
        return 0.0, v + t * t
    b, j_s, j_t = math.sqrt(held) * t / s, v / (v + s * s), v / (v + t * t)
    hold, noise = b + (1.0 - b) * j_s, t * t * (1.0 - held)
    k = float(_lower_root(v * (j_t - j_s), 2.0 * v * (hold - 1.0), v + t * t - (v + s * s) * hold ** 2 - noise))
    keeps = (hold - k * j_s) / (1.0 - k * j_t)
    return keeps, noise / (1.0 - k * j_t) ** 2


def _bend(v: float, before: Tuple[float, float, float], step: Tuple[float, float, float]) -> float:
    """The c of a bend c R that gives the predicted state the variance v + lambda_t^2.

    With y_s - mean = A (y_1 - mean) + new noise of variance S after the step before, g = b + (1 - b) J_s and Q = J_s A - J_1
    it is the positive root of (g A + c Q)^2 (v + lambda_1^2) + (g + c J_s)^2 S + lambda_t^2 (1 - rho^2) = v + lambda_t^2.

    Args:
        before, step: lambda_s, lambda_t and rho^2.
    """
    last, (s, t, held) = before[0], step
    keeps, new = _kept(v, *before)
    b, j = math.sqrt(held) * t / s, v / (v + s * s)
    g, turn = b + (1.0 - b) * j, 0.0
    size = 0.0
    if math.isfinite(last):
        size, turn = v + last * last, j * keeps - v / (v + last * last)
    two = turn * turn * size + j * j * new
    one = 2.0 * (g * keeps * turn * size + g * j * new)
    none = (g * keeps) ** 2 * size + g * g * new + t * t * (1.0 - held) - v - t * t
    return 2.0 * -none / (one + math.sqrt(max(0.0, one * one - 4.0 * two * none)))


def _curve(q: Tuple[float, float, float], f: Tuple[float, float, float], start: float, end: float, scale: float) -> Curve:
    """The `Curve` through three points."""
    (q0, qm, q1), (f0, fm, f1) = q, f
    a = (qm - q0) / (q1 - qm) * (f1 - fm) / (fm - f0) if fm != f0 else 1.0
    return Curve((f0 * a * q1 - f1 * q0, f1 - f0 * a), (a * q1 - q0, 1.0 - a), start, end, scale)


def _lower_root(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The smaller root of a k^2 + b k + c, b < 0, also where a is 0."""
    return 2.0 * c / (-b + np.sqrt(np.maximum(b * b - 4.0 * a * c, 0.0)))


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

    def predict(self, r: int) -> Prediction:
        """The weights of step r, no bend, and their order; the steps are asked for one after the other."""
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
        return weights, {}, _NO_PAST, len(nodes)

    def correct(self, r: int) -> Optional[Correction]:
        """Nothing: the published formulas have no corrector."""
        return None

    def amend(self, r: int, alpha: float, s_noise: Optional[float] = None) -> Optional[Amend]:
        """Nothing either."""
        return None

    def reach(self, r: int, alpha: float, amended: bool) -> Tuple[bool, float, Optional[Curve]]:
        """Nor this."""
        return False, 0.0, None

    def excess(self, r: int, alpha: float) -> float:
        """Nor this."""
        return 0.0


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


def _noisy(length: float, log_rho: float) -> bool:
    """Whether much of the noise is new after a step, or would be at its rate in one of `_RATED`."""
    return 2.0 * log_rho * max(length, _RATED) <= math.log(_HELD) * length


def _fresh(lam_s: float, lam_t: float, held: float) -> float:
    """The share of noise in what a step moves y by, in variance, where rho^2 = held."""
    if held == 1.0:
        return 0.0
    q = lam_t / lam_s
    noise, still = q * q * (1.0 - held), 1.0 - math.sqrt(held) * q
    return noise / (noise + still * still)
