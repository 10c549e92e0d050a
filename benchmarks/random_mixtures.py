"""The noise-free default against ComfyUI's formulas on mixtures that nobody chose: drawn at random, as many as wanted.

    python -m benchmarks.random_mixtures [--count 16] [--seed 1] [--guided DIM] [--told] [--out DIR]
    python -m benchmarks.random_mixtures --spectra ...     of parts whose deviations fall by a power, as pictures' do

Dimension, number of parts, their places and widths, the guidance and the parts it points to are drawn; each mixture runs in
both processes, with 5 to 50 steps.  The figure of a cell is the mean over `POINTS` starting points of the RMS error to the
exact probability flow, over that of ComfyUI's formulas; its 95 % interval is by bootstrap over the starting points, the
same in both.  A mixture is a line of JSON in DIR, and a run takes up where the last one stopped.  With --guided only those
with guidance and of dimension DIM are taken, the next ones from the seed on.  With --told the default is told what guidance
adds to the conditional D, as the hosts tell it, on the mixtures that have guidance.  With --spectra a part has a deviation
for each direction, which fall by a power from first to last, in a basis of its own or of all parts.  The table of another
seed, of --guided, of --told and of --spectra has a file of its own.
"""
from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from tqdm import tqdm

import ersde
from tests.problems import Mixture, flow_exact

from . import quality

POINTS, EXACT_STEPS = 96, 800
SPECTRA_STEPS = 200         # of the exact flow of --spectra, whose D takes longer: by RK4 they are good to 1e-7
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


@dataclasses.dataclass
class Spectral(Mixture):
    """A Gaussian mixture whose parts have a deviation for each direction.

    Args:
        std: shape (components, dim).
        basis: the directions, orthonormal columns of shape (components, dim, dim).
    """

    basis: Optional[torch.Tensor] = None

    def _denoise(self, x, alpha, sigma, keep=None):
        keep = slice(None) if keep is None else keep
        means, std, basis, weights = (v.to(x)[keep] for v in (self.means, self.std, self.basis, self.weights))
        alpha, sigma = alpha[:, None], sigma[:, None]                       # (batch, 1, 1)
        along = torch.einsum("bkd,kde->bke", x[:, None] - alpha * means, basis)
        var = (alpha * std) ** 2 + sigma ** 2                               # (batch, components, dim)
        part = (weights.log() - 0.5 * (along ** 2 / var + var.log()).sum(2)).softmax(1)
        centres = means + torch.einsum("bke,kde->bkd", along * alpha * std ** 2 / var, basis)
        return (part[..., None] * centres).sum(1)

    def data(self, count, generator=None):
        pick = torch.multinomial(self.weights.double(), count, replacement=True, generator=generator)
        noise = self.std.double()[pick] * torch.randn(count, self.dim, generator=generator, dtype=torch.float64)
        out = self.means.double()[pick]
        for part, basis in enumerate(self.basis.double()):
            out[pick == part] += noise[pick == part] @ basis.T
        return out


def drawn(seed: int, spectra: bool = False) -> Dict[str, object]:
    """One mixture: its parts and its guidance."""
    rng = np.random.default_rng(seed)
    if spectra:
        return _drawn_spectra(rng)
    dim, parts = int(rng.choice([2, 4, 16, 48])), int(rng.integers(2, 16))
    guidance = None if rng.random() < 0.4 else float(rng.choice([2.0, 4.0, 7.5]))
    means = torch.tensor(rng.normal(size=(parts, dim)) * rng.choice([0.5, 1.0, 1.5]))
    std = torch.tensor(np.exp(rng.uniform(np.log(0.05), np.log(0.5), size=parts)))
    label = None if guidance is None else torch.arange(parts) < max(1, parts // 3)
    return {"means": means, "std": std, "guidance": guidance, "label": label}


def _drawn_spectra(rng: np.random.Generator) -> Dict[str, object]:
    """Of `Spectral`: the deviation along direction j is that of the first, over j to a power."""
    dim, parts, power = int(rng.choice([8, 32, 48])), int(rng.integers(1, 9)), rng.choice([0.5, 1.0, 1.5])
    guidance = None if rng.random() < 0.4 or parts == 1 else float(rng.choice([2.0, 4.0, 7.5]))
    means = torch.tensor(rng.normal(size=(parts, dim)) * rng.choice([0.3, 0.7, 1.0]))
    first = np.exp(rng.uniform(np.log(0.3), np.log(1.3), size=(parts, 1)))
    std = torch.tensor(np.maximum(first * np.arange(1, dim + 1) ** -power, 0.003))
    bases = [torch.linalg.qr(torch.tensor(rng.normal(size=(dim, dim))))[0] for _ in range(parts)]
    shared = rng.random() < 0.5
    label = None if guidance is None else torch.arange(parts) < max(1, parts // 3)
    return {"means": means, "std": std, "basis": torch.stack(bases[:1] * parts if shared else bases), "guidance": guidance,
            "label": label}


def mixture(seed: int, process: str, spectra: bool = False) -> Tuple[Mixture, Mixture]:
    """The denoiser of the mixture `seed`, and the mixture that its data comes from."""
    parts = drawn(seed, spectra)
    kind, label = Spectral if spectra else Mixture, parts["label"]
    source = {name: value if label is None else value[label] for name, value in parts.items()
              if name not in ("guidance", "label")}
    return kind(process=process, **parts), kind(process=process, **source)


def chosen(seed: int, guided: Optional[int]) -> bool:
    """Whether a mixture is taken: with a dimension `guided` only those of it that have guidance."""
    if guided is None:
        return True
    parts = drawn(seed)
    return parts["guidance"] is not None and parts["means"].shape[1] == guided


class Case(NamedTuple):
    """A mixture on a schedule of so many model calls: what is asked, from where, and the exact results."""

    process: str
    schedule: str
    calls: int
    model: Mixture
    start: torch.Tensor
    exact: torch.Tensor

    @property
    def row(self) -> Dict[str, object]:
        """What a line of JSON says of it."""
        return {"process": self.process, "schedule": self.schedule, "steps": self.calls, "dim": self.model.dim,
                "guidance": self.model.guidance or 1.0, "parts": len(self.model.means)}

    def error(self, out: torch.Tensor) -> np.ndarray:
        """The RMS error of each result."""
        return (out - self.exact).square().mean(1).sqrt().numpy()


def cases(seed: int, spectra: bool, calls: Sequence[int]) -> Iterator[Case]:
    """Those of the mixture `seed`."""
    for process, schedules in SCHEDULES.items():
        model, source = mixture(seed, process, spectra)
        for name in schedules:
            start = source.start(POINTS, quality.schedule(name, 2, 2)[0].item(), torch.Generator().manual_seed(seed))
            exact: Dict[int, torch.Tensor] = {}
            for n in calls:
                key = n if process == "flow" else 0         # of ve all runs end at the same sigma
                if key not in exact:
                    exact[key] = flow_exact(model, start, quality.schedule(name, n, n),
                                            SPECTRA_STEPS if spectra else EXACT_STEPS)
                yield Case(process, name, n, model, start, exact[key])


def measure(seed: int, told: bool = False, spectra: bool = False) -> List[dict]:
    """All cells of the mixture `seed`; told, if it has guidance, what that adds."""
    rows = []
    for case in cases(seed, spectra, STEPS):
        asked = Told(case.model) if told else case.model
        sigmas, error = quality.schedule(case.schedule, case.calls, case.calls), {}
        for method in ("exact", "comfyui"):
            error[method] = case.error(ersde.sample_preset(
                asked, case.start, sigmas, ersde.Preset(method, eta=0.0, method=method), disable=True, process=case.process,
                excess=getattr(asked, "excess", None)))
        again = np.random.default_rng(0).integers(POINTS, size=(1000, POINTS))
        low, high = np.quantile(error["exact"][again].mean(1) / error["comfyui"][again].mean(1), (0.025, 0.975))
        rows.append({**case.row, "comfyui": float(error["comfyui"].mean()), "low": float(low), "high": float(high),
                     "ratio": float(error["exact"].mean() / error["comfyui"].mean())})
    return rows


def measured(seeds: Iterable[int], path: Path, how: str, cells_of: Callable[[int], List[dict]]) -> List[dict]:
    """The cells of these mixtures; those of a mixture that `path` lacks are measured and appended to it as one line.

    Args:
        how: what the key of a line has beside the seed.
    """
    done, rows = quality.load(path, "key"), []
    with quality.appending(path) as file:
        for seed in tqdm(seeds, unit="mixture"):
            key = f"{seed} / {how}"
            if key not in done:
                done[key] = {"key": key, "cells": cells_of(seed)}
                file.write(json.dumps(done[key]) + "\n")
                file.flush()
            rows += done[key]["cells"]
    return rows


def table(rows: List[dict], mixtures: int, told: bool = False, spectra: bool = False) -> str:
    """Shares by number of steps, and the worst cells."""
    lines = [f"{mixtures} random mixtures{' of parts with spectra' * spectra}, {len(rows)} cells, {POINTS} starting points "
             f"each, torch {torch.__version__}: error of the noise-free default{', told what guidance adds,' * told} over "
             "that of ComfyUI's formulas.", "",
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
    parser.add_argument("--spectra", action="store_true", help="mixtures whose parts have a deviation for each direction")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    if args.spectra and args.guided:
        parser.error("--spectra: mixtures of dimensions of their own; not with --guided")
    seeds = list(itertools.islice((s for s in itertools.count(args.seed) if chosen(s, args.guided)), args.count))
    if args.told:
        seeds = [seed for seed in seeds if drawn(seed, args.spectra)["guidance"] is not None]
        if not seeds:
            parser.error("--told: none of these mixtures has guidance")
    torch.set_num_threads(1)
    own = quality._code(Path(__file__).read_text(encoding="utf-8"))
    how = quality._digest(quality._own_source(), own, torch.__version__) + " / told" * args.told + " / spectra" * args.spectra
    rows = measured(seeds, args.out / "random_mixtures.jsonl", how, lambda seed: measure(seed, args.told, args.spectra))
    text = table(rows, len(seeds), args.told, args.spectra)
    command = quality.command_of("random_mixtures", parser, args, "count", "seed", "guided", "told", "spectra")
    other = f"_guided_{args.guided}" if args.guided else f"_{args.seed}" if args.seed != 1 else ""
    other = "_spectra" * args.spectra + other + "_told" * args.told
    (args.out / f"random_mixtures{other}.md").write_text(f"    {command}\n\n{text}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
