"""Pictures of the trained network against real ones: ours and the peers at equal model calls, with guidance.

    python -m benchmarks.evaluate [--calls N ...] [--guidance W ...] [--process P ...] [--count N] [--filter REGEX] [--out DIR]
    torchrun --nproc_per_node 4 -m benchmarks.evaluate ...          the same on several processes or machines

The samplers are those of benchmarks/quality.py; the network is the demo's, `ve` on Karras' schedule (rho 7, sigma 80 to
0.01: at the 14.6 of Stable Diffusion the white paper still shows through the noise, and all samplers would start too dark),
`flow` on equal steps of time with shift 3.  A sampler with two calls a step has cells at odd counts alone.

The distances are taken in the 128 features of benchmarks/classifier.py, between N pictures of the sampler, the classes in
turn, and the pictures that the network was trained on, drawn as in its training (benchmarks/data.py), whose features lie in
benchmarks/weights/reference.safetensors, so that nothing is downloaded; `--reference` makes that file:

* Frechet distance of Gaussian fits (Heusel et al., arXiv 1706.08500), squared; it grows with a smaller N, so that only equal
  N compare, and `floor` is what N drawn training pictures have themselves;
* kernel distance (Binkowski et al., arXiv 1801.01401), the unbiased squared MMD of the kernel (x y / 128 + 1)^3, times 1000;
* precision and recall (Kynkaanniemi et al., arXiv 1904.06991), k = 3, real pictures: 54 of each class, as they are;
* the share of pictures that the classifier takes for their class.

Intervals are 95 % by bootstrap over seeds, centred as in quality.py (recall: over the real pictures).  Comparisons of two
samplers resample the same seeds in both.

Every picture is made from its seed alone: its class, its start and the noise of each step (`ersde.noise`).  Seeds go in
blocks of --block, each a batch of its own, because a matrix product may round otherwise in another batch: so 1, 2 or 4
processes make the same set, bit for bit on equal machines.  Each process appends its finished blocks to a file of its own in
DIR; a run takes up where the last one stopped, with any number of processes.  DIR gets evaluate.json, evaluate.md and plots.
"""
from __future__ import annotations

import argparse
import base64
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import re
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from ersde.demo.mixture import karras
from ersde.demo.network import CLASSES, SIZE, WEIGHTS
from ersde.noise import SeededNoise, philox_normal

from . import classifier, quality
from .network import Network

Tensor = torch.Tensor

PIXELS = 3 * SIZE * SIZE
CALLS, GUIDANCE, BLOCK = (4, 6, 8, 9, 10, 12, 15, 20, 30, 50), (1.0, 4.0), 64
SCHEDULES = {"ve": "karras 80 to 0.01", "flow": "shift 3"}
SHOWN = (r"^ours (sde_5|ode|few_steps|sde)$|^comfyui|^k-diffusion (euler|heun|euler_ancestral|dpmpp_(2m|2m_sde|3m_sde|sde))$"
         r"|^azula (zEAB order [23]|vAB order 2)$")
REFERENCE = classifier.WEIGHTS.with_name("reference.safetensors")
FORMAT = "ersde-reference-1"
RESAMPLES = 200
START = 1 << 32             # names the start in the noise: above the name of every sigma


# ------------------------------------------------------------------------------------------------------------- sampling

class SeedNoise:
    """A noise sampler (sigma, sigma_next) -> z: what `ersde.noise` draws for each picture's seed and the step's sigma.

    A second question with the same start that reaches further (dpmpp_sde asks for half a step, then for the whole) contains
    the first increment, as k-diffusion's own Brownian tree has it: increments of a path in sigma over their deviation.
    """

    def __init__(self, x: Tensor, seeds: Sequence[int]):
        self.draw, self.last = SeededNoise(x, list(seeds)), None

    def __call__(self, sigma, sigma_next) -> Tensor:
        sigma, sigma_next = float(sigma), float(sigma_next)
        out = self.draw(sigma)
        if self.last and abs(self.last[0] - sigma) < 1e-9 * sigma and sigma_next < self.last[1]:
            half = self.last[1]
            out = (out * (sigma - half) ** 0.5 + self.draw(half) * (half - sigma_next) ** 0.5) / (sigma - sigma_next) ** 0.5
        else:
            self.last = (sigma, sigma_next)
        return out


@dataclasses.dataclass(frozen=True)
class Cell:
    """One sampler with a number of model calls, under a process and a guidance."""

    process: str
    guidance: float
    calls: int
    method: quality.Method

    @property
    def name(self) -> str:
        """What it is called in files and tables."""
        return f"{self.process} / guidance {self.guidance:g} / {self.calls} calls / {self.method.name}"

    def sigmas(self, steps: int, calls: int) -> Tensor:
        """Shape (steps + 1,); the same range for all samplers with as many calls."""
        return karras(steps, 80.0, 0.01) if self.process == "ve" else quality.schedule(SCHEDULES["flow"], steps, calls)

    def window(self, preset) -> Tuple[float, float]:
        """A preset's stochastic window as sigmas: its parts of a schedule of 1000 steps."""
        dense = self.sigmas(1000, 1000)[:-1].numpy()
        at = lambda part: float(np.interp(part, np.linspace(0, 1, len(dense)), dense))
        return (np.inf if preset.start == 0 else at(preset.start)), (0.0 if preset.end == 1 else at(preset.end))

    def pictures(self, seeds: Sequence[int]) -> Tensor:
        """The pictures of these seeds as one batch, shape (seeds, 3, SIZE, SIZE), float64."""
        labels = torch.tensor([seed % len(CLASSES) for seed in seeds])
        model = Network(self.process, self.guidance, labels)
        sigmas = self.sigmas(self.method.steps(self.calls), self.calls)
        start = torch.from_numpy(np.stack([philox_normal(seed, 0, START, PIXELS) for seed in seeds])).double()
        x = start * sigmas[0]
        out = self.method.run(model, x, sigmas, SeedNoise(x, seeds), self.window)
        if model.calls != self.calls:
            raise RuntimeError(f"{self.name} made {model.calls} model calls")
        return out.reshape(-1, 3, SIZE, SIZE)


@functools.lru_cache(None)
def _judge() -> classifier.Classifier:
    return classifier.load_classifier()


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@functools.lru_cache(None)
def _sampling_source() -> str:
    """Of what a block depends on beside its cell: this code, the weights, torch."""
    code = (quality._code(inspect.getsource(part)) for part in (SeedNoise, Cell, Network, philox_normal))
    return quality._digest(*code, *(_file_digest(path) for path in (WEIGHTS / "ve.safetensors", WEIGHTS / "flow.safetensors",
                                                                    classifier.WEIGHTS)), torch.__version__)


def key_of(cell: Cell, seeds: Sequence[int]) -> str:
    """A block's name: of everything that its pictures depend on."""
    return quality._digest(cell.name, cell.method.source, f"{seeds[0]} to {seeds[-1]}", _sampling_source())


def block_row(cell: Cell, seeds: Sequence[int]) -> dict:
    """Samples one block; its line in the file: the features (float16, base64) and a digest of the pictures' bytes."""
    pictures = cell.pictures(seeds).float()
    row = {"key": key_of(cell, seeds), "cell": cell.name, "seeds": [seeds[0], seeds[-1]]}
    if not pictures.isfinite().all():
        return {**row, "diverged": True}
    shown = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte()
    features = _judge().features(pictures).half()
    return {**row, "pictures": hashlib.sha256(shown.numpy().tobytes()).hexdigest(),
            "features": base64.b64encode(features.numpy().tobytes()).decode()}


def features_of(row: dict) -> Optional[np.ndarray]:
    """The features of a block, shape (seeds, FEATURES), float16; None where the sampler diverged."""
    if row.get("diverged"):
        return None
    return np.frombuffer(base64.b64decode(row["features"]), dtype="<f2").reshape(-1, classifier.FEATURES)


# ------------------------------------------------------------------------------------------------------------ processes

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _everyone(value) -> list:
    """The value of each process."""
    if world() == 1:
        return [value]
    out = [None] * world()
    dist.all_gather_object(out, value)
    return out


def held(folder: Path) -> Dict[str, dict]:
    """key -> row of all blocks in a folder, whatever processes made them."""
    rows: Dict[str, dict] = {}
    for path in sorted(folder.glob("evaluate_rank*.jsonl")):
        rows.update(quality.load(path, "key"))
    return rows


def sample(items: Sequence[Tuple[Cell, Sequence[int]]], folder: Path, quiet: bool = False) -> Tuple[Dict[str, dict], int]:
    """Makes the blocks that no process has yet, each on one of them, and brings all of them to the first process.

    Returns:
        key -> row of all items (on the first process), and how many blocks this process made now.
    """
    here = held(folder)
    wanted = {key_of(cell, seeds): (cell, seeds) for cell, seeds in items}
    has = _everyone(sorted(here.keys() & wanted.keys()))
    somewhere = set().union(*has)
    missing = [item for key, item in wanted.items() if key not in somewhere][rank()::world()]
    made: List[dict] = []
    with quality.appending(folder / f"evaluate_rank{rank()}.jsonl") as file:
        cost = lambda cell, seeds: cell.calls * len(seeds) * (1 if cell.guidance == 1 else 2)
        bar = tqdm(total=sum(cost(*item) for item in missing), disable=quiet or rank() > 0, unit="call", unit_scale=True)
        for cell, seeds in missing:
            bar.set_postfix_str(cell.name, refresh=False)
            row = block_row(cell, seeds)
            file.write(json.dumps(row) + "\n")
            file.flush()
            made.append(row)
            bar.update(cost(cell, seeds))
        bar.close()
    # Where the processes share no folder, the first one gets what it lacks.
    lent = made if rank() else []
    lent = lent + [here[key] for key in has[rank()] if key not in has[0]]
    rows = {**here, **{row["key"]: row for row in made}}
    for part in _everyone(lent):
        rows.update({row["key"]: row for row in part})
    if rank() == 0 and world() > 1:
        written = held(folder)
        with quality.appending(folder / "evaluate_rank0.jsonl") as file:
            for key, row in rows.items():
                if key in wanted and key not in written:
                    file.write(json.dumps(row) + "\n")
    return {key: rows[key] for key in wanted if key in rows}, len(made)


# -------------------------------------------------------------------------------------------------------------- metrics

@dataclasses.dataclass
class Reference:
    """The training pictures in features.

    Attributes:
        mean, root: of 20,000 draws, the root of their covariance; float64.
        draws: (4096, FEATURES) of them, float64, for the kernel distance and the floor.
        real: (540, FEATURES), 54 plain pictures of each class, for precision and recall.
        digest: of the file.
    """

    mean: Tensor
    root: Tensor
    draws: Tensor
    real: Tensor
    digest: str

    def __post_init__(self):
        kernel = _kernel(self.draws, self.draws)
        count = len(kernel)
        self.within = ((kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1))).item()
        self.radii = _radii(self.real)

    @functools.lru_cache(None)
    def floor(self, count: int) -> Tuple[float, float]:
        """Mean and standard deviation of the Frechet distance of `count` drawn training pictures."""
        parts = self.draws.split(count) if count <= len(self.draws) else (self.draws,)
        values = torch.stack([quality.frechet(part, self) for part in parts if len(part) == min(count, len(self.draws))])
        return values.mean().item(), (values.std().item() if len(values) > 1 else float("nan"))

    def __hash__(self):
        return id(self)


def make_reference(path: Path = REFERENCE) -> None:
    """Write the reference from the training pictures (benchmarks/data.py), whole or not at all."""
    from safetensors.torch import save

    from . import data

    pictures, generator, judge = data.load("train"), torch.Generator().manual_seed(0), _judge()
    draws = torch.cat([judge.features(pictures.batch(500, generator)[0]) for _ in range(40)]).double()
    order = torch.randperm(len(pictures.labels), generator=generator)
    plain, least = pictures.plain(), min(int((pictures.labels == k).sum()) for k in range(len(CLASSES)))
    real = torch.cat([order[pictures.labels[order] == k][:least] for k in range(len(CLASSES))])
    state = {"mean": draws.mean(0).float(), "covariance": draws.T.cov().float(), "draws": draws[:4096].half(),
             "real": judge.features(plain[real]).half()}
    about = {"format": FORMAT, "classifier": _file_digest(classifier.WEIGHTS), "draws": len(draws),
             "pictures": len(pictures.labels), "data": f"{data.PACKAGE} {data.VERSION}"}
    part = path.with_name(path.name + ".part")
    part.write_bytes(save({name: value.contiguous() for name, value in state.items()},
                          metadata={classifier.KEY: json.dumps(about)}))
    os.replace(part, path)


def load_reference(path: Path = REFERENCE) -> Reference:
    """The reference; ValueError where it was made with another classifier."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get(classifier.KEY, "{}"))
        if about.get("format") != FORMAT or about.get("classifier") != _file_digest(classifier.WEIGHTS):
            raise ValueError(f"{path} is not of this classifier: python -m benchmarks.evaluate --reference makes it again")
        state = {name: file.get_tensor(name).double() for name in file.keys()}
    values, vectors = torch.linalg.eigh(state["covariance"])
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return Reference(state["mean"], root, state["draws"], state["real"], _file_digest(path))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _radii(x: Tensor, k: int = 3) -> Tensor:
    """The distance of each row to its k-th neighbour among the others."""
    return torch.cdist(x, x).kthvalue(k + 1, 1).values


def kernel_distance(x: Tensor, reference: Reference, weights: Optional[Tensor] = None) -> Tensor:
    """Unbiased squared MMD between the rows of x and the reference's draws.

    Args:
        x: (count, FEATURES), float64.
        weights: (resamples, count), how often each row is in a resample; None: once each.
            A pair of a row with itself does not count, however often the row is in the resample.

    Returns:
        Shape (resamples,), or () for None.
    """
    w = torch.ones(1, len(x), dtype=x.dtype) if weights is None else weights.to(x.dtype)
    own = _kernel(x, x)
    own.fill_diagonal_(0)
    pairs = w.sum(1) ** 2 - (w ** 2).sum(1)
    cross = (w @ _kernel(x, reference.draws).mean(1)) / w.sum(1)
    out = ((w @ own) * w).sum(1) / pairs + reference.within - 2 * cross
    return out[0] if weights is None else out


def precision_recall(x: Tensor, reference: Reference) -> Tuple[Tensor, Tensor]:
    """Which rows of x lie in a ball of a real picture, which real pictures in a ball of x; each ball reaches the third
    neighbour of its own kind.  Float, shapes (count,) and (540,)."""
    apart = torch.cdist(x, reference.real)
    return ((apart <= reference.radii).any(1).double(), (apart <= _radii(x)[:, None]).any(0).double())


def resamples(count: int, of: int = RESAMPLES) -> Tensor:
    """Indices (of, count) of bootstrap samples, the same for all cells of as many pictures."""
    return torch.randint(count, (of, count), generator=torch.Generator().manual_seed(41))


def measure(features: np.ndarray, labels: Tensor, reference: Reference) -> dict:
    """All metrics of one cell: {name: {"value", "interval"}}, and the resampled distances for comparisons."""
    x = torch.from_numpy(features.astype(np.float64))
    count = len(x)
    rows = resamples(count)
    weights = torch.zeros(len(rows), count, dtype=torch.float64).scatter_add_(1, rows, torch.ones_like(rows, dtype=torch.float64))
    numbers = lambda value, resampled: {"value": value, "interval": quality.interval(value, resampled)}
    frechet = torch.cat([quality.frechet(x, reference, some) for some in rows.split(max(1, (1 << 15) // count))])
    kernel = 1000 * kernel_distance(x, reference, weights)
    precise, recalled = precision_recall(x, reference)
    right = (_judge().last(x.float()).argmax(1) == labels).double()
    real = resamples(len(recalled))
    return {"count": count, "frechet": numbers(quality.frechet(x, reference).item(), frechet),
            "kernel": numbers(1000 * kernel_distance(x, reference).item(), kernel),
            "precision": numbers(precise.mean().item(), precise[rows].mean(1)),
            "recall": numbers(recalled.mean().item(), recalled[real].mean(1)),
            "class": numbers(right.mean().item(), right[rows].mean(1)),
            "resampled": {"frechet": [round(v, 6) for v in frechet.tolist()], "kernel": [round(v, 6) for v in kernel.tolist()]}}


def ratio(one: dict, other: dict, what: str = "frechet", floor: float = 0.0) -> dict:
    """(one - floor) / (other - floor) of a distance and its 95 % interval over the seeds, the same ones in both.

    Resampling adds a bias to each distance, which is taken off before they are divided.
    """
    a, b = one[what]["value"] - floor, other[what]["value"] - floor
    free = [np.array(cell["resampled"][what]) for cell in (one, other)]
    x, y = (values - values.mean() + value for values, value in zip(free, (a, b)))
    low, high = np.quantile(x / np.maximum(y, 1e-9), (0.025, 0.975))
    value = a / b
    return {"value": value, "interval": [min(low, value), max(high, value)]}


# ------------------------------------------------------------------------------------------------------------- commands

def plan(processes: Sequence[str], guidance: Sequence[float], calls: Sequence[int], chosen: str) -> List[Cell]:
    """The cells of the samplers whose name `chosen` finds; those that cannot be (odd calls, flow) are left out."""
    return [Cell(process, float(scale), n, method) for process in processes for scale in guidance for n in calls
            for method in quality.methods() if re.search(chosen, method.name) and method.steps(n)
            and (method.flow or process == "ve")]


def blocks(count: int, size: int) -> List[Sequence[int]]:
    """The seeds 0 to count - 1 in blocks; the last one may be smaller."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def main(argv=None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS), metavar="N", help="model calls of a run")
    parser.add_argument("--guidance", type=float, nargs="+", default=list(GUIDANCE), metavar="W")
    parser.add_argument("--process", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES), metavar="P")
    parser.add_argument("--count", type=int, default=512, help="pictures of a cell")
    parser.add_argument("--block", type=int, default=BLOCK, help="seeds of a batch; another size is another set, to rounding")
    parser.add_argument("--filter", default=SHOWN, metavar="REGEX", help="samplers whose name it finds ('' for all)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evaluate"), help="folder of the results")
    parser.add_argument("--sample", action="store_true", help="sample only, no report")
    parser.add_argument("--reference", action="store_true", help="make the file of the real pictures' features, and end")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.reference:
        make_reference()
        return 0
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    cells = plan(args.process, args.guidance, args.calls, args.filter)
    items = [(cell, seeds) for seeds in blocks(args.count, args.block) for cell in cells]
    rows, made = sample(items, args.out)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
