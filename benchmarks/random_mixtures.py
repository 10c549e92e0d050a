"""The noise-free default against ComfyUI's formulas on mixtures that nobody chose: drawn at random, as many as wanted.

    python -m benchmarks.random_mixtures [--count 16] [--seed 1] [--guided DIM] [--told] [--out DIR]

Dimension, number of parts, their places and widths, the guidance and the parts it points to are drawn; each mixture runs in
both processes, with 5 to 50 steps.  The figure of a cell is the mean over `POINTS` starting points of the RMS error to the
exact probability flow, over that of ComfyUI's formulas; its 95 % interval is by bootstrap over the starting points, the
same in both.  A mixture is a line of JSON in DIR, and a run takes up where the last one stopped.  With --guided only those
with guidance and of dimension DIM are taken, the next ones from the seed on.  With --told the default is told what guidance
adds to the conditional D, as the hosts tell it, on the mixtures that have guidance.  The table of another seed, of --guided
and of --told has a file of its own.
"""
from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
import torch
from tqdm import tqdm

import ersde
from tests.problems import Mixture, flow_exact

from . import quality

POINTS, EXACT_STEPS = 96, 800
STEPS = (5, 6, 8, 10, 15, 20, 30, 50)
SCHEDULES = {"ve": ("karras", "exponential"), "flow": ("shift 3",)}


class Told:
    """A guided mixture that tells what guidance adds: `excess()` is D - D_label of the newest call."""

    def __init__(self, model: Mixture):
        self.model, self.process, self._excess = model, model.process, None
        self.conditional = dataclasses.replace(model, guidance=1.0)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_) -> torch.Tensor:
        out = self.model(x, sigma)
        self._excess = out - self.conditional(x, sigma)
        return out

    def excess(self) -> torch.Tensor:
        return self._excess


def drawn(seed: int) -> Dict[str, object]:
    """One mixture: its parts and its guidance."""
    rng = np.random.default_rng(seed)
    dim, parts = int(rng.choice([2, 4, 16, 48])), int(rng.integers(2, 16))
    guidance = None if rng.random() < 0.4 else float(rng.choice([2.0, 4.0, 7.5]))
    means = torch.tensor(rng.normal(size=(parts, dim)) * rng.choice([0.5, 1.0, 1.5]))
    std = torch.tensor(np.exp(rng.uniform(np.log(0.05), np.log(0.5), size=parts)))
    label = None if guidance is None else torch.arange(parts) < max(1, parts // 3)
    return {"means": means, "std": std, "guidance": guidance, "label": label}


def mixture(seed: int, process: str) -> Tuple[Mixture, Mixture]:
    """The denoiser of the mixture `seed`, and the mixture that its data comes from."""
    parts = drawn(seed)
    model = Mixture(process=process, **parts)
    label = slice(None) if model.label is None else model.label
    return model, Mixture(model.means[label], model.std[label], process=process)


def chosen(seed: int, guided: Optional[int]) -> bool:
    """Whether a mixture is taken: with a dimension `guided` only those of it that have guidance."""
    if guided is None:
        return True
    parts = drawn(seed)
    return parts["guidance"] is not None and parts["means"].shape[1] == guided


def measure(seed: int, told: bool = False) -> List[dict]:
    """All cells of the mixture `seed`; told, if it has guidance, what that adds."""
    rows = []
    for process, schedules in SCHEDULES.items():
        model, source = mixture(seed, process)
        asked = Told(model) if told else model
        for name in schedules:
            start = source.start(POINTS, quality.schedule(name, 2, 2)[0].item(), torch.Generator().manual_seed(seed))
            exact: Dict[int, torch.Tensor] = {}
            for steps in STEPS:
                sigmas = quality.schedule(name, steps, steps)
                key = steps if process == "flow" else 0         # of ve all runs end at the same sigma
                if key not in exact:
                    exact[key] = flow_exact(model, start, sigmas, EXACT_STEPS)
                error = {}
                for method in ("exact", "comfyui"):
                    out = ersde.sample_preset(asked, start, sigmas, ersde.Preset(method, eta=0.0, method=method), disable=True,
                                              process=process, excess=getattr(asked, "excess", None))
                    error[method] = (out - exact[key]).square().mean(1).sqrt().numpy()
                again = np.random.default_rng(0).integers(POINTS, size=(1000, POINTS))
                low, high = np.quantile(error["exact"][again].mean(1) / error["comfyui"][again].mean(1), (0.025, 0.975))
                rows.append({"process": process, "schedule": name, "steps": steps, "guidance": model.guidance or 1.0,
                             "dim": model.dim, "parts": len(model.means), "comfyui": float(error["comfyui"].mean()),
                             "ratio": float(error["exact"].mean() / error["comfyui"].mean()), "low": float(low),
                             "high": float(high)})
    return rows


def table(rows: List[dict], mixtures: int, told: bool = False) -> str:
    """Shares by number of steps, and the worst cells."""
    lines = [f"{mixtures} random mixtures, {len(rows)} cells, {POINTS} starting points each, torch {torch.__version__}: "
             f"error of the noise-free default{', told what guidance adds,' * told} over that of ComfyUI's formulas.", "",
             "| steps | geometric mean | 5 % worse at most | worse by more with the whole interval | largest |",
             "|---|---|---|---|---|"]
    for steps in (*STEPS, None):
        part = [r for r in rows if steps in (None, r["steps"])]
        ratio = np.array([r["ratio"] for r in part])
        worse = sum(r["low"] > 1.05 for r in part)
        lines.append(f"| {steps or 'all'} | {np.exp(np.log(ratio).mean()):.2f} | {np.mean(ratio <= 1.05):.1%} | "
                     f"{worse} of {len(part)} | {ratio.max():.2f} |")
    lines += ["", "The cells that are worse by more than 5 % with the whole interval:", "",
              "| cell | guidance | dimensions | parts | error of ComfyUI's formulas | ratio (95 %) |",
              "|---|---|---|---|---|---|"]
    for r in sorted((r for r in rows if r["low"] > 1.05), key=lambda r: -r["ratio"]):
        cell = f"{r['process']} / {r['schedule']} / {r['steps']} | {r['guidance']:g} | {r['dim']} | {r['parts']}"
        lines.append(f"| {cell} | {r['comfyui']:.2g} | {r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f}) |")
    return "\n".join(lines) + "\n"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_mixtures", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=16, help="mixtures")
    parser.add_argument("--seed", type=int, default=1, help="of the first one; the others follow")
    parser.add_argument("--guided", type=int, choices=(2, 4, 16, 48), help="only mixtures with guidance, of this dimension")
    parser.add_argument("--told", action="store_true", help="tell the default what guidance adds; mixtures with guidance")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    seeds = list(itertools.islice((s for s in itertools.count(args.seed) if chosen(s, args.guided)), args.count))
    if args.told:
        seeds = [seed for seed in seeds if drawn(seed)["guidance"] is not None]
        if not seeds:
            parser.error("--told: none of these mixtures has guidance")
    torch.set_num_threads(1)
    path = args.out / "random_mixtures.jsonl"
    own = quality._code(Path(__file__).read_text(encoding="utf-8"))
    stamp = quality._digest(quality._own_source(), own, torch.__version__)
    done, rows = quality.load(path, "key"), []
    with quality.appending(path) as file:
        for seed in tqdm(seeds, unit="mixture"):
            key = f"{seed} / {stamp}" + " / told" * args.told
            if key not in done:
                done[key] = {"key": key, "cells": measure(seed, args.told)}
                file.write(json.dumps(done[key]) + "\n")
                file.flush()
            rows += done[key]["cells"]
    text = table(rows, len(seeds), args.told)
    options = "".join(f" --{key} {value}" for key, value, usual in (("count", args.count, 16), ("seed", args.seed, 1),
                                                                    ("guided", args.guided, None)) if value != usual)
    options += " --told" * args.told
    other = f"_guided_{args.guided}" if args.guided else f"_{args.seed}" if args.seed != 1 else ""
    other += "_told" * args.told
    (args.out / f"random_mixtures{other}.md").write_text(f"    python -m benchmarks.random_mixtures{options}\n\n{text}",
                                                         encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
