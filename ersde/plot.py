"""Figures of what the solver does: noise scales, noise per step, weights per step.  No host is needed.

Each function returns a `matplotlib.figure.Figure` with an Agg canvas; pyplot and its global state are never used, so
that a host may call these from any thread.  `to_image` turns a figure into a picture for a host's image socket.
"""
from __future__ import annotations

from typing import Iterable, Optional, Sequence, Tuple

import numpy as np
import torch

from .errors import check_choice, check_real
from .noise_scale import NOISE_SCALES, NoiseScale, get_noise_scale
from .process import check_sigmas, get_process, start_below_one
from .weights import METHODS, Plan, make_plan

# Okabe and Ito's colours, which colour-blind readers can tell apart, and a dash pattern each for print.
COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "-", (0, (6, 2)), "-", "-", (0, (4, 1.5, 1, 1.5)), (0, (1.5, 1.2)))
_STYLE = {name: (COLOURS[i], DASHES[i]) for i, name in enumerate(("ode", "sde", "sde_1", "sde_2", "sde_3", "sde_4",
                                                                   "sde_5"))}
_GRID = {"color": "#e3e3e3", "linewidth": 0.8}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """An empty figure of width x height inches (100 dots each) on an Agg canvas, and its array of axes.

    Returns:
        (Figure, axes of shape (rows, columns)).

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("ersde.plot needs matplotlib, which this Python does not have; sampling works without it"
                          ) from error
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.grid(True, **_GRID)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure, axes


def to_image(figure):
    """A figure as a `PIL.Image` in mode RGB, of figsize x dpi pixels.

    Raises:
        ImportError: pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("ersde.plot.to_image needs pillow, which this Python does not have") from error
    canvas = figure.canvas
    if not hasattr(canvas, "buffer_rgba"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _scales(names) -> Sequence[NoiseScale]:
    names = tuple(NOISE_SCALES) if names is None else (names,) if isinstance(names, str) or callable(names) else names
    return [get_noise_scale(name) for name in names]


def _ratio(scale: NoiseScale, eta: float, lam: torch.Tensor, one: torch.Tensor) -> np.ndarray:
    """(g(lambda) / g(one))^eta within 1e-100 to 1e100: a logarithmic axis that reaches further cannot be drawn."""
    return (eta * (scale.log_g(lam) - scale.log_g(one))).clamp(-230.0, 230.0).exp().numpy()


def _style(scale: NoiseScale, index: int) -> dict:
    colour, dash = _STYLE.get(scale.name, (COLOURS[index % len(COLOURS)], "-"))
    return {"color": colour, "linestyle": dash, "linewidth": 2.0}


def plot_noise_scales(names: Optional[Iterable] = None, eta: float = 1.0, lam: Tuple[float, float] = (0.01, 100.0)):
    """g(lambda)^eta = phi_eta / lambda of noise scale functions against lambda, each divided by its value at 1.

    The left axes are logarithmic both ways; the right ones show the range 0.75 to 1.75 on a linear axis, where the
    functions that add little noise can be told apart.  A steeper curve adds more noise over the same step.

    Args:
        names: names of `ersde.NOISE_SCALES` or callables phi(lambda); None: all of the table.
        eta: exponent of g, from 0.
        lam: smallest and largest lambda = sigma / alpha, both positive and finite.

    Returns:
        matplotlib.figure.Figure.

    Raises:
        ValueError, TypeError: an unknown name, an eta or a range that is not allowed.
        ImportError: matplotlib is not installed.
    """
    scales = _scales(names)
    eta = check_real("eta", eta)
    low, high = (check_real("lam", value) for value in lam)
    if not 0.0 < low < high:
        raise ValueError(f"lam must be two positive numbers, the smaller one first, got {lam!r}")
    grid = torch.logspace(np.log10(low), np.log10(high), 400, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    figure, axes = new_figure(11, 4.6, 1, 2)
    whole, zoom = axes[0]
    for i, scale in enumerate(scales):
        value = _ratio(scale, eta, grid, one)
        for axis in (whole, zoom):
            axis.plot(grid.numpy(), value, label=f"{scale.name}:  {scale.formula}", **_style(scale, i))
    power = "" if eta == 1 else f"^{eta:g}"
    for axis in (whole, zoom):
        axis.set_xscale("log")
        axis.set_xlim(low, high)
        axis.set_xlabel("lambda = sigma / alpha")
    whole.set_yscale("log")
    whole.set_ylabel(f"(g(lambda) / g(1)){power}")
    whole.set_title("noise scale functions, phi / lambda = g", loc="left", fontsize=11)
    zoom.set_ylim(0.75, 1.75)
    zoom.set_title("the same near 1, linear", loc="left", fontsize=11)
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(scales)),
                  frameon=False, fontsize=9, handlelength=3)
    return figure


def make_plot_plan(sigmas, process="ve", noise_scale="sde_5", eta=1.0, s_noise: float = 1.0, order: int = 3,
                   corrector: bool = True, method: str = "exact", first: float = 1.0 - 1e-4) -> Plan:
    """The plan that `ersde.sample_er_sde` would run on `sigmas`, for `plot_weights` and `plot_run`.

    Args:
        sigmas: shape (steps + 1,), as for the sampler.
        eta: a number, or one per step, shape (steps,) or longer (0 outside a stochastic window).
        first: where the method "comfyui" starts a flow model whose schedule begins at 1.

    Raises:
        ValueError, TypeError: an argument is not allowed.
    """
    process = get_process(process)
    values = check_sigmas(sigmas, process)
    if len(values) < 2:
        raise ValueError(f"sigmas must have at least 2 entries, got {len(values)}")
    check_choice("method", method, METHODS)
    if process.name == "flow" and method == "comfyui" and values[0] >= 1.0:
        values = start_below_one(values, first)
    eta = np.asarray(eta, dtype=np.float64)
    etas = eta[:len(values) - 1] if eta.ndim else np.full(len(values) - 1, eta)
    return make_plan(values, process, get_noise_scale(noise_scale), etas, s_noise, order, corrector, method)


def plot_injected_noise(sigmas, names: Optional[Iterable] = None, process="ve", eta=1.0, s_noise: float = 1.0):
    """The noise that each step adds on a schedule, per noise scale function.

    Left: the standard deviation sigma_t sqrt(1 - rho^2) s_noise that step number i adds, in x's units, on a logarithmic
    axis (steps that add none are left out).  Right: the share of the variance of the noise at sigma_t that is new in
    the step, 1 - rho^2, from 0 (ODE) to 1 (all of it).

    Args:
        sigmas: shape (steps + 1,), as for the sampler.
        names: names of `ersde.NOISE_SCALES` or callables phi(lambda); None: all of the table.
        process: "ve" or "flow".
        eta: exponent of g: a number, or one per step, shape (steps,).
        s_noise: factor of the noise's standard deviation, above 0.

    Returns:
        matplotlib.figure.Figure.

    Raises:
        ValueError, TypeError: an argument is not allowed.
        ImportError: matplotlib is not installed.
    """
    scales = _scales(names)
    if check_real("s_noise", s_noise) == 0.0:
        raise ValueError("s_noise must be above 0: at 0 no step adds noise")
    figure, axes = new_figure(11, 4.6, 1, 2)
    amount, share = axes[0]
    for i, scale in enumerate(scales):
        plan = make_plot_plan(sigmas, process, scale, eta, s_noise, order=1, corrector=False)
        noise = np.array([step.noise for step in plan.steps])
        after = plan.sigmas[1:]
        # The last step, to sigma = 0, leaves no noise to have a share of.
        part = np.divide(noise, s_noise * after, out=np.full_like(noise, np.nan), where=after > 0) ** 2
        number = np.arange(1, len(noise) + 1)
        style = {**_style(scale, i), "marker": "o", "markersize": 3.5}
        amount.plot(number, np.where(noise > 0, noise, np.nan), label=scale.name, **style)
        share.plot(number, part, label=scale.name, **style)
    amount.set_yscale("log")
    amount.set_ylabel("standard deviation added, units of x")
    amount.set_title(f"noise added per step, {get_process(process).name}, {len(number)} steps", loc="left", fontsize=11)
    share.set_ylabel("new share of the noise's variance, 1 - rho²")
    share.set_ylim(-0.03, 1.03)
    share.set_title("how much of the noise is new", loc="left", fontsize=11)
    for axis in (amount, share):
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlim(0.5, len(number) + 0.5)
    figure.legend(*share.get_legend_handles_labels(), loc="outside lower center", ncols=min(7, len(scales)),
                  frameon=False, fontsize=9, handlelength=3)
    return figure


def _draw_weights(axis, plan: Plan) -> int:
    """The bars of the evaluations' weights and the dots of the state's; returns how many series there are."""
    steps = plan.steps
    lags = sorted({lag for step in steps for lag, _ in step.evaluations})
    number = np.arange(1, len(steps) + 1)
    width = 0.84 / max(1, len(lags))
    colours = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
    for k, lag in enumerate(lags):
        weight = [dict(step.evaluations).get(lag, 0.0) for step in steps]
        axis.bar(number + (k - (len(lags) - 1) / 2) * width, weight, width, color=colours[k % len(colours)],
                 label="D, newest" if lag == 0 else f"D, {lag} before")
    axis.plot(number, [step.x_scale for step in steps], "o-", color="#555555", linewidth=1.0, markersize=4, label="state x")
    axis.axhline(0.0, color="#333333", linewidth=0.8)
    axis.set_ylabel("weight")
    return len(lags) + 1


def _draw_noise(axis, plan: Plan) -> None:
    """What each step multiplies the noise by, on a logarithmic axis; steps that add none are left out."""
    noise = [step.noise or np.nan for step in plan.steps]
    axis.plot(np.arange(1, len(noise) + 1), noise, "x-", color="#b00020", linewidth=1.0, markersize=6, label="noise z")
    axis.set_yscale("log")
    axis.set_ylabel("noise")


def _draw_orders(axis, plan: Plan) -> None:
    """How many evaluations each step's predictor interpolates."""
    axis.bar(np.arange(1, len(plan.steps) + 1), plan.orders, 0.7, color="#7a8ca3")
    axis.set_ylabel("evaluations")
    axis.set_yticks(range(0, max(plan.orders) + 1))


def _number_steps(axis, count: int) -> None:
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlim(0.4, count + 0.6)


def plot_weights(plan: Plan, title: str = ""):
    """A plan's weights: what each step multiplies the state, the evaluations of the denoiser and the noise by.

    From the top: one bar per evaluation of the denoiser D that the step uses, newest first (the corrector's share is
    merged in), and the state's factor as dots; the noise's factor on a logarithmic axis, where a step adds any; how
    many evaluations the step's predictor interpolates.

    Args:
        plan: of `ersde.weights.make_plan` or `make_plot_plan`.
        title: above the figure; "" leaves it out.

    Returns:
        matplotlib.figure.Figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    noisy = any(step.noise for step in plan.steps)
    ratios = (4, 1.5, 1) if noisy else (4, 1)
    figure, axes = new_figure(11, 6.4 if noisy else 5.2, len(ratios), 1, sharex=True, height_ratios=ratios)
    series = _draw_weights(axes[0, 0], plan)
    if noisy:
        _draw_noise(axes[1, 0], plan)
    _draw_orders(axes[-1, 0], plan)
    _number_steps(axes[-1, 0], len(plan.steps))
    handles = [axis.get_legend_handles_labels() for axis in axes[:-1, 0]]
    figure.legend(sum((h for h, _ in handles), []), sum((t for _, t in handles), []), loc="outside lower center",
                  ncols=series + noisy, frameon=False, fontsize=9)
    if title:
        axes[0, 0].set_title(title, loc="left", fontsize=11)
    return figure


def plot_run(plan: Plan, process, scale, eta: float = 1.0, title: str = ""):
    """All that a run does, on one sheet, for a person who tunes it.

    Left: the noise scale g^eta over the run's lambda with a mark per step, among the functions of the table; and the
    noise that each step adds, its standard deviation on a logarithmic axis and the share of the noise's variance that is
    new.  Right: the weights and the orders, as in `plot_weights`.

    Args:
        plan: of `make_plot_plan`.
        process: "ve" or "flow", the plan's.
        scale: the noise scale, as `ersde.sample_er_sde` takes it; eta: its exponent within the window.
        title: above the figure; "" leaves it out.

    Returns:
        matplotlib.figure.Figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    scale, steps = get_noise_scale(scale), len(plan.steps)
    number = np.arange(1, steps + 1)
    figure, axes = new_figure(13, 7.6, 2, 2, height_ratios=(3, 2))
    curve, weights, amount, orders = axes.flat

    lam = get_process(process).lam(plan.sigmas)
    lam = lam[np.isfinite(lam) & (lam > 0)]
    low, high = (lam.min() / 1.5, lam.max() * 1.5) if len(lam) else (0.01, 100.0)
    grid = torch.logspace(np.log10(low), np.log10(high), 300, dtype=torch.float64)
    one = torch.full((1,), low, dtype=torch.float64)
    value = lambda g, at, power=1.0: _ratio(g, power, at, one)
    for i, other in enumerate(NOISE_SCALES.values()):
        if other.name != scale.name:
            curve.plot(grid.numpy(), value(other, grid), **{**_style(other, i), "linewidth": 1.0, "alpha": 0.45},
                       label=other.name)
    name = scale.name if eta == 1 else f"{scale.name}, eta {eta:g}"
    curve.plot(grid.numpy(), value(scale, grid, eta), color="#000000", linewidth=2.6, label=name)
    if len(lam):
        curve.plot(lam, value(scale, torch.from_numpy(lam), eta), "o", color="#000000", markersize=5)
    curve.set_xscale("log")
    curve.set_yscale("log")
    curve.set_xlim(low, high)
    curve.invert_xaxis()
    curve.set_xlabel("lambda = sigma / alpha, as the run goes")
    curve.set_ylabel("g(lambda)^eta, 1 at the end")
    curve.set_title("noise scale: the steeper, the more noise", loc="left", fontsize=11)
    curve.legend(frameon=False, fontsize=8, ncols=2)

    after = plan.sigmas[1:]
    noise = np.array([step.noise for step in plan.steps])
    top = noise.max()
    share = np.divide(noise, after, out=np.zeros_like(noise), where=after > 0) ** 2
    new = amount.twinx()
    new.bar(number, share, 0.7, color="#c9d4e0", zorder=0)
    new.set_ylim(0, max(1.0, 1.05 * share.max()))
    new.spines["top"].set_visible(False)
    new.set_ylabel("share of the variance that is new", color="#7a8ca3")
    amount.set_zorder(new.get_zorder() + 1)
    amount.patch.set_visible(False)
    if top > 0:
        _draw_noise(amount, plan)
        amount.set_ylabel("standard deviation added", color="#b00020")
    else:
        amount.set_yticks([])
        amount.text(0.5, 0.5, "no step adds noise", transform=amount.transAxes, ha="center", va="center", fontsize=12)
    amount.set_title("noise added per step", loc="left", fontsize=11)

    series = _draw_weights(weights, plan)
    weights.set_title("weights of the model's evaluations", loc="left", fontsize=11)
    low, high = weights.get_ylim()
    weights.set_ylim(low, high + 0.2 * (high - low))        # room for the legend
    weights.legend(frameon=False, fontsize=8, ncols=min(4, series), loc="upper left")
    _draw_orders(orders, plan)
    orders.set_title("evaluations that a step looks at", loc="left", fontsize=11)
    for axis in (amount, weights, orders):
        _number_steps(axis, steps)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


__all__ = ["make_plot_plan", "new_figure", "plot_injected_noise", "plot_noise_scales", "plot_run", "plot_weights",
           "to_image"]
