"""The members with noise on the trained network: the law of their pictures against a fine run's, at equal model calls.

    python -m benchmarks.network_members [--calls N ...] [--guidance W ...] [--process P ...] [--member NAME ...]
                                         [--count N] [--fine N] [--out DIR]

benchmarks/evaluate.py measures pictures by their distance to real ones, which guidance of 7.5 is not meant to reach; this
measures them by what the sampler is to reach, the member's own law with that guidance.  It is known by --fine steps of the
published second order, on the same path of the noise from the same start.  Of N pictures of few steps and the N fine ones,
the same seeds, in the features of benchmarks/classifier.py, there are two figures:

* the squared Frechet distance, over that of ComfyUI's formulas of the same member.  Of two sets of one law it is not 0: it
  falls with 1 / N, the slower the less their seeds' pictures are alike, and with much noise that is nearly all of it;
* the kernel distance of `evaluate`, x 1000, between the two sets, a seed's own two pictures being no pair: without bias, 0
  in the mean for one law at any N, and so the one that says which sampler is nearer to the law.  Its difference to that of
  ComfyUI's formulas decides.

95 % intervals by centred bootstrap over the seeds, the same in all sets.  A reference of few steps is itself off, in the
direction of the published formulas.

Network, schedules, seeds, blocks and the files that a run goes on from are evaluate.py's, in DIR/network_members; torchrun
shares the blocks out.  DIR gets network_members.md.
"""
from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist

import ersde
from ersde.noise_scale import NOISE_SCALES

from . import evaluate, quality
from .evaluate import Cell
from .variables import WORSE

FINE, CALLS, GUIDANCE = 240, (6, 8, 10, 15, 20), (1.0, 4.0, 7.5)
# A cell of ours, its member and its figures.
Row = Tuple[Cell, str, Dict[str, object]]


@dataclasses.dataclass(frozen=True)
class Law:
    """What `quality.frechet` needs of the fine pictures."""

    mean: torch.Tensor
    root: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "Law":
        return cls(features.mean(0), quality.root_of(features.T.cov()))


def methods(member: str) -> Dict[str, quality.Method]:
    """The default, ComfyUI's formulas and the fine run of one noise scale."""
    ours = ersde.Preset("ours", member)
    presets = (ours, dataclasses.replace(ours, name="comfyui", method="comfyui", corrector=False),
               dataclasses.replace(ours, name="fine", method="paper", order=2, corrector=False))
    return {preset.name: quality._family(preset, f"{preset.name} {member}", preset.method) for preset in presets}


def cells(processes: Sequence[str], guidance: Sequence[float], calls: Sequence[int], members: Sequence[str],
          fine: int = FINE) -> List[Cell]:
    """Those that are sampled, the runs of `fine` steps among them."""
    out = []
    for process in processes:
        for scale in guidance:
            for member in members:
                made = methods(member)
                out.append(Cell(process, scale, fine, made["fine"]))
                out += [Cell(process, scale, n, made[name]) for n in calls for name in ("ours", "comfyui")]
    return out


def kernel_distance(x: torch.Tensor, fine: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Unbiased squared MMD x 1000 between the rows of x and of `fine`, of the same seeds, the classes in turn.

    Its pairs are h(i, j) = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i) of different seeds i and j alone.

    Args:
        weights: (resamples, count), how often each seed is in a resample.

    Returns:
        Shape (resamples,).
    """
    cross = evaluate.cubic(x, fine)
    return 1000 * evaluate.pair_mean(evaluate.cubic(x, x) + evaluate.cubic(fine, fine) - cross - cross.T, weights)


def measure(ours: torch.Tensor, comfyui: torch.Tensor, fine: torch.Tensor) -> Dict[str, object]:
    """Both figures of both samplers, the Frechet distances' ratio, the kernel distances' difference and that to 1.05 of
    ComfyUI's, each with its interval, from the features of the same seeds.
    """
    law, rows, both = Law.of(fine), evaluate.resamples(len(fine)), (ours, comfyui)
    values = [quality.frechet(features, law).item() for features in both]
    again = [quality.frechet(features, law, rows) for features in both]
    weights = torch.cat((torch.ones(1, len(fine), dtype=torch.float64), evaluate.how_often(rows)))
    kernel = [kernel_distance(features, fine, weights) for features in both]
    with_interval = lambda value, resampled: (value, tuple(quality.interval(value, resampled)))
    ratio, interval = with_interval(values[0] / values[1], again[0] / again[1])
    difference, over = (with_interval(d[0].item(), d[1:]) for d in (kernel[0] - kernel[1], kernel[0] - WORSE * kernel[1]))
    return {"ours": values[0], "comfyui": values[1], "ratio": ratio, "interval": interval,
            "kernel": tuple(k[0].item() for k in kernel), "difference": difference, "over": over}


def compared(plan: Sequence[Cell], blocks: Sequence[Sequence[int]], held: Dict[str, dict]) -> List[Row]:
    """Each cell of ours with its figures, from the rows of the blocks (`evaluate.sample`)."""
    def features(cell: Cell) -> torch.Tensor:
        parts = [evaluate.features_of(held[evaluate.key_of(cell, seeds)]) for seeds in blocks]
        if any(part is None for part in parts):
            raise FloatingPointError(f"{cell.name} became infinite")
        return torch.from_numpy(np.concatenate(parts)).double()

    rows, comfyui, fine = [], {}, {}
    for cell in plan:
        kind, member = cell.method.name.split()
        if kind == "fine":
            fine[cell.process, cell.guidance, member] = features(cell)
        elif kind == "comfyui":
            comfyui[cell.process, cell.guidance, member, cell.calls] = features(cell)
    for cell in plan:
        kind, member = cell.method.name.split()
        if kind == "ours":
            of = cell.process, cell.guidance, member
            rows.append((cell, member, measure(features(cell), comfyui[(*of, cell.calls)], fine[of])))
    return rows


def table(rows: Sequence[Row], count: int, fine: int, command: str) -> str:
    """The Markdown text."""
    ratio = np.array([found["ratio"] for _, _, found in rows])
    nearer = sum(found["difference"][1][1] < 0 for _, _, found in rows)
    further, worse = (sum(found[what][1][0] > 0 for _, _, found in rows) for what in ("difference", "over"))
    above = sum(found["interval"][0] > WORSE for _, _, found in rows)
    lines = ["# The members with noise on the trained network", "", f"    {command}", "",
             f"N = {count}; torch {torch.__version__}; the sources have the digest {quality._own_source()}. Distances to "
             f"{fine} steps on the same path of the noise, of the default and of ComfyUI's formulas.", "",
             f"Of {len(rows)} cells the default is nearer to the law than ComfyUI's formulas in {nearer} with the whole "
             f"interval of the difference of the kernel distances (x 1000, without bias), further in {further}, by more "
             f"than 5 % in {worse}.", "",
             f"The squared Frechet distance, in which there is what {count} pictures of one law are apart, is at "
             f"{np.exp(np.log(ratio).mean()):.2f} of theirs in the geometric mean, at {ratio.max():.2f} at most; "
             f"{sum(ratio <= WORSE)} are within 5 % or better, {above} further off with the whole interval.", "",
             "| process | guidance | member | calls | kernel, ours | ComfyUI's | difference (95 %) | Frechet, ours "
             "| ComfyUI's | ratio (95 %) |", "|---|---|---|---|---|---|---|---|---|---|"]
    for cell, member, found in rows:
        (low, high), (difference, (least, most)) = found["interval"], found["difference"]
        ours, comfyui = found["kernel"]
        lines.append(f"| {cell.process} | {cell.guidance:g} | {member} | {cell.calls} | {ours:.3f} | {comfyui:.3f} | "
                     f"{difference:.3f} ({least:.3f} to {most:.3f}) | {found['ours']:.3g} | {found['comfyui']:.3g} | "
                     f"{found['ratio']:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines) + "\n"


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network_members", description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS), metavar="N", help="model calls of a run")
    parser.add_argument("--guidance", type=float, nargs="+", default=list(GUIDANCE), metavar="W")
    parser.add_argument("--process", nargs="+", default=list(evaluate.SCHEDULES), choices=list(evaluate.SCHEDULES))
    parser.add_argument("--member", nargs="+", default=["sde_5"], choices=[name for name in NOISE_SCALES if name != "ode"],
                        help="noise scales")
    parser.add_argument("--count", type=int, default=512, help="pictures of a cell")
    parser.add_argument("--fine", type=int, default=FINE, metavar="N", help="steps of the runs that show the law")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
    plan = cells(args.process, args.guidance, args.calls, args.member, args.fine)
    blocks = evaluate.blocks(args.count, evaluate.BLOCK)
    held, _ = evaluate.sample([(cell, seeds) for seeds in blocks for cell in plan], args.out / "network_members")
    first = evaluate.rank() == 0
    if dist.is_initialized():
        dist.destroy_process_group()
    if not first:
        return
    command = quality.command_of("network_members", parser, args, "calls", "guidance", "process", "member", "count", "fine")
    text = table(compared(plan, blocks, held), args.count, args.fine, command)
    (args.out / "network_members.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
