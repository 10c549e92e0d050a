"""What a step measures of each picture, and the weights that follow from it (formulas: `ersde.weights`).

All of it is arithmetic on a few numbers per picture, written once for two kinds of them.  On a device they are tensors,
and nothing is read back from it.  Of a single picture on the CPU they are Python floats: there its numbers are in the
memory that Python works on, and a torch operation on one number costs fifty times what a float's does.
"""
from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any, NamedTuple, Optional, Tuple, Union

import torch

from .weights import Amend, Plan, Step

Tensor = torch.Tensor
Number = Union[float, Tensor]
"""One number per picture: a tensor of shape (batch, 1, ...), or a float where there is one picture, on the CPU."""

HALF = (torch.float16, torch.bfloat16)
TINY = 1e-30       # keeps 0 / 0 of evaluations that do not change at all from being NaN
_SURE = 1e12        # the largest 1 / v: times lambda^2 it stays far from float32's largest


def _div(a: float, b: float) -> float:
    return a / b if b else math.copysign(math.inf, a) if a else math.nan


FLOATS = SimpleNamespace(
    addcmul=lambda a, b, c, value=1.0: a + value * b * c,
    addcdiv=lambda a, b, c, value=1.0: a + value * _div(b, c),
    div=_div,
    where=lambda condition, a, b: a if condition else b,
    maximum=max,
    minimum=min,
    # A NaN stays one, as it does in torch.
    clamp=lambda a, min=-math.inf, max=math.inf: min if a < min else max if a > max else a,
    sqrt=math.sqrt,
)
"""torch's functions of these names, for floats."""


class Numbers(NamedTuple):
    """The numbers of a step that meet those of a picture: as tensors of the dtype that the state is computed in, since in an
    operation a Python number costs more than the operation itself, or as floats.

    Attributes:
        m: `torch`, or `FLOATS`.
        x_scale: of the `Step`, a tensor in either case: it multiplies the state.
        most: 2 + (1 - common) (1 + ratio^2), the trust's.
        line: the first bend of the `Step`.
        level, usual: of its `Amend`, 1 / usual.
        curve: start, end, scale, top_0, top_1, bottom_0 and bottom_1 of the `Amend`'s curve and of `Step.reach`: each of
            shape (2, 1, ...), or both curves' floats; () without an `Amend`.
        one, zero: 1 and 0.
    """

    m: Any
    x_scale: Tensor
    most: Number
    line: Number
    level: Number
    usual: Number
    curve: Tuple
    one: Number
    zero: Number


@functools.lru_cache(maxsize=32)
def numbers(plan: Plan, ndim: int, dtype: torch.dtype, device: torch.device, floats: bool = False) -> Tuple[Numbers, ...]:
    """The `Numbers` of each step of a plan, for a state of `ndim` dimensions; one copy to the device, the first time."""
    scales, rows, curves = [], [], []
    for step in plan.steps:
        amend = step.amend
        level, usual = (0.0, 0.0) if amend is None else (amend.level, 1.0 / amend.usual)
        scales.append(step.x_scale)
        rows.append((2.0 + (1.0 - step.common) * (1.0 + step.ratio ** 2), step.bend[0] if step.bend else 0.0, level, usual))
        both = () if amend is None else (amend.curve, step.reach or amend.curve)
        curves.append(tuple((c.start, c.end, c.scale, *c.top, *c.bottom) for c in both))
    make = lambda values: torch.tensor(values, dtype=torch.float64, device="cpu").to(dtype).to(device)
    if floats:
        return tuple(Numbers(FLOATS, scale, *row, curve, 1.0, 0.0)
                     for scale, row, curve in zip(make(scales).unbind(), rows, curves))
    pairs = [number for curve in curves for pair in zip(*curve) for number in pair]
    flat = [number for row in rows for number in row]
    made = make([1.0, 0.0, *scales, *flat, *pairs])
    one, zero, *single = made[:2 + len(scales) + len(flat)].unbind()
    pairs = iter(made[2 + len(single):].reshape(-1, 7, 2, *(1,) * ndim).unbind())
    return tuple(Numbers(torch, scale, *single[len(scales) + 4 * i:len(scales) + 4 * i + 4],
                         next(pairs).unbind() if curve else (), one, zero)
                 for i, (scale, curve) in enumerate(zip(single, curves)))


@functools.lru_cache(None)
def rest(ndim: int) -> Tuple[int, ...]:
    """The dimensions of one picture."""
    return tuple(range(1, ndim))


def read(m: Any, value: Tensor) -> Number:
    """The tensor, or the float in it: on the CPU it is where numpy, and so Python, reads it."""
    return value if m is torch else value.numpy().item()


def length(m: Any, x: Tensor) -> Number:
    """Euclidean norm of each picture, float32 or wider."""
    if x.ndim == 1:
        return read(m, x.abs().to(torch.float32) if x.dtype in HALF else x.abs())
    wide = torch.float32 if x.dtype in HALF else None
    return read(m, torch.linalg.vector_norm(x, 2, rest(x.ndim), True, dtype=wide))


def total(m: Any, x: Tensor, dtype: Optional[torch.dtype] = None) -> Number:
    """Sum over each picture."""
    return read(m, x.to(dtype or x.dtype) if x.ndim == 1 else x.sum(dim=rest(x.ndim), keepdim=True, dtype=dtype))


def inverse_variance(by: Numbers, amend: Amend, along: Number, size: Number) -> Number:
    """1 / v of each picture, 0 where there is none, from <R_0, e_0 - e_1> without its factor and |R_0|."""
    m = by.m
    return m.clamp(m.addcdiv(by.zero, along, m.clamp(size * size, min=TINY), value=amend.factor), 0.0, _SURE)


def correction(by: Numbers, inverse: Number) -> Tuple[Number, Number, Number, Number]:
    """By 1 / v: whether there is a v, alpha k of the correction, the step's own bend, v / (v + level), the slope of D."""
    m, sure = by.m, inverse > by.zero
    used = m.where(sure, inverse, by.usual)
    weight, by_law = _curve(m, by.one, by.curve, used).unbind() if m is torch else \
        (_curve(m, by.one, curve, used) for curve in by.curve)
    return sure, weight, by_law, sure / m.addcmul(by.one, inverse, by.level)


def _curve(m: Any, one: Number, curve: Tuple, inverse: Number) -> Number:
    """f(v), see `ersde.weights.Curve`."""
    start, end, scale, top, steep, bottom, deep = curve
    q = m.sqrt(m.div(m.addcmul(start, inverse, end), m.addcmul(one, inverse, scale)))
    return m.div(m.addcmul(top, q, steep), m.addcmul(bottom, q, deep))


def mean_slope(m: Any, amend: Amend, count: int, now: Number, turn: float, old: Optional[Number]) -> Number:
    """v / (v + level) of the mean over all directions, see `ersde.weights.Limit`.

    Args:
        count: the numbers in a picture.
        now: the length of alpha lambda^2 e of now.
        turn, old: what turns one of the step's start into that, and the length of that, None for 0.
    """
    limit, level = amend.limit, amend.level
    # |e|^2 of both over factor^2
    now, noise = now * now, count * limit.fresh / amend.factor ** 2
    if old is None:
        room, gain = now * -level + noise, now
    else:
        past = old * old * (limit.held * turn ** 2)
        room, gain = past * limit.level - now * level + noise, now - past
    # v = room / gain; both are not negative at once.
    room = m.clamp(room, min=0.0)
    return m.div(room, m.clamp(room + m.clamp(gain, min=0.0) * level, min=TINY))


def reach(by: Numbers, step: Step, by_law: Number, sure: Number, size: Number, newest: Number, before: Optional[Number]
          ) -> Number:
    """The weight on R_0 of a long step's bend.

    Args:
        by_law, sure: the bend by v, and whether there is a v.
        size, newest, before: |D_0|, |R_0| and, where the step has a ratio, |R_1|.
    """
    m = by.m
    if not step.bend:
        return by_law * sure
    share = m.div(newest, size)             # infinite for D = 0
    by_line = by.line / m.addcmul(by.one, share, share, value=step.common)
    if step.ratio == 0.0:
        return m.maximum(by_law * sure, by_line)
    fall = before / newest
    fall = fall * fall
    fall = m.addcmul(by.one, fall, fall, value=step.ratio ** 4)
    return m.where(sure, m.maximum(by_law, by_line), by_line / fall)


def trust(by: Numbers, step: Step, size: Number, newest: Number, miss: Optional[Number]) -> Number:
    """theta = clamp(2 - m^2, 0, 1) / (1 + s^2), m and s made fair to fresh noise (see `ersde.weights`).

    Args:
        size, newest, miss: |D_0|, |R_0| and, where the step has a ratio, |R_0 - ratio R_1|.
    """
    m = by.m
    share = m.div(newest, size)             # infinite for D = 0, where the trust is 0
    wide = m.addcmul(by.one, share, share, value=step.common)
    if miss is None:
        return by.one / wide
    miss = miss / newest
    return m.clamp(by.most - miss * miss, 0.0, 1.0) / wide
