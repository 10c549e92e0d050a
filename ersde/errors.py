"""Checks of arguments: each returns the value, or raises an error that names the argument and what is allowed."""
from __future__ import annotations

import difflib
import math
import reprlib
from numbers import Integral, Real
from typing import Iterable

import torch

MAX_ETA = 1000.0
"""The most that eta may be: far beyond any use, and still far from where its products overflow."""


def shown(value) -> str:
    """`repr(value)` in one line of at most some 100 letters, whatever it is."""
    try:
        text = " ".join(reprlib.repr(value).split())
    except Exception:                   # an integer of too many digits, or a repr that fails
        text = f"a value of type {type(value).__name__}"
    # A lone surrogate, as JSON can hold it, cannot be written to a log.
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 100 else text[:97] + "..."


def check_choice(name: str, value, allowed: Iterable[str]) -> str:
    """`value` if it is one of `allowed`; TypeError for a non-string, ValueError for an unknown one."""
    allowed = list(allowed)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}")
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}{hint}")
    return value


def check_real(name: str, value, low: float = 0.0, high: float = math.inf) -> float:
    """`value` as a finite float in [low, high]; TypeError for a non-number, ValueError outside the range."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        value = float(value)
    except OverflowError:               # an integer of hundreds of digits
        value = math.inf if value > 0 else -math.inf
    if not math.isfinite(value) or not low <= value <= high:
        allowed = f"a finite number of at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    return value


def check_eta(value) -> float:
    """`value` as a finite float from 0 to `MAX_ETA`."""
    value = check_real("eta", value)
    if value > MAX_ETA:
        raise ValueError(f"eta must be at most {MAX_ETA:g}, got {shown(value)}")
    return value


def check_int(name: str, value, low: int, high: int) -> int:
    """`value` as an int in [low, high]; TypeError for a non-integer, ValueError outside the range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {shown(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {shown(value)}")
    return int(value)


def check_bool(name: str, value) -> bool:
    """`value` if it is a bool; TypeError otherwise (a 0 or a "false" from a file is more likely a mistake)."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def check_callable(name: str, value, optional: bool = False):
    """`value` if it can be called, or is None where that is allowed; TypeError otherwise."""
    if not callable(value) and not (optional and value is None):
        raise TypeError(f"{name} must be a function{' or None' if optional else ''}, got {shown(value)}")
    return value


def check_state(x) -> torch.Tensor:
    """`x` if it is a dense floating point tensor with a batch dimension; TypeError or ValueError otherwise."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.layout != torch.strided:
        got = f"{x.dtype}, {x.layout}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"x must be a dense floating point tensor, got {got}")
    if x.ndim == 0:
        raise ValueError("x must have a batch dimension, got a tensor of shape ()")
    return x


def check_tensor_like(name: str, value, x) -> torch.Tensor:
    """`value` if it is a dense floating point tensor of x's shape on x's device; TypeError or ValueError otherwise."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point() or value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense floating point tensor, got {value.dtype}, {value.layout}")
    if value.shape != x.shape:
        raise ValueError(f"{name} must have x's shape {tuple(x.shape)}, got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")
    return value
