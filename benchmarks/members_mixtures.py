"""Every member with noise on mixtures: the default against ComfyUI's formulas, at equal model calls.

    python -m benchmarks.members_mixtures [--steps N ...] [--guidance W ...] [--count N] [--out DIR]
    python -m benchmarks.members_mixtures --random N [--seed S] [--spectra] ...        on mixtures that nobody chose
    python -m benchmarks.members_mixtures --told ...                       told what guidance adds

The problems, schedules and exact laws are those of benchmarks/quality.py, which has ComfyUI's formulas of `sde_5` alone;
here every noise scale meets its own, from the same starts and with the same noise.  With --random the problems are the N
mixtures of benchmarks/random_mixtures.py from the seed S on, with --spectra those of its --spectra, on its schedules, under
the guidance that they were drawn with.
The figure is the squared Frechet distance to the member's law less that of exact samples of the same N (the excess), no less
than twice the floor's standard deviation: two cells below it count as equal.  A cell is worse where the excess is more than
5 % above ComfyUI's with the whole 95 % interval, a centred bootstrap over the starting points, the same in both.  `far` are
the pictures that end further from every component of the data than five deviations of the exact ones.  With --told the
default is told what guidance adds to the conditional D, as the hosts tell it, in all cells that have guidance.

A cell is a line of JSON in DIR, and a run takes up where the last one stopped.  DIR gets members_mixtures.md, that of
--random members_mixtures_random.md, or members_mixtures_spectra.md, with a seed other than 1 in its name, those of --told
with names that end in _told.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from tqdm import tqdm

import ersde
from tests.problems import Mixture

from . import quality, random_mixtures
from .members import MEMBERS
from .random_mixtures import Told
from .variables import WORSE

STEPS, GUIDANCE = (5, 6, 8, 10, 15, 20, 30, 50), (1.0, 4.0, 7.5)
SETTINGS = dataclasses.replace(quality.QUICK, count=768, reference=4, fine_steps=150, heavy_resamples=100)
FAR = 5.0


@dataclasses.dataclass(frozen=True)
class Cell:
    """A member on a problem, with a number of steps; told what guidance adds, or not."""

    problem: quality.Problem
    member: str
    eta: float
    steps: int
    told: bool = False

    @property
    def name(self) -> str:
        return f"{self.problem.label} / {self.member} eta {self.eta:g} / {self.steps} steps" + " / told" * self.told

    def presets(self) -> Tuple[ersde.Preset, ersde.Preset]:
        """Ours and ComfyUI's."""
        ours = ersde.Preset("ours", self.member, self.eta)
        return ours, dataclasses.replace(ours, name="comfyui", method="comfyui", corrector=False)

    def measure(self) -> dict:
        """The row of the cell."""
        problem, settings = self.problem, self.problem.settings
        law = problem.law(self.presets()[0])
        rows = quality._resamples(settings)[:settings.heavy_resamples]
        sigmas, start = quality.schedule(problem.schedule_name, self.steps, self.steps), problem.start()
        model, excess, again, far = Told(problem.model) if self.told else problem.model, [], [], []
        for preset in self.presets():
            noise = quality.PathNoise(start, settings.seed + 31)
            out = quality._run_preset(preset)(model, start.clone(), sigmas, noise, problem.window)
            excess.append(quality.frechet(out, law).item() - law.floor_frechet)
            again.append(quality.frechet(out, law, rows) - law.floor_frechet)
            far.append(int((quality.nearest(out, problem.source.means) > FAR * law.spread).sum()))
        over = quality.interval(excess[0] - WORSE * excess[1], again[0] - WORSE * again[1])
        least = 2 * law.floor_sd
        ratio = max(excess[0], least) / max(excess[1], least)
        return {"problem": problem.label, "guidance": problem.guidance or 1.0, "schedule": problem.schedule_name,
                "process": problem.process, "member": self.member, "eta": self.eta, "steps": self.steps,
                "count": settings.count, "told": self.told, "ours": excess[0], "comfyui": excess[1], "least": least,
                "ratio": ratio, "over": over, "worse": bool(ratio > WORSE and over[0] > 0), "far": far}


def cells(steps: Sequence[int] = STEPS, guidance: Sequence[float] = GUIDANCE, settings: quality.Settings = SETTINGS,
          told: bool = False) -> List[Cell]:
    """All of them, those of one problem side by side; told what guidance adds, those that have it."""
    problems = [quality.Problem(name, scale, process, kind, settings) for name, scale in quality.PROBLEMS
                if (scale or 1.0) in guidance for process, kinds in quality.SCHEDULES.items() for kind in kinds]
    return _of(problems, steps, told)


def random_cells(count: int, seed: int = 1, steps: Sequence[int] = STEPS,
                 settings: quality.Settings = SETTINGS, told: bool = False, spectra: bool = False) -> List[Cell]:
    """Those of `count` random mixtures, whose name has their seed and dimension."""
    what = "spectra" if spectra else "mixture"
    problems = [quality.Problem(f"{what} {one} of dimension {mixture[0].dim}", mixture[0].guidance, process, kind, settings,
                                mixture)
                for one in range(seed, seed + count) for process, kinds in random_mixtures.SCHEDULES.items()
                for mixture in [random_mixtures.mixture(one, process, spectra)] for kind in kinds]
    return _of(problems, steps, told)


def _of(problems: Sequence[quality.Problem], steps: Sequence[int], told: bool) -> List[Cell]:
    return [Cell(problem, member, eta, n, told) for problem, (member, eta), n in itertools.product(problems, MEMBERS, steps)
            if problem.guidance is not None or not told]


@functools.lru_cache(None)
def _source() -> str:
    own = (quality._code(Path(path).read_text(encoding="utf-8")) for path in (__file__, random_mixtures.__file__))
    return quality._digest(quality._own_source(), quality._measuring_source(), *own, torch.__version__)


def run(plan: Sequence[Cell], path: Path, quiet: bool = False) -> List[dict]:
    """The rows of the cells; those that the file lacks are measured and appended to it."""
    done, rows, before = quality.load(path, "key"), [], None
    with quality.appending(path) as file:
        for cell in tqdm(plan, disable=quiet, unit="cell"):
            if before is not None and before is not cell.problem:
                before._laws.clear()
            before = cell.problem
            key = f"{cell.name} / {quality._digest(repr(cell.problem.settings), _source())}"
            if key not in done:
                done[key] = {"key": key, **cell.measure()}
                file.write(json.dumps(done[key]) + "\n")
                file.flush()
            rows.append(done[key])
    return rows


def _part(name: str, rows: Sequence[dict]) -> str:
    ratio = np.array([row["ratio"] for row in rows])
    above = sum(max(row["ours"], row["comfyui"]) > row["least"] for row in rows)
    ours, theirs = np.sum([row["far"] for row in rows], axis=0)
    return (f"| {name} | {len(rows)} | {above} | {np.exp(np.log(ratio).mean()):.2f} | {np.mean(ratio <= WORSE):.1%} | "
            f"{sum(row['worse'] for row in rows)} | {ratio.max():.2f} | {ours} | {theirs} |")


def table(rows: Sequence[dict], command: str) -> str:
    """The Markdown text."""
    member = lambda row: row["member"] if row["eta"] == 1 else f"{row['member']}, eta {row['eta']:g}"
    parts: Dict[str, Optional[Callable[[dict], str]]] = {
        "all": None, "guidance": lambda row: f"guidance {row['guidance']:g}", "member": member,
        "schedule": lambda row: f"{row['process']}, {row['schedule']}", "steps": lambda row: f"{row['steps']} steps"}
    lines = ["# The members with noise on mixtures", "", f"    {command}", "",
             f"N = {rows[0]['count']} in each of {len(rows)} cells, float64; torch {torch.__version__}; the sources "
             f"have the digest {quality._own_source()}. The excess squared Frechet distance of the default over that of "
             "ComfyUI's formulas of the same member, both no less than what can be told from exact samples."
             + " The default is told what guidance adds." * rows[0]["told"], "",
             "| part | cells | above the floor | geometric mean | within 5 % or better | worse with the whole interval | "
             "largest | far, ours | far, ComfyUI's |", "|---|---|---|---|---|---|---|---|---|"]
    for name, of in parts.items():
        groups: Dict[str, List[dict]] = {}
        for row in rows:
            groups.setdefault(of(row) if of else name, []).append(row)
        lines += [_part(key, group) for key, group in groups.items()]
    worse = sorted((row for row in rows if row["worse"]), key=lambda row: -row["ratio"])
    lines += ["", f"Worse by more than 5 % with the whole interval: {len(worse)} of {len(rows)} cells.", ""]
    if worse:
        lines += ["| cell | member | steps | excess | ComfyUI's | ratio |", "|---|---|---|---|---|---|"]
        lines += [f"| {row['problem']} | {member(row)} | {row['steps']} | {row['ours']:.3g} | {row['comfyui']:.3g} | "
                  f"{row['ratio']:.2f} |" for row in worse]
    return "\n".join(lines).rstrip() + "\n"


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.members_mixtures", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="model calls of a run")
    parser.add_argument("--guidance", type=float, nargs="+", choices=GUIDANCE, metavar="W",
                        help="guidance scales; 1 is none (default: all)")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="on so many random mixtures")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="the first of these")
    parser.add_argument("--spectra", action="store_true", help="of --random: parts with a deviation for each direction")
    parser.add_argument("--told", action="store_true", help="tell the default what guidance adds; cells with guidance")
    parser.add_argument("--count", type=int, default=SETTINGS.count, help="starting points of a cell")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    args = parser.parse_args(argv)
    if args.random < 0 or (args.random and args.guidance):
        parser.error("--random: a count of mixtures, which have a guidance of their own; not with --guidance")
    if args.seed != 1 and not args.random:
        parser.error("--seed: of the mixtures of --random")
    if args.spectra and not args.random:
        parser.error("--spectra: of the mixtures of --random")
    if args.told and 1.0 in (args.guidance or ()):
        parser.error("--told: guidance 1 adds nothing")
    torch.set_num_threads(1)
    settings, name = dataclasses.replace(SETTINGS, count=args.count), "members_mixtures"
    if args.random:
        plan = random_cells(args.random, args.seed, args.steps, settings, args.told, args.spectra)
        name += ("_spectra" if args.spectra else "_random") + (f"_{args.seed}" if args.seed != 1 else "")
    else:
        plan = cells(args.steps, args.guidance or GUIDANCE, settings, args.told)
    if not plan:
        parser.error("--told: none of these mixtures has guidance")
    name += "_told" * args.told
    command = quality.command_of("members_mixtures", parser, args, "random", "seed", "spectra", "steps", "guidance", "told",
                                 "count")
    text = table(run(plan, args.out / "members_mixtures.jsonl"), command)
    (args.out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
