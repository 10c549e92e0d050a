"""What the demo computes and draws.  Every number on the page comes from here, of the same run."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, List, Sequence, Tuple

import torch

import ersde
from ersde import plot

from . import pictures, trained
from .mixture import SIGMA_MAX, SIGMA_MIN, digits, fine_solution, fine_steps, flow_schedule, karras
from .network import load_model

Tensor = torch.Tensor

STD = 0.1
SEED = 2026


@dataclass(frozen=True)
class Size:
    """How much is computed.

    Attributes:
        steps: the columns of the grids.
        sweep: values of eta and s_noise; etas: those of the noise scales' figure.
        guidance: guidance scales.
        run: steps of a run in the guidance figure and in the sweeps.
        error_seeds: seeds behind each number of the error figures.
        error_steps: step counts of the error figure; table: those of its table.
        fine: RK4 steps of the fine solution per unit of log sigma; its check runs with half of them.
    """

    steps: Tuple[int, ...] = (4, 6, 8, 10, 15, 30)
    sweep: Tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    etas: Tuple[float, ...] = (0.5, 1.0, 1.5)
    guidance: Tuple[float, ...] = (1.0, 2.0, 4.0, 7.5, 12.0)
    run: Tuple[int, int] = (8, 16)
    error_seeds: int = 64
    error_steps: Tuple[int, ...] = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
    table: Tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    fine: int = 64


QUICK = Size((4,), (0.0, 1.0), (1.0,), (1.0, 5.0), (4, 4), 8, (4, 8, 16), (4, 8, 16), 8)

SOLVERS: Dict[str, Dict[str, object]] = {
    "exact, order 3, corrector": {"method": "exact", "corrector": True},
    "exact, order 3": {"method": "exact", "corrector": False},
    "paper, order 3": {"method": "paper", "corrector": False},
    "comfyui, order 3": {"method": "comfyui", "corrector": False},
}
# figure -> process and rows
GRIDS = {
    "peers": ("ve", ("sde_5", "comfyui", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "few_steps", "ode", "dpmpp_2m",
                     "euler")),
    "presets": ("ve", tuple(ersde.PRESETS)),
    "flow": ("flow", ("sde_5", "comfyui", "few_steps", "ode", "dpmpp_2m", "euler", "sde", "sde_4", "flat", "texture")),
}
GUIDED = ("sde_5", "ode", "few_steps", "comfyui", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde")
LABELS = ("face", "animal", "flag", "person")       # of the four pictures in each cell
CFG = 3.0
COST = 20                                           # of a call of the network in the progress bar, in calls of the mixture


@dataclass
class Shown:
    """One figure of the page.

    Attributes:
        file: its PNG.
        title, look, settings, alt: heading, what to look for, how it was made, and for whom it is read to.
        table: heading and rows of cells, or none.
        notes: sentences with numbers of this run, below.
    """

    file: str
    title: str
    look: str
    settings: str
    alt: str
    width: int = 0
    height: int = 0
    table: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()


def start_noise(count: int, process: str) -> Tensor:
    """The start of `count` seeds, shape (count, 1, 8, 8), float64: picture k is the same in every figure."""
    noise = torch.randn(count, 64, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    return (noise * high(process)).reshape(count, 1, 8, 8)


def high(process: str) -> float:
    """The first sigma of every schedule."""
    return SIGMA_MAX if process == "ve" else 1.0


def schedule(process: str, steps: int) -> Tensor:
    """The process's schedule of the whole page, shape (steps + 1,)."""
    return karras(steps) if process == "ve" else flow_schedule(steps)


def settings_of(process: str) -> str:
    if process == "ve":
        return f"Process ve, Karras schedule from sigma {SIGMA_MAX:g} to {SIGMA_MIN:g}, then 0"
    return "Process flow, equal steps of time from sigma 1, shifted by 3 as in SD3, then 0"


class Trained:
    """The figures of the trained network.

    Args:
        tick: called with a number of calls that are done, a call of the network counting `COST`.
    """

    def __init__(self, size: Size, tick: Callable[[int], None] = lambda calls: None):
        self.size, self.tick = size, tick
        self.models = {process: load_model(process).to(memory_format=torch.channels_last) for process in ("ve", "flow")}
        self.seeds = range(SEED, SEED + len(LABELS))
        self.has_peers = trained.k_diffusion() is not None
        self._cells: Dict[tuple, Tensor] = {}       # of the grids, which share some

    def rows(self, names: Sequence[str]) -> Sequence[str]:
        """Those that this Python can run."""
        return [name for name in names if self.has_peers or name not in trained.PEERS]

    def made(self, sampler, steps: int, process: str = "ve", cfg: float = CFG) -> Tensor:
        """A cell's pictures, shape (len(LABELS), 3, 32, 32)."""
        return trained.sample(self.models[process], sampler, steps, self.seeds, LABELS, cfg=cfg,
                              callback=lambda info: self.tick(COST))

    def parts(self) -> List[Tuple[str, int, Callable[[], Shown]]]:
        """(description, calls, what computes it) of every figure, in the page's order."""
        size = self.size
        few, many = size.run
        cost = lambda *calls: COST * sum(calls)
        fresh, seen = {}, set()
        for figure, (process, names) in GRIDS.items():
            fresh[figure] = len({(process, name) for name in self.rows(names)} - seen)
            seen |= {(process, name) for name in names}
        return [
            *((f"samplers, {figure}", cost(*size.steps) * fresh[figure], lambda figure=figure: self.grid(figure))
              for figure in GRIDS),
            ("guidance", cost(few) * len(self.rows(GUIDED)) * len(size.guidance), self.guidance),
            ("eta and s_noise", cost(many) * 4 * len(size.sweep), self.sweep),
            ("noise scales", cost(many) * len(ersde.NOISE_SCALES) * len(size.etas), self.scales),
        ]

    def settings(self, process: str = "ve", cfg: str = f"guidance {CFG:g}") -> str:
        return (f"{trained.settings_of(process)}; {cfg}. Four seeds ({', '.join(LABELS)}), the same start and the same "
                "stream of noise in every cell.")

    def cell(self, sampler: str, steps: int, process: str) -> Tensor:
        key = (sampler, steps, process)
        if key not in self._cells:
            self._cells[key] = self.made(sampler, steps, process)
        return self._cells[key]

    def grid(self, figure: str) -> Tuple[Shown, object]:
        steps, (process, names) = self.size.steps, GRIDS[figure]
        names = self.rows(names)
        cells = [[self.cell(name, n, process) for n in steps] for name in names]
        image = pictures.grid(cells, names, [str(n) for n in steps], "steps", 2)
        peers = [name for name in names if name in trained.PEERS]
        notes = []
        if peers:
            notes.append(f"{', '.join(peers)} are k-diffusion's own functions.")
        elif not self.has_peers:
            notes.append("k-diffusion is not installed in this Python, so its samplers are left out.")
        if process == "flow" and peers:
            notes.append("Its stochastic ones add noise for alpha = 1, which is wrong for flow.")
        title, look = {
            "peers": ("Beside other samplers, at the same number of model calls", (
                "Above, samplers with noise; below, without. Look to the left for who needs the fewest calls: blur, stray "
                "colour and broken shapes mark too few.")),
            "presets": ("The presets by number of steps", (
                "Follow a row: a preset without noise (ode, few_steps) settles on one picture per seed as steps grow; one "
                "with noise draws other noise for other sigmas, so its pictures change along the row.")),
            "flow": ("The same on a flow model", "Rectified flow, as in SD3, Flux or Wan: the noise has to fit alpha = 1 - "
                                                 "sigma, and then the same presets do the same."),
        }[figure]
        return Shown(
            f"{figure}.png", title, look,
            " ".join([f"{self.settings(process)} comfyui is ComfyUI's formulas.", *notes]),
            f"A table of generated pictures: {len(names)} samplers in rows, {len(steps)} numbers of steps from {steps[0]} "
            f"to {steps[-1]} in columns, four pictures in each cell."), image

    def guidance(self) -> Tuple[Shown, object]:
        steps, names = self.size.run[0], self.rows(GUIDED)
        cells = [[self.made(name, steps, cfg=scale) for scale in self.size.guidance] for name in names]
        image = pictures.grid(cells, names, [f"{scale:g}" for scale in self.size.guidance], "guidance", 2)
        return Shown(
            "guidance.png", "Guidance towards the class",
            "Strong guidance over few steps is the hardest case for a multistep solver: look for burnt colours, hard edges "
            "and lost shapes to the right.",
            f"{self.settings(cfg=f'{steps} steps, D = D_null + guidance (D_class - D_null)')}",
            f"A table of generated pictures: {len(names)} samplers in rows, guidance {self.size.guidance[0]:g} to "
            f"{self.size.guidance[-1]:g} in columns."), image

    def sweep(self) -> Tuple[Shown, object]:
        values, steps = self.size.sweep, self.size.run[1]
        rows = [(name, field) for name in ("sde_5", "sde") for field in ("eta", "s_noise")]
        cells = [[self.made(ersde.PRESETS[name].replace(**{field: v}), steps) for v in values] for name, field in rows]
        image = pictures.grid(cells, ["\n".join(row) for row in rows], [f"{v:g}" for v in values], "value", 2)
        return Shown(
            "sweep.png", "eta and s_noise",
            "eta turns the noise scale from the ODE (0) to the function as published (1) and beyond: the picture changes, "
            "its quality should not. s_noise other than 1 adds too little or too much noise for what the step takes away, "
            "so look for blur to the left and grain to the right.",
            f"{self.settings()} {steps} steps.",
            "A table of generated pictures: eta and s_noise of the presets sde_5 and sde in rows, values "
            f"{values[0]:g} to {values[-1]:g} in columns."), image

    def scales(self) -> Tuple[Shown, object]:
        etas, steps, names = self.size.etas, self.size.run[1], tuple(ersde.NOISE_SCALES)
        make = lambda name, eta: ersde.PRESETS["sde_5"].replace(noise_scale=name, eta=eta)
        cells = [[self.made(make(name, eta), steps) for name in names] for eta in etas]
        image = pictures.grid(cells, [f"eta {eta:g}" for eta in etas], names, "", 2)
        return Shown(
            "scales.png", "The noise scales in pictures",
            "One solver, the same seeds, seven noise scales: sde_1 stays with the ODE, sde_5 varies what happens early, "
            "sde_2, sde and sde_3 draw ever more of the picture anew.",
            f"{self.settings()} {steps} steps.",
            f"A table of generated pictures: eta in rows, {len(names)} noise scales in columns."), image


class Work:
    """The curves, and the errors on a model that is known in closed form.

    Args:
        tick: called with a number of model calls that are done.
    """

    def __init__(self, size: Size, tick: Callable[[int], None] = lambda calls: None):
        self.size, self.tick = size, tick
        self.models = {process: digits(process, STD) for process in ("ve", "flow")}

    def parts(self) -> List[Tuple[str, int, Callable[[], Shown]]]:
        """(description, model calls, what computes it) of every figure, in the page's order."""
        size = self.size
        error = {process: len(SOLVERS) * sum(size.error_steps) + 4 * sum(
            sum(fine_steps(process, high(process), self.ends(process), n)) for n in (size.fine, size.fine // 2))
            for process in ("ve", "flow")}
        return [
            ("noise scale functions", 0, self.noise_scales),
            ("noise per step, ve", 0, lambda: self.injected("ve")),
            ("noise per step, flow", 0, lambda: self.injected("flow")),
            ("weights", 0, self.weights),
            ("error, ve", error["ve"], lambda: self.error("ve")),
            ("error, flow", error["flow"], lambda: self.error("flow")),
        ]

    def noise_scales(self) -> Tuple[Shown, object]:
        return Shown(
            "noise_scales.png", "The noise scale functions",
            "Only the slope matters: flat is the ODE, and a step adds the more noise the more the curve falls "
            "over it from right to left; right panel: sde_1 hardly differs from the ODE.",
            "g = phi / lambda for each function at eta = 1, divided by its value at lambda = 1.",
            f"Curves of {len(ersde.NOISE_SCALES)} noise scale functions against lambda, on logarithmic and on "
            "linear axes."
        ), plot.to_image(plot.plot_noise_scales())

    def injected(self, process: str) -> Tuple[Shown, object]:
        image = plot.to_image(plot.plot_injected_noise(schedule(process, 20), None, process))
        return Shown(
            f"injected_noise_{process}.png", f"Noise added per step, {process}",
            "Left: how much noise each step adds; right: how much of the noise left after the step is new. 1 "
            "throughout would forget the start; ode stays at 0.",
            f"{settings_of(process)}, 20 steps, eta = 1, s_noise = 1.",
            f"Curves of the noise added at each of 20 steps by {len(ersde.NOISE_SCALES)} noise scale functions."), image

    def weights(self) -> Tuple[Shown, object]:
        plan = plot.make_plot_plan(karras(20))
        image = plot.to_image(plot.plot_weights(plan, "sde_5, exact, order 3 with corrector, 20 Karras steps"))
        return Shown(
            "weights.png", "What a step is made of",
            "Each step is one weighted sum of the state, the last evaluations and fresh noise; these weights "
            "depend on the schedule alone, and the last step returns the evaluation itself.",
            f"{settings_of('ve')}, 20 steps, noise scale sde_5, order 3 with corrector.",
            "Bars of the weights of 20 steps on the newest and on earlier evaluations, and the order of each "
            "step."), image

    def ends(self, process: str) -> List[float]:
        """The last sigma above 0 of every schedule of the error figure, falling."""
        return sorted({schedule(process, n)[-2].item() for n in self.size.error_steps}, reverse=True)

    def error(self, process: str) -> Tuple[Shown, object]:
        size, model, count = self.size, self.models[process], self.size.error_seeds
        x = start_noise(count, process)
        # Every run returns D at its last sigma above 0, so the fine solution is read off there as well.
        ends = self.ends(process)
        fine, coarse = (dict(zip(ends, fine_solution(model, x, high(process), ends, n, self.tick)))
                        for n in (size.fine, size.fine // 2))

        def median(a: Tensor, b: Tensor) -> float:
            return ((a - b).flatten(1) ** 2).mean(1).sqrt().median().item()

        errors: Dict[str, List[float]] = {}
        for name, options in SOLVERS.items():
            errors[name] = []
            for n in size.error_steps:
                sigmas = schedule(process, n)
                out = ersde.sample_er_sde(model, x, sigmas, disable=True, eta=0.0, order=3, process=process, **options)
                errors[name].append(median(out, fine[sigmas[-2].item()]))
                self.tick(n)
        check = max(median(fine[end], coarse[end]) for end in ends)
        table = [["steps", *SOLVERS]]
        for i, n in enumerate(size.error_steps):
            if n in size.table:
                table.append([str(n), *(f"{values[i]:.2g}" for values in errors.values())])
        return Shown(
            f"error_{process}.png", f"Error by number of steps, {process}",
            "Lower is better; a steeper line gains more from every further step. A dip at one number of steps can be "
            "an error that changes its sign there.",
            "Handwritten digits of 8 x 8 pixels as a mixture of Gaussians, whose denoiser is known in closed form, so that "
            f"errors can be measured. ODE member (eta = 0), order 3, float64. {settings_of(process)}. Plotted: the median "
            f"over {count} seeds of each picture's RMS difference per pixel to a fine solution of the same ODE, from the "
            f"same start to the same last sigma (RK4, {size.fine} steps per unit of log sigma; with half as many it "
            f"differs by at most {check:.1e} in the same measure). The median, because a mean would mostly count "
            "the few seeds that end at another digit.",
            f"Error against number of steps on logarithmic axes for {len(SOLVERS)} solvers.",
            table=table, notes=compare(size.error_steps, errors)), plot.to_image(error_figure(size.error_steps, errors))


def compare(steps: Sequence[int], errors: Dict[str, List[float]]) -> List[str]:
    """Where the exact solver is better and where it is not: sentences with this run's numbers."""
    ours, theirs = errors["exact, order 3, corrector"], errors["comfyui, order 3"]
    gain = [b / a for a, b in zip(ours, theirs)]
    best = max(range(len(steps)), key=gain.__getitem__)
    out = []
    if gain[best] > 1:
        out.append(f"The exact solver with corrector gains most on comfyui's formulas at {steps[best]} steps: "
                   f"{ours[best]:.2g} against {theirs[best]:.2g}.")
    worse = [f"{steps[i]} ({ours[i]:.2g} against {theirs[i]:.2g})" for i in range(len(steps)) if gain[i] < 1]
    if worse:
        out.append(f"It is worse than comfyui's formulas at {', '.join(worse)} steps.")
    else:
        out.append(f"At none of the {len(steps)} numbers of steps is it worse than comfyui's formulas.")
    return out


def error_figure(steps: Sequence[int], errors: Dict[str, List[float]]):
    """The log-log figure of median errors, with the slope of a third-order method."""
    figure, axes = plot.new_figure(9, 5.2)
    axis = axes[0, 0]
    looks = (("#0072b2", "-", "o"), ("#56b4e9", "-", "s"), ("#009e73", "--", "^"), ("#d55e00", "-", "x"))
    for (name, values), (colour, dash, marker) in zip(errors.items(), looks):
        axis.plot(steps, values, color=colour, linestyle=dash, marker=marker, linewidth=2, label=name)
    start = steps[max(0, len(steps) - 3)]
    ends = [errors["exact, order 3"][-1] * (steps[-1] / n) ** 3 for n in (start, steps[-1])]
    axis.plot((start, steps[-1]), [0.4 * value for value in ends], color="#888888", linewidth=1, linestyle=":",
              label="slope of order 3")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(steps, [str(n) for n in steps])
    axis.minorticks_off()
    axis.set_xlabel("steps (model calls)")
    axis.set_ylabel("median RMS error per pixel")
    axis.legend(frameon=False)
    return figure
