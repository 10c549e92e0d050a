"""Checks of arguments: each returns the value, or raises an error that names the argument and what is allowed."""
from __future__ import annotations

import difflib
import math
from numbers import Integral, Real
from typing import Iterable


def check_choice(name: str, value, allowed: Iterable[str]) -> str:
    """`value` if it is one of `allowed`; TypeError for a non-string, ValueError for an unknown one."""
    allowed = list(allowed)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint}")
    return value


def check_real(name: str, value, low: float = 0.0, high: float = math.inf) -> float:
    """`value` as a finite float in [low, high]; TypeError for a non-number, ValueError outside the range."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    value = float(value)
    if not math.isfinite(value) or not low <= value <= high:
        allowed = f"a finite number of at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return value


def check_int(name: str, value, low: int, high: int) -> int:
    """`value` as an int in [low, high]; TypeError for a non-integer, ValueError outside the range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value!r}")
    return int(value)


def check_bool(name: str, value) -> bool:
    """`value` if it is a bool; TypeError otherwise (a 0 or a "false" from a file is more likely a mistake)."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value
