"""What a sampler with one model call a step cannot know: the digits under Karras' schedule with what it lacks given to it.

    python -m benchmarks.derivative --steps 20 [--count 4096] [--variable log]

An evaluation is made at the predicted state, and the state is corrected by it.  What is missing is D at the corrected state,

    D + J E,    E the correction,  J the derivative of D by the state,

which decides on which side of the border between two digits a point near it goes on.  Here a predictor and corrector of
order 3 (Adams, in a variable of lambda) runs as it is, then with the exact J: of the part of J E along the newest change
R_0 of D, or along all of R_0, R_1 and R_2, which is everything that such a sampler has seen of D; and at last with D
evaluated at the corrected state, which is a second call in each step.  Beside them this project's default, all as RMS error
over that of ComfyUI's formulas, as in the tables of `benchmarks.convergence --peers`.
"""
from __future__ import annotations

import argparse
from typing import Dict, List, Sequence

import numpy as np
import torch

from ersde.noise_scale import get_noise_scale
from ersde.weights import VARIABLES, StepIntegrals, Variable, divided_difference
from tests.problems import Mixture, digits, flow_exact, karras

from . import quality
from .convergence import KINDS, print_errors, run

Tensor = torch.Tensor
ORDER = 3
GROWN = 5.0     # a correction that J would make so many times as large is no correction: J is left out


def adams(lam_s: float, lam_t: float, nodes: Sequence[float], variable: Variable) -> List[float]:
    """The weights of D at `nodes` in a step of the ODE, y_t = (lambda_t / lambda_s) y_s + sum of weights * D.

    The first node is lambda_s.
    """
    tau = variable.tau(np.array(nodes, dtype=np.float64))
    integrals = StepIntegrals(np.array([lam_s]), np.array([lam_t]), get_noise_scale("ode"), np.zeros(1))
    coef = [1.0 - lam_t / lam_s, *(float(c) for c in integrals.newton(tau[:-1, None], variable)[:, 0])]
    out = np.zeros(len(nodes))
    for k, c in enumerate(coef):
        out[:k + 1] += c * np.array(divided_difference(tau[:k + 1].tolist()))
    return out.tolist()


def _along(model: Mixture, x: Tensor, sigma: Tensor, correction: Tensor, changes: Sequence[Tensor], weight: float
           ) -> Tensor:
    """P J E of E = correction + weight P J E, P the projection on the changes: exact, one linear system per point."""
    def derivative(direction):
        return torch.func.jvp(lambda at: model(at, sigma), (x,), (direction,))[1]

    basis, _ = torch.linalg.qr(torch.stack(list(changes), 2))                   # (points, dim, changes)
    turned = torch.stack([derivative(one) for one in basis.unbind(2)], 2)
    matrix = torch.eye(len(changes)).to(x) - weight * basis.mT @ turned
    found = torch.linalg.solve(matrix, basis.mT @ derivative(correction)[..., None])
    found = (basis @ found)[..., 0]
    grown = (correction + weight * found).norm(dim=1, keepdim=True) > GROWN * correction.norm(dim=1, keepdim=True)
    return torch.where(grown, torch.zeros_like(found), found)


def sample(model: Mixture, x: Tensor, sigmas: Tensor, variable: str, known: int = 0, again: bool = False) -> Tensor:
    """The last evaluation of the predictor and corrector (`ve`, noise-free).

    Args:
        known: how many of the newest changes J E is known along.
        again: whether D is evaluated at the corrected state.
    """
    lam, rule = sigmas[sigmas > 0].tolist(), VARIABLES[variable]
    denoised = [model(x, sigmas[:1].expand(len(x)))]        # newest first
    for i, (lam_s, lam_t) in enumerate(zip(lam, lam[1:])):
        past, sigma = lam[i::-1][:ORDER], sigmas[i + 1].expand(len(x))
        still = lam_t / lam_s * x
        predicted = still + sum(w * d for w, d in zip(adams(lam_s, lam_t, past, rule), denoised))
        new = model(predicted, sigma)
        *weights, last = adams(lam_s, lam_t, [*past, lam_t], rule)
        x = still + last * new + sum(w * d for w, d in zip(weights, denoised))
        if again:
            new = model(x, sigma)
        elif known:
            seen = [a - b for a, b in zip([new, *denoised], denoised)][:known]
            more = _along(model, predicted, sigma, x - predicted, seen, last)
            x, new = x + last * more, new + more
        denoised = [new, *denoised][:ORDER]
    return denoised[0]


def errors(steps: int, count: int, variable: str) -> Dict[str, np.ndarray]:
    """Row -> its error at each starting point, those of the tables of `benchmarks.convergence --peers`."""
    model, sigmas = digits("ve"), karras(steps)
    x = model.start(count, sigmas[0].item(), torch.Generator().manual_seed(1))
    exact = flow_exact(model, x, sigmas, steps=250)
    found = {"ComfyUI's formulas": run(model, x, sigmas, **KINDS["comfyui"]),
             "this project's default": run(model, x, sigmas)}
    for name, kw in (("predictor and corrector", {}), ("and J E along R_0", {"known": 1}),
                     ("and J E along R_0, R_1, R_2", {"known": 3}), ("and D at the corrected state", {"again": True})):
        found[name] = sample(model, x, sigmas, variable, **kw)
    return {name: ((out - exact) ** 2).mean(1).sqrt().numpy() for name, out in found.items()}


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.derivative", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--count", type=int, default=4096, help="starting points")
    parser.add_argument("--variable", choices=list(VARIABLES), default="log", help="what the polynomials are in")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"    {quality.command_of('derivative', parser, args, 'steps', 'count', 'variable')}\n")
    print_errors(errors(args.steps, args.count, args.variable), "ComfyUI's formulas",
                 f"Digits, ve, Karras, {args.steps} steps, N = {args.count}, over ComfyUI's formulas")


if __name__ == "__main__":
    main()
