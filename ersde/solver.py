"""Running a plan: per step one linear combination of the state, the denoiser's history and the noise.

Nothing here reads from the device: the weights are Python floats made before the first model call.  The one look at the
result is after the last step.
"""
from __future__ import annotations

from typing import Callable, List, Optional, Sequence

import torch

from .weights import Plan

Tensor = torch.Tensor


def _steps(count: int, disable: Optional[bool]):
    """range(count) behind a progress bar, as k-diffusion shows it."""
    if disable:
        return range(count)
    try:
        from tqdm.auto import trange
    except ImportError:         # a progress bar is no reason to fail
        return range(count)
    return trange(count, disable=disable)


def run(plan: Plan, model: Callable, x: Tensor, sigmas: Tensor, noise: Callable[[int], Tensor], extra_args: dict,
        callback: Optional[Callable], disable: Optional[bool], history: Sequence[Tensor] = ()) -> Tensor:
    """Execute `plan` on `model` from the state `x`.

    Args:
        x: the state at sigmas[0], any shape (batch, ...); never written to.
        sigmas: the schedule as the host gave it: what the callback sees.
        noise: step number -> z of x's shape; called only where a step adds noise.
        history: evaluations made before the first step, newest first.

    Raises:
        FloatingPointError: the result is not finite; names the first step whose evaluation was not.
    """
    count = len(plan.steps)
    at = list(sigmas.unbind())
    # One contiguous copy of the schedule per batch item in x's dtype, so that a step makes no tensor of its own for it.
    for_model = sigmas.to(x.dtype).to(x.device)[:, None].repeat(1, x.shape[0]).unbind()
    past: List[Tensor] = list(history)
    # One number per step, left on the device: a sum is not finite exactly where its terms are not (or overflow).
    sums: List[Tensor] = []
    for i in _steps(count, disable):
        denoised = model(x, for_model[i], **extra_args)
        sums.append(denoised.sum(dtype=torch.float32))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": at[i], "sigma_hat": at[i], "denoised": denoised})
        past.insert(0, denoised)
        del past[plan.history:]
        step = plan.steps[i]
        if step.x_scale == 0.0 and step.denoised == ((0, 1.0),) and step.noise == 0.0:
            x = denoised.to(x.dtype)
            continue
        # The product is a new tensor (the callback or the model may hold the old x), all else is added in place.
        x = x * step.x_scale
        for lag, weight in step.denoised:
            x.add_(past[lag], alpha=weight)
        if step.noise != 0.0:
            x.add_(noise(i), alpha=step.noise)
    _check_finite(x, sums, plan)
    return x


def _check_finite(x: Tensor, sums: Sequence[Tensor], plan: Plan) -> None:
    """The one look at the device, after the last step; only a bad result makes a second one, to name the first cause."""
    if x.isfinite().all().cpu().numpy():
        return
    bad = ~torch.stack(list(sums)).isfinite().cpu().numpy()
    if bad.any():
        i = int(bad.argmax())
        cause = " (its own doing, or the noise of the step before was not finite)" if i else ""
        raise FloatingPointError(f"the model returned NaN or infinity at step {i} of {len(sums)}, counted from 0, "
                                 f"sigma = {plan.sigmas[i]:.6g}{cause}")
    raise FloatingPointError(f"the state became NaN or infinite although every evaluation was finite: the noise of the "
                             f"last step was not finite, or dtype {x.dtype} is too narrow for sigma = {plan.sigmas[0]:.6g}")
