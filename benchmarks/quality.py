"""Quality at equal model calls: this project's presets beside the published formulas, ComfyUI's, k-diffusion and azula.

    python -m benchmarks.quality [--quick] [--out DIR] [--filter REGEX] [--calls N ...] [--count N] [--all-schedules]

Every sampler starts from the same states, takes noise from the same seed and makes the same number of model calls,
which are counted.  A sampler with two calls a step gets (calls + 1) / 2 steps over the same range of sigma; ending in
sigma = 0 it makes an odd number of calls, so it has no cell at an even count.  Everything is float64.

Deterministic runs: the RMS error of each starting point's result to the exact probability flow (RK4), mean and median.
All runs: Frechet distance of Gaussian fits and sliced Wasserstein-2 to the exact law, and the RMS distance to the
nearest component mean over that of exact samples.  Without guidance the exact law is the data's.  A guided denoiser
belongs to no diffused density, so that each member of the family has its own law: it is made there by a run of many
steps of the published formulas.  Excess Frechet distance is over that of an exact sample of the same size.

Intervals are 95 % by bootstrap over starting points, centred: value + (quantiles - mean) of the resampled statistic,
since resampling adds the same bias to a Frechet or Wasserstein distance as sampling did.

DIR gets a line of JSON per finished cell (a run takes up where the last one stopped), a table and plots.
"""
from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import re
import statistics
import textwrap
from pathlib import Path
from typing import IO, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import numpy as np
import torch
from tqdm import tqdm

import ersde
from tests import problems
from tests.problems import Mixture, flow_exact, flow_schedule, karras

Tensor = torch.Tensor
OURS, PAPER, COMFYUI, KDIFFUSION, AZULA = "ours", "paper", "comfyui", "k-diffusion", "azula"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a cell's numbers depend on beside its name."""

    count: int = 1024           # starting points
    digits_stride: int = 1      # every how manieth digit is a component of the mixture
    reference: int = 3          # exact samples, in multiples of count; another count of them gives the floor
    fine_steps: int = 400       # steps of the reference law under guidance
    exact_steps: int = 600      # RK4 steps of the exact flow
    resamples: int = 200        # of the RMS error and the spread
    heavy_resamples: int = 100  # of the Frechet and Wasserstein distances
    projections: int = 64
    seed: int = 0


QUICK = Settings(count=384, digits_stride=6, reference=2, fine_steps=100, exact_steps=200, heavy_resamples=40,
                 projections=24)
CALLS, QUICK_CALLS = (5, 6, 7, 8, 9, 10, 15, 20, 21, 31, 50, 51), (5, 9, 10, 20, 21)
SCHEDULES = {"ve": ("karras", "exponential"), "flow": ("shift 1", "shift 3")}
QUICK_SCHEDULES = {"ve": ("karras",), "flow": ("shift 3",)}
PROBLEMS = (("separated", None), ("digits", None), ("digits", 4.0), ("digits", 7.5))


# ------------------------------------------------------------------------------------------------------------- samplers

@dataclasses.dataclass(frozen=True)
class Method:
    """One row: `run(model, x, sigmas, noise, window)` -> result.

    Args:
        preset: the member of the family whose law the run converges to.
        calls_per_step: 1 or 2.
        flow: whether it is valid for the flow process; `reason` says why not.
        source: text whose change makes finished cells stale.
    """

    name: str
    family: str
    run: Callable
    preset: ersde.Preset
    calls_per_step: int = 1
    flow: bool = True
    reason: str = ""
    source: str = ""

    @property
    def noisy(self) -> bool:
        """Whether the run draws noise."""
        return law_of(self.preset) != "ode"

    def steps(self, calls: int) -> Optional[int]:
        """Steps that make exactly `calls` calls, or None."""
        if self.calls_per_step == 1:
            return calls
        return (calls + 1) // 2 if calls % 2 else None


def law_of(preset: ersde.Preset) -> str:
    """A name of what a preset's run converges to, whatever its solver."""
    if preset.eta == 0 or preset.noise_scale == "ode":
        return "ode"
    return f"{preset.noise_scale} eta {preset.eta:g} s_noise {preset.s_noise:g} {preset.start:g} to {preset.end:g}"


class PathNoise:
    """A noise sampler from a seeded generator: increments of a Brownian path in sigma, over their standard deviation.

    Fresh noise for every new step.  A second question with the same start that reaches further (dpmpp_sde asks for
    half a step, then for the whole) contains the first increment, as k-diffusion's own Brownian tree has it.
    """

    def __init__(self, x: Tensor, seed: int):
        self.x, self.generator, self.last = x, torch.Generator().manual_seed(seed), None

    def __call__(self, sigma, sigma_next) -> Tensor:
        sigma, sigma_next = float(sigma), float(sigma_next)
        fresh = torch.randn(self.x.shape, generator=self.generator, dtype=torch.float64)
        if self.last and abs(self.last[0] - sigma) < 1e-9 * sigma and sigma_next < self.last[1]:
            half, past = self.last[1], self.last[2]
            fresh = (past * (sigma - half) ** 0.5 + fresh * (half - sigma_next) ** 0.5) / (sigma - sigma_next) ** 0.5
        self.last = (sigma, sigma_next, fresh)
        return fresh.to(self.x)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _code(source: str) -> str:
    """`source` without comments, docstrings and layout, the same from every Python."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return _tree(tree)


def _tree(part) -> str:
    """What `ast.dump` writes, less the fields that are empty, which a newer Python may have more of."""
    if isinstance(part, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(part) if value is not None and value != [])
        return f"{type(part).__name__}({', '.join(f'{name}={_tree(value)}' for name, value in fields)})"
    return f"[{', '.join(map(_tree, part))}]" if isinstance(part, list) else repr(part)


@functools.lru_cache(None)
def _own_source() -> str:
    files = sorted(Path(ersde.__file__).parent.glob("*.py"))
    return _digest(*(_code(path.read_text(encoding="utf-8")) for path in files
                     if path.name not in ("plot.py", "__main__.py")))


def _run_preset(preset):
    return lambda model, x, sigmas, noise, window: ersde.sample_preset(
        model, x, sigmas, preset, disable=True, noise_sampler=noise, process=model.process, window=window(preset),
        excess=getattr(model, "excess", None))


def _family(preset, name, family) -> Method:
    return Method(name, family, _run_preset(preset), preset, source=f"{_own_source()} {ersde.presets.to_dict(preset)}")


def _k_diffusion() -> Iterable[Method]:
    from k_diffusion import sampling

    version = importlib.metadata.version("k_diffusion")
    for name in ("euler", "heun", "lms", "dpm_2", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde",
                 "dpmpp_sde"):
        function = getattr(sampling, f"sample_{name}")
        noisy = "noise_sampler" in inspect.signature(function).parameters

        def run(model, x, sigmas, noise, window, function=function, noisy=noisy):
            return function(model, x, sigmas, disable=True, **({"noise_sampler": noise} if noisy else {}))

        yield Method(f"k-diffusion {name}", KDIFFUSION, run, ersde.PRESETS["sde" if noisy else "ode"],
                     2 if name in ("heun", "dpm_2", "dpmpp_sde") else 1, not noisy,
                     "adds noise for alpha = 1, which is wrong for flow" if noisy else "", version)


def _azula() -> Iterable[Method]:
    from azula import sample
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import Schedule

    class Listed(Schedule):
        """A given list of sigmas as a schedule of t = 1, ..., 0 in equal steps."""

        def __init__(self, sigmas: Tensor, process: str):
            self.sigmas, self.process = sigmas, process

        def __call__(self, t):
            sigma = self.sigmas[((1 - t) * (len(self.sigmas) - 1)).round().long()]
            return (1 - sigma if self.process == "flow" else torch.ones_like(sigma)), sigma

    class Analytic(Denoiser):
        """One of our denoisers as azula's."""

        def __init__(self, model, schedule):
            super().__init__()
            self.model, self.schedule = model, schedule

        def forward(self, x_t, t, **_):
            return DiracPosterior(mean=self.model(x_t, self.schedule(t)[1].expand(x_t.shape[0])))

    version = importlib.metadata.version("azula")
    for name in ("zAB", "vAB", "zEAB", "xEAB", "REAB"):
        for order in (2, 3):
            def run(model, x, sigmas, noise, window, name=name, order=order):
                # Their exponents are log lambda, which sigma = 0 does not have (nor, but for vAB, sigma = 1 of a flow
                # model): they go to the last positive sigma and end with D there, and they start with alpha = 1e-3, as
                # azula's own RectifiedSchedule does.
                positive = sigmas[sigmas > 0].clone()
                if model.process == "flow" and name != "vAB":
                    positive[0] = positive[0].clamp(max=1 - 1e-3)
                if len(positive) > 1:
                    denoiser = Analytic(model, Listed(positive, model.process))
                    x = getattr(sample, f"{name}Sampler")(denoiser, order=order, steps=len(positive) - 1, silent=True,
                                                          dtype=torch.float64)(x)
                return model(x, positive[-1].expand(x.shape[0])) if sigmas[-1] == 0 else x

            yield Method(f"azula {name} order {order}", AZULA, run, ersde.PRESETS["ode"], source=version)


@functools.lru_cache(None)
def methods() -> Tuple[Method, ...]:
    """Every row; a family whose library is not installed is left out, with a line that says so."""
    rows: List[Method] = []
    for name, preset in ersde.PRESETS.items():
        if preset.method == "exact":
            rows.append(_family(preset, f"ours {name}", OURS))
    for family in (PAPER, COMFYUI):
        for name in ("ode", "sde_5"):
            preset = dataclasses.replace(ersde.PRESETS[name], method=family, corrector=False, order=3)
            rows.append(_family(preset, f"{family} {name}", family))
    for family, make in ((KDIFFUSION, _k_diffusion), (AZULA, _azula)):
        try:
            rows.extend(make())
        except ImportError as error:
            print(f"{family} is left out: {error}")
    return tuple(rows)


def noise_free(process: str, calls: int) -> Iterator[Tuple[Method, int]]:
    """The rows without noise that make `calls` model calls in a process, each with its steps."""
    for method in methods():
        steps = method.steps(calls)
        if not method.noisy and steps and (method.flow or process != "flow"):
            yield method, steps


# ------------------------------------------------------------------------------------------------------------- problems

def schedule(name: str, steps: int, calls: int) -> Tensor:
    """`steps` steps with a final 0; the last positive sigma depends on `calls` alone, the same for every sampler."""
    if name == "karras":
        return karras(steps)
    if name == "exponential":
        grid = torch.linspace(np.log(14.6), np.log(0.03), steps, dtype=torch.float64).exp()
        return torch.cat([grid, torch.zeros(1, dtype=torch.float64)])
    shift, time = float(name.split()[1]), 1 / calls
    return flow_schedule(steps, low=shift * time / (1 + (shift - 1) * time), shift=shift)


@functools.lru_cache(None)
def _mixture(name: str, process: str, guidance: Optional[float], stride: int) -> Tuple[Mixture, Mixture]:
    """The denoiser, and the mixture that its data comes from."""
    if name == "separated":
        model = problems.separated(process)
        return model, model
    model = problems.digits(process, guidance=guidance)
    keep = torch.arange(len(model.means)) % stride == 0
    model = Mixture(model.means[keep], model.std[keep], None, process, guidance, model.label[keep])
    if guidance is None:
        return model, model
    return model, Mixture(model.means[model.label], model.std[model.label], None, process)


def root_of(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance, shape (dim, dim), as `frechet` takes it."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@dataclasses.dataclass
class Reference:
    """Exact samples of a law, what the metrics need of them, and the same metrics of exact samples (the floor)."""

    mean: Tensor
    root: Tensor                # square root of the covariance
    quantiles: Tensor           # (projections, count)
    spread: float
    floor_frechet: float
    floor_sd: float             # standard deviation of the floor from sample to sample
    floor_wasserstein: float
    members: int


class Problem:
    """A data distribution in a process, under a guidance, on a schedule: states, exact results, exact laws.

    Args:
        mixture: the denoiser and what its data comes from; None: those of that name.
    """

    def __init__(self, name: str, guidance: Optional[float], process: str, schedule_name: str, settings: Settings,
                 mixture: Optional[Tuple[Mixture, Mixture]] = None):
        self.name, self.guidance, self.process, self.schedule_name = name, guidance, process, schedule_name
        self.settings = settings
        self.model, self.source = mixture or _mixture(name, process, guidance, settings.digits_stride)
        generator = torch.Generator().manual_seed(settings.seed + 11)
        self.directions = torch.randn(settings.projections, self.model.dim, generator=generator, dtype=torch.float64)
        self.directions /= self.directions.norm(dim=1, keepdim=True)
        self._exact: Dict[int, Tensor] = {}
        self._laws: Dict[str, Reference] = {}

    @property
    def label(self) -> str:
        """Its part of a cell's name."""
        guidance = "" if self.guidance is None else f" guidance {self.guidance:g}"
        return f"{self.name}{guidance} / {self.process} / {self.schedule_name}"

    def start(self, count: Optional[int] = None, seed: int = 1) -> Tensor:
        """Exact states at the first sigma."""
        sigma = schedule(self.schedule_name, 2, 2)[0].item()
        generator = torch.Generator().manual_seed(self.settings.seed + seed)
        return self.source.start(count or self.settings.count, sigma, generator)

    def exact(self, calls: int) -> Tensor:
        """The exact flow's results for the schedules of `calls`."""
        sigmas = schedule(self.schedule_name, calls, calls)
        key = 0 if self.process == "ve" else calls          # ve: one range of sigma for all
        if key not in self._exact:
            self._exact[key] = flow_exact(self.model, self.start(), sigmas, self.settings.exact_steps)
        return self._exact[key]

    def window(self, preset: ersde.Preset) -> Tuple[float, float]:
        """A preset's stochastic window as sigmas: its parts of a schedule of 1000 steps, the same at every count."""
        dense = schedule(self.schedule_name, 1000, 1000)[:-1].numpy()
        at = lambda part: float(np.interp(part, np.linspace(0, 1, len(dense)), dense))
        return (np.inf if preset.start == 0 else at(preset.start)), (0.0 if preset.end == 1 else at(preset.end))

    def law(self, preset: ersde.Preset) -> Reference:
        """The exact law of a member: the data, or under guidance a run of many steps of the published formulas."""
        s = self.settings
        name = "data" if self.guidance is None else law_of(preset)
        if name not in self._laws:
            members = s.count * s.reference
            if self.guidance is None:
                generator = torch.Generator().manual_seed(s.seed + 21)
                reference = self.source.data(members, generator)
                floors = [self.source.data(s.count, generator) for _ in range(8)]
            else:
                fine = dataclasses.replace(preset, method="paper", corrector=False, order=2)
                sigmas = schedule(self.schedule_name, s.fine_steps, s.fine_steps)
                # In float32, whose error is far below what these many steps leave.
                x = self.start(members + 2 * s.count, seed=22).float()
                out = _run_preset(fine)(self.model, x, sigmas, PathNoise(x, s.seed + 23), self.window).double()
                reference, floors = out[:members], [out[members:members + s.count], out[members + s.count:]]
            self._laws[name] = self._reference(reference, floors)
        return self._laws[name]

    def _reference(self, samples: Tensor, floors: List[Tensor]) -> Reference:
        mean, root = samples.mean(0), root_of(samples.T.cov())
        # At the middles of count equal parts; Hazen's rule gives equally many samples back as they are.
        middles = (np.arange(self.settings.count) + 0.5) / self.settings.count
        quantiles = torch.from_numpy(
            np.quantile((self.directions @ samples.T).numpy(), middles, axis=1, method="hazen").T)
        ref = Reference(mean, root, quantiles, (nearest(samples, self.source.means) ** 2).mean().sqrt().item(),
                        0.0, 0.0, 0.0, len(samples))
        ref.floor_frechet = statistics.mean(frechet(x, ref).item() for x in floors)
        ref.floor_sd = frechet(floors[0], ref, _resamples(self.settings)[:self.settings.heavy_resamples]).std().item()
        ref.floor_wasserstein = statistics.mean(sliced_wasserstein(x, ref, self.directions).item() for x in floors)
        return ref


# -------------------------------------------------------------------------------------------------------------- metrics

def frechet(samples: Tensor, reference: Reference, rows: Optional[Tensor] = None) -> Tensor:
    """Squared Frechet distance of the Gaussian fits, |m - m'|^2 + tr(C + C' - 2 (C'^1/2 C C'^1/2)^1/2).

    Args:
        samples: (count, dim), float64.
        rows: (resamples, count) indices of bootstrap samples, or None for the samples as they are.

    Returns:
        Shape () or (resamples,).
    """
    picked = samples[None] if rows is None else samples[rows]
    mean = picked.mean(1, keepdim=True)
    picked = picked - mean
    covariance = picked.transpose(1, 2) @ picked / (samples.shape[0] - 1)
    inner = torch.linalg.eigvalsh(reference.root @ covariance @ reference.root).clamp(min=0).sqrt().sum(1)
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1) + (reference.root ** 2).sum()
    out = ((mean[:, 0] - reference.mean) ** 2).sum(1) + trace - 2 * inner
    return out[0] if rows is None else out


def sliced_wasserstein(samples: Tensor, reference: Reference, directions: Tensor,
                       rows: Optional[Tensor] = None) -> Tensor:
    """Sliced Wasserstein-2 distance over fixed directions; arguments and result as `frechet`'s."""
    flat = directions @ samples.T
    picked = flat[:, None] if rows is None else flat[:, rows]               # (projections, resamples, count)
    out = ((picked.sort(-1).values - reference.quantiles[:, None]) ** 2).mean((0, 2)).sqrt()
    return out[0] if rows is None else out


def nearest(samples: Tensor, means: Tensor) -> Tensor:
    """RMS distance per coordinate of each sample to the nearest of `means`, shape (count,)."""
    return torch.cdist(samples, means.to(samples)).min(1).values / samples.shape[1] ** 0.5


def interval(value: float, resampled: Tensor) -> List[float]:
    """The centred 95 % bootstrap interval, value + (quantiles - mean) of the resamples; it contains the value."""
    low, high = np.quantile(resampled.numpy(), (0.025, 0.975)) - resampled.mean().item()
    return [value + min(low, 0.0), value + max(high, 0.0)]


def _resamples(settings: Settings) -> Tensor:
    generator = torch.Generator().manual_seed(settings.seed + 41)
    return torch.randint(settings.count, (settings.resamples, settings.count), generator=generator)


def _numbers(value: float, resampled: Tensor) -> Dict[str, object]:
    return {"value": value, "interval": interval(value, resampled)}


def measure(problem: Problem, method: Method, calls: int) -> Dict[str, object]:
    """Runs one cell: its metrics, intervals and the model calls it made."""
    s = problem.settings
    model, x = problem.model, problem.start()
    sigmas = schedule(problem.schedule_name, method.steps(calls), calls)
    model.calls = 0
    out = method.run(model, x.clone(), sigmas, PathNoise(x, s.seed + 31), problem.window)
    row: Dict[str, object] = {"calls_made": model.calls, "steps": len(sigmas) - 1, "count": s.count}
    if not out.isfinite().all():
        return {**row, "diverged": True}
    rows = _resamples(s)
    heavy = rows[:s.heavy_resamples]
    if not method.noisy:
        points = ((out - problem.exact(calls)) ** 2).mean(1).sqrt()
        row["rms"] = _numbers(points.mean().item(), points[rows].mean(1))
        row["rms_median"] = _numbers(points.median().item(), points[rows].median(1).values)
        row["points"] = [float(f"{point:.3g}") for point in points.tolist()]
    ref = problem.law(method.preset)
    distance = _numbers(frechet(out, ref).item(), frechet(out, ref, heavy))
    row["frechet"] = {**distance, "floor": ref.floor_frechet, "floor_sd": ref.floor_sd}
    row["excess"] = {"value": distance["value"] - ref.floor_frechet,
                     "interval": [bound - ref.floor_frechet for bound in distance["interval"]]}
    row["wasserstein"] = {**_numbers(sliced_wasserstein(out, ref, problem.directions).item(),
                                     sliced_wasserstein(out, ref, problem.directions, heavy)),
                          "floor": ref.floor_wasserstein}
    apart = nearest(out, problem.source.means) ** 2
    row["spread"] = _numbers(apart.mean().sqrt().item() / ref.spread, apart[rows].mean(1).sqrt() / ref.spread)
    return row


# --------------------------------------------------------------------------------------------------------- cells, files

def cell_name(problem: Problem, calls: int, method: Method) -> str:
    """What `--filter` is matched against."""
    return f"{problem.label} / {calls} calls / {method.name}"


@functools.lru_cache(None)
def _measuring_source() -> str:
    parts = (problems, measure, frechet, sliced_wasserstein, nearest, interval, schedule, Problem, root_of, PathNoise,
             _k_diffusion, _azula)
    return _digest(*(_code(inspect.getsource(part)) for part in parts))


def fingerprint(problem: Problem, calls: int, method: Method) -> str:
    """Of everything that a cell's numbers depend on; a finished cell with the same one is not run again."""
    return _digest(cell_name(problem, calls, method), repr(problem.settings), method.source, torch.__version__,
                   _measuring_source())


def plan(settings: Settings, calls: Iterable[int], schedules: Dict[str, Tuple[str, ...]], chosen: str = "",
         which=PROBLEMS) -> List[Tuple[Problem, int, Method]]:
    """The cells, those of one problem side by side."""
    cells = []
    for name, guidance in which:
        for process, names in schedules.items():
            for schedule_name in names:
                problem = Problem(name, guidance, process, schedule_name, settings)
                cells += [(problem, n, method) for n in calls for method in methods()
                          if method.steps(n) and (method.flow or process == "ve")
                          and re.search(chosen, cell_name(problem, n, method))]
    return cells


def load(path: Path, key: str = "fingerprint") -> Dict[str, dict]:
    """row[key] -> finished cell of a file with a line of JSON each; a last line that was cut off is left out."""
    found = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[row[key]] = row
    return found


def command_of(name: str, parser: argparse.ArgumentParser, args: argparse.Namespace, *options: str) -> str:
    """The command line that a result comes from: of these options those that are not as usual."""
    said = f"python -m benchmarks.{name}"
    for option in options:
        value = getattr(args, option)
        if value is True:
            said += f" --{option}"
        elif value != parser.get_default(option):
            values = value if isinstance(value, list) else [value]
            said += f" --{option} " + " ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in values)
    return said


def appending(path: Path) -> IO[str]:
    """`path`, opened to append lines for `load`, behind a last line that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.exists() or not path.stat().st_size or path.read_bytes().endswith(b"\n")
    file = open(path, "a", encoding="utf-8")
    if not whole:
        file.write("\n")
    return file


def run(cells: List[Tuple[Problem, int, Method]], path: Path, quiet: bool = False) -> Tuple[List[dict], int]:
    """Measures the cells that `path` does not hold yet, appending a line each.

    Returns:
        The rows of all cells, and how many were measured now.
    """
    done = load(path)
    rows, fresh = [], 0
    with appending(path) as file:
        previous = None
        for problem, calls, method in tqdm(cells, disable=quiet, unit="cell"):
            if previous is not None and previous is not problem:
                previous._exact.clear()
                previous._laws.clear()
            previous = problem
            key = fingerprint(problem, calls, method)
            if key not in done:
                row = {"fingerprint": key, "problem": problem.label, "process": problem.process,
                       "guidance": problem.guidance, "schedule": problem.schedule_name, "calls": calls,
                       "method": method.name, "family": method.family, "noisy": method.noisy,
                       **measure(problem, method, calls)}
                file.write(json.dumps(row) + "\n")
                file.flush()
                done[key] = row
                fresh += 1
            rows.append(done[key])
    return rows, fresh


# -------------------------------------------------------------------------------------------------------------- reading

def _score(row: dict) -> float:
    """What a cell is compared by: mean RMS error, or excess Frechet distance, no less than the floor's own noise."""
    if row.get("diverged"):
        return float("inf")
    if not row["noisy"]:
        return row["rms"]["value"]
    return max(row["excess"]["value"], 2 * row["frechet"]["floor_sd"])


def _resolved(row: dict) -> bool:
    return bool(row.get("diverged")) or row["excess"]["value"] > 2 * row["frechet"]["floor_sd"]


def ratio(row: dict, other: dict) -> Dict[str, object]:
    """score(row) / score(other), and its 95 % interval: paired over starting points (RMS), or from both intervals."""
    value = _score(row) / _score(other) if np.isfinite(_score(other)) else 0.0
    if row.get("diverged") or other.get("diverged"):
        return {"value": value, "interval": [value, value]}
    if not row["noisy"]:
        a, b = torch.tensor(row["points"]), torch.tensor(other["points"])
        rows = torch.randint(len(a), (400, len(a)), generator=torch.Generator().manual_seed(0))
        return {"value": value, "interval": interval(value, a[rows].mean(1) / b[rows].mean(1).clamp(min=1e-30))}
    bound = lambda cell, at: max(cell["excess"]["interval"][at], 2 * cell["frechet"]["floor_sd"])
    return {"value": value, "interval": [bound(row, 0) / bound(other, 1), bound(row, 1) / bound(other, 0)]}


def compare(rows: List[dict]) -> List[dict]:
    """One record per (problem, calls, deterministic or not): ours over ComfyUI's and over the best of all others.

    Default: `ode` among deterministic runs, `sde_5` among stochastic ones; the best of our presets is named.
    """
    groups: Dict[tuple, List[dict]] = {}
    for row in rows:
        groups.setdefault((row["problem"], row["calls"], row["noisy"]), []).append(row)
    out = []
    for (problem, calls, noisy), cells in groups.items():
        default = [cell for cell in cells if cell["method"] == ("ours sde_5" if noisy else "ours ode")]
        theirs = [cell for cell in cells if cell["family"] != OURS]
        comfyui = [cell for cell in cells if cell["family"] == COMFYUI]
        if not default or not theirs or not comfyui or default[0].get("diverged"):
            continue
        best = min((cell for cell in cells if cell["family"] == OURS), key=_score)
        peer = min(theirs, key=_score)
        out.append({"problem": problem, "calls": calls, "noisy": noisy, "best": best["method"], "peer": peer["method"],
                    "default": _score(default[0]), "comfyui": _score(comfyui[0]), "peer_score": _score(peer),
                    "default/comfyui": ratio(default[0], comfyui[0]), "best/comfyui": ratio(best, comfyui[0]),
                    "default/peer": ratio(default[0], peer), "best/peer": ratio(best, peer),
                    "resolved": not noisy or any(_resolved(cell) for cell in (default[0], best, comfyui[0], peer))})
    return out


def _number(value: Optional[dict], digits: int = 3) -> str:
    if value is None:
        return ""
    low, high = value["interval"]
    return f"{value['value']:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def table(rows: List[dict], settings: Settings) -> str:
    """The Markdown report: the shares, the comparison by cell, and every cell."""
    found = compare(rows)
    stride = f", every {settings.digits_stride}th digit as a component" if settings.digits_stride > 1 else ""
    lines = [
        "# Quality at equal model calls", "",
        f"N = {settings.count} starting points{stride}; float64; intervals are 95 %, centred bootstrap over starting "
        f"points. torch {torch.__version__}, k-diffusion {_version('k_diffusion')}, azula {_version('azula')}; "
        f"this project's sources have the digest {_own_source()}.", "",
        "Deterministic runs are compared by the mean over starting points of the RMS error to the exact flow, "
        "stochastic ones by the excess squared Frechet distance over an exact sample's of the same N, no less than "
        "twice that floor's standard deviation: below it nothing can be told apart, and two such cells count as equal. "
        "`default` is the preset `ode` or `sde_5`; `best` the best of our presets in that cell, chosen after the fact; "
        "`peer` the best of all that is not ours, `paper` and `comfyui` among them.", "",
        "## Shares of cells", "",
        "Over the cells where anything is above the floor.", "",
        "| runs | cells | of them above the floor | ratio | median | within 5 % or better | "
        "over 1.05 with its whole interval | largest |",
        "|---|---|---|---|---|---|---|---|"]
    for noisy in (False, True):
        kind = [cell for cell in found if cell["noisy"] == noisy]
        part = [cell for cell in kind if cell["resolved"]]
        for key in ("default/comfyui", "best/comfyui", "default/peer", "best/peer"):
            if part:
                values = [cell[key]["value"] for cell in part]
                sure = sum(cell[key]["interval"][0] > 1.05 for cell in part)
                lines.append(f"| {'stochastic' if noisy else 'deterministic'} | {len(kind)} | {len(part)} | {key} | "
                             f"{statistics.median(values):.3f} | {np.mean([v <= 1.05 for v in values]):.0%} | {sure} | "
                             f"{max(values):.2f} |")
    lines += ["", "## By cell", "", "| cell | calls | runs | default | default/comfyui | default/peer | peer | "
              "best preset | best/comfyui | best/peer |", "|---|---|---|---|---|---|---|---|---|---|"]
    for cell in found:
        lines.append(f"| {cell['problem']} | {cell['calls']} | {'stochastic' if cell['noisy'] else 'deterministic'} | "
                     f"{cell['default']:.3g} | {_number(cell['default/comfyui'], 2)} | "
                     f"{_number(cell['default/peer'], 2)} | {cell['peer']} | {cell['best']} | "
                     f"{_number(cell['best/comfyui'], 2)} | {_number(cell['best/peer'], 2)} |")
    lines += ["", "## Not run", "",
              "* heun, dpm_2 and dpmpp_sde at even counts: two calls a step and one in the last make an odd number."]
    lines += [f"* {method.name} on flow: it {method.reason}." for method in methods() if not method.flow]
    lines += ["* azula's DDPM, DDIM, Euler, Heun, Ito and PC samplers: not multistep.", "",
              "k-diffusion's euler, heun, lms, dpm_2 and dpmpp_2m solve dx/dsigma = (x - D) / sigma, which is the "
              "probability flow in both processes, and run on both.  azula's samplers go to the last positive sigma "
              "and end with D there; on flow all but vAB start at alpha = 0.001.", "",
              "## Every cell", "",
              "| cell | sampler | calls made | mean RMS | median RMS | Frechet | its floor | sliced W2 | its floor | "
              "spread over exact |", "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        start = f"| {row['problem']} | {row['method']} | {row['calls_made']} | "
        if row.get("diverged"):
            lines.append(start + "diverged | | | | | | |")
            continue
        lines.append(start + " | ".join([
            _number(row.get("rms")), _number(row.get("rms_median")), _number(row["frechet"]),
            f"{row['frechet']['floor']:.3g}", _number(row["wasserstein"]), f"{row['wasserstein']['floor']:.3g}",
            _number(row["spread"])]) + " |")
    return "\n".join(lines) + "\n"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def draw_lines(axis, rows: List[dict], key: str) -> None:
    """row[key]'s value and interval by model calls, a line for each sampler in its family's style, with a legend."""
    from ersde.plot import COLOURS

    styles = {OURS: (COLOURS[1], "-", 2.2), COMFYUI: (COLOURS[0], "--", 2.2), PAPER: (COLOURS[2], "-.", 1.6),
              KDIFFUSION: (COLOURS[3], "-", 1.0), AZULA: (COLOURS[4], "-", 1.0)}
    seen: Dict[str, int] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = sorted((row for row in rows if row["method"] == name), key=lambda row: row["calls"])
        family = cells[0]["family"]
        colour, dash, width = styles[family]
        marker = "osD^vP*X<>"[seen.setdefault(family, 0) % 10]
        seen[family] += 1
        value = np.array([row[key]["value"] for row in cells])
        bounds = np.array([row[key]["interval"] for row in cells])
        calls = [row["calls"] for row in cells]
        axis.plot(calls, value, color=colour, linestyle=dash, linewidth=width, marker=marker, markersize=4,
                  label=name)
        axis.fill_between(calls, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.08,
                          linewidth=0)
    axis.set_xlabel("model calls")
    axis.set_xscale("log")
    if rows:
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def number_calls(axis, calls: Iterable[int]) -> None:
    """Ticks at the calls, with numbers where there is room."""
    ticks = sorted(set(calls))
    close = [at > 0 and tick < 1.08 * ticks[at - 1] for at, tick in enumerate(ticks)]
    axis.set_xticks(ticks, ["" if skip else str(tick) for tick, skip in zip(ticks, close)])
    axis.minorticks_off()


def draw(rows: List[dict], problem: str):
    """One problem's figure by calls: RMS error of deterministic runs, excess Frechet distance of stochastic ones."""
    from ersde.plot import new_figure

    figure, axes = new_figure(16, 5, 1, 2)
    rows = [row for row in rows if row["problem"] == problem and not row.get("diverged")]
    for axis, noisy, key, title in ((axes[0, 0], False, "rms", "deterministic: mean RMS error to the exact flow"),
                                    (axes[0, 1], True, "excess", "stochastic: excess Frechet distance")):
        draw_lines(axis, [row for row in rows if row["noisy"] == noisy], key)
        axis.set_title(title, fontsize=10)
        number_calls(axis, (row["calls"] for row in rows))
        if noisy:
            # Linear up to the floor's own noise, below which nothing can be told apart.
            floor = max((row["frechet"]["floor_sd"] * 2 for row in rows if row["noisy"]), default=1e-3)
            axis.set_yscale("symlog", linthresh=floor)
            axis.set_ylim(bottom=-floor)
        else:
            axis.set_yscale("log")
    figure.suptitle(problem, fontsize=11)
    return figure


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cells, starting points and digits: a few minutes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"), help="folder of the results")
    parser.add_argument("--filter", default="", help="regular expression: only cells whose name has it")
    parser.add_argument("--calls", type=int, nargs="+", help="model calls of a run")
    parser.add_argument("--count", type=int, help="starting points")
    parser.add_argument("--all-schedules", action="store_true", help="with --quick: all schedules, not one per process")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = QUICK if args.quick else Settings()
    if args.count:
        settings = dataclasses.replace(settings, count=args.count)
    stem = "quality_quick" if args.quick else "quality"
    cells = plan(settings, args.calls or (QUICK_CALLS if args.quick else CALLS),
                 QUICK_SCHEDULES if args.quick and not args.all_schedules else SCHEDULES, args.filter)
    rows, fresh = run(cells, args.out / f"{stem}.jsonl")
    text = table(rows, settings)
    (args.out / f"{stem}.md").write_text(text, encoding="utf-8")
    for problem in dict.fromkeys(row["problem"] for row in rows):
        name = re.sub(r"[^a-z0-9.]+", "_", problem.lower())
        draw(rows, problem).savefig(args.out / f"{stem}_{name}.png")
    print(text[text.index("## Shares"):text.index("## Not run")])
    print(f"{len(rows)} cells, {fresh} measured now, in {args.out}")


if __name__ == "__main__":
    main()
