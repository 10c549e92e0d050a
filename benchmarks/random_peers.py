"""The noise-free default against every other sampler without noise, on mixtures that nobody chose.

    python -m benchmarks.random_peers [--count 16] [--seed 1] [--calls N ...] [--spectra] [--told] [--out DIR]

The mixtures, schedules, starting points and exact results are those of benchmarks/random_mixtures.py, with --spectra those of
its --spectra; the samplers are those of benchmarks/quality.py at equal model calls.  The figure of a cell is the mean over
the starting points of the RMS error to the exact probability flow.  The best peer of a cell is picked after the fact: of so
many one is the best for that mixture and that number of calls.  With --told our presets are told what guidance adds, as the
hosts tell them, where a mixture has guidance.  A mixture is a line of JSON in DIR, and a run takes up where the last one
stopped.
"""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np
import torch

from . import quality, random_mixtures
from .random_mixtures import Told, cases, measured
from .variables import WORSE

CALLS = (5, 7, 9, 11, 15, 21, 31)           # odd, as two calls a step and the last one make
OURS, COMFYUI, LOST = "ours ode", "comfyui ode", 1e6        # LOST: of a run that became infinite


def measure(seed: int, calls: Sequence[int], spectra: bool, told: bool) -> List[dict]:
    """All cells of the mixture `seed`: the error of each sampler."""
    rows = []
    for case in cases(seed, spectra, calls):
        asked = Told(case.model) if told and case.model.guidance is not None else case.model
        errors = {}
        for method, steps in quality.noise_free(case.process, case.calls):
            sigmas = quality.schedule(case.schedule, steps, case.calls)
            error = case.error(method.run(asked, case.start.clone(), sigmas, None, lambda preset: (np.inf, 0.0))).mean()
            errors[method.name] = float(min(error, LOST)) if np.isfinite(error) else LOST
        rows.append({**case.row, "errors": errors})
    return rows


def best_peer(errors: Dict[str, float]) -> str:
    """The name of the best that is not ours."""
    return min((name for name in errors if not name.startswith("ours")), key=errors.get)


def table(rows: List[dict], mixtures: int, spectra: bool = False, told: bool = False) -> str:
    """The default over the best peer, by calls, and over each of them."""
    mean = lambda values: f"{np.exp(np.mean(np.log(values))):.2f}"
    over = [row["errors"][OURS] / row["errors"][best_peer(row["errors"])] for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row["errors"]))
    peers = [name for name in names if not name.startswith("ours")]
    lines = [f"{mixtures} random mixtures{' of parts with spectra' * spectra}, {len(rows)} cells, {random_mixtures.POINTS} "
             f"starting points each, torch {torch.__version__}: the noise-free default"
             f"{', told what guidance adds,' * told} over the best of {len(peers)} others, picked after the fact in each "
             "cell.", "", "| calls | cells | within 5 % or better | geometric mean | largest | over ComfyUI's formulas |",
             "|---|---|---|---|---|---|"]
    for calls in (*dict.fromkeys(row["steps"] for row in rows), None):
        at = [i for i, row in enumerate(rows) if calls in (None, row["steps"])]
        part = np.array(over)[at]
        base = [rows[i]["errors"][OURS] / rows[i]["errors"][COMFYUI] for i in at]
        lines.append(f"| {calls or 'all'} | {len(at)} | {np.mean(part <= WORSE):.1%} | {mean(part)} | {part.max():.2f} | "
                     f"{mean(base)} |")
    lines += ["", "Each sampler by itself: in how many cells it is the best peer, its error over that of ComfyUI's formulas, "
              "and the default's over its.", "",
              "| sampler | cells | the best peer | over ComfyUI's | the default over it | at most 5 % worse | largest |",
              "|---|---|---|---|---|---|---|"]
    for name in names:
        held = [row["errors"] for row in rows if name in row["errors"]]
        ours = np.array([errors[OURS] / errors[name] for errors in held])
        first = sum(best_peer(errors) == name for errors in held)
        lines.append(f"| {name} | {len(held)} | {first} | {mean([e[name] / e[COMFYUI] for e in held])} | {mean(ours)} | "
                     f"{np.mean(ours <= WORSE):.1%} | {ours.max():.2f} |")
    return "\n".join(lines) + "\n"


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_peers", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=16, help="mixtures")
    parser.add_argument("--seed", type=int, default=1, help="of the first one; the others follow")
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS), help="model calls of a run")
    parser.add_argument("--spectra", action="store_true", help="mixtures whose parts have a deviation for each direction")
    parser.add_argument("--told", action="store_true", help="tell our presets what guidance adds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    own = (quality._code(Path(file).read_text(encoding="utf-8")) for file in (__file__, random_mixtures.__file__))
    stamp = quality._digest(quality._own_source(), quality._measuring_source(), *own, torch.__version__)
    how = f"{args.calls} / {stamp}" + " / spectra" * args.spectra + " / told" * args.told
    rows = measured(range(args.seed, args.seed + args.count), args.out / "random_peers.jsonl", how,
                    lambda seed: measure(seed, args.calls, args.spectra, args.told))
    command = quality.command_of("random_peers", parser, args, "count", "seed", "calls", "spectra", "told")
    text = f"    {command}\n\n" + table(rows, args.count, args.spectra, args.told)
    name = "random_peers" + "_spectra" * args.spectra + (f"_{args.seed}" if args.seed != 1 else "") + "_told" * args.told
    (args.out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
