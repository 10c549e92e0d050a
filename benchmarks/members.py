"""The choice of the interpolation variable, the order, the corrector and the trust rule for the members with noise.

    python -m benchmarks.members [--quick] [--out DIR] [--steps N ...] [--guidance G ...]
    python -m benchmarks.members --ode [...]
    python -m benchmarks.members --told [...]
    python -m benchmarks.members --default [...]

benchmarks/variables.py measures the ODE member by the error of each picture; this measures every member with noise by the
law of all its pictures, which a sample tells only roughly.  So the data are Gaussian: pictures whose pixels are of four
kinds, of the standard deviations `CLASS` around `MEAN`, of which the unconditional model knows `ALL` around 0.  The guided
denoiser D = D_all + w (D_class - D_all) is then linear in x, and a run's result in independent standard normals; the
solver runs on their coefficients, exactly, with norms that are those of a picture of infinitely many pixels.  The exact law
comes from the differential equations of its mean and variance (`exact`).

The figure of a run is the Frechet distance to it at the last positive sigma, the root of the sum over the kinds of the
squared differences of mean and deviation, over that of ComfyUI's formulas (order 3) on the same schedule, which start a
flow at 0.9999.  Every (variable, order, corrector, adapt), member, guidance, process, schedule and number of steps.  Of the
default also that of the finished pictures, at sigma = 0, in which what the data have below the last positive sigma is
missing with every sampler.

DIR gets members.md and members.json.  With --ode the member without noise is measured on the same data, in files whose names
end in _ode.  With --default the default alone is, in files whose names end in _default.  With --told the default is told what
guidance adds to D_class, as the hosts tell it (`excess` of `ersde.sample_preset`), in all cells with guidance, in files whose
names end in _told.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from tqdm import tqdm

from ersde.noise_scale import get_noise_scale
from ersde.process import get_process
from ersde.solver import run as run_plan

from . import variables
from .variables import COMFYUI, DEFAULT, DIVERGED, GUIDANCE, SCHEDULES, STEPS, Row, grid

Tensor = torch.Tensor
# Noise scale and eta.
ODE = (("ode", 0.0),)
MEMBERS = (*((f"sde{n}", 1.0) for n in ("", "_1", "_2", "_3", "_4", "_5")), ("sde_5", 0.5))
CLASS, MEAN = np.array([0.03, 0.1, 0.3, 0.6]), np.array([0.02, 0.1, 0.3, 0.6])
ALL = np.hypot(CLASS, MEAN)         # the classes lie around 0
FAR = 1e6                           # a lambda at which a picture has no part in the state
LOW = 1e-4                          # the lowest sigma of any schedule, at which a picture is done


@dataclasses.dataclass(frozen=True)
class Cell:
    """A member under a process and a guidance, on a schedule."""

    process: str
    guidance: float
    member: str
    eta: float
    schedule: str
    steps: int

    def sigmas(self) -> Tensor:
        """Down to the last positive sigma."""
        return variables.schedule(self.schedule, self.process, self.steps)[:-1]

    @property
    def name(self) -> str:
        """For the bar."""
        return (f"{self.process} / guidance {self.guidance:g} / {self.member} eta {self.eta:g} / {self.schedule} / "
                f"{self.steps} steps")


def cells(steps: Sequence[int] = STEPS, guidance: Sequence[float] = GUIDANCE,
          members: Sequence[tuple] = MEMBERS) -> List[Cell]:
    """All of them."""
    return [Cell(process, scale, member, eta, kind, n) for process, kinds in SCHEDULES.items()
            for scale, (member, eta), kind, n in itertools.product(guidance, members, kinds, steps)]


def denoiser(lam, guidance: float) -> Tuple[np.ndarray, np.ndarray]:
    """A and B of D = A y + B for y = x / alpha, of each kind; lam a number."""
    lam2 = np.float64(lam) ** 2
    of_class, of_all = CLASS ** 2 / (CLASS ** 2 + lam2), ALL ** 2 / (ALL ** 2 + lam2)
    return of_all + guidance * (of_class - of_all), guidance * (1 - of_class) * MEAN


@functools.lru_cache(64)
def exact(process: str, guidance: float, member: str, eta: float):
    """(lambda) -> mean and deviation of y of each kind, shape (4,).

    With r = eta dlog g / dlog lambda, n = mean / lambda, W = variance / lambda^2, and D = A y + B, the member's reverse-time
    SDE dy = (1 + r) (y - D) dlog lambda + noise, of variance 2 r lambda^2 for a step of -dlog lambda, gives

        dn / dlog lambda = r n - (1 + r) (A n + B / lambda),    dW / dlog lambda = 2 r (W - 1) - 2 (1 + r) A W.
    """
    scale = get_noise_scale(member)
    start = variables.HIGH[process] if process == "ve" else FAR

    def slope(u, state):
        at = np.exp(u + np.array([-1e-4, 1e-4]))
        r = eta * float(np.diff(scale.log_g_array(at))[0]) / 2e-4
        a, b = denoiser(np.exp(u), guidance)
        n, w = state.reshape(2, -1)
        return np.concatenate((r * n - (1 + r) * (a * n + b * np.exp(-u)), 2 * r * (w - 1) - 2 * (1 + r) * a * w))

    first = np.concatenate((MEAN / start, 1 + (CLASS / start) ** 2))
    found = solve_ivp(slope, (math.log(start), math.log(LOW)), first, "LSODA", rtol=1e-9, atol=1e-11, dense_output=True)
    if not found.success:
        raise RuntimeError(f"no exact law of {member}, guidance {guidance:g}: {found.message}")

    def law(lam: float) -> Tuple[np.ndarray, np.ndarray]:
        n, w = found.sol(math.log(lam)).reshape(2, -1)
        return n * lam, np.sqrt(w) * lam

    return law


def result(row: Row, cell: Cell, finished: bool = False, told: bool = False) -> Tuple[np.ndarray, np.ndarray]:
    """The mean and the deviation of y of each kind at the last positive sigma or, finished, at 0, shape (4,).

    Args:
        told: whether the run is told what guidance adds.
    """
    process, kinds, sigmas = get_process(cell.process), len(MEAN), cell.sigmas()
    if finished:
        sigmas = torch.cat((sigmas, torch.zeros(1, dtype=sigmas.dtype)))
    if row.variable is None and cell.process == "flow":
        sigmas[0] = 0.9999          # as ComfyUI does
    steps, first = len(sigmas) - 1, sigmas[0].item()
    alpha = float(process.alpha(np.array([first]))[0])
    # Of each kind: the mean, the weight of the start's normal, and that of each step's.  Times the root of how many they
    # are, which makes the mean square of these numbers that of the pixels.
    size = math.sqrt(steps + 2)
    state = torch.zeros(1, kinds, steps + 2, dtype=torch.float64)
    state[0, :, 0] = torch.from_numpy(size * alpha * MEAN)
    state[0, :, 1] = torch.from_numpy(size * np.hypot(alpha * CLASS, first))

    def evaluate(x, sigma, guidance):
        at = np.array([sigma[0].item()])
        alpha = float(process.alpha(at)[0])
        if alpha == 0:              # D does not know the state
            a, b = np.zeros(kinds), denoiser(math.inf, guidance)[1]
        else:
            a, b = denoiser(process.lam(at)[0], guidance)
            a = a / alpha
        out = torch.from_numpy(a)[:, None] * x
        out[0, :, 0] += torch.from_numpy(size * b)
        return out

    added = None

    def model(x, sigma):
        nonlocal added
        out = evaluate(x, sigma, cell.guidance)
        added = out - evaluate(x, sigma, 1.0) if told else None
        return out

    def noise(i):
        out = torch.zeros_like(state)
        out[0, :, i + 2] = size
        return out

    plan = row.plan(sigmas, cell.process, cell.member, cell.eta)
    x = run_plan(plan, model, state, sigmas, noise, {}, None, True, excess=(lambda: added) if told else None)[0]
    size *= float(process.alpha(sigmas[-1:].numpy())[0])
    return x[:, 0].numpy() / size, x[:, 1:].norm(dim=1).numpy() / size


def measure(cell: Cell, rows: Sequence[Row], told: bool = False) -> dict:
    """One cell: ComfyUI's distance and every row's over it; "finished": ComfyUI's and the default's over it at sigma = 0."""
    law = exact(cell.process, cell.guidance, cell.member, cell.eta)
    low = get_process(cell.process).lam(cell.sigmas()[-1:].numpy())[0]

    def distance(row: Row, at: float, finished: bool) -> float:
        try:
            own = result(row, cell, finished, told)
        except FloatingPointError:
            return math.inf
        return float(math.hypot(*(np.linalg.norm(a - b) for a, b in zip(own, law(at)))))

    found = {row.name: distance(row, low, False) for row in rows}
    base, last = found[COMFYUI.name], distance(COMFYUI, LOW, True)
    return {**dataclasses.asdict(cell), "comfyui": base,
            "ratio": {name: min(value / base, DIVERGED) for name, value in found.items()},
            "finished": {"comfyui": last, "ratio": {DEFAULT.name: min(distance(DEFAULT, LOW, True) / last, DIVERGED)}}}


def columns(done: Sequence[dict], what) -> Dict[str, List[dict]]:
    """The cells by what(cell)."""
    out: Dict[str, List[dict]] = {}
    for cell in done:
        out.setdefault(what(cell), []).append(cell)
    return out


def further(done: Sequence[dict]) -> str:
    """In how many cells the default is more than 5 % further from the exact law than ComfyUI's formulas, and by how much."""
    ratio, comfyui = (np.array(v) for v in zip(*((cell["ratio"][DEFAULT.name], cell["comfyui"]) for cell in done)))
    worse = ratio > variables.WORSE
    excess = ((ratio - 1.0) * comfyui)[worse]
    text = (f"{np.exp(np.log(ratio).mean()):.2f} of ComfyUI's distance, more than 5 % further off in {worse.sum()} of "
            f"{len(done)} cells")
    if not worse.any():
        return text
    return (f"{text}, there by {np.median(excess):.4f} in the median and at most {excess.max():.3f} (the pixels of the data "
            f"have deviations of {CLASS.min():g} to {CLASS.max():g}), by more than 0.01 in {(excess > 0.01).sum()}")


def at_dips(held: Sequence[dict], done: Sequence[dict]) -> str:
    """In how many of the `held` cells that are further off ComfyUI's distance is in a dip, as where an error changes sign:
    below the line, in the logarithms, through its distances with the next fewer and the next more steps among `done`.
    """
    place = lambda c: tuple(c[name] for name in ("process", "guidance", "member", "eta", "schedule"))
    beside, found = columns(done, place), []
    for cell in held:
        if cell["ratio"][DEFAULT.name] <= variables.WORSE:
            continue
        fewer = [c for c in beside[place(cell)] if c["steps"] < cell["steps"]]
        more = [c for c in beside[place(cell)] if c["steps"] > cell["steps"]]
        if fewer and more:
            ends = max(fewer, key=lambda c: c["steps"]), min(more, key=lambda c: c["steps"])
            line = np.interp(math.log(cell["steps"]), *np.log([[c[name] for c in ends] for name in ("steps", "comfyui")]))
            found.append(cell["ratio"][DEFAULT.name] * cell["comfyui"] <= variables.WORSE * math.exp(line))
    return (f"{len(found)} of the cells that are further off have others with fewer and with more steps beside them. In "
            f"{sum(found)} of these the default is no more than 5 % further off than the line between ComfyUI's distances "
            "there: ComfyUI's own is in a dip below it.")


def parts_of(held: Sequence[dict]) -> List[str]:
    """The default by steps and by schedule: how many cells, their mean, those more than 5 % further off, the largest."""
    lines = ["| part | cells | geometric mean | more than 5 % further off | largest |", "|---|---|---|---|---|"]
    for name, part in {**columns(held, lambda c: f"{c['steps']} steps"),
                       **columns(held, lambda c: f"{c['process']}, {c['schedule']}")}.items():
        ratio = np.array([cell["ratio"][DEFAULT.name] for cell in part])
        lines.append(f"| {name} | {len(part)} | {np.exp(np.log(ratio).mean()):.2f} | {(ratio > variables.WORSE).sum()} | "
                     f"{ratio.max():.2f} |")
    return lines


def report(done: List[dict], command: str, told: bool = False, alone: bool = False) -> str:
    """The Markdown tables; alone: of the default alone."""
    member = lambda c: c["member"] if c["eta"] == 1 else f"{c['member']}, eta {c['eta']:g}"
    parts = {"By guidance and steps": None, "By member": columns(done, member),
             "By schedule": columns(done, lambda c: f"{c['process']}, {c['schedule']}"),
             "By steps": columns(done, lambda c: f"{c['steps']} steps")}
    noise = "with noise" if any(cell["eta"] for cell in done) else "without noise"
    heading = f"The members {noise}, told what guidance adds" if told else f"The default, members {noise}" if alone else \
        f"Interpolation variable, order, corrector and trust rule of the members {noise}"
    lines = [f"# {heading}", "", f"    {command}", "",
             f"torch {torch.__version__}; the solver has the digest {variables.DIGEST}; {len(done)} cells. Gaussian data of "
             "four scales: Frechet distance to the exact law over that of `comfyui` (order 3). A number is the geometric "
             "mean over cells, in brackets the worst cell; a column's head has the number of cells. A larger ratio than "
             f"{DIVERGED:g}, or a run that became infinite, counts as {DIVERGED:g}."]
    for title, part in parts.items():
        lines += ["", f"## {title}", "", *variables._table(done, part)]
    lines += ["", "## What it shows", "", f"The default, {variables.against(done)}."]
    held = [cell for cell in done if cell["guidance"] <= 7.5 and cell["steps"] >= 5]
    if held:
        last = [cell["finished"] for cell in held]
        free = [cell["finished"] for cell in held if cell["guidance"] == 1]
        lines += ["", f"With 5 steps and more and guidance up to 7.5 it is at {further(held)}. Of the finished pictures it "
                  f"is at {'; without guidance at '.join(map(further, (last, free) if free else (last,)))}."]
        lines += ["", at_dips(held, done), "", *parts_of(held)]
    return "\n".join(lines) + "\n"


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.members", description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--ode", action="store_true", help="the member without noise, on the same data")
    kind.add_argument("--default", action="store_true", help="the default alone")
    kind.add_argument("--told", action="store_true", help="the default told what guidance adds, as in the hosts")
    parser.add_argument("--quick", action="store_true", help="6 and 10 steps, guidance 1 and 7.5")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--steps", type=int, nargs="+", help="steps")
    parser.add_argument("--guidance", type=float, nargs="+", help="guidance scales; 1 is none")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    stem, command, kinds = "members", "python -m benchmarks.members", MEMBERS
    if args.quick:
        stem, command = f"{stem}_quick", f"{command} --quick"
    if args.ode:
        stem, command, kinds = f"{stem}_ode", f"{command} --ode", ODE
    for name in ("default", "told"):
        if getattr(args, name):
            stem, command = f"{stem}_{name}", f"{command} --{name}"
    scales = (1.0, 7.5) if args.quick else GUIDANCE
    guidance = args.guidance or [scale for scale in scales if scale != 1.0 or not args.told]
    for name, values in (("steps", args.steps), ("guidance", args.guidance)):
        command += f" --{name} {' '.join(f'{v:g}' for v in values)}" if values else ""
    bar = tqdm(cells(args.steps or ((6, 10) if args.quick else STEPS), guidance, kinds))
    rows = [COMFYUI, DEFAULT] if args.told or args.default else grid()
    done = []
    for cell in bar:
        bar.set_description(cell.name)
        done.append(measure(cell, rows, args.told))
    kept = {COMFYUI.name, DEFAULT.name}
    short = [{**cell, "ratio": {name: value for name, value in cell["ratio"].items() if name in kept}} for cell in done]
    result = {"command": command, "torch": torch.__version__, "digest": variables.DIGEST,
              "rows": variables.summaries(done), "cells": short}
    variables._write(args.out / f"{stem}.json", json.dumps(variables._rounded(result), separators=(",", ":")) + "\n")
    variables._write(args.out / f"{stem}.md", report(done, command, args.told, args.default))


if __name__ == "__main__":
    main()
