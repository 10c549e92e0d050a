"""What a long step takes the derivative of D along its correction to be, beside what a second model call finds it to be.

    python -m benchmarks.slopes [--calls N ...] [--count N] [--mixtures N]

The evaluation D at the end of a long step corrects the state it was made at, x, by E, and itself by what the variance of the
data that the step measures says of D at x + E (`ersde.weights.Amend`).  Here every such step of a run of this project's
`sde_5` and `sde_3` has another call, at x + E, which goes into nothing but the table:

    assumed  <D' - D, E> alpha / |E|^2,  D' the corrected evaluation
    found    <D(x + E) - D, E> alpha / |E|^2

each over all pictures and steps, weighted by |E|^2; of `found` the 95 % interval by bootstrap over the pictures.  The rows
are lambda_s^2 / v, v the variance that the step measures, negative where guidance leaves none.  The last evaluation, whose v
the length of the noise bounds (`ersde.weights.Limit`), has rows of its own.  Data: the demo's trained network, and the mixtures
of benchmarks/quality.py; without guidance, and with 4 and 7.5, told what guidance adds, as the hosts tell it, and not.
"""
from __future__ import annotations

import argparse
import dataclasses
import itertools
from contextlib import contextmanager
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

import ersde
from ersde import solver
from ersde.demo.mixture import SIGMA_MAX
from ersde.demo.network import CLASSES, SIZE

from . import quality
from .random_mixtures import Told
from .network import SCHEDULES, Network

Tensor = torch.Tensor
MEMBERS = ("sde_5", "sde_3")
EDGES = (-np.inf, -8.0, -4.0, -2.0, -1.0, -0.5, 0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 8.0, np.inf)     # of lambda_s^2 / v
FEWEST = 20     # pictures of a cell of the table


class Seen(NamedTuple):
    """One long step, an array of one number per picture each.

    Attributes:
        last: whether D is the result.
        variance: lambda_s^2 / v, as the step measures it.
        size: |E|^2 / alpha^2 / |R_0|^2, R_0 the change of D that the step began with.
        assumed, found: <D' - D, E> / alpha / |R_0|^2 and <D(x + E) - D, E> / alpha / |R_0|^2.
    """

    last: bool
    variance: np.ndarray
    size: np.ndarray
    assumed: np.ndarray
    found: np.ndarray


class Watched:
    """A model that can be called again at the sigma of its newest call, at another state, without a trace."""

    def __init__(self, model):
        self.model, self.process, self.sigma = model, model.process, None
        tells = getattr(model, "excess", None)
        self._added: Optional[Tensor] = None
        self.excess = (lambda: self._added) if tells else None

    def __call__(self, x: Tensor, sigma: Tensor, **_) -> Tensor:
        self.sigma = sigma
        out = self.model(x, sigma)
        self._added = self.model.excess() if self.excess else None
        return out

    def again(self, x: Tensor) -> Tensor:
        """D at the state x, of the sigma of the newest call."""
        return self.model(x, self.sigma)


def _dot(a: Tensor, b: Tensor) -> np.ndarray:
    return (a.flatten(1).double() * b.flatten(1).double()).sum(1).numpy()


@contextmanager
def watching(model: Watched, seen: List[Seen]) -> Iterator[None]:
    """Notes every long step of the runs within."""
    amended = solver._amended

    def also(m, amend, by, score, denoised, changes, past, turn, *rest):
        x, change, before, first = score + amend.alpha * denoised, changes[0].clone(), past[0], denoised.clone()
        turned = score.clone() if before is None else score - turn * before
        out = amended(m, amend, by, score, denoised, changes, past, turn, *rest)
        # `score` is x - alpha D of the corrected state and evaluation now.
        moved = score + amend.alpha * out[0] - x
        scale = _dot(change, change)
        if before is not None:
            each = [_dot(moved, moved) / amend.alpha ** 2, _dot(out[0] - first, moved) / amend.alpha,
                    _dot(model.again(x + moved) - first, moved) / amend.alpha]
            variance = amend.curve.scale * amend.factor * _dot(turned, change)
            seen.append(Seen(amend.limit is not None, *(one / np.maximum(scale, 1e-30) for one in (variance, *each))))
        return out

    with mock.patch.object(solver, "_amended", also):
        yield


def runs(count: int, mixtures: int, guidance: float, told: bool):
    """(whether it is the network, the model, a start, the schedule's name) of every problem with such guidance."""
    for process in SCHEDULES:
        model = Network(process, guidance, torch.arange(count) % len(CLASSES), apart=told)
        x = torch.randn(count, 3 * SIZE * SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for name in SCHEDULES[process]:
            yield True, model, x * (SIGMA_MAX if process == "ve" else 1.0), name
    settings = dataclasses.replace(quality.QUICK, count=mixtures)
    for problem, scale in quality.PROBLEMS:
        if (scale or 1.0) == guidance:
            for process, names in quality.SCHEDULES.items():
                for name in names:
                    one = quality.Problem(problem, scale, process, name, settings)
                    yield False, Told(one.model) if told else one.model, one.start(), name


def collect(calls: Sequence[int], count: int, mixtures: int, guidance: Sequence[float], told: bool, bar
            ) -> Dict[bool, List[Seen]]:
    """What the long steps of all runs show, of the network (True) and of mixtures."""
    out: Dict[bool, List[Seen]] = {True: [], False: []}
    for scale in guidance:
        for network, model, x, name in runs(count, mixtures, scale, told):
            for member, steps in itertools.product(MEMBERS, calls):
                watched = Watched(model)
                with watching(watched, out[network]):
                    quality._run_preset(ersde.PRESETS[member])(
                        watched, x.clone(), quality.schedule(name, steps, steps), quality.PathNoise(x, 1),
                        lambda preset: (np.inf, 0.0))
                bar.update(steps)
    return out


def row(seen: Sequence[Seen], last: bool, low: float, high: float) -> Optional[str]:
    """`assumed`, `found` and the number of steps with lambda_s^2 / v in [low, high), or None where there are few."""
    chosen = [one for one in seen if one.last == last]
    pictures = max((len(one.size) for one in chosen), default=0)
    sums = np.zeros((3, pictures))
    many = np.zeros(pictures, dtype=int)
    for one in chosen:
        here = (one.variance >= low) & (one.variance < high)
        for total, value in zip(sums, (one.size, one.assumed, one.found)):
            total[:len(value)] += np.where(here, value, 0.0)
        many[:len(here)] += here
    if (many > 0).sum() < FEWEST:
        return None
    size, assumed, found = sums
    rows = np.random.default_rng(0).integers(pictures, size=(1000, pictures))
    least, most = np.quantile(found[rows].sum(1) / np.maximum(size[rows].sum(1), 1e-300), (0.025, 0.975))
    return (f"{assumed.sum() / size.sum():.2f} | {found.sum() / size.sum():.2f} ({least:.2f} to {most:.2f}) | "
            f"{many.sum()}")


def table(groups: Dict[str, List[Seen]]) -> str:
    """The Markdown of all groups."""
    lines = []
    for name, seen in groups.items():
        lines += [f"## {name}", "", "| lambda_s^2 / v | before the last: assumed | found (95 %) | steps | "
                  "the last: assumed | found (95 %) | steps |", "|---" * 7 + "|"]
        for low, high in zip(EDGES, EDGES[1:]):
            cells = [row(seen, last, low, high) for last in (False, True)]
            if any(cells):
                lines.append(f"| {low:g} to {high:g} | " + " | ".join(cell or "| |" for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slopes", description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, nargs="+", default=[6, 10, 20], help="of a run, without the second ones")
    parser.add_argument("--count", type=int, default=24, help="pictures of the network")
    parser.add_argument("--mixtures", type=int, default=96, help="starting points of each mixture")
    args = parser.parse_args(argv)
    if min(args.count, args.mixtures) < FEWEST:
        parser.error(f"--count, --mixtures: at least {FEWEST}")
    torch.set_num_threads(1)
    print(f"    {quality.command_of('slopes', parser, args, 'calls', 'count', 'mixtures')}\n")
    print(f"`sde_5` and `sde_3`, {args.count} pictures of the trained network, {args.mixtures} starting points of each "
          f"mixture, torch {torch.__version__}; this project's sources have the digest {quality._own_source()}.\n")
    groups: Dict[str, List[Seen]] = {}
    with tqdm(unit="step") as bar:
        for title, guidance, told in (
                ("no guidance", (1.0,), False), ("guidance 4, told", (4.0,), True), ("guidance 7.5, told", (7.5,), True),
                ("guidance 4 and 7.5, not told", (4.0, 7.5), False)):
            for network, seen in collect(args.calls, args.count, args.mixtures, guidance, told, bar).items():
                groups[f"{'Network' if network else 'Mixtures'}, {title}"] = seen
    print(table(groups))


if __name__ == "__main__":
    main()
