"""What the hosts' models look like from inside a sampler.  Read off their attributes: nothing of a host is imported here."""
from __future__ import annotations

from typing import Iterator, Optional, Tuple

import numpy as np


def _model_sampling(model):
    """ComfyUI's and reForge's model_sampling object behind a sampler's `model`, or None.

    ComfyUI's wrapper has a model_patcher, which knows of what nodes exchange; so has the one that reForge's script "Advanced
    Model Sampling" puts in.  reForge's own wrappers hold the A1111 model, and that its forge_objects.
    """
    inner = getattr(model, "inner_model", None)
    patcher = getattr(inner, "model_patcher", None)
    if patcher is not None and hasattr(patcher, "get_model_object"):
        return patcher.get_model_object("model_sampling")
    unet = getattr(getattr(getattr(inner, "inner_model", None), "forge_objects", None), "unet", None)
    return getattr(getattr(unet, "model", None), "model_sampling", None)


def _chain(model) -> Iterator[object]:
    """`model` and what it wraps, outermost first, each once."""
    seen = set()
    while model is not None and id(model) not in seen:
        seen.add(id(model))
        yield model
        model = getattr(model, "inner_model", None)


def read_process(model) -> str:
    """"flow" when the host's model is a rectified flow model, else "ve".

    ComfyUI and reForge: the class of model_sampling derives from CONST.  Forge and Forge Neo: the predictor's
    prediction_type is "const".  AUTOMATIC1111: the SD3 model has add_noise_to_latent.
    """
    sampling = _model_sampling(model)
    if sampling is not None:
        return "flow" if any(base.__name__ == "CONST" for base in type(sampling).__mro__) else "ve"
    for part in _chain(model):
        kind = getattr(getattr(part, "predictor", None), "prediction_type", None)
        if kind is not None:
            return "flow" if kind == "const" else "ve"
        if hasattr(part, "add_noise_to_latent"):
            return "flow"
    return "ve"


def percent_to_sigma(model, sigmas: np.ndarray, percent: float) -> float:
    """The sigma at a part of the model's whole schedule: 0 is pure noise (infinity here), 1 the picture (0).

    ComfyUI's own percent_to_sigma where there is one, else the host's table of sigmas over training time (ascending); a
    model with neither is measured by this run's steps.
    """
    if percent <= 0.0:
        return float("inf")
    if percent >= 1.0:
        return 0.0
    sampling = _model_sampling(model)
    if hasattr(sampling, "percent_to_sigma"):
        return float(sampling.percent_to_sigma(percent))
    table = _table(model)
    if table is not None:
        # Between two entries by their logarithms, as ComfyUI does, so that a window means the same there.
        at = (1.0 - percent) * (len(table) - 1)
        return float(np.exp(np.interp(at, np.arange(len(table)), np.log(table))))
    return float(np.interp(percent * (len(sigmas) - 1), np.arange(len(sigmas)), sigmas))


def first_flow_sigma(model) -> float:
    """Where ComfyUI's er_sde starts a flow model whose schedule begins at 1: the sigma at 0.01 % of the model's schedule.

    For a model without one that is 1 - 1e-4, as for a shift of 1.
    """
    known = hasattr(_model_sampling(model), "percent_to_sigma") or _table(model) is not None
    return percent_to_sigma(model, np.empty(0), 1e-4) if known else 1.0 - 1e-4


def _table(model) -> Optional[np.ndarray]:
    """The host's ascending sigmas over training time, float64, or None."""
    for part in _chain(model):
        table = getattr(part, "sigmas", None)
        if hasattr(table, "detach") and table.ndim == 1 and len(table) > 1:
            return np.maximum(table.detach().cpu().double().numpy(), 1e-12)
    return None


def window_sigmas(model, sigmas: np.ndarray, start: float, end: float) -> Tuple[float, float]:
    """The stochastic window (start, end) in parts of the schedule as sigmas: a step from sigma is in it when
    window[0] >= sigma > window[1]."""
    return percent_to_sigma(model, sigmas, start), percent_to_sigma(model, sigmas, end)
