"""The forward process x_t = alpha_t x_0 + sigma_t eps, seen through sigma: alpha, and lambda = sigma / alpha.

`ve` is k-diffusion's frame (alpha = 1; eps, v and EDM models alike), `flow` is rectified flow (alpha = 1 - sigma).
"""
from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MappingProxyType
from typing import Callable, Mapping

import numpy as np
import torch

from .errors import check_choice, shown

SMALLEST, LARGEST = 1e-38, 1e38
"""The range of a positive sigma: float32's, and powers of it up to the order stay within float64's."""


@dataclass(frozen=True)
class Process:
    """alpha(sigma) and its largest sigma; numpy float64 in and out."""

    name: str
    alpha: Callable[[np.ndarray], np.ndarray]
    sigma_max: float

    def lam(self, sigma: np.ndarray) -> np.ndarray:
        """lambda = sigma / alpha; infinite at sigma = 1 of a flow model."""
        sigma = np.asarray(sigma, dtype=np.float64)
        with np.errstate(divide="ignore"):
            return sigma / self.alpha(sigma)


PROCESSES: Mapping[str, Process] = MappingProxyType({
    "ve": Process("ve", np.ones_like, np.inf),
    "flow": Process("flow", lambda sigma: 1.0 - sigma, 1.0),
})


def get_process(process) -> Process:
    """The `Process` of a name; ValueError or TypeError for anything else."""
    return process if isinstance(process, Process) else PROCESSES[check_choice("process", process, PROCESSES)]


def start_below_one(sigmas: np.ndarray, first: float = 1.0 - 1e-4) -> np.ndarray:
    """`sigmas` of a flow model with a first sigma of 1 moved to `first`, but not below the middle to the next sigma.

    The published formulas cannot start at lambda = infinity; the default is ComfyUI's for a model of shift 1.
    """
    sigmas = np.array(sigmas, dtype=np.float64)
    if sigmas[0] >= 1.0:
        sigmas[0] = max(first, 0.5 * (1.0 + sigmas[1]))
    return sigmas


def check_sigmas(sigmas, process: Process) -> np.ndarray:
    """`sigmas` as float64 numpy, checked: the one read of the schedule from its device, before the first model call.

    Returns:
        The schedule up to its first zero.  It falls (steps of length zero are allowed), or it rises as a whole,
        which is inversion.

    Raises:
        TypeError: not a tensor (or array or list) of real numbers.
        ValueError: not 1-D, not finite, negative, out of float32's range, above sigma = 1 of a flow model, falling in one
            place and rising in another, or rising from 0, where there is no noise direction to follow.
    """
    if isinstance(sigmas, torch.Tensor):
        if sigmas.is_complex() or sigmas.dtype == torch.bool:
            raise TypeError(f"sigmas must be real numbers, got dtype {sigmas.dtype}")
        # First off the device, then to float64, which some devices do not have.
        values = sigmas.detach().cpu().to(torch.float64).numpy()
    else:
        try:
            values = np.asarray(sigmas)
        except (TypeError, ValueError):
            values = np.empty(0, dtype=object)
        if values.dtype.kind not in "iuf":      # nor texts, truth values, complex numbers, which a cast would take for reals
            raise TypeError(f"sigmas must be a 1-D tensor of real numbers, got {type(sigmas).__name__} {shown(sigmas)}")
        values = values.astype(np.float64)
    if values.ndim != 1:
        raise ValueError(f"sigmas must be 1-D, of shape (steps + 1,), got shape {tuple(values.shape)}")
    return _checked(values.tobytes(), process).copy()


@functools.lru_cache(maxsize=32)
def _checked(sigmas: bytes, process: Process) -> np.ndarray:
    """`check_sigmas` of float64 numbers, which the next picture or tile has again."""
    values = np.frombuffer(sigmas)
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"sigmas must be finite, got {values[at]} at index {at}")
    if (values < 0).any():
        at = int(np.flatnonzero(values < 0)[0])
        raise ValueError(f"sigmas must not be negative, got {values[at]:.6g} at index {at}")
    beyond = (values > 0) & ((values < SMALLEST * (1 - 1e-6)) | (values > LARGEST * (1 + 1e-6)))     # as float32 rounds them
    if beyond.any():
        at = int(np.flatnonzero(beyond)[0])
        raise ValueError(f"sigmas must be 0 or between {SMALLEST:g} and {LARGEST:g}, got {values[at]:.6g} at index {at}")
    # A host's shift in float32 can leave sigma = 1 a rounding higher (1.0000001 at shift 1.32).
    values = np.where(values <= process.sigma_max * (1.0 + 1e-6), np.minimum(values, process.sigma_max), values)
    if (values > process.sigma_max).any():
        at = int(np.flatnonzero(values > process.sigma_max)[0])
        raise ValueError(f"sigmas of a flow model must be at most 1, got {values[at]:.6g} at index {at} "
                         "(an eps or v model needs process='ve')")
    diff = np.diff(values)
    if (diff > 0).any() and (diff < 0).any():
        at = int(np.flatnonzero(diff > 0)[0])
        raise ValueError(f"sigmas must be descending, got {values[at]:.6g} -> {values[at + 1]:.6g} at index {at} "
                         "(a schedule that rises as a whole is inversion)")
    if (diff > 0).any() and values[0] == 0:
        raise ValueError("sigmas that rise must start above 0: at sigma = 0 there is no noise direction to follow")
    zero = np.flatnonzero(values == 0)
    return values[:zero[0] + 1] if zero.size and not (diff > 0).any() else values
