"""Pictures of the trained network: its schedules, starts and samplers, ours and k-diffusion's, at the same seeds.

Everything of a picture comes from its seed and the settings: the start, and the noise of each step by the step's sigma
(`ersde.noise`), the same for every sampler.
"""
from __future__ import annotations

import warnings
from types import MappingProxyType
from typing import Callable, Mapping, Optional, Sequence, Union

import numpy as np
import torch

import ersde
from ersde.errors import check_choice, check_int
from ersde.noise import make_noise, philox_normal

from .mixture import flow_schedule, karras
from .network import CLASSES, SIZE, Denoiser, guided

Tensor = torch.Tensor

# EDM's sigma_max: at the 14.6 of Stable Diffusion the pictures' white paper still shows through the noise.
SIGMA_MAX, SIGMA_MIN = 80.0, 0.01
START = 1 << 32             # names the start in the noise, above the name of every sigma

PEERS: Mapping[str, str] = MappingProxyType({
    "euler": "sample_euler", "euler_ancestral": "sample_euler_ancestral", "dpmpp_2m": "sample_dpmpp_2m",
    "dpmpp_2m_sde": "sample_dpmpp_2m_sde", "dpmpp_3m_sde": "sample_dpmpp_3m_sde"})
"""k-diffusion's samplers, by the name that the hosts have for them."""
NOISY_PEERS = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde")       # they add noise for alpha = 1: wrong for flow


def samplers(process: str = "ve") -> Sequence[str]:
    """The names that `sample` takes for a process: the presets and k-diffusion's samplers."""
    return (*ersde.PRESETS, *(name for name in PEERS if process == "ve" or name not in NOISY_PEERS))


def schedule(process: str, steps: int, calls: Optional[int] = None) -> Tensor:
    """Shape (steps + 1,), float64: Karras et al., rho 7, from 80 to 0.01 (`ve`); equal steps of time, shift 3 (`flow`).

    calls: where a sampler makes more than one model call in a step, so that its last sigma above 0 is that of as many steps.
    """
    check_int("steps", steps, 1, 1000)
    if process == "ve":
        return karras(steps, SIGMA_MAX, SIGMA_MIN)
    return flow_schedule(steps, flow_schedule(calls)[-2].item() if calls else None)


def settings_of(process: str) -> str:
    """The schedule in words."""
    if process == "ve":
        return f"Process ve, Karras schedule from sigma {SIGMA_MAX:g} to {SIGMA_MIN:g}, then 0"
    return "Process flow, equal steps of time from sigma 1, shifted by 3 as in SD3, then 0"


def start(seeds: Sequence[int], process: str) -> Tensor:
    """The state at the first sigma, shape (seeds, 3, SIZE, SIZE), float32, of each seed alone."""
    noise = np.stack([philox_normal(seed, 0, START, 3 * SIZE * SIZE) for seed in seeds])
    return torch.from_numpy(noise).reshape(-1, 3, SIZE, SIZE) * (SIGMA_MAX if process == "ve" else 1.0)


def k_diffusion() -> Optional[object]:
    """k-diffusion's module of samplers, or None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # of packages that it imports
            from k_diffusion import sampling
    except ImportError:
        return None
    return sampling


def sample(model: Denoiser, sampler: Union[str, ersde.Preset], steps: int, seeds: Sequence[int], labels: Sequence, *,
           cfg: float = 3.0, callback: Optional[Callable] = None) -> Tensor:
    """Pictures, one of each seed, shape (seeds, 3, SIZE, SIZE), float32.

    Args:
        model: from `load_model`.
        sampler: a preset or its name, or a name of `PEERS`.
        labels: the class of each picture, as `guided` takes them.
        cfg: guidance scale.
        callback: as k-diffusion's.

    Raises:
        ValueError: an unknown sampler, or one that is wrong for the model's process; says what is allowed.
        ImportError: k-diffusion is asked for and not installed.
    """
    process, seeds = model.process, list(seeds)
    if isinstance(sampler, str):
        check_choice("sampler", sampler, samplers(process))
    call, x, sigmas = guided(model, labels, cfg), start(seeds, process), schedule(process, steps)
    if sampler in PEERS:
        found = k_diffusion()
        if found is None:
            raise ImportError(f"{sampler} is a sampler of k-diffusion, which this Python does not have")
        noise = {"noise_sampler": make_noise("cpu", x, seeds)} if sampler in NOISY_PEERS else {}
        return getattr(found, PEERS[sampler])(call, x, sigmas.float(), disable=True, callback=callback, **noise)
    return ersde.sample_preset(call, x, sigmas, sampler, {"seed": seeds}, callback, True, process=process,
                               window=window(process, sampler), excess=call.excess)


def window(process: str, preset: Union[str, ersde.Preset]):
    """A preset's stochastic window as sigmas, counted in parts of a schedule of 1000 steps, whatever the number of steps."""
    preset, dense = ersde.get_preset(preset), schedule(process, 1000)[:-1].numpy()
    at = lambda part: float(np.interp(part, np.linspace(0, 1, len(dense)), dense))
    return (np.inf if preset.start == 0 else at(preset.start)), (0.0 if preset.end == 1 else at(preset.end))


def labels_of(count: int, label: Optional[Union[str, int]] = None) -> Sequence:
    """`count` labels: the one given, or the classes in turn."""
    return [CLASSES[k % len(CLASSES)] for k in range(count)] if label is None else [label] * count
