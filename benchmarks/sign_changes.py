"""Why no rule is never worse than another: data on which ComfyUI's formulas are exact by chance.

    python -m benchmarks.sign_changes [--steps N ...] [--out DIR]

Gaussian data of one deviation s around 0, without guidance: D = s^2 / (s^2 + lambda^2) y for y = x / alpha is linear, and
every member keeps the law of y, of deviation hypot(s, lambda), so that a run has one number to get right.  Its error,
deviation / hypot(s, lambda) - 1 at the last positive sigma, is continuous in s.  Where that of ComfyUI's formulas (order 3)
changes its sign between two s, it is 0 at one between them, and there every rule is as many times further off as one likes,
unless its own error is 0 at the same s.  So "in no cell worse" is not to be had for all data; how much of s it costs is.

For every member, process, schedule and number of steps: where ComfyUI's error changes its sign over s from 0.01 to 1, how
far off each of the 80 rules of benchmarks/variables.py is there, and the share of s (of its logarithm) in which the default
is more than 5 % further off.  A run solves for all s at once, each a picture of a batch, on the coefficients of independent
standard normals as benchmarks/members.py does.  DIR gets sign_changes.md.
"""
from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import List, NamedTuple, Sequence

import numpy as np
import torch
from scipy.optimize import brentq
from tqdm import tqdm

from ersde.process import get_process
from ersde.solver import run as run_plan

from . import members, variables
from .members import Cell
from .variables import COMFYUI, DEFAULT, STEPS, WORSE, Row, grid

SWEEP = np.geomspace(0.01, 1.0, 193)
RULES = grid()[1:]


def errors(row: Row, cell: Cell, deviations: Sequence[float]) -> np.ndarray:
    """The error of each of the data's deviations, of its own sign, at the last positive sigma."""
    process, sigmas = get_process(cell.process), cell.sigmas()
    last = process.lam(sigmas[-1:].numpy())[0]
    if row.variable is None and cell.process == "flow":
        sigmas[0] = 0.9999          # as ComfyUI does
    data = torch.as_tensor(np.asarray(deviations, dtype=np.float64)).reshape(-1, 1)
    steps, first = len(sigmas) - 1, sigmas[0].item()
    # Per picture the weight of the start's normal and of each step's, times the root of how many they are: see members.
    size = math.sqrt(steps + 1)
    state = torch.zeros(len(data), steps + 1, dtype=torch.float64)
    alpha = float(process.alpha(np.array([first]))[0])
    state[:, 0] = size * torch.from_numpy(np.hypot(alpha * data[:, 0].numpy(), first))

    def model(x, sigma):
        at = np.array([sigma[0].item()])
        alpha = float(process.alpha(at)[0])
        return data ** 2 * alpha / ((data * alpha) ** 2 + at[0] ** 2) * x

    def noise(i):
        out = torch.zeros_like(state)
        out[:, i + 1] = size
        return out

    x = run_plan(row.plan(sigmas, cell.process, cell.member, cell.eta), model, state, sigmas, noise, {}, None, True)
    found = x.norm(dim=1).numpy() / size / float(process.alpha(sigmas[-1:].numpy())[0])
    return found / np.hypot(data[:, 0].numpy(), last) - 1


def sign_changes(cell: Cell, sweep: np.ndarray, comfyui: np.ndarray) -> List[float]:
    """The deviations at which ComfyUI's error, whose values over the sweep are given, is 0."""
    at = np.flatnonzero(np.sign(comfyui[:-1]) * np.sign(comfyui[1:]) < 0)
    return [brentq(lambda s: errors(COMFYUI, cell, [s])[0], sweep[i], sweep[i + 1], xtol=1e-13) for i in at]


class Found(NamedTuple):
    """Of a cell: |error| of ComfyUI's formulas and of the default over the sweep; the s at which ComfyUI's is 0; |error| there
    of ComfyUI's formulas and of each of the rules, shape (len(at), 81)."""

    comfyui: np.ndarray
    own: np.ndarray
    at: Sequence[float]
    there: np.ndarray


def measure(cell: Cell, sweep: np.ndarray = SWEEP) -> Found:
    """One cell."""
    signed = errors(COMFYUI, cell, sweep)
    at = sign_changes(cell, sweep, signed)
    there = np.array([errors(row, cell, at) for row in (COMFYUI, *RULES)]).T if at else np.empty((0, 1 + len(RULES)))
    return Found(abs(signed), abs(errors(DEFAULT, cell, sweep)), at, abs(there))


def report(cells: Sequence[Cell], found: Sequence[Found], command: str) -> str:
    """The Markdown page."""
    ours = 1 + RULES.index(DEFAULT)
    there = np.concatenate([one.there for one in found])
    worse = np.array([one.own > WORSE * one.comfyui for one in found])
    changed = np.array([len(one.at) > 0 for one in found])
    near = (there[:, 1:] <= WORSE * there[:, :1]).any(0).sum()
    lines = ["# Data on which ComfyUI's formulas are exact by chance", "", f"    {command}", "",
             f"torch {torch.__version__}; the solver has the digest {variables.DIGEST}. Gaussian data of one deviation s, no "
             f"guidance; {len(cells)} cells, in each {len(SWEEP)} s from {SWEEP[0]:g} to {SWEEP[-1]:g}.", "",
             f"ComfyUI's error changes its sign in {changed.sum()} of {len(cells)} cells, at {len(there)} s in all."]
    if len(there):
        own = there[:, ours]
        lines[-1] += (f" There it is {there[:, 0].max():.0e} at most, and that of the default {np.median(own):.4f} in the median "
                      f"and {own.max():.4f} at most; {near} of the {len(RULES)} rules are within 5 % of ComfyUI's at any of them.")
    lines += ["", f"The default is more than 5 % further off than ComfyUI's formulas in {worse.mean():.1%} of all cells and s, "
              f"and somewhere in {worse.any(1).sum()} of the cells, {worse[changed].any(1).sum()} of them cells with a change "
              "of sign.", "",
              "| cells | with a change of sign | further off somewhere | of all s |", "|---|---|---|---|"]
    parts = {f"{n} steps": [cell.steps == n for cell in cells] for n in sorted({cell.steps for cell in cells})}
    parts.update({f"{p}, {s}": [(cell.process, cell.schedule) == (p, s) for cell in cells]
                  for p, kinds in variables.SCHEDULES.items() for s in kinds})
    for name, part in parts.items():
        if any(part):
            of = worse[part]
            lines.append(f"| {name} ({sum(part)}) | {changed[part].sum()} | {of.any(1).sum()} | {of.mean():.1%} |")
    lines += ["", "| cell | s at which ComfyUI's error is 0 | the default's there | the nearest rule's |", "|---|---|---|---|"]
    for cell, one in zip(cells, found):
        member = cell.member if cell.eta in (0, 1) else f"{cell.member} at eta {cell.eta:g}"
        for s, row in zip(one.at, one.there):
            best = int(row[1:].argmin())
            lines.append(f"| {cell.process}, {cell.schedule}, {member}, {cell.steps} steps | {s:.4f} | {row[ours]:.1e} | "
                         f"{row[1 + best]:.1e}, {RULES[best].name} |")
    return "\n".join(lines) + "\n"


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sign_changes", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", help="steps")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the result")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    command = "python -m benchmarks.sign_changes" + (f" --steps {' '.join(map(str, args.steps))}" if args.steps else "")
    cells = members.cells(args.steps or [n for n in STEPS if n >= 5], (1.0,), (*members.ODE, *members.MEMBERS))
    bar, found = tqdm(cells), []
    for cell in bar:
        bar.set_description(cell.name)
        found.append(measure(cell))
    variables._write(args.out / "sign_changes.md", report(cells, found, command))


if __name__ == "__main__":
    main()
