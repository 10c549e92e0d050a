"""What a step measures of each picture, and the weights that follow from it (formulas: `ersde.weights`).

All of it is arithmetic on a few numbers per picture, written once for all kinds of them.  On a device they are tensors,
and nothing is read back from it.  On the CPU, where they are in the memory that Python works on, they are floats of 64 bits:
a torch operation on one number costs fifty times what a float's does.  A picture alone has Python's, a few have Python's one
after the other, a batch numpy's, whose arithmetic is the same, so that a picture of a batch is the picture alone.
"""
from __future__ import annotations

import contextlib
import functools
import itertools
import math
from typing import Callable, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch

from .weights import Amend, Plan, Step

Tensor = torch.Tensor
Number = Union[float, "Several", np.ndarray, Tensor]
"""One number per picture: shape (batch, 1, ...), a float for a picture alone, or `Several` floats for a few."""
Rows = Union[Tensor, Sequence[Tensor]]
"""A state, for sums over each picture: as it is, or each picture's numbers one after the other."""

HALF = (torch.float16, torch.bfloat16)
TINY = 1e-30       # keeps 0 / 0 of evaluations that do not change at all from being NaN
_AS_IT_IS = contextlib.nullcontext()
_FAR = 1e6          # the largest |R| / |D| that is told from infinity: its fourth power is a float32
_UNFORESEEN = 0.14    # (|R| / |D|)^2 (1 - r)^2 of a change that halves the line of a step without a v
_LEFT = 0.25        # of guidance's excess, what a long step's bend leaves at least
_BESIDE = 0.05      # |A|^2 / |D|^2 of an excess of which a long step adds half
_LARGE = 1e30       # 1 / v times this is 1 or more for any v
_FEW = 8            # pictures for which numpy's functions take longer than Python's, one picture after the other
_SURE = 1e12        # the largest 1 / v: times lambda^2 it stays far from float32's largest


class Tensors:
    """Numbers on a device: torch's functions, and what numbers do to states."""

    addcmul, addcdiv, div, where = map(staticmethod, (torch.addcmul, torch.addcdiv, torch.div, torch.where))
    maximum, minimum, clamp, sqrt = map(staticmethod, (torch.maximum, torch.minimum, torch.clamp, torch.sqrt))
    floats = False

    def quiet(self):
        """Where what is divided by 0 gets the infinity that is meant, and no warning."""
        return _AS_IT_IS

    def rows(self, x: Tensor) -> Rows:
        """What `inner` and `length` take."""
        return x

    def inner(self, x: Rows, y: Rows, free: bool = False) -> Number:
        """Inner product of each picture, float32 or wider; x may be written over where it is free."""
        x = x.to(torch.float32) if x.dtype in HALF else x
        product = x.mul_(y) if free else x * y
        return product if x.ndim == 1 else product.sum(dim=rest(x.ndim), keepdim=True)

    def length(self, x: Rows) -> Number:
        """Euclidean norm of each picture, float32 or wider."""
        wide = torch.float32 if x.dtype in HALF else x.dtype
        return x.abs().to(wide) if x.ndim == 1 else torch.linalg.vector_norm(x, 2, rest(x.ndim), True, dtype=wide)

    def none(self, weight: Number) -> bool:
        """Whether all are known to be 0, so that there is nothing to add."""
        return False

    def take(self, value: Optional[Number], x: Tensor) -> Optional[Number]:
        """Numbers that another run left, in whatever form."""
        # The dtype first: Apple's GPUs have no float64.
        if value is None or isinstance(value, Tensor):
            return value
        found = torch.as_tensor(value, dtype=x.dtype).to(x.device)
        return found.reshape(-1, *(1,) * (x.ndim - 1)) if isinstance(value, Several) else found

    def add_(self, x: Tensor, change: Tensor, weight: Number, value: float = 1.0) -> Tensor:
        """x += value * weight * change"""
        return x.addcmul_(like(change, x), like(weight, x), value=value)

    def add(self, x: Tensor, change: Tensor, weight: Number, value: float = 1.0, out: Optional[Tensor] = None) -> Tensor:
        """x + value * weight * change, of change's dtype, in the memory of `out` where there is one"""
        return torch.addcmul(like(x, change), change, like(weight, change), value=value, out=out)


def _float_div(a: float, b: float) -> float:
    return a / b if b else math.copysign(math.inf, a) if a else math.nan


class Floats:
    """Numbers of a picture alone on the CPU.

    A weight gets into an operation by the one tensor that is kept for it, and a sum out of it by another: what is asked of
    the CPU is done at once.

    Attributes:
        dtype: the state's.
        weight: that tensor, shape (batch, 1, ...).
        cell: numpy's view of its numbers.
        sums: the other, a tensor per picture.
        found: numpy's view of all of them, of weight's shape.
        count: the numbers of a picture.
        lined: whether pictures are whole cache lines.  A library's inner product adds up in another order where memory
            begins elsewhere in a line, and a picture of a batch would not be the picture alone.
    """

    addcmul = staticmethod(lambda a, b, c, value=1.0: a + value * b * c)
    addcdiv = staticmethod(lambda a, b, c, value=1.0: a + value * _float_div(b, c))
    div = staticmethod(_float_div)
    where = staticmethod(lambda condition, a, b: a if condition else b)
    maximum, minimum, sqrt = staticmethod(max), staticmethod(min), staticmethod(math.sqrt)
    # A NaN stays one, as it does in torch.
    clamp = staticmethod(lambda a, min, max=math.inf: min if a < min else max if a > max else a)
    floats = True

    def __init__(self, x: Tensor):
        self.dtype, batch = x.dtype, x.shape[0]
        self.cell, found = np.zeros((2, batch), np.float64 if x.dtype == torch.float64 else np.float32)
        shape = (batch, *(1,) * (x.ndim - 1))
        self.weight, self.found = torch.from_numpy(self.cell).view(shape), found.reshape(shape)
        self.sums = torch.from_numpy(found).unbind()
        self.count = math.prod(x.shape[1:])
        self.lined = self.count * x.element_size() % 64 == 0

    def quiet(self):
        return _AS_IT_IS

    def rows(self, x):
        return (x if x.dtype is self.dtype else x.to(self.dtype)).reshape(-1)

    def inner(self, x, y, free=False):
        self._sum(x, y, self.sums[0])
        return self.found.item()

    def _sum(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        if self.lined:
            torch.dot(x, y, out=out)
        else:
            torch.sum(x * y, 0, out=out)

    def length(self, x):
        return self.sqrt(self.inner(x, x))

    def none(self, weight):
        return weight == 0.0

    def take(self, value, x):
        if value is None or isinstance(value, float):
            return value
        return value[0] if isinstance(value, Several) else value.item()

    def _held(self, weight, value=1.0) -> Tensor:
        self.cell[0] = value * weight
        return self.weight

    def add_(self, x, change, weight, value=1.0):
        return x.addcmul_(like(change, x), self._held(weight, value))

    def add(self, x, change, weight, value=1.0, out=None):
        return torch.addcmul(like(x, change), change, self._held(weight, value), out=out)


class Several(list):
    """The numbers of a few pictures."""

    __slots__ = ()

    def __mul__(self, other):
        if isinstance(other, list):
            return Several([a * b for a, b in zip(self, other)])
        return Several([a * other for a in self])

    __rmul__ = __mul__

    def __sub__(self, other):
        return Several([a - b for a, b in zip(self, other)])


def _each(function: Callable) -> Callable:
    """A function of floats that takes and returns those of several pictures: a tuple of them where it returns one."""

    def of_several(*args, **kwargs):
        columns = [arg if isinstance(arg, Several) else itertools.repeat(arg) for arg in args]
        found = [function(*row, **kwargs) for row in zip(*columns)]
        return tuple(map(Several, zip(*found))) if isinstance(found[0], tuple) else Several(found)

    return of_several


class _Batch(Floats):
    """What the numbers of several pictures on the CPU have in common: each picture is summed up by itself."""

    def rows(self, x):
        return like(x, self.weight).reshape(-1, self.count).unbind() if self.count else ()

    def _sums(self, x: Rows, y: Rows) -> np.ndarray:
        for a, b, out in zip(x, y, self.sums):
            self._sum(a, b, out)
        return self.found


class Few(_Batch):
    """Numbers of a few pictures on the CPU: in what is measured of them they are those of each picture alone."""

    div, minimum, clamp, sqrt = (staticmethod(_each(f)) for f in (Floats.div, Floats.minimum, Floats.clamp, Floats.sqrt))
    addcmul = staticmethod(_each(Floats.addcmul))

    def inner(self, x, y, free=False):
        return Several(self._sums(x, y).ravel().tolist())

    def _held(self, weight, value=1.0):
        self.cell[:] = [value * one for one in weight]
        return self.weight

    def none(self, weight):
        return not any(weight)

    def take(self, value, x):
        if value is None or isinstance(value, Several):
            return value
        if isinstance(value, float):
            return Several([value] * len(self.sums))
        return Several(value.ravel().tolist())


class Arrays(_Batch):
    """Numbers of a batch on the CPU."""

    addcdiv = staticmethod(lambda a, b, c, value=1.0: a + value * np.divide(b, c))
    div, where, maximum, minimum, sqrt = map(staticmethod, (np.divide, np.where, np.maximum, np.minimum, np.sqrt))
    clamp = staticmethod(lambda a, min, max=None: np.maximum(a, min) if max is None else np.minimum(np.maximum(a, min), max))

    def quiet(self):
        return np.errstate(all="ignore")

    def inner(self, x, y, free=False):
        return self._sums(x, y).astype(np.float64)

    def _held(self, weight, value=1.0):
        self.cell[:] = np.ravel(value * weight)
        return self.weight

    def none(self, weight):
        return not weight.any()

    def take(self, value, x):
        if value is None or isinstance(value, np.ndarray):
            return value
        if isinstance(value, Several):
            return np.array(value).reshape(self.found.shape)
        return np.full(self.found.shape, value) if isinstance(value, float) else value.cpu().numpy().astype(np.float64)


Kind = Union[Tensors, Floats]


def kind(x: Tensor) -> Kind:
    """The numbers of a run with such a state."""
    if x.device.type != "cpu":
        return TENSORS
    if x.shape[0] == 1:
        return Floats(x)
    return Few(x) if 1 < x.shape[0] <= _FEW and x.numel() else Arrays(x)


TENSORS = Tensors()


def like(value: Tensor, x: Tensor) -> Tensor:
    """`value` in x's dtype; a cast to the same one would be an operation."""
    return value if value.dtype == x.dtype else value.to(x.dtype)


class Numbers(NamedTuple):
    """The numbers of a step that meet those of a picture: as tensors of the dtype that the state is computed in, since in an
    operation a Python number costs more than the operation itself, or as floats.

    Attributes:
        x_scale: of the `Step`, a tensor in either case: it multiplies the state.
        most: 2 + fresh (1 + ratio^2), the trust's.
        line: the first bend of the `Step`.
        level, usual: of its `Amend`, 1 / usual.
        rest, room: what the slope of D is for a negative v, rest + room / v: 1 and the `Amend`'s room; where that is 0, 0 and
            a number so large that any positive v gives 1.
        curve: start, end, scale, top_0, top_1, bottom_0 and bottom_1 of the `Amend`'s curve and of `Step.reach`: each of
            shape (2, 1, ...), or both curves' floats; () without an `Amend`.
        one, zero: 1 and 0.
    """

    x_scale: Tensor
    most: Number
    line: Number
    level: Number
    usual: Number
    rest: Number
    room: Number
    curve: Tuple
    one: Number
    zero: Number


@functools.lru_cache(maxsize=32)
def numbers(plan: Plan, ndim: int, dtype: torch.dtype, device: torch.device, floats: bool = False) -> Tuple[Numbers, ...]:
    """The `Numbers` of each step of a plan, for a state of `ndim` dimensions; one copy to the device, the first time."""
    scales, rows, curves = [], [], []
    for step in plan.steps:
        amend = step.amend
        of_amend = (0.0,) * 4
        if amend is not None:
            of_amend = (amend.level, 1.0 / amend.usual, *((1.0, amend.room) if amend.room else (0.0, _LARGE)))
        scales.append(step.x_scale)
        rows.append((2.0 + step.fresh * (1.0 + step.ratio ** 2), step.bend[0] if step.bend else 0.0, *of_amend))
        both = () if amend is None else (amend.curve, step.reach or amend.curve)
        curves.append(tuple((c.start, c.end, c.scale, *c.top, *c.bottom) for c in both))
    make = lambda values: torch.tensor(values, dtype=torch.float64, device="cpu").to(dtype).to(device)
    if floats:
        return tuple(Numbers(scale, *row, curve, 1.0, 0.0)
                     for scale, row, curve in zip(make(scales).unbind(), rows, curves))
    pairs = [number for curve in curves for pair in zip(*curve) for number in pair]
    flat = [number for row in rows for number in row]
    made = make([1.0, 0.0, *scales, *flat, *pairs])
    one, zero, *single = made[:2 + len(scales) + len(flat)].unbind()
    pairs = iter(made[2 + len(single):].reshape(-1, 7, 2, *(1,) * ndim).unbind())
    of_step = iter(single[len(scales):])
    return tuple(Numbers(scale, *itertools.islice(of_step, len(row)), next(pairs).unbind() if curve else (), one, zero)
                 for scale, row, curve in zip(single, rows, curves))


@functools.lru_cache(None)
def rest(ndim: int) -> Tuple[int, ...]:
    """The dimensions of one picture."""
    return tuple(range(1, ndim))


def _of_each(function: Callable) -> Callable:
    """`function(m, ...)`, for `Few` that of the numbers of each picture."""
    several = _each(functools.partial(function, Floats))
    return functools.wraps(function)(lambda m, *args: several(*args) if isinstance(m, Few) else function(m, *args))


@_of_each
def inverse_variance(m: Kind, by: Numbers, amend: Amend, along: Number, size: Number) -> Number:
    """1 / v of each picture, from <R_0, e_0 - e_1> without its factor and |R_0|; no less than -1 / room, or than 0."""
    least = -1.0 / amend.room if amend.room else 0.0
    return m.clamp(m.addcdiv(by.zero, along, m.clamp(size * size, min=TINY), value=amend.factor), least, _SURE)


@_of_each
def unexplained(m: Kind, by: Numbers, along: Number, moved: Number, size: Number) -> Number:
    """1 - cos^2 of R_0 and e_0 - e_1, the share of |R_0|^2 that no v explains; 1 where their product is not positive.

    Args:
        along, moved, size: <R_0, e_0 - e_1>, |e_0 - e_1| and |R_0|, the first two without their factor.
    """
    cos = m.clamp(m.div(m.clamp(along, min=0.0), m.clamp(moved * size, min=TINY)), 0.0, 1.0)
    return by.one - cos * cos


@_of_each
def correction(m: Kind, by: Numbers, inverse: Number) -> Tuple[Number, Number, Number, Number]:
    """By 1 / v: whether there is a v, alpha k of the correction, the step's own bend, and the slope of D, v / (v + level), of
    a negative v (v + room) / (v + level).
    """
    sure = inverse > by.zero
    used = m.where(sure, inverse, by.usual)
    weight, by_law = (_curve(m, by.one, curve, used) for curve in by.curve) if m.floats else \
        _curve(m, by.one, by.curve, used).unbind()
    slope = m.clamp(m.addcmul(by.rest, inverse, by.room), 0.0, 1.0) / m.addcmul(by.one, inverse, by.level)
    return sure, weight, by_law, slope


def _curve(m: Kind, one: Number, curve: Tuple, inverse: Number) -> Number:
    """f(v), see `ersde.weights.Curve`."""
    start, end, scale, top, steep, bottom, deep = curve
    q = m.sqrt(m.div(m.addcmul(start, inverse, end), m.addcmul(one, inverse, scale)))
    return m.div(m.addcmul(top, q, steep), m.addcmul(bottom, q, deep))


@_of_each
def mean_slope(m: Kind, amend: Amend, count: int, now: Number, turn: float, old: Optional[Number]) -> Number:
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


@_of_each
def missed(m: Kind, ratio: float, size: Number, last: Number, along: Number) -> Number:
    """|R_0 - ratio R_1| from |R_0|, |R_1| and <R_0, R_1>.  Rounding counts where it is too small to matter."""
    last = ratio * last
    return m.sqrt(m.clamp(size * size + last * last - 2.0 * ratio * along, min=0.0))


@_of_each
def reach(m: Kind, by: Numbers, step: Step, by_law: Number, sure: Number, size: Number, newest: Number,
          before: Optional[Number], along: Optional[Number], guided: Optional[Number] = None) -> Number:
    """The weight on R_0 of a long step's bend.

    Args:
        by_law, sure: the bend by v, and whether there is a v.
        size, newest, before: |D_0|, |R_0| and, where the step has a ratio, |R_1|, the last two above 0.
        along: <R_0, R_1> where the step has a ratio and noise.
        guided: `told`, where the step is told what guidance adds.
    """
    if not step.bend:
        return by_law * sure
    share = m.div(newest, size)             # infinite for D = 0
    by_line = by.line / m.addcmul(by.one, share, share)
    alone = by_line
    if along is not None:
        share = m.clamp(share, 0.0, _FAR)
        odd = m.addcmul(share, share, m.clamp(along / newest / before, -1.0, 1.0), value=-1.0)
        odd = odd * odd
        wide = m.addcmul(by.one, share, share, value=1.0 - step.common)
        cut = odd if guided is None else odd * (by.one - guided)
        alone = by.line / m.addcmul(wide, odd, cut, value=step.common / _UNFORESEEN ** 2)
    elif step.ratio != 0.0:
        fall = before / newest
        fall = fall * fall
        alone = by_line / m.addcmul(by.one, fall, fall, value=step.ratio ** 4)
    return m.where(sure, m.maximum(by_law, by_line), alone)


@_of_each
def told(m: Kind, size: Number, far: Number) -> Number:
    """|A|^2 / (|A|^2 + |D_0|^2 / 20), from |A|^2 and |D_0|: how far a long step goes by what it is told of guidance."""
    return m.div(size, m.clamp(size + _BESIDE * far * far, min=TINY))


@_of_each
def left(m: Kind, by: Numbers, weight: float, bend: Number, along: Number, size: Number) -> Number:
    """What a long step's bend w R_0 has not got of c_A A: 1 - w <R_0, A> / (c_A |A|^2), a quarter to all.

    Args:
        weight: c_A, below 0.
        bend: w.
        along, size: <A, R_0> and |A|^2.
    """
    return m.clamp(by.one - m.div(bend * along, weight * m.clamp(size, min=TINY)), _LEFT, 1.0)


@_of_each
def trust(m: Kind, by: Numbers, step: Step, size: Number, newest: Number, miss: Optional[Number]) -> Number:
    """theta = clamp(2 - m^2, 0, 1) / (1 + s^2), m made fair to fresh noise (see `ersde.weights`).

    Args:
        size, newest, miss: |D_0|, |R_0| and, where the step has a ratio, |R_0 - ratio R_1|.
    """
    share = m.div(newest, size)             # infinite for D = 0, where the trust is 0
    wide = m.addcmul(by.one, share, share)
    if miss is None:
        return by.one / wide
    miss = miss / newest
    return m.clamp(by.most - miss * miss, 0.0, 1.0) / wide
