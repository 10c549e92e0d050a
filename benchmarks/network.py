"""The noise-free samplers on the trained network of the demo, at equal model calls, with guidance.

    python -m benchmarks.network [--calls 5 9 21] [--guidance 1 4 7.5] [--count 32] [--told] [--out DIR] [--filter REGEX]

The figure of a cell is the RMS error of each picture's result to a fine solution of the same network (the second order
without a corrector, `FINE` steps between the same sigmas), its mean over the pictures, over the one of ComfyUI's formulas.
Intervals are 95 % by bootstrap over the pictures, of the ratio, the same pictures in both.  All samplers start from the same
states.  With --told our presets are told what guidance adds, as the hosts tell them, in a table with a name of its own.  The
cells of a problem are lines of JSON in DIR, and a run takes up where the last one stopped.
"""
from __future__ import annotations

import argparse
import functools
import json
import re
from pathlib import Path
from typing import Dict, List, Optional

import numpy as np
import torch
from tqdm import tqdm

import ersde
from ersde.demo.mixture import SIGMA_MAX
from ersde.demo.network import CLASSES, SIZE, guided, load_model

from . import quality

FINE = 250
SCHEDULES = {"ve": ("karras", "exponential"), "flow": ("shift 3",)}
BASE = "comfyui ode"


@functools.lru_cache(None)
def _loaded(process: str, device: str):
    return load_model(process, device).to(memory_format=torch.channels_last)


class Network:
    """The guided network on rows: model(x of shape (count, pixels), sigma) -> D.

    Args:
        apart: whether our presets are told what guidance adds to the conditional D, as the hosts tell them.
    """

    def __init__(self, process: str, guidance: float, labels: torch.Tensor, device: str = "cpu", apart: bool = False):
        self.process, self.calls = process, 0
        self.network = guided(_loaded(process, device), labels, guidance)
        self.excess = self._excess if apart else None

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_) -> torch.Tensor:
        self.calls += 1
        out = self.network(x.float().reshape(-1, 3, SIZE, SIZE), sigma.float().expand(len(x)))
        return out.reshape(x.shape).to(x)

    def _excess(self) -> Optional[torch.Tensor]:
        found = self.network.excess()
        return None if found is None else found.flatten(1).double()


def ratio(errors: np.ndarray, base: np.ndarray, resamples: int = 1000) -> List[float]:
    """Ratio of the mean errors and its 95 % interval by bootstrap over the pictures."""
    rows = np.random.default_rng(0).integers(len(errors), size=(resamples, len(errors)))
    low, high = np.quantile(errors[rows].mean(1) / base[rows].mean(1), (0.025, 0.975))
    return [float(errors.mean() / base.mean()), float(low), float(high)]


def cells(process: str, schedule: str, guidance: float, calls: int, count: int, chosen: str,
          told: bool = False) -> Dict[str, List[float]]:
    """The RMS error of each picture, by sampler."""
    model = Network(process, guidance, torch.arange(count) % len(CLASSES), apart=told)
    sigmas = quality.schedule(schedule, calls, calls)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3 * SIZE * SIZE, generator=generator, dtype=torch.float64) * (SIGMA_MAX if process == "ve" else 1)
    high, low = sigmas[0].item(), sigmas[-2].item()
    if process == "ve":
        fine = torch.cat([torch.logspace(np.log10(high), np.log10(low), FINE, dtype=torch.float64), sigmas[-1:]])
    else:
        fine = quality.schedule(schedule, FINE, calls)
    exact = ersde.sample_er_sde(model, x, fine, eta=0.0, order=2, corrector=False, process=process, disable=True)
    found = {}
    for method, steps in quality.noise_free(process, calls):
        if method.name != BASE and not re.search(chosen, method.name):
            continue
        model.calls = 0
        out = method.run(model, x.clone(), quality.schedule(schedule, steps, calls), None, lambda preset: (np.inf, 0.0))
        if model.calls != calls:
            raise RuntimeError(f"{method.name} made {model.calls} model calls, not {calls}")
        found[method.name] = ((out - exact) ** 2).mean(1).sqrt().tolist()
    return found


def table(rows: List[dict], count: int) -> str:
    """The Markdown of all rows."""
    names = list(dict.fromkeys(name for row in rows for name in row["errors"]))
    lines = [f"Trained network of the demo, {count} pictures, torch {torch.__version__}: RMS error to the fine "
             f"solution over that of `{BASE}` (95 % interval).", "",
             "| problem | calls | error of comfyui | " + " | ".join(names) + " |",
             "|---" * (len(names) + 3) + "|"]
    shares = {name: [] for name in names}
    worst, best = [], []
    for row in rows:
        base = np.array(row["errors"][BASE])
        texts = []
        for name in names:
            if name not in row["errors"]:
                texts.append("")
                continue
            value, low, high = ratio(np.array(row["errors"][name]), base)
            shares[name].append(value)
            texts.append(f"{value:.2f} ({low:.2f} to {high:.2f})")
        peers = min(np.mean(e) for n, e in row["errors"].items() if not n.startswith("ours"))
        ours = np.mean(row["errors"]["ours ode"])
        worst.append(ours / base.mean())
        best.append(ours / peers)
        lines.append(f"| {row['problem']} | {row['calls']} | {base.mean():.4f} | " + " | ".join(texts) + " |")
    lines += ["", "| sampler | geometric mean | worst | cells |", "|---|---|---|---|"]
    lines += [f"| {name} | {np.exp(np.mean(np.log(v))):.2f} | {max(v):.2f} | {len(v)} |" for name, v in shares.items()]
    lines += ["", f"`ours ode` over `{BASE}`: at most 5 % worse in {np.mean(np.array(worst) <= 1.05):.0%} of {len(rows)} "
              f"cells, worst {max(worst):.2f}.  Over the best peer of each cell, picked after the fact: at most 5 % worse "
              f"in {np.mean(np.array(best) <= 1.05):.0%}, worst {max(best):.2f}."]
    return "\n".join(lines) + "\n"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network", description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 9, 21])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0, 7.5])
    parser.add_argument("--count", type=int, default=32, help="pictures")
    parser.add_argument("--told", action="store_true", help="tell our presets what guidance adds")
    parser.add_argument("--filter", default="", help="regular expression: only samplers whose name has it")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "network.jsonl"
    stamp = quality._digest(quality._own_source(), quality._measuring_source(), torch.__version__, args.filter)
    done = quality.load(path, "key")
    rows = []
    todo = [(p, s, g, n) for p, names in SCHEDULES.items() for s in names for g in args.guidance for n in args.calls]
    with open(path, "a", encoding="utf-8") as file:
        for process, schedule, guidance, calls in tqdm(todo):
            problem = f"{process} / {schedule} / guidance {guidance:g}"
            key = f"{problem} / {calls} / {args.count} / {stamp}" + " / told" * args.told
            if key not in done:
                done[key] = {"key": key, "problem": problem, "calls": calls,
                             "errors": cells(process, schedule, guidance, calls, args.count, args.filter, args.told)}
                file.write(json.dumps(done[key]) + "\n")
                file.flush()
            rows.append(done[key])
    command = quality.command_of("network", parser, args, "calls", "guidance", "count", "told", "filter")
    text = f"    {command}\n\n" + table(rows, args.count)
    (args.out / f"network{'_told' * args.told}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
