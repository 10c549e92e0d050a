"""The samplers: k-diffusion-style functions model, x, sigmas -> x.

    x_t = (sigma_t / sigma_s) rho x_s + alpha_t int + sigma_t sqrt(1 - rho^2) s_noise z,   rho = (g_t / g_s)^eta

with the integral of the denoiser over the step taken exactly for its interpolating polynomial; see `ersde.weights`.
Reference: Cui et al., "Elucidating the solution space of extended reverse-time SDE for diffusion models", arXiv 2309.06169.
"""
from __future__ import annotations

import inspect
from dataclasses import fields
from types import MappingProxyType
from typing import Callable, Mapping, Optional, Tuple, Union

import numpy as np
import torch

from . import hosts
from .errors import check_bool, check_callable, check_choice, check_eta, check_int, check_real, check_state, shown
from .history import History
from .noise import Noise, make_noise
from .noise_scale import get_noise_scale
from .presets import PRESETS, TEXTS, Preset, get_preset
from .process import check_sigmas, get_process, start_below_one
from .solver import run
from .weights import METHODS, known_plan, make_plan

Tensor = torch.Tensor


@torch.no_grad()
def sample_er_sde(model, x, sigmas, extra_args=None, callback=None, disable=None, *,
                  eta=1.0, s_noise=1.0, noise_sampler=None, noise_scale="sde_5",
                  order=3, corrector=True, method="exact", process=None):
    """Sample with the ER-SDE solver: the member phi(lambda) = lambda g(lambda)^eta of the extended reverse-time SDE.

    Args:
        model: (x, sigma of shape (batch,), **extra_args) -> D, the denoiser's estimate of x_0, of x's shape.
        x: the state at sigmas[0], shape (batch, ...), any float dtype; never written to.
        sigmas: shape (steps + 1,), descending, usually ending in 0; below it x is returned unchanged when shorter than 2.
            A schedule that rises as a whole is inversion, for eta = 0 or noise_scale "ode" only.
        extra_args: keyword arguments of every model call; an int "seed" in it, or one for each image, seeds our own noise.
        callback: called each step with {'x', 'i', 'sigma', 'sigma_hat', 'denoised'}.
        disable: True hides the progress bar.
        eta: exponent of g, from 0: 0 is the ODE whatever noise_scale is, 1 the function as published.
        s_noise: factor of the noise's standard deviation, from 0.
        noise_sampler: (sigma, sigma_next) -> z of x's shape and unit variance, or a name of `NOISES`; None: "cpu".
        noise_scale: a name of `NOISE_SCALES`, or a callable phi(lambda) on float64 tensors with phi / lambda not falling.
        order: how many evaluations a step interpolates at most, 1 to 5 ("paper" and "comfyui": 1 to 3); "exact" uses less of
            it where it cannot be trusted (`ersde.weights`), and one more in short steps with the corrector.
        corrector: whether each evaluation also corrects the step that led to it, at no model call ("exact" only).
        method: "exact", "paper" (the published formulas, integrals exact) or "comfyui" (with ComfyUI's 200-point sums).
        process: "ve", "flow", or None: read off the host's model.

    Returns:
        The state at sigmas[-1], of x's shape, dtype and device.

    Raises:
        TypeError, ValueError: an argument is not allowed; names it, its value and what is allowed.
        FloatingPointError: the model returned NaN or infinity; names the first such step and its sigma.
    """
    return _sample(model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, noise_scale, order,
                   corrector, method, process, (np.inf, 0.0))


@torch.no_grad()
def sample_preset(model, x, sigmas, preset: Union[str, Preset], extra_args=None, callback=None, disable=None, *,
                  noise_sampler=None, process=None, window: Optional[Tuple[float, float]] = None, noise_scale=None,
                  guidance: Optional[Callable[[], Tensor]] = None, fresh: Optional[Callable[[], bool]] = None,
                  history: Optional[History] = None, excess: Optional[Callable[[], Optional[Tensor]]] = None):
    """Sample with a preset's settings; `sample_er_sde` says what the arguments are.

    With `guidance` this is CFG++ (Chung et al., arXiv 2406.08070): the noise direction comes from the unconditional
    prediction D_u.  Before a step x_s becomes x_s + alpha_s (D - D_u), so that with order 1

        x_t = alpha_t D + (sigma_t / sigma_s) rho (x_s - alpha_s D_u) + sigma_t sqrt(1 - rho^2) s_noise z.

    Higher orders and the corrector interpolate the guided D as ever.  The guidance counts in full in each step, so that it
    wants a scale of about 1, and less with more steps.

    Args:
        preset: a name of `PRESETS`, or a `Preset`.
        window: (sigma_start, sigma_end): noise only in steps from sigma_start >= sigma > sigma_end; None: the preset's
            start and end, as parts of the model's schedule, read off the host's model.
        noise_scale: a function in place of the preset's, as `sample_er_sde` takes it.
        guidance: () -> D - D_u of the newest model call, of x's shape; asked for once per step, after the call.
        fresh: asked after each model call: whether it was the first one of another model (a refiner, say).  The run goes
            on from there with the same noise, and without the evaluations made before.
        history: what the run before this one left, so that the two are as one, and where this one leaves the same.
        excess: with classifier-free guidance, () -> A = D - D_c of the newest model call, of x's shape, D_c being its
            prediction for the condition alone; None where that call was not guided.  With it the long steps of "exact" know
            that guidance falls away as sigma does (`ersde.weights`), at no model call.  Not asked for with `guidance`,
            which makes another use of the two predictions.
    """
    preset = get_preset(preset)
    if window is None:
        window = (np.inf, 0.0) if (preset.start, preset.end) == (0.0, 1.0) else \
            lambda values: hosts.window_sigmas(model, values, preset.start, preset.end)
    return _sample(model, x, sigmas, extra_args, callback, disable, preset.eta, preset.s_noise, noise_sampler,
                   preset.noise_scale if noise_scale is None else noise_scale, preset.order, preset.corrector,
                   preset.method, process, window, guidance, fresh, history, excess)


def _sample(model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, noise_scale, order, corrector,
            method, process, window, guidance=None, fresh=None, history=None, excess=None):
    eta, s_noise = check_eta(eta), check_real("s_noise", s_noise)
    scale = get_noise_scale(noise_scale)
    check_choice("method", method, METHODS)
    order = check_int("order", order, 1, METHODS[method])
    check_bool("corrector", corrector)
    check_callable("model", model)
    check_callable("callback", callback, optional=True)
    check_callable("excess", excess, optional=True)
    if not isinstance(noise_sampler, str):
        check_callable("noise_sampler", noise_sampler, optional=True)
    if history is not None and not isinstance(history, History):
        raise TypeError(f"history must be an ersde.History or None, got {shown(history)}")
    if extra_args is not None and not isinstance(extra_args, Mapping):
        raise TypeError(f"extra_args must be a dict of keyword arguments, got {shown(extra_args)}")
    check_state(x)
    process = get_process(hosts.read_process(model) if process is None else process)
    values = check_sigmas(sigmas, process)
    if len(values) < 2:
        return x
    start, end = window(values) if callable(window) else _checked_window(window)
    etas = etas_in_window(values, eta, start, end)
    if process.name == "flow" and method == "comfyui" and values[0] >= 1.0:
        sigmas = torch.as_tensor(sigmas).clone()
        sigmas[0] = start_below_one(values, hosts.first_flow_sigma(model))[0]
        values[0] = float(sigmas[0])        # as it is in the schedule's dtype, which is what the host's sampler sees
    sigmas = torch.as_tensor(sigmas)
    extra_args = {} if extra_args is None else extra_args
    if noise_sampler is None or isinstance(noise_sampler, str):
        noise_sampler = make_noise("cpu" if noise_sampler is None else noise_sampler, x, extra_args.get("seed"), values)
    if isinstance(noise_sampler, Noise):
        ours = noise_sampler.of_member(process, scale, eta)
        noise = lambda i: ours(values[i], values[i + 1])        # numbers: the schedule may be on a device
    else:
        ends = sigmas.unbind()
        noise = lambda i: noise_sampler(ends[i], ends[i + 1])
    shift = None
    if guidance is not None:
        alpha = process.alpha(values).tolist()
        shift, excess = lambda i: guidance() * alpha[i], None

    def make(values, etas, history=()):
        rounding = torch.finfo(x.dtype).eps
        if len(history):
            return make_plan(values, process, scale, etas, s_noise, order, corrector, method, history=history,
                             rounding=rounding)
        return known_plan(values, process, scale, etas, s_noise, order, corrector, method, rounding)

    replan = None
    if fresh is not None:
        if history is not None:
            raise ValueError("history and fresh cannot be had together: a run of two models is none to go on from")
        replan = lambda i: make(values[i:], etas[i:]) if fresh() else None

    def go(plan, x, memory=None):
        holds, (least, most) = torch.finfo(x.dtype), plan.extent
        if most > holds.max:
            raise ValueError(f"x of dtype {x.dtype} holds numbers up to {holds.max:g}, too few for sigmas up to "
                             f"{values.max():g} with s_noise={s_noise:g}")
        if least <= 0.5 * holds.tiny * holds.eps:
            raise ValueError(f"x of dtype {x.dtype} takes sigma {least:g} for 0: use float32, or end the schedule earlier")
        return run(plan, model, x, sigmas, noise, extra_args, callback, disable, shift=shift, replan=replan,
                   memory=memory, excess=excess)

    if history is None:
        return go(make(values, etas), x)
    rule = (process.name, noise_scale, order, corrector, method, guidance is None, excess is None)
    return history.run(x, values, etas, rule, make, go)


def etas_in_window(values: np.ndarray, eta: float, start: float, end: float) -> np.ndarray:
    """The eta of each step over the sigmas `values`: 0 outside the stochastic window start >= sigma > end."""
    return np.where((values[:-1] <= start) & (values[:-1] > end), eta, 0.0)


def _checked_window(window) -> Tuple[float, float]:
    try:
        start, end = (check_real("window", sigma) if sigma != np.inf else np.inf for sigma in window)
    except (TypeError, ValueError):
        raise TypeError("window must be two sigmas (start, end), numbers of at least 0 of which start may be infinite, "
                        f"got {shown(window)}") from None
    if start < end:
        raise ValueError(f"window must be two sigmas (start, end) of which start is not below end, got {shown(window)}")
    return start, end


def _preset_function(preset: Preset) -> Callable:
    """`sample_er_sde_<name>`: the preset as a k-diffusion-style function, its settings the defaults of its keywords."""
    settings = [f.name for f in fields(Preset) if f.name != "name" and f.name not in TEXTS]

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, *, noise_sampler=None, process=None,
               **changes):
        return sample_preset(model, x, sigmas, preset.replace(**changes) if changes else preset, extra_args, callback,
                             disable, noise_sampler=noise_sampler, process=process)

    plain = [p for p in inspect.signature(sample).parameters.values() if p.kind is not p.VAR_KEYWORD]
    sample.__signature__ = inspect.Signature(
        plain + [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(preset, name))
                 for name in settings])
    sample.__name__ = sample.__qualname__ = f"sample_er_sde_{preset.name}"
    sample.__module__ = __name__
    sample.__doc__ = (f"{preset.description}\n\n`sample_er_sde` with the settings of the preset {preset.name!r}, any of "
                      "which a keyword changes.\n`start` and `end` are the stochastic window; see `Preset`.")
    return sample


SAMPLERS: Mapping[str, Callable] = MappingProxyType(
    {f"sample_er_sde_{name}": _preset_function(preset) for name, preset in PRESETS.items()})
"""One k-diffusion-style function per built-in preset, by its name; all of them are attributes of `ersde`."""
