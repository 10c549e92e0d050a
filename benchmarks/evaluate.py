"""Pictures of the trained network against real ones: ours and the peers at equal model calls, with guidance.

    python -m benchmarks.evaluate [--calls N ...] [--guidance W ...] [--process P ...] [--count N] [--filter REGEX]
    torchrun --nproc_per_node 4 -m benchmarks.evaluate ...          the same on several processes or machines

The samplers are those of benchmarks/quality.py; the network is the demo's, `ve` on Karras' schedule (rho 7, sigma 80 to
0.01: at the 14.6 of Stable Diffusion the white paper still shows through the noise, and all samplers would start too dark),
`flow` on equal steps of time with shift 3.  Our presets are told what guidance adds (`excess` of `ersde.sample_preset`), as
the hosts tell them.  A sampler with two calls a step has cells at odd counts alone.

The distances are taken in the 128 features of benchmarks/classifier.py, between N pictures of the sampler, the classes in
turn, and the pictures that the network was trained on, drawn as in its training (benchmarks/data.py), whose features lie in
benchmarks/weights/reference.safetensors, so that nothing is downloaded; `--reference` makes that file:

* Frechet distance of Gaussian fits (Heusel et al., arXiv 1706.08500), squared; it grows with a smaller N, so that only equal
  N compare, and `floor` is what N drawn training pictures have themselves;
* kernel distance (Binkowski et al., arXiv 1801.01401), the unbiased squared MMD of the kernel (x y / 128 + 1)^3, times 1000;
* precision and recall (Kynkaanniemi et al., arXiv 1904.06991), k = 3, real pictures: 54 of each class, as they are;
* the share of pictures that the classifier takes for their class.

Intervals are 95 % by bootstrap over the seeds of each class, centred as in quality.py (recall: over the real pictures).
Comparisons of two samplers resample the same seeds in both.

Every picture is made from its seed alone: its class, its start and the path of its noise (`ersde.noise`).  Seeds go in
blocks of --block, each a batch of its own, because a matrix product may round otherwise in another batch: so 1, 2 or 4
processes make the same set, bit for bit on equal machines.  Each process appends its finished blocks to a file of its own in
DIR; a run takes up where the last one stopped, with any number of processes.  At the end the first one measures, in as many
threads.  DIR gets evaluate.json, evaluate.md and plots.
"""
from __future__ import annotations

import argparse
import base64
import bisect
import dataclasses
import datetime
import functools
import hashlib
import inspect
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from ersde.demo import trained
from ersde.demo.network import CLASSES, SIZE, WEIGHTS
from ersde.noise import philox_normal, step_key
from ersde.noise_scale import get_noise_scale
from ersde.process import get_process

from . import classifier, quality
from .network import Network

Tensor = torch.Tensor

PIXELS = 3 * SIZE * SIZE
CALLS, GUIDANCE, BLOCK = (4, 6, 8, 9, 10, 12, 15, 20, 30, 50), (1.0, 4.0), 64
SCHEDULES = {"ve": "karras 80 to 0.01", "flow": "shift 3"}
SHOWN = (r"^ours (sde_5|ode|few_steps|sde)$|^comfyui|^k-diffusion (euler|heun|euler_ancestral|dpmpp_(2m|2m_sde|3m_sde|sde))$"
         r"|^azula (zEAB order [23]|vAB order 2)$")
REFERENCE = classifier.WEIGHTS.with_name("reference.safetensors")
FORMAT = "ersde-reference-2"
RESAMPLES = 200
NODES = 32
START = trained.START       # names the start in the noise, and the names after it the nodes


# ------------------------------------------------------------------------------------------------------------- sampling

class SeedNoise:
    """A noise sampler (sigma, sigma_next) -> z for each picture's seed: increments of one path W over their deviation.

    The path runs in the clock T = g^(-2 eta) of the member that the sampler converges to (`ersde.noise.BrownianNoise`), so
    that runs with more and with fewer calls follow the same path and can be compared seed by seed.  W is known at `NODES`
    points of the schedule from unit normals of the seed, and a point between two known ones gets

        W = W_a + share (W_b - W_a) + sqrt(share (1 - share) (T_b - T_a)) xi,     share = (T - T_a) / (T_b - T_a),

    with xi of the seed and the point's sigma: what a Brownian path has, exactly.  Steps that do not overlap are independent,
    and a second question with the same start that reaches further (dpmpp_sde asks for half a step, then for the whole)
    contains the first increment.

    Args:
        x: the state, shape (batch, pixels).
        seeds: one for each picture, a range.
        clock: sigma -> T, falling.
        nodes: sigmas, falling, from the schedule's first to its last above 0.
    """

    def __init__(self, x: Tensor, seeds: Sequence[int], clock: Callable[[float], float], nodes: Sequence[float]):
        self.x, self.seeds, self.clock, self.points, self.path = x, seeds, clock, [], []
        total = torch.zeros(x.shape, dtype=torch.float64)
        for at, sigma in enumerate(nodes):
            if at:
                total = total + (clock(sigma) - self.points[-1]) ** 0.5 * of_nodes(seeds, len(nodes), x.shape[1])[at]
            self.points.append(clock(sigma))
            self.path.append(total)

    def at(self, sigma: float) -> Tensor:
        """W at a sigma within the nodes."""
        time = min(max(self.clock(sigma), self.points[0]), self.points[-1])
        place = bisect.bisect_left(self.points, time)
        if self.points[place] == time:
            return self.path[place]
        before, after = self.points[place - 1], self.points[place]
        share = (time - before) / (after - before)
        value = torch.lerp(self.path[place - 1], self.path[place], share)
        value += (share * (1 - share) * (after - before)) ** 0.5 * normals(self.seeds, step_key(sigma), self.x.shape[1])
        self.points.insert(place, time)
        self.path.insert(place, value)
        return value

    def __call__(self, sigma, sigma_next) -> Tensor:
        sigma, sigma_next = float(sigma), float(sigma_next)
        step = self.at(sigma_next) - self.at(sigma)
        elapsed = self.clock(sigma_next) - self.clock(sigma)
        # A step in which the clock stands (the ODE, or none of the member's noise) has noise that nothing multiplies.
        return (step / elapsed ** 0.5 if elapsed > 0 else step).to(self.x)


def normals(seeds: Sequence[int], name: int, count: int) -> Tensor:
    """Standard normal numbers of each seed's stream `name` (`ersde.noise`), shape (seeds, count), float64."""
    return torch.from_numpy(np.stack([philox_normal(seed, 0, name, count) for seed in seeds])).double()


@functools.lru_cache(1)
def of_nodes(seeds: Sequence[int], nodes: int, count: int) -> List[Tensor]:
    """The normals of the start (the first) and of the nodes, kept while the cells of a block are run; seeds: a range."""
    return [normals(seeds, START + at, count).float() for at in range(nodes)]


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

    def clock(self, sigma: float) -> float:
        """T of `SeedNoise`."""
        log_g = get_noise_scale(self.method.preset.noise_scale).log_g_array(get_process(self.process).lam([sigma]))
        return float(np.exp(-2 * self.method.preset.eta * log_g[0]))

    def nodes(self) -> List[float]:
        """Those of `SeedNoise`."""
        return trained.schedule(self.process, NODES)[:-1].tolist()

    def pictures(self, seeds: Sequence[int], device: str = "cpu") -> Tensor:
        """The pictures of these seeds, a range, as one batch, shape (seeds, 3, SIZE, SIZE), float64."""
        labels = torch.tensor([seed % len(CLASSES) for seed in seeds])
        model = Network(self.process, self.guidance, labels, device, apart=True)
        sigmas = trained.schedule(self.process, self.method.steps(self.calls), self.calls)
        x = (of_nodes(seeds, NODES, PIXELS)[0].double() * sigmas[0]).to(device)
        noise = SeedNoise(x, seeds, self.clock, self.nodes()) if self.method.noisy else None
        out = self.method.run(model, x, sigmas.to(device), noise, lambda preset: trained.window(self.process, preset))
        if model.calls != self.calls:
            raise RuntimeError(f"{self.name} made {model.calls} model calls")
        return out.reshape(-1, 3, SIZE, SIZE)


@functools.lru_cache(None)
def _judge(device: str = "cpu") -> classifier.Classifier:
    return classifier.load_classifier(device=device)


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@functools.lru_cache(None)
def _sampling_source() -> str:
    """Of what a block depends on beside its cell: this code, the weights, torch."""
    code = (quality._code(inspect.getsource(part)) for part in (SeedNoise, normals, of_nodes, Cell, Network, philox_normal))
    weights = (_file_digest(path) for path in (WEIGHTS / "ve.safetensors", WEIGHTS / "flow.safetensors", classifier.WEIGHTS))
    return quality._digest(*code, *weights, torch.__version__, str(NODES), inspect.getsource(trained.schedule))


def key_of(cell: Cell, seeds: Sequence[int], device: str = "cpu") -> str:
    """A block's name: of everything that its pictures depend on."""
    return quality._digest(cell.name, cell.method.source, f"{seeds[0]} to {seeds[-1]}", _sampling_source(), device)


def block_row(cell: Cell, seeds: Sequence[int], device: str = "cpu") -> dict:
    """Samples one block; its line in the file: the features (float16, base64) and a digest of the pictures' bytes."""
    pictures = cell.pictures(seeds, device).float()
    row = {"key": key_of(cell, seeds, device), "cell": cell.name, "seeds": [seeds[0], seeds[-1]]}
    if not pictures.isfinite().all():
        return {**row, "diverged": True}
    shown = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    features = _judge(device).features(pictures).half().cpu()
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


def _everyone(value, first: bool = False) -> list:
    """The value of each process; with `first`, on the first one alone."""
    if world() == 1:
        return [value]
    out = [None] * world()
    if not first:
        dist.all_gather_object(out, value)
        return out
    dist.gather_object(value, out if rank() == 0 else None)
    return out if rank() == 0 else []


def held(folder: Path) -> Dict[str, dict]:
    """key -> row of all blocks in a folder, whatever processes made them."""
    rows: Dict[str, dict] = {}
    for path in sorted(folder.glob("evaluate_rank*.jsonl")):
        rows.update(quality.load(path, "key"))
    return rows


def sample(items: Sequence[Tuple[Cell, Sequence[int]]], folder: Path, quiet: bool = False,
           device: str = "cpu") -> Tuple[Dict[str, dict], int]:
    """Makes the blocks that no process has yet, each on one of them, and brings all of them to the first process.

    Returns:
        key -> row of all items (on the first process), and how many blocks this process made now.
    """
    here = held(folder)
    wanted = {key_of(cell, seeds, device): (cell, seeds) for cell, seeds in items}
    has = _everyone(sorted(here.keys() & wanted.keys()))
    somewhere = set().union(*has)
    missing = [item for key, item in wanted.items() if key not in somewhere][rank()::world()]
    made: List[dict] = []
    with quality.appending(folder / f"evaluate_rank{rank()}.jsonl") as file:
        cost = lambda cell, seeds: cell.calls * len(seeds) * (1 if cell.guidance == 1 else 2)
        bar = tqdm(total=sum(cost(*item) for item in missing), disable=quiet or rank() > 0, unit="call", unit_scale=True)
        for cell, seeds in missing:
            bar.set_postfix_str(cell.name, refresh=False)
            row = block_row(cell, seeds, device)
            file.write(json.dumps(row) + "\n")
            file.flush()
            made.append(row)
            bar.update(cost(cell, seeds))
        bar.close()
    # Where the processes share no folder, the first one gets what it lacks.
    lent = made if rank() else []
    lent = lent + [here[key] for key in has[rank()] if key not in has[0]]
    rows = {**here, **{row["key"]: row for row in made}}
    for part in _everyone(lent, first=True):
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
        mean, root: of 20,000 draws, 2000 of each class, the root of their covariance; float64.
        draws: (4000, FEATURES) of them, float64, the classes in turn, for the kernel distance and the floor.
        real: (540, FEATURES), 54 plain pictures of each class, for precision and recall.
        digest: of the file.
    """

    mean: Tensor
    root: Tensor
    draws: Tensor
    real: Tensor
    digest: str

    def __post_init__(self):
        self.within = pair_mean(cubic(self.draws, self.draws), torch.ones(1, len(self.draws), dtype=torch.float64)).item()
        self.radii = _radii(self.real)

    @functools.lru_cache(None)
    def floor(self, count: int) -> Tuple[float, float]:
        """Mean and standard deviation of the Frechet distance of `count` drawn training pictures, the classes in turn."""
        size = min(count, len(self.draws))
        starts = range(0, len(self.draws) - size + 1, -(-size // len(CLASSES)) * len(CLASSES))
        values = torch.stack([quality.frechet(self.draws[start:start + size], self) for start in starts])
        return values.mean().item(), (values.std().item() if len(values) > 1 else float("nan"))

    def __hash__(self):
        return id(self)


def make_reference(path: Path = REFERENCE) -> None:
    """Write the reference from the training pictures (benchmarks/data.py), whole or not at all."""
    from safetensors.torch import save

    from . import data

    pictures, generator, judge = data.load("train"), torch.Generator().manual_seed(0), _judge()
    drawn = [pictures.batch(500, generator) for _ in range(48)]
    labels = torch.cat([some for _, some in drawn])
    found = torch.cat([judge.features(some) for some, _ in drawn]).double()
    draws = torch.stack([found[labels == k][:2000] for k in range(len(CLASSES))], 1).flatten(0, 1)
    order = torch.randperm(len(pictures.labels), generator=generator)
    plain, least = pictures.plain(), min(int((pictures.labels == k).sum()) for k in range(len(CLASSES)))
    real = torch.cat([order[pictures.labels[order] == k][:least] for k in range(len(CLASSES))])
    state = {"mean": draws.mean(0).float(), "covariance": draws.T.cov().float(), "draws": draws[:4000].half(),
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
    return Reference(state["mean"], quality.root_of(state["covariance"]), state["draws"], state["real"], _file_digest(path))


_reference = functools.lru_cache(None)(load_reference)


def cubic(x: Tensor, y: Tensor) -> Tensor:
    """The kernel (x y / features + 1)^3 of each row with each, (len(x), len(y)); Binkowski et al., arXiv 1801.01401."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def _radii(x: Tensor, k: int = 3) -> Tensor:
    """The distance of each row to its k-th neighbour among the others."""
    return torch.cdist(x, x).kthvalue(k + 1, 1).values


def pair_mean(kernel: Tensor, weights: Tensor) -> Tensor:
    """The mean of a kernel over pairs of rows, each class with each class alike, the classes in turn in the rows.

    As many of each class are in them, so that a plain mean over the pairs of different rows would have too few of one class.
    A row with itself is no pair, however often it is in a resample.

    Args:
        kernel: (count, count), of each row with each; its diagonal is written over.
        weights: (resamples, count), how often each row is in a resample.

    Returns:
        Shape (resamples,).
    """
    kernel.fill_diagonal_(0)
    label = torch.arange(len(kernel)) % len(CLASSES)
    of = [torch.nonzero(label == k)[:, 0] for k in range(min(len(CLASSES), len(kernel)))]
    out = []
    for at, one in enumerate(of):
        w = weights[:, one]
        for other in of[:at + 1]:
            v = weights[:, other]
            pairs = w.sum(1) * v.sum(1) - ((w * w).sum(1) if one is other else 0)
            mean = ((w @ kernel[one][:, other]) * v).sum(1) / pairs.clamp(min=1)
            out.append(mean if one is other else 2 * mean)
    return torch.stack(out).sum(0) / len(of) ** 2


def kernel_distance(x: Tensor, reference: Reference, weights: Optional[Tensor] = None) -> Tensor:
    """Unbiased squared MMD between the rows of x, the classes in turn, and the reference's draws.

    Args:
        x: (count, FEATURES), float64.
        weights: (resamples, count), how often each row is in a resample; None: once each.

    Returns:
        Shape (resamples,), or () for None.
    """
    w = torch.ones(1, len(x), dtype=x.dtype) if weights is None else weights.to(x.dtype)
    cross = (w @ cubic(x, reference.draws).mean(1)) / w.sum(1)
    out = pair_mean(cubic(x, x), w) + reference.within - 2 * cross
    return out[0] if weights is None else out


def precision_recall(x: Tensor, reference: Reference) -> Tuple[Tensor, Tensor]:
    """Which rows of x lie in a ball of a real picture, which real pictures in a ball of x; each ball reaches the third
    neighbour of its own kind.  Float, shapes (count,) and (540,)."""
    apart = torch.cdist(x, reference.real)
    return ((apart <= reference.radii).any(1).double(), (apart <= _radii(x)[:, None]).any(0).double())


def resamples(count: int, of: int = RESAMPLES) -> Tensor:
    """Indices (of, count) of bootstrap samples within each class, as the seeds have the classes in turn.

    The same for all cells of as many pictures.
    """
    step, place = len(CLASSES), torch.arange(count)
    size = (count - 1 - place % step) // step + 1          # of the place's class
    u = torch.rand(of, count, generator=torch.Generator().manual_seed(41), dtype=torch.float64)
    return (u * size).long() * step + place % step


def how_often(rows: Tensor) -> Tensor:
    """How often each row is in each resample: (resamples, count), float64, of indices of that shape."""
    return torch.zeros(rows.shape, dtype=torch.float64).scatter_add_(1, rows, torch.ones(rows.shape, dtype=torch.float64))


def measure(features: np.ndarray, labels: Tensor, reference: Reference) -> dict:
    """All metrics of one cell: {name: {"value", "interval"}}, and the resampled distances for comparisons."""
    x = torch.from_numpy(features.astype(np.float64))
    count = len(x)
    rows = resamples(count)
    weights = how_often(rows)
    numbers = lambda value, resampled: {"value": value, "interval": quality.interval(value, resampled)}
    frechet = torch.cat([quality.frechet(x, reference, some) for some in rows.split(max(1, (1 << 15) // count))])
    kernel = 1000 * kernel_distance(x, reference, weights)
    precise, recalled = precision_recall(x, reference)
    right = (_judge().last(x.float()).argmax(1) == labels).double()
    real = torch.randint(len(recalled), (RESAMPLES, len(recalled)), generator=torch.Generator().manual_seed(42))
    return {"count": count, "frechet": numbers(quality.frechet(x, reference).item(), frechet),
            "kernel": numbers(1000 * kernel_distance(x, reference).item(), kernel),
            "precision": numbers(precise.mean().item(), precise[rows].mean(1)),
            "recall": numbers(recalled.mean().item(), recalled[real].mean(1)),
            "class": numbers(right.mean().item(), right[rows].mean(1)),
            "resampled": {name: [round(value, 6) for value in values.tolist()]
                          for name, values in (("frechet", frechet), ("kernel", kernel))}}


def _features_and_labels(blocks: Sequence[Tuple[Sequence[int], dict]]) -> Tuple[np.ndarray, Tensor]:
    """Of the blocks of one cell, for `measure`."""
    return (np.concatenate([features_of(row) for _, row in blocks]),
            torch.tensor([seed % len(CLASSES) for some, _ in blocks for seed in some]))


def paired(one: dict, other: dict, what: str, how) -> dict:
    """how(one's distance, other's), such as their ratio, and its 95 % interval over the seeds, the same ones in both.

    Resampling adds a bias to each distance, which is taken off first.
    """
    a, b = ([cell[what]["value"]] + (np.array(cell["resampled"][what]) - np.mean(cell["resampled"][what])
                                     + cell[what]["value"]).tolist() for cell in (one, other))
    value, *resampled = how(np.array(a), np.array(b)).tolist()
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {"value": value, "interval": [min(low, value), max(high, value)]}


# --------------------------------------------------------------------------------------------------------------- report

STOCHASTIC, DETERMINISTIC = (6, 8, 9, 10, 15, 20), (6, 8, 9, 10, 15, 20)
FEWER = ((6, 9), (8, 12), (10, 15), (6, 12), (10, 20), (15, 30))        # ours, ComfyUI's


@functools.lru_cache(None)
def _measuring_source() -> str:
    parts = (measure, kernel_distance, pair_mean, precision_recall, resamples, how_often, cubic, _radii, features_of,
             quality.frechet, quality.interval)
    return quality._digest(*(quality._code(inspect.getsource(part)) for part in parts), _reference().digest)


class Results:
    """The finished cells, measured at any N that they reach.

    Args:
        cells: the cells; of each the blocks from the first seed on that `rows` holds are looked at.
        seeds: the blocks, in order.
        rows: from `sample`.
        folder: where evaluate_measured.jsonl keeps what was measured.
        devices: where the blocks were made; a cell is of the first that has its first block.
    """

    def __init__(self, cells: Sequence[Cell], seeds: Sequence[Sequence[int]], rows: Dict[str, dict], folder: Path,
                 devices: Sequence[str] = ("cpu",)):
        self.reference, self.blocks, self.path = _reference(), {}, folder / "evaluate_measured.jsonl"
        self.made: Dict[str, List[Cell]] = {device: [] for device in devices}
        self.block = len(seeds[0])
        for cell in cells:
            for device in devices:
                found = []
                for some in seeds:
                    row = rows.get(key_of(cell, some, device))
                    if row is None:
                        break
                    found.append((some, row))
                if found:
                    self.blocks[cell] = found
                    self.made[device].append(cell)
                    break
        self.done = quality.load(self.path, "key")

    @property
    def where(self) -> str:
        """On what device the cells were made; those of any but the first device by process, calls and sampler."""
        first, *others = (device for device, cells in self.made.items() if cells)
        told = [first]
        for device in others:
            names: Dict[tuple, List[str]] = {}
            for cell in self.made[device]:
                at = names.setdefault((cell.process, cell.calls), [])
                at += [] if cell.method.name in at else [cell.method.name]
            told.append(f"on {device} {'; '.join(f'{p}, {n} calls: ' + ', '.join(at) for (p, n), at in names.items())}")
        return ", but ".join(told)

    def count(self, cell: Cell) -> int:
        """How many pictures a cell has."""
        return sum(len(some) for some, _ in self.blocks.get(cell, ()))

    def diverged(self, cell: Cell) -> bool:
        return any(row.get("diverged") for _, row in self.blocks[cell])

    def _used(self, cell: Cell, count: Optional[int]) -> Tuple[str, list]:
        """The name of what `of` measures, and its blocks."""
        used, left = [], self.count(cell) if count is None else count
        for some, row in self.blocks[cell]:
            if left >= len(some):
                used.append((some, row))
                left -= len(some)
        return quality._digest(*(row["key"] for _, row in used), _measuring_source()), used

    def of(self, cell: Cell, count: Optional[int] = None) -> dict:
        """The metrics of a cell's first `count` pictures, a whole number of blocks; None: of all."""
        key, used = self._used(cell, count)
        if key not in self.done:
            self._keep(key, measure(*_features_and_labels(used), self.reference))
        return self.done[key]

    def _keep(self, key: str, found: dict) -> None:
        self.done[key] = {"key": key, **found}
        with quality.appending(self.path) as file:
            file.write(json.dumps(self.done[key]) + "\n")

    def measure_all(self, threads: int) -> None:
        """Measures what `of` will be asked for, in several threads; two cells compare at the smaller N of theirs."""
        if threads < 2:
            return              # `of` does it
        counts = {self.count(cell) for cell in self.blocks}
        wanted = dict(self._used(cell, count) for cell in self.blocks if not self.diverged(cell)
                      for count in counts if count <= self.count(cell))
        wanted = {key: _features_and_labels(used) for key, used in wanted.items() if key not in self.done}
        _judge()                # once, before several ask for it
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(lambda work: measure(*work, self.reference), wanted.values())
            for key, one in zip(wanted, tqdm(found, desc="measuring", unit="cell", total=len(wanted))):
                self._keep(key, one)

    def compare(self, one: Cell, other: Cell) -> dict:
        """The distances of two cells at the N that both have, ours over theirs, paired by seed.

        `better` and `worse` are said where the whole interval of the Frechet distances' difference lies on one side of 0.
        """
        count = min(self.count(one), self.count(other))
        a, b = self.of(one, count), self.of(other, count)
        found = {"frechet": paired(a, b, "frechet", np.divide), "difference": paired(a, b, "frechet", np.subtract),
                 "kernel": paired(a, b, "kernel", np.subtract)}
        low, high = found["difference"]["interval"]
        return {"process": one.process, "guidance": one.guidance, "ours": one.method.name, "calls": one.calls,
                "peer": other.method.name, "peer_calls": other.calls, "count": count,
                "values": [a["frechet"]["value"], b["frechet"]["value"]], **found,
                "verdict": "better" if high < 0 else "worse" if low > 0 else "alike"}


def questions(results: Results) -> Dict[str, List[dict]]:
    """The comparisons that the evaluation is made for, by question, from the cells that are there."""
    cells = {(cell.process, cell.guidance, cell.calls, cell.method.name): cell for cell in results.blocks
             if not results.diverged(cell)}
    settings = list(dict.fromkeys((cell.process, cell.guidance) for cell in results.blocks))
    names = list(dict.fromkeys(cell.method.name for cell in results.blocks))
    theirs = [name for name in names if not name.startswith(quality.OURS)]
    noisy = {cell.method.name for cell in results.blocks if cell.method.noisy}
    found: Dict[str, List[dict]] = {"fewer calls": [], "comfyui": [], "stochastic peers": [], "deterministic peers": []}

    def add(question: str, at: tuple, ours: Tuple[int, str], peer: Tuple[int, str]) -> None:
        pair = cells.get((*at, *ours)), cells.get((*at, *peer))
        if None not in pair:
            found[question].append(results.compare(*pair))

    for at in settings:
        for ours, calls in FEWER:
            for preset in ("ours sde_5", "ours few_steps"):
                add("fewer calls", at, (ours, preset), (calls, "comfyui sde_5"))
        for calls in sorted({cell.calls for cell in results.blocks}):
            add("comfyui", at, (calls, "ours sde_5"), (calls, "comfyui sde_5"))
        for name in theirs:
            for calls in STOCHASTIC if name in noisy else ():
                add("stochastic peers", at, (calls, "ours sde_5"), (calls, name))
        for calls in DETERMINISTIC:
            peers = [cells[(*at, calls, name)] for name in theirs if name not in noisy and (*at, calls, name) in cells]
            if peers:
                least = min(results.count(cell) for cell in peers)
                best = min(peers, key=lambda cell: results.of(cell, least)["frechet"]["value"])
                add("deterministic peers", at, (calls, "ours few_steps"), (calls, best.method.name))
    return found


ASKED = {
    "fewer calls": "Ours `sde_5` and `few_steps` with fewer calls than ComfyUI's `sde_5`",
    "comfyui": "Ours `sde_5` over ComfyUI's `sde_5` at equal calls",
    "stochastic peers": "Ours `sde_5` over each stochastic peer at equal calls",
    "deterministic peers": "Ours `few_steps` over the best deterministic peer of each cell, picked after the fact",
}


def table(results: Results, found: Dict[str, List[dict]]) -> str:
    """The Markdown report."""
    counts = sorted({results.count(cell) for cell in results.blocks})
    floors = ", ".join(f"{results.reference.floor(n)[0]:.2f} at N = {n}" for n in counts)
    number = quality._number
    lines = [
        "# The trained network's pictures against real ones", "",
        "Written by `python -m benchmarks.evaluate`, whose docstring says what is measured and how. Squared Frechet "
        "distance in the features of the small classifier, to the training pictures, which have themselves "
        f"{floors}; only equal N compare. Intervals are 95 % by bootstrap over the seeds of each class, paired; `better` "
        "and `worse` are said where the whole interval of the difference lies on one side of 0. `kernel` is the difference "
        "of the kernel distances x 1000, which have no floor.", "",
        f"Sampled on {results.where}, in blocks of {results.block}. torch {torch.__version__}, k-diffusion "
        f"{quality._version('k_diffusion')}, azula {quality._version('azula')}; this project's sources have the digest "
        f"{quality._own_source()}. ve: {SCHEDULES['ve']}; flow: {SCHEDULES['flow']}.", ""]
    for question, records in found.items():
        if not records:
            continue
        tally = [sum(r["verdict"] == verdict for r in records) for verdict in ("better", "alike", "worse")]
        near = sum(r["frechet"]["value"] <= 1.05 for r in records)
        lines += [f"## {ASKED[question]}", "",
                  f"{len(records)} cells: {tally[0]} better, {tally[1]} alike, {tally[2]} worse; {near} within 5 % or "
                  "better.", "", "| process | guidance | ours | calls | peer | calls | N | Frechet, ours | peer's | ratio "
                  "| difference | kernel | |", "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
        lines += [f"| {r['process']} | {r['guidance']:g} | {r['ours']} | {r['calls']} | {r['peer']} | {r['peer_calls']} | "
                  f"{r['count']} | {r['values'][0]:.2f} | {r['values'][1]:.2f} | {number(r['frechet'])} | "
                  f"{number(r['difference'], 2)} | {number(r['kernel'], 2)} | {r['verdict']} |" for r in records] + [""]
    lines += ["## Every cell", "", "| cell | N | Frechet | kernel x 1000 | precision | recall | taken for its class |",
              "|---|---|---|---|---|---|---|"]
    for cell in results.blocks:
        start = f"| {cell.name} | {results.count(cell)} | "
        if results.diverged(cell):
            lines.append(start + "diverged | | | | |")
            continue
        row = results.of(cell)
        lines.append(start + " | ".join(number(row[what]) for what in ("frechet", "kernel", "precision", "recall", "class"))
                     + " |")
    return "\n".join(lines) + "\n"


def draw(results: Results, process: str, what: str = "frechet"):
    """One process's figure: a distance by model calls, a row for each guidance, noise-free samplers to the left.

    All at the smallest N of its cells, since a Frechet distance depends on N.
    """
    from ersde.plot import new_figure

    cells = [cell for cell in results.blocks if cell.process == process and not results.diverged(cell)]
    scales = sorted({cell.guidance for cell in cells})
    count = min(results.count(cell) for cell in cells)
    figure, axes = new_figure(16, 4.6 * len(scales), len(scales), 2)
    for scale, pair in zip(scales, axes):
        for axis, noisy in zip(pair, (False, True)):
            rows = [{"method": cell.method.name, "family": cell.method.family, "calls": cell.calls,
                     **results.of(cell, count)}
                    for cell in cells if cell.guidance == scale and cell.method.noisy == noisy]
            quality.draw_lines(axis, rows, what)
            axis.set_yscale("log")
            axis.set_title(f"{'stochastic' if noisy else 'deterministic'}, guidance {scale:g}", loc="left", fontsize=10)
            if what == "frechet":
                axis.axhline(results.reference.floor(count)[0], color="#888888", linestyle=":", linewidth=1)
            low, high = axis.get_ylim()
            ticks = [tick for power in range(-3, 4) for tick in (10.0 ** power, 2 * 10.0 ** power, 5 * 10.0 ** power)
                     if low <= tick <= high]
            axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            quality.number_calls(axis, (row["calls"] for row in rows))
    name = {"frechet": "squared Frechet distance (dotted: real pictures)", "kernel": "kernel distance x 1000"}[what]
    figure.suptitle(f"{name} to the training pictures, {process}, N = {count}", fontsize=11)
    return figure


def report(results: Results, folder: Path) -> str:
    """Writes evaluate.json, evaluate.md and the plots; returns the Markdown."""
    found = questions(results)
    cells = [{"process": cell.process, "guidance": cell.guidance, "calls": cell.calls, "method": cell.method.name,
              "family": cell.method.family, "noisy": cell.method.noisy, **(
                  {"count": results.count(cell), "diverged": True} if results.diverged(cell) else
                  {name: value for name, value in results.of(cell).items() if name not in ("key", "resampled")})}
             for cell in tqdm(results.blocks, desc="measuring", unit="cell")]
    floors = {str(n): results.reference.floor(n)[0] for n in sorted({cell["count"] for cell in cells})}
    text = table(results, found)
    about = {"torch": torch.__version__, "device": results.where, "block": results.block,
             "sources": quality._own_source(), "schedules": SCHEDULES, "floor": floors}
    (folder / "evaluate.json").write_text(json.dumps({"about": about, "questions": found, "cells": cells}, indent=1,
                                                     default=float) + "\n", encoding="utf-8")
    (folder / "evaluate.md").write_text(text, encoding="utf-8")
    for process in dict.fromkeys(cell["process"] for cell in cells if not cell.get("diverged")):
        for what in ("frechet", "kernel"):
            draw(results, process, what).savefig(folder / f"evaluate_{process}_{what}.png")
    return text


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
    parser.add_argument("--block", type=int, default=BLOCK, help="seeds of a batch; another size is another set")
    parser.add_argument("--filter", default=SHOWN, metavar="REGEX", help="samplers whose name it finds ('' for all)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evaluate"), help="folder of the results")
    parser.add_argument("--device", nargs="+", default=["cpu"], choices=("cpu", "cuda"),
                        help="of the network; each is a set of its own; --report takes a cell from the first that has it")
    parser.add_argument("--sample", action="store_true", help="sample only, no report")
    parser.add_argument("--report", action="store_true", help="report what is finished, sample nothing")
    parser.add_argument("--reference", action="store_true", help="make the file of the real pictures' features, and end")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.reference:
        make_reference()
        return 0
    if "RANK" in os.environ and not dist.is_initialized():
        # A process may have to wait long for the others at the end.
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    if len(args.device) > 1 and not args.report:
        parser.error("--device: sampling takes one, only --report several")
    if args.device == ["cuda"] and not args.report:
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU here")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    cells = plan(args.process, args.guidance, args.calls, args.filter)
    seeds = blocks(args.count, args.block)
    items = [(cell, some) for some in seeds for cell in cells]
    rows, made = (held(args.out), 0) if args.report else sample(items, args.out, device=args.device[0])
    first, processes = rank() == 0, world()
    if dist.is_initialized():
        dist.destroy_process_group()
    if first and not args.sample:
        results = Results(cells, seeds, rows, args.out, args.device)
        if not results.blocks:
            parser.error(f"--report: no block of these cells is in {args.out}")
        results.measure_all(processes)
        text = report(results, args.out)
        print(text[text.index("## "):text.index("## Every cell")])
        print(f"{len(results.blocks)} cells, {made} blocks made now by this process, in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
