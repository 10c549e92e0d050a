"""The choice of the interpolation variable, the order, the corrector and the trust rule, by measurement.

    python -m benchmarks.variables [--quick] [--out DIR] [--steps N ...] [--guidance G ...] [--count N]
    python -m benchmarks.variables --default [--out DIR] [--count N]

Deterministic part, the ODE member: every (variable, order, corrector, adapt) over ComfyUI's formulas (order 3) on the same
schedule, by the mean over pictures of a picture's RMS error to a fine solution that ends at the same sigma.  On the trained
network (float32, the main judge) the fine solution is order 2 in lambda without corrector, which nothing makes wild; on
mixtures (float64) it is the flow by RK4.

A full grid of 80 rows on every cell would take hours.  For each process, guidance and number of steps the full grid is
measured on one schedule, the schedules taking turns; the rows in lambda also on all the others, at fewer steps.

Stochastic part: the variance of Gaussian data.  With D linear in x the state is linear in independent standard normals, and
the solver runs on their coefficients, so that norms are those of a picture of infinitely many pixels.

DIR gets variables.md and variables.json, and a line of JSON per finished cell (a run takes up where the last one stopped).
Interrupted, it writes the tables of what is finished.

With --default the default alone is measured, on the network's cells with 5 steps and more and guidance up to 7.5, by more
pictures and with intervals; DIR gets variables_default.md.
"""
from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence

import numpy as np
import torch
from tqdm import tqdm

import ersde
from benchmarks.network import ratio
from benchmarks.quality import load
from ersde.noise_scale import get_noise_scale
from ersde.process import check_sigmas, get_process
from ersde.solver import run as run_plan
from ersde.weights import VARIABLES, make_plan
from tests import problems
from tests.problems import Mixture, flow_exact, flow_schedule, karras

Tensor = torch.Tensor
HIGH = {"ve": 14.6, "flow": 1.0}            # the first sigma of every schedule
SCHEDULES = {"ve": ("karras", "exponential", "simple", "beta", "align your steps"),
             "flow": ("shift 3", "shift 1", "beta")}
GUIDANCE = (1.0, 7.5, 4.0, 12.0)
ORDERS = (1, 2, 3, 4)
# Steps of the full grid, and of the lambda rows on all schedules: of the network by guidance (a guided call costs twice).
STEPS = (4, 6, 8, 10, 15, 20, 30, 50)
NETWORK_LAMBDA = {1.0: (6, 12), 7.5: (6, 12)}
MIXTURE_LAMBDA = (5, 8, 20)
MIXTURE_COUNT = 32
MEMBERS = (("sde_5", 1.0), ("sde", 1.0), ("sde_4", 1.0), ("sde_5", 0.5))
NOISY_VARIABLES, NOISY_STEPS = ("lambda", "rational", "asinh"), (6, 10, 15, 20)
DIVERGED = 1000.0                           # the ratio of a run that became infinite
WORSE = 1.05


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to make a step; variable None is ComfyUI's."""

    variable: Optional[str]
    order: int = 3
    corrector: bool = False
    adapt: bool = False

    @property
    def name(self) -> str:
        """Its key in the results."""
        if self.variable is None:
            return "comfyui"
        return f"{self.variable} / {self.order} / {'on' if self.corrector else 'off'} / {'on' if self.adapt else 'off'}"

    def plan(self, sigmas: np.ndarray, process: str, member: str = "ode", eta: float = 0.0):
        """The weights on a schedule."""
        kind = get_process(process)
        kw = {"method": "comfyui"} if self.variable is None else {"variable": self.variable, "adapt": self.adapt}
        return make_plan(check_sigmas(torch.as_tensor(sigmas), kind), kind, get_noise_scale(member),
                         np.full(len(sigmas) - 1, eta), order=self.order, corrector=self.corrector, **kw)


COMFYUI, DEFAULT = Row(None), Row("lambda", 3, True, True)


def grid(variables: Iterable[str] = tuple(VARIABLES), orders: Sequence[int] = ORDERS) -> List[Row]:
    """ComfyUI's row and every combination."""
    return [COMFYUI, *(Row(*row) for row in itertools.product(variables, orders, (False, True), (False, True)))]


# ------------------------------------------------------------------------------------------------------------ schedules

def _beta_steps(steps: int) -> np.ndarray:
    """Times of 1000, the first 999, those that rounding makes equal once."""
    from scipy.stats import beta

    times = np.rint(beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6) * 999).astype(int)
    return np.array(list(dict.fromkeys(times.tolist())))


def schedule(name: str, process: str, steps: int) -> Tensor:
    """`steps` steps from HIGH with a final 0, float64."""
    if name == "karras":
        return karras(steps)
    if name.startswith("shift"):
        return flow_schedule(steps, shift=float(name.split()[1]))
    if name == "exponential":
        positive = np.geomspace(14.6, 0.03, steps)
    elif name == "align your steps":
        # The published sigmas for Stable Diffusion 1.5, log-linear between them; the last of steps + 1 becomes 0.
        known = np.log([14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029])
        positive = np.exp(np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(known)), known))[:-1]
    elif process == "flow":
        at = (_beta_steps(steps) + 1) / 1000
        positive = 3 * at / (1 + 2 * at)
    else:
        # Stable Diffusion's: `simple` takes equal steps of time, as ComfyUI does.
        bars = np.cumprod(1 - np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2)
        table = ((1 - bars) / bars) ** 0.5
        positive = table[_beta_steps(steps) if name == "beta" else [999 - int(i * 1000 / steps) for i in range(steps)]]
    positive = np.array(positive)
    positive[0] = HIGH[process]
    return torch.tensor([*positive, 0.0], dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- problems

@dataclasses.dataclass(frozen=True)
class Settings:
    """What a cell's numbers depend on beside its name."""

    count: int = 4              # pictures of the network
    mixture_count: int = MIXTURE_COUNT
    digits_stride: int = 6      # every how manieth digit is a component of the mixture
    # Of the network's fine solution, over the whole range of sigma.  Twice as many moved one picture's by 5e-5 RMS (ve,
    # guidance 7.5, to the end of 20 Karras steps) and 1.5e-4 (flow, guidance 12, 12 steps of shift 3).
    fine_steps: int = 400
    exact_steps: int = 300      # RK4 steps of a mixture's flow, over the whole range
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Cell:
    """A problem on a schedule, and which rows are measured: all, or those in lambda."""

    problem: str
    process: str
    guidance: float
    schedule: str
    steps: int
    full: bool

    @property
    def name(self) -> str:
        """Its key in the results."""
        return (f"{self.problem} / {self.process} / guidance {self.guidance:g} / {self.schedule} / {self.steps} steps / "
                f"{'full' if self.full else 'lambda'}")


class Memo:
    """A model that evaluates an equal state at an equal sigma once: the rows have their first steps in common."""

    def __init__(self, model):
        self.model, self.known = model, {}

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        key = hashlib.blake2b(x.contiguous().numpy().tobytes(), digest_size=16, key=repr(sigma[0].item()).encode()).digest()
        if key not in self.known:
            self.known[key] = self.model(x, sigma)
        return self.known[key]


class Problem:
    """States at the first sigma, a denoiser, and fine solutions that end at given sigmas."""

    def __init__(self, name: str, process: str, guidance: float, settings: Settings):
        self.process, self.settings, self.exact = process, settings, {}
        generator = torch.Generator().manual_seed(settings.seed + 1)
        self.network = name == "network"
        if self.network:
            from ersde.demo.network import CLASSES, guided, load_model

            model = load_model(process)
            model.network.to(memory_format=torch.channels_last)
            labels = [i * len(CLASSES) // settings.count % len(CLASSES) for i in range(settings.count)]
            self.model = guided(model, labels, guidance)
            self.start = torch.randn(settings.count, 3, 32, 32, generator=generator) * HIGH[process]
            return
        source = self.model = getattr(problems, name)(process)
        if name == "digits":
            whole = problems.digits(process, guidance=None if guidance == 1 else guidance)
            keep = torch.arange(len(whole.means)) % settings.digits_stride == 0
            means, std, label = whole.means[keep], whole.std[keep], whole.label[keep]
            source = self.model = Mixture(means, std, None, process, whole.guidance, label)
            if guidance != 1:
                source = Mixture(means[label], std[label], None, process)
        self.start = source.start(settings.mixture_count, HIGH[process], generator)

    def solve(self, lows: Iterable[float]) -> None:
        """Fine solutions from the first sigma to each of `lows`, then D there: one pass through all of them."""
        lows = sorted(set(lows) - set(self.exact), reverse=True)
        if lows:
            (self._solve_network if self.network else self._solve_mixture)(lows)

    def _solve_network(self, lows: List[float]) -> None:
        high, steps = HIGH[self.process], self.settings.fine_steps
        if self.process == "flow":
            # Equal steps of log lambda from where D does not know the state; the one before has D(infinity).
            fine = 1 / (1 + np.exp(-np.linspace(7.0, math.log(lows[-1] / (1 - lows[-1])), steps + 1)))
        else:
            fine = np.geomspace(high, lows[-1], steps + 1)
        apart = 0.1 * math.log(high / lows[-1]) / steps
        ends = np.log(lows)
        fine = [s for s in fine if s < high and np.abs(ends - math.log(s)).min() > apart]
        sigmas = torch.tensor([high, *sorted([*fine, *lows], reverse=True), 0.0], dtype=torch.float64)

        def keep(info):
            if info["sigma"].item() in wanted:
                self.exact[info["sigma"].item()] = info["denoised"].clone()

        wanted = set(lows)
        plan = Row("lambda", 2).plan(sigmas, self.process)
        run_plan(plan, self.model, self.start, sigmas, lambda i: None, {}, keep, True)

    def _solve_mixture(self, lows: List[float]) -> None:
        x, at = self.start, HIGH[self.process]
        whole = 1.0 if self.process == "flow" else math.log(at / 0.03)
        for low in lows:
            length = at ** 0.5 - low ** 0.5 if self.process == "flow" else math.log(at / low)
            if low != at:
                steps = max(12, math.ceil(self.settings.exact_steps * length / whole))
                x = flow_exact(self.model, x, torch.tensor([at, low], dtype=torch.float64), steps)
            at = low
            self.exact[low] = self.model(x, torch.full((len(x),), low, dtype=torch.float64))


def pictures(problem: Problem, sigmas: Tensor, rows: Sequence[Row]) -> Dict[str, Tensor]:
    """Row -> the RMS error of each picture; infinite where the run was."""
    low = sigmas[-2].item()
    problem.solve([low])
    model, exact, out = Memo(problem.model), problem.exact[low], {}
    for row in rows:
        try:
            x = run_plan(row.plan(sigmas, problem.process), model, problem.start, sigmas, lambda i: None, {}, None, True)
            out[row.name] = (x - exact).double().flatten(1).square().mean(1).sqrt()
        except FloatingPointError:
            out[row.name] = torch.full((len(exact),), math.inf)
    return out


def measure(problem: Problem, sigmas: Tensor, rows: Sequence[Row]) -> Dict[str, float]:
    """Row -> mean over pictures of the RMS error."""
    return {name: error.mean().item() for name, error in pictures(problem, sigmas, rows).items()}


def ratios(errors: Dict[str, float]) -> Dict[str, float]:
    """Errors over ComfyUI's."""
    return {name: min(error / errors[COMFYUI.name], DIVERGED) for name, error in errors.items()}


def _steps_of(problem: str, guidance: float, full: bool) -> Sequence[int]:
    if full:
        return STEPS
    return NETWORK_LAMBDA.get(guidance, ()) if problem == "network" else MIXTURE_LAMBDA


def cells(steps: Optional[Sequence[int]] = None, guidance: Optional[Sequence[float]] = None,
          quick: bool = False) -> List[Cell]:
    """The cells, the quickest problems first; `steps` instead of the thinned ones everywhere."""
    steps, guidance = steps or ((5, 10) if quick else None), tuple(guidance or ((1.0, 7.5) if quick else GUIDANCE))
    full: List[Cell] = []
    other: List[Cell] = []
    for names in (("digits", "separated"), ("network",)):
        for (turn, scale), process, problem in itertools.product(enumerate(guidance), SCHEDULES, names):
            if problem == "separated" and scale != 1:
                continue
            # Problems and guidances start their turns at different schedules.
            kinds, wanted = SCHEDULES[process], steps or _steps_of(problem, scale, True)
            own = [(n, kinds[(turn + place + (problem == "separated")) % len(kinds)]) for place, n in enumerate(wanted)]
            full += [Cell(problem, process, scale, kind, n, True) for n, kind in own]
            every = itertools.product(steps or _steps_of(problem, scale, False), kinds)
            other += [Cell(problem, process, scale, kind, n, False) for n, kind in every if (n, kind) not in own]
    order = lambda cell: (cell.problem == "network", not cell.full)
    return full if quick else sorted(full + other, key=order)


def default_cells() -> List[Cell]:
    """The network's, with 5 steps and more and guidance up to 7.5."""
    return [cell for cell in cells() if cell.problem == "network" and cell.steps >= 5 and cell.guidance <= 7.5]


# ----------------------------------------------------------------------------------------------------------- stochastic

def variance(row: Row, process: str, steps: int, member: str, eta: float, std: float = 0.5, mean: float = 0.7) -> float:
    """Variance at the last positive sigma for data N(mean, std^2), over the exact one, less 1."""
    kind = get_process(process)
    sigmas = schedule(SCHEDULES[process][0], process, steps)[:-1]
    if row.variable is None and process == "flow":
        sigmas[0] = 0.9999          # as ComfyUI does
    alpha = kind.alpha(sigmas.numpy())
    state = torch.zeros(1, steps + 2, dtype=torch.float64)
    state[0, 0], state[0, 1] = math.hypot(alpha[0] * std, sigmas[0].item()), alpha[0] * mean

    def model(x, sigma):
        s = sigma.item()
        a = float(kind.alpha(np.array(s)))
        gain = a * std ** 2 / (a ** 2 * std ** 2 + s ** 2)
        out = gain * x
        out[0, 1] += (1 - a * gain) * mean
        return out

    def noise(i):
        return torch.nn.functional.one_hot(torch.tensor([i + 2]), steps + 2).double()

    x = run_plan(row.plan(sigmas, process, member, eta), model, state, sigmas, noise, {}, None, True)[0]
    exact = alpha[-1] ** 2 * std ** 2 + sigmas[-1].item() ** 2
    return ((x[0] ** 2 + (x[2:] ** 2).sum()) / exact - 1).item()


def stochastic() -> List[dict]:
    """Deviation of the variance in % by process, member, steps and row."""
    rows = [COMFYUI, *(Row(v, 3, True, adapt) for v in NOISY_VARIABLES for adapt in (False, True))]
    return [{"process": process, "member": member, "eta": eta, "steps": steps,
             "percent": {row.name: 100 * variance(row, process, steps, member, eta) for row in rows}}
            for process in SCHEDULES for member, eta in MEMBERS for steps in NOISY_STEPS]


# --------------------------------------------------------------------------------------------------------------- tables

SOLVER = ("weights.py", "measure.py", "solver.py")


def _digest() -> str:
    folder = Path(ersde.__file__).parent
    return hashlib.sha256(b"\0".join((folder / n).read_bytes() for n in SOLVER)).hexdigest()[:16]


DIGEST = _digest()          # of what was imported, whatever becomes of the files


def interval(each: Dict[str, Tensor]) -> Optional[List[float]]:
    """95 % interval of the default's mean error over ComfyUI's, by bootstrap over the pictures; None without the default.

    each: what `pictures` returns, shape (pictures,) each; an error counts as at most DIVERGED times that of ComfyUI.
    """
    if DEFAULT.name not in each:
        return None
    own, base = (each[name].numpy() for name in (DEFAULT.name, COMFYUI.name))
    return ratio(np.minimum(own, DIVERGED * base), base)[1:]


def measure_all(plan: Sequence[Cell], settings: Settings, path: Path, rows: Optional[List[Row]] = None) -> List[dict]:
    """Every cell, from the file or measured now and appended to it; an interrupt leaves the rest out."""
    found, done = load(path, "key"), []
    bar = tqdm(plan)
    made: Dict[tuple, Problem] = {}
    try:
        for cell in bar:
            bar.set_description(cell.name)
            key = f"{cell.name} {dataclasses.astuple(settings)} {DIGEST} torch {torch.__version__}"
            if key not in found or "median" not in found[key] and cell.problem != "network":
                which = (cell.problem, cell.process, cell.guidance)
                if which not in made:
                    made[which] = Problem(*which, settings)
                    made[which].solve(schedule(c.schedule, c.process, c.steps)[-2].item() for c in plan
                                      if (c.problem, c.process, c.guidance) == which)
                chosen = rows or grid(VARIABLES if cell.full else ("lambda",))
                each = pictures(made[which], schedule(cell.schedule, cell.process, cell.steps), chosen)
                mean, median = ({name: kind(e).item() for name, e in each.items()} for kind in (torch.mean, torch.median))
                found[key] = {"key": key, **dataclasses.asdict(cell), "comfyui": mean[COMFYUI.name], "ratio": ratios(mean),
                              "median": ratios(median), "interval": interval(each)}
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found[key]) + "\n")
            done.append(found[key])
    except KeyboardInterrupt:
        print(f"interrupted after {len(done)} of {len(plan)} cells")
    return done


def summary(values: Sequence[float]) -> dict:
    """Geometric mean, worst, share above WORSE, number."""
    values = np.array(values)
    return {"mean": float(np.exp(np.log(values).mean())), "worst": float(values.max()),
            "share": float((values > WORSE).mean()), "cells": len(values)}


def splits(done: Sequence[dict]) -> Dict[str, List[dict]]:
    """The columns: all, by guidance, by steps."""
    out = {"all": list(done)}
    for scale in sorted({cell["guidance"] for cell in done}):
        out[f"guidance {scale:g}"] = [cell for cell in done if cell["guidance"] == scale]
    out["4-10 steps"] = [cell for cell in done if cell["steps"] <= 10]
    out["12-50 steps"] = [cell for cell in done if cell["steps"] > 10]
    return {name: part for name, part in out.items() if part}


def summaries(done: Sequence[dict]) -> Dict[str, Dict[str, dict]]:
    """Row -> column -> summary."""
    names = list(done[0]["ratio"]) if done else []
    return {name: {key: summary([cell["ratio"][name] for cell in part]) for key, part in splits(done).items()}
            for name in names}


def _table(done: Sequence[dict], columns: Optional[Dict[str, List[dict]]] = None) -> List[str]:
    columns = columns or splits(done)
    lines = ["| variable / order / corrector / adapt | share above 1.05 | "
             + " | ".join(f"{key} ({len(part)})" for key, part in columns.items()) + " |",
             "|---|---|" + "---|" * len(columns)]
    for name in done[0]["ratio"]:
        found = [summary([cell["ratio"][name] for cell in part]) for part in columns.values()]
        share = summary([cell["ratio"][name] for cell in done])["share"]
        lines.append(f"| {name} | {share:.0%} | " + " | ".join(f"{s['mean']:.2f} ({s['worst']:.3g})" for s in found) + " |")
    return lines


def _listed(values: Iterable) -> str:
    return ", ".join(f"{v:g}" for v in sorted(set(values)))


def against(done: Sequence[dict]) -> str:
    """The default's mean and worst ratio, those of the rows beside it, and the best rows."""
    names = [name for name in done[0]["ratio"] if name != COMFYUI.name]
    found = {name: summary([cell["ratio"][name] for cell in done]) for name in names}
    said = lambda name: f"{found[name]['mean']:.2f} (worst {found[name]['worst']:.3g})"
    near = {f"in {v}": dataclasses.replace(DEFAULT, variable=v) for v in VARIABLES if v != DEFAULT.variable}
    near |= {f"with order {k}": dataclasses.replace(DEFAULT, order=k) for k in ORDERS if k != DEFAULT.order}
    near |= {"without corrector": dataclasses.replace(DEFAULT, corrector=False),
             "without the trust rule": dataclasses.replace(DEFAULT, adapt=False)}
    best, safest = (min(names, key=lambda name: (found[name][key], found[name]["mean"])) for key in ("mean", "worst"))
    return (f"{DEFAULT.name}, is at {said(DEFAULT.name)}; "
            + ", ".join(f"{words} {said(row.name)}" for words, row in near.items() if row.name in found)
            + f"; the lowest mean has {best}, {said(best)}, the mildest worst cell {safest}, {said(safest)}")


def findings(done: Sequence[dict], noisy: Sequence[dict]) -> List[str]:
    """A paragraph for each kind of problem, all from the numbers: the default, its neighbours and the best."""
    out = []
    full = [c for c in done if c["full"]]
    mixtures = [c for c in full if c["problem"] != "network"]
    for title, part in (("network", [c for c in full if c["problem"] == "network"]), ("mixtures", mixtures),
                        ("mixtures by medians", [{**c, "ratio": c["median"]} for c in mixtures])):
        names = [name for name in (part[0]["ratio"] if part else ()) if name != COMFYUI.name]
        if DEFAULT.name not in names:
            continue
        by = []
        for key, cells_ in list(splits(part).items())[1:]:
            mean = {name: summary([cell["ratio"][name] for cell in cells_])["mean"] for name in names}
            least = min(names, key=mean.get)
            by.append(f"{key} {mean[DEFAULT.name]:.2f} against {mean[least]:.2f} of {least}")
        text = f"On the {title} the default, {against(part)}."
        if title == "network":
            text += f" Its mean against the lowest of each column, chosen after the fact: {', '.join(by)}."
        out += [text, ""]
    if noisy:
        mean = {name: np.mean([abs(c["percent"][name]) for c in noisy]) for name in noisy[0]["percent"]}
        out.append("The variance of stochastic members is off by, in the mean over all cells, "
                   + ", ".join(f"{value:.1f} % ({name})" for name, value in mean.items()) + ".")
    return out


def report(done: List[dict], noisy: List[dict], settings: Settings, planned: int, command: str) -> str:
    """The Markdown tables."""
    lines = [
        "# Interpolation variable, order, corrector and trust rule", "", f"    {command}", "",
        f"torch {torch.__version__}, one thread; the solver has the digest {DIGEST}; {len(done)} of {planned} planned "
        "cells. The ODE member: RMS error to a fine solution over `comfyui`'s (order 3) on the same schedule, the mean over "
        "pictures of each one's RMS; those with noise are in `members.md`. Network: the trained denoiser in float32, "
        f"N = {settings.count} pictures, fine solution by order 2 in lambda without corrector, {settings.fine_steps} steps "
        f"over the whole range of sigma. Mixtures: digits (every {settings.digits_stride}th is a component) and separated "
        f"(no guidance), float64, N = {settings.mixture_count}, fine solution by RK4.", "",
        "A number is the geometric mean over cells, in brackets the worst cell; a column's head has the number of cells. "
        f"A larger ratio than {DIVERGED:g}, or a run that became infinite, counts as {DIVERGED:g}. "
        "Order 1 without corrector is the same in every variable.", "",
        "Thinned: the full grid is measured on one schedule per process, guidance and number of steps, the schedules taking "
        "turns, so that every row has the same cells, and no column compares schedules. The rows in lambda are also "
        "measured on the other schedules, in the tables by schedule, with the steps and the guidance that these name."]
    for title, full, network in (("Network, full grid", True, True), ("Mixtures, full grid", True, False),
                                 ("Network, lambda, by schedule", False, True),
                                 ("Mixtures, lambda, by schedule", False, False)):
        part = [c for c in done if (c["problem"] == "network") == network and (c["full"] or not full)]
        if full and part:
            at = {g: _listed(c["steps"] for c in part if c["guidance"] == g) for g in sorted({c["guidance"] for c in part})}
            text = "; ".join(f"guidance {g:g}: {steps}" for g, steps in at.items())
            lines += ["", f"## {title}", "", f"Steps: {text}.", "", *_table(part)]
            if not network:
                lines += ["", f"## {title}, medians", "",
                          "The same with the median over starting points instead of the mean, "
                          "which a single point that ends at another digit decides.", "",
                          *_table([{**c, "ratio": c["median"]} for c in part])]
        elif any(not c["full"] for c in part):
            own = [c for c in part if not c["full"]]
            names = {name for cell in own for name in cell["ratio"]}
            part = [{**c, "ratio": {k: v for k, v in c["ratio"].items() if k in names}} for c in part]
            kinds = {f"{p}, {s}": [c for c in part if (c["process"], c["schedule"]) == (p, s)]
                     for p, names_ in SCHEDULES.items() for s in names_}
            lines += ["", f"## {title}", "", f"Those of the full grid, and on all schedules guidance "
                      f"{_listed(c['guidance'] for c in own)} at {_listed(c['steps'] for c in own)} steps.", "",
                      *_table(part, {"all": part, **{k: v for k, v in kinds.items() if v}})]
    if noisy:
        names = list(noisy[0]["percent"])
        lines += [
            "", "## Stochastic members: variance", "",
            "Deviation in % of the variance of Gaussian data (mean 0.7, standard deviation 0.5) at the last positive sigma, "
            "Karras and shift 3, order 3 with corrector; `comfyui` starts a flow at 0.9999. Last row: mean of the absolute "
            "values.", "",
            "| process | member | steps | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
        for cell in noisy:
            eta = "" if cell["eta"] == 1 else f", eta {cell['eta']:g}"
            lines.append(f"| {cell['process']} | {cell['member']}{eta} | {cell['steps']} | "
                         + " | ".join(f"{cell['percent'][name]:+.2f}" for name in names) + " |")
        means = (np.mean([abs(cell["percent"][name]) for cell in noisy]) for name in names)
        lines.append("| all | | | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    lines += ["", "## What it shows", "", *findings(done, noisy)]
    return "\n".join(lines) + "\n"


def report_default(done: Sequence[dict], settings: Settings, planned: int, command: str) -> str:
    """The table of `--default`."""
    ratio = np.array([cell["ratio"][DEFAULT.name] for cell in done])
    worse = sum(cell["interval"][0] > WORSE for cell in done)
    lines = ["# The default on the trained network, on every schedule", "", f"    {command}", "",
             f"torch {torch.__version__}; the solver has the digest {DIGEST}; {len(done)} of {planned} planned cells; N = "
             f"{settings.count} pictures, fine solution of {settings.fine_steps} steps. RMS error of {DEFAULT.name} over "
             "that of `comfyui`, in brackets the 95 % interval by bootstrap over the pictures.", "",
             f"Geometric mean {np.exp(np.log(ratio).mean()):.2f}, largest {ratio.max():.2f}; worse than {WORSE:g} with the "
             f"whole interval in {worse} cells.", "",
             "| process | guidance | schedule | steps | error of comfyui | ratio |", "|---|---|---|---|---|---|"]
    lines += [f"| {c['process']} | {c['guidance']:g} | {c['schedule']} | {c['steps']} | {c['comfyui']:.4f} | "
              f"{c['ratio'][DEFAULT.name]:.2f} ({c['interval'][0]:.2f} to {c['interval'][1]:.2f}) |" for c in done]
    return "\n".join(lines) + "\n"


def _rounded(value):
    """Floats to five digits, in all that is nested."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 and 10 steps, guidance 1 and 7.5, no further schedules")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--steps", type=int, nargs="+", help="steps of every cell, instead of the thinned ones")
    parser.add_argument("--guidance", type=float, nargs="+", help="guidance scales; 1 is none")
    parser.add_argument("--count", type=int, help=f"pictures of the network, {Settings.count} or, with --default, 32")
    parser.add_argument("--default", action="store_true", help="the default alone, on the network, with intervals")
    args = parser.parse_args(argv)
    if args.default and (args.quick or args.steps or args.guidance):
        parser.error("--default has cells of its own: without --quick, --steps and --guidance")
    if args.count is not None and args.count < 1:
        parser.error(f"--count must be at least 1, not {args.count}")
    torch.set_num_threads(1)
    if args.default:
        settings, command = Settings(count=args.count or 32), "python -m benchmarks.variables --default"
        command += f" --count {args.count}" if args.count else ""
        plan = default_cells()
        done = measure_all(plan, settings, args.out / "variables_default.jsonl", [COMFYUI, DEFAULT])
        if done:
            _write(args.out / "variables_default.md", report_default(done, settings, len(plan), command))
        return
    args.count = args.count or Settings.count
    settings, stem = Settings(count=args.count), "variables_quick" if args.quick else "variables"
    command = "python -m benchmarks.variables" + (" --quick" if args.quick else "")
    for name, values in (("steps", args.steps), ("guidance", args.guidance)):
        command += f" --{name} {' '.join(f'{v:g}' for v in values)}" if values else ""
    command += f" --count {args.count}" if args.count != Settings.count else ""
    began, noisy = time.time(), stochastic()
    plan = cells(args.steps, args.guidance, args.quick)
    done = measure_all(plan, settings, args.out / f"{stem}.jsonl")
    parts = {"network": [c for c in done if c["full"] and c["problem"] == "network"],
             "mixtures": [c for c in done if c["full"] and c["problem"] != "network"]}
    result = {"command": command, "torch": torch.__version__, "digest": DIGEST, "settings": dataclasses.asdict(settings),
              "full grid": {name: summaries(part) for name, part in parts.items()}, "variance": noisy,
              "cells": [{k: v for k, v in cell.items() if k != "key"} for cell in done]}
    _write(args.out / f"{stem}.json", json.dumps(_rounded(result), separators=(",", ":")) + "\n")
    _write(args.out / f"{stem}.md", report(done, noisy, settings, len(plan), command))
    print(f"{len(done)} of {len(plan)} cells in {time.time() - began:.0f} s, in {args.out}")


if __name__ == "__main__":
    main()
