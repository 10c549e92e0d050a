"""The members with noise on the trained network: the law of their pictures against a fine run's, at equal model calls.

    python -m benchmarks.network_members [--calls N ...] [--guidance W ...] [--process P ...] [--member NAME ...]
                                         [--count N] [--out DIR]

benchmarks/evaluate.py measures pictures by their distance to real ones, which guidance of 7.5 is not meant to reach; this
measures them by what the sampler is to reach, the member's own law with that guidance.  It is known by `FINE` steps of the
published second order, on the same path of the noise from the same start.  The figure is the squared Frechet distance
between N pictures of few steps and the N fine ones, the same seeds, in the features of benchmarks/classifier.py, over that
of ComfyUI's formulas of the same member; 95 % intervals by centred bootstrap over the seeds, the same in both.

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

FINE, CALLS, GUIDANCE = 60, (6, 8, 10, 15, 20), (1.0, 4.0, 7.5)
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


def cells(processes: Sequence[str], guidance: Sequence[float], calls: Sequence[int], members: Sequence[str]) -> List[Cell]:
    """Those that are sampled, the fine runs among them."""
    out = []
    for process in processes:
        for scale in guidance:
            for member in members:
                made = methods(member)
                out.append(Cell(process, scale, FINE, made["fine"]))
                out += [Cell(process, scale, n, made[name]) for n in calls for name in ("ours", "comfyui")]
    return out


def measure(ours: torch.Tensor, comfyui: torch.Tensor, fine: torch.Tensor) -> Dict[str, object]:
    """Both distances, their ratio and its interval, from the features of the same seeds."""
    law, rows = Law.of(fine), evaluate.resamples(len(fine))
    values = [quality.frechet(features, law).item() for features in (ours, comfyui)]
    again = [quality.frechet(features, law, rows) for features in (ours, comfyui)]
    ratio = values[0] / values[1]
    low, high = quality.interval(ratio, again[0] / again[1])
    return {"ours": values[0], "comfyui": values[1], "ratio": ratio, "interval": (low, high)}


def compared(plan: Sequence[Cell], blocks: Sequence[Sequence[int]], held: Dict[str, dict]) -> List[Row]:
    """Each cell of ours with its figures, from the rows of the blocks (`evaluate.sample`)."""
    def features(cell: Cell) -> torch.Tensor:
        parts = [evaluate.features_of(held[evaluate.key_of(cell, seeds)]) for seeds in blocks]
        if any(part is None for part in parts):
            raise FloatingPointError(f"{cell.name} became infinite")
        return torch.from_numpy(np.concatenate(parts)).double()

    by_name = {cell.name: cell for cell in plan}
    rows = []
    for cell in plan:
        kind, member = cell.method.name.split()
        if kind == "ours":
            fine, comfyui = (by_name[dataclasses.replace(cell, calls=calls, method=methods(member)[name]).name]
                             for name, calls in (("fine", FINE), ("comfyui", cell.calls)))
            rows.append((cell, member, measure(features(cell), features(comfyui), features(fine))))
    return rows


def table(rows: Sequence[Row], count: int, command: str) -> str:
    """The Markdown text."""
    ratio = np.array([found["ratio"] for _, _, found in rows])
    worse = sum(found["interval"][0] > WORSE for _, _, found in rows)
    lines = ["# The members with noise on the trained network", "", f"    {command}", "",
             f"N = {count}; torch {torch.__version__}; the sources have the digest {quality._own_source()}. Squared Frechet "
             f"distance to {FINE} steps on the same path of the noise, over that of ComfyUI's formulas.", "",
             f"{len(rows)} cells: {np.exp(np.log(ratio).mean()):.2f} in the geometric mean, the largest {ratio.max():.2f}; "
             f"{sum(ratio <= WORSE)} within 5 % or better, {worse} worse with the whole interval.", "",
             "| process | guidance | member | calls | ours | ComfyUI's | ratio (95 %) |", "|---|---|---|---|---|---|---|"]
    for cell, member, found in rows:
        low, high = found["interval"]
        lines.append(f"| {cell.process} | {cell.guidance:g} | {member} | {cell.calls} | {found['ours']:.3g} | "
                     f"{found['comfyui']:.3g} | {found['ratio']:.2f} ({low:.2f} to {high:.2f}) |")
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
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
    plan, blocks = cells(args.process, args.guidance, args.calls, args.member), evaluate.blocks(args.count, evaluate.BLOCK)
    held, _ = evaluate.sample([(cell, seeds) for seeds in blocks for cell in plan], args.out / "network_members")
    first = evaluate.rank() == 0
    if dist.is_initialized():
        dist.destroy_process_group()
    if not first:
        return
    command = quality.command_of("network_members", parser, args, "calls", "guidance", "process", "member", "count")
    text = table(compared(plan, blocks, held), args.count, command)
    (args.out / "network_members.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
