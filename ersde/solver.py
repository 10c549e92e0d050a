"""Running a plan: per step one linear combination of the state, the changes of the denoiser and the noise.

Nothing here reads from the device: the weights are Python floats made before the first model call, and the trust in a long
step's extrapolation is a tensor of one number per picture.  The one look at the result is after the last step.
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch

from .errors import check_tensor_like
from .weights import MAX_ORDER, Amend, Plan, Settle, Step

Tensor = torch.Tensor
_HALF = (torch.float16, torch.bfloat16)
_TINY = 1e-30       # keeps 0 / 0 of evaluations that do not change at all from being NaN
_SURE = 1e12        # the largest 1 / v: times lambda^2 it stays far from float32's largest


@dataclass
class Memory:
    """What a run knows before a step: the state as it is computed, the newest evaluation, the changes R_0, R_1, ..., and of
    the step before the state without its bend; where it was a long one, `_score` of its start and the factor that makes it
    e, its bend's weights on R_0, ..., and 1 / v of each picture.
    """

    x: Optional[Tensor] = None
    newest: Optional[Tensor] = None
    changes: Sequence[Tensor] = ()
    base: Optional[Tensor] = None
    score: Optional[Tensor] = None
    bent: Sequence[Tensor] = ()
    inverse: Optional[Tensor] = None
    factor: float = 1.0


class Numbers(NamedTuple):
    """The numbers of a step that multiply tensors of one number per picture, as tensors: in an operation a Python number
    costs more than the operation itself.  Of the dtype that the state is computed in, without dimensions but for `curve`.

    Attributes:
        x_scale: of the `Step`.
        most: 2 + (1 - common) (1 + ratio^2), the trust's.
        line: the first bend of the `Step`.
        level, usual: of its `Amend`, 1 / usual.
        curve: start, end, scale, top_0, top_1, bottom_0 and bottom_1 of the `Amend`'s curve and of `Step.reach`, each of
            shape (2, 1, ...); () without an `Amend`.
        one, zero: 1 and 0.
    """

    x_scale: Tensor
    most: Tensor
    line: Tensor
    level: Tensor
    usual: Tensor
    curve: Tuple[Tensor, ...]
    one: Tensor
    zero: Tensor


@functools.lru_cache(maxsize=32)
def numbers(plan: Plan, ndim: int, dtype: torch.dtype, device: torch.device) -> Tuple[Numbers, ...]:
    """The `Numbers` of each step of a plan, for a state of `ndim` dimensions; one copy to the device, the first time."""
    rows, curves = [], []
    for step in plan.steps:
        amend = step.amend
        level, usual = (0.0, 0.0) if amend is None else (amend.level, 1.0 / amend.usual)
        most = 2.0 + (1.0 - step.common) * (1.0 + step.ratio ** 2)
        rows += [step.x_scale, most, step.bend[0] if step.bend else 0.0, level, usual]
        if amend is not None:
            both = amend.curve, step.reach or amend.curve
            curves += [n for pair in zip(*((c.start, c.end, c.scale, *c.top, *c.bottom) for c in both)) for n in pair]
    made = torch.tensor([1.0, 0.0, *rows, *curves], dtype=torch.float64, device="cpu").to(dtype).to(device)
    single = made[:2 + len(rows)].unbind()
    pairs = iter(made[len(single):].reshape(-1, 7, 2, *(1,) * ndim).unbind())
    return tuple(Numbers(*single[2 + 5 * i:7 + 5 * i], next(pairs).unbind() if step.amend else (), *single[:2])
                 for i, step in enumerate(plan.steps))


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
        callback: Optional[Callable], disable: Optional[bool], history: Sequence[Tensor] = (),
        shift: Optional[Callable[[int], Tensor]] = None, replan: Optional[Callable[[int], Optional[Plan]]] = None,
        memory: Optional[Memory] = None) -> Tensor:
    """Execute `plan` on `model` from the state `x`.

    A state of half precision is kept in float32 between the model calls: rounded at every step, as often as there are
    steps, its error would grow with their number.

    Args:
        x: the state at sigmas[0], any shape (batch, ...); never written to.
        sigmas: the schedule as the host gave it: what the callback sees.
        noise: step number -> z of x's shape; called only where a step adds noise.
        history: evaluations made before the first step, newest first.
        shift: step number -> what is added to the state before the step, once its evaluation is made; the last step returns
            the evaluation and asks for none.
        replan: asked after each model call with the step's number; a plan for the steps from there on makes the run go on
            with it and without the evaluations before, None keeps what there is.
        memory: in place of `history`, what the run before this one left; what this one leaves, once it has ended well.

    Raises:
        TypeError, ValueError: the model or the noise did not return a floating point tensor like x; names the step.
        FloatingPointError: the result is not finite; names the first step whose evaluation was not.
    """
    count, start = len(plan.steps), x
    at = list(sigmas.unbind())
    # One contiguous copy of the schedule per batch item in x's dtype, so that a step makes no tensor of its own for it.
    for_model = sigmas.to(x.dtype).to(x.device)[:, None].repeat(1, x.shape[0]).unbind()
    narrow = x.dtype if x.dtype in _HALF else None
    x = x if narrow is None else x.float()
    known = memory or Memory(newest=history[0] if history else None, changes=[a - b for a, b in zip(history, history[1:])])
    x, newest, changes = x if known.x is None else known.x, known.newest, list(known.changes)
    # These two are written over.
    base, score = (value if value is None else value.clone() for value in (known.base, known.score))
    bent, inverse, factor = known.bent, known.inverse, known.factor
    length: Optional[Tensor] = None     # |R_0| of the step before, where that measured it
    # One number per step, left on the device: a sum is not finite exactly where its terms are not (or overflow).
    sums: List[Tensor] = []
    now, first = plan, 0        # the plan in force and the number of its first step
    by_step = numbers(plan, x.ndim, x.dtype, x.device)
    for i in _steps(count, disable):
        seen = x if narrow is None else x.to(narrow)
        denoised = model(seen, for_model[i], **extra_args)
        if not _alike(denoised, x):
            check_tensor_like(f"what the model returns (step {i}, sigma = {plan.sigmas[i]:.6g})", denoised, x)
        if callback is not None:
            callback({"x": seen, "i": i, "sigma": at[i], "sigma_hat": at[i], "denoised": denoised})
        new = None if replan is None else replan(i)
        if new is not None:
            now, first, newest, inverse, length = new, i, None, None, None
            changes.clear()
            by_step = numbers(now, x.ndim, x.dtype, x.device)
        kept = now.history if memory is None else MAX_ORDER + 1
        # What is not needed any more goes before its successor comes.
        if newest is not None and kept:
            del changes[kept - 1:]
            changes.insert(0, denoised - newest)
        newest = None
        step, by, trust, reached = now.steps[i - first], by_step[i - first], None, None
        if step.amend is not None:
            before, score, turn, factor = [score], None, factor / step.amend.factor, step.amend.factor
            x, denoised, score, inverse, by_law = _amended(step.amend, by, x, seen, denoised, changes, before, turn, bent,
                                                           inverse)
        elif step.score is not None:
            score, factor = _score(_like(seen, x), denoised, step.score[0]), step.score[1]
        newest, bent, score = denoised, (), score if step.score is not None else None
        del seen                # or the old state would outlive the new one
        if step.reach is not None:
            reached, size, length = _reached(step, by, denoised, changes, by_law, length)
            sums.append(size)
        elif step.bend:
            trust, size, length = _trust(denoised, changes, step, by)
            sums.append(size)
        else:
            sums.append(denoised.sum(dtype=torch.float32))
            length = None
        if step.last:
            if step.settle is not None:
                own = base if memory is None or base is None else base.clone()
                denoised = _settled(step.settle, x, own, denoised, changes, by.one)
            x = denoised.to(x.dtype)
            continue
        # A state that the callback or the model may hold is left alone.
        if step.from_base:
            x = base.mul_(by.x_scale)
        else:
            x = x * by.x_scale if step.amend is None else x.mul_(by.x_scale)
        if shift is not None:
            x.add_(shift(i), alpha=step.x_scale)
        x.add_(denoised, alpha=step.denoised)
        for change, weight in zip(changes, step.changes):
            x.add_(change, alpha=weight)
        if step.noise != 0.0:
            z = noise(i)
            if not _alike(z, x):
                check_tensor_like(f"what noise_sampler returns (step {i})", z, x)
            x.add_(z, alpha=step.noise)
            del z
        base = None
        if reached is not None:
            bent = [reached]
            x.addcmul_(_like(changes[0], x), _like(reached, x))
        elif step.long and step.bend:
            bent = [trust * weight for weight in step.bend]
            for change, weight in zip(changes, bent):
                x.addcmul_(_like(change, x), _like(weight, x))
        elif step.bend:
            base = x
            x = _bent(x, changes, step.bend, trust)
    out = x if narrow is None else x.to(narrow)
    if memory is None:
        changes, base, score = [], None, None
    _check_finite(out, sums, plan, start)
    if memory is not None:
        memory.x, memory.newest, memory.changes, memory.base = x, newest, changes, base
        memory.score, memory.bent, memory.inverse, memory.factor = score, bent, inverse, factor
    return out


def _alike(value, x: Tensor) -> bool:
    """Whether `check_tensor_like` has nothing to look at: the common case, without its message."""
    return (isinstance(value, torch.Tensor) and value.dtype == x.dtype and value.shape == x.shape
            and value.device == x.device and value.layout == torch.strided)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of each picture, float32 or wider, shape (batch, 1, ...)."""
    if x.dtype in _HALF:
        return x.abs().to(torch.float32) if x.ndim == 1 else torch.linalg.vector_norm(x, 2, _rest(x.ndim), True,
                                                                                      dtype=torch.float32)
    return x.abs() if x.ndim == 1 else torch.linalg.vector_norm(x, 2, _rest(x.ndim), True)


@functools.lru_cache(None)
def _rest(ndim: int) -> Tuple[int, ...]:
    """The dimensions of one picture."""
    return tuple(range(1, ndim))


def _like(value: Tensor, x: Tensor) -> Tensor:
    """`value` in x's dtype; a cast to the same one would be an operation."""
    return value if value.dtype == x.dtype else value.to(x.dtype)


def _score(x: Tensor, denoised: Tensor, alpha: float) -> Tensor:
    """alpha lambda^2 e of the state x = alpha y, e = (y - D) / lambda^2: its factor is left to where e is used."""
    return torch.sub(x, _like(denoised, x), alpha=alpha)


def _amended(amend: Amend, by: Numbers, x: Tensor, seen: Tensor, denoised: Tensor, changes: List[Tensor],
             past: List[Optional[Tensor]], turn: float, bent: Sequence[Tensor], known: Optional[Tensor]
             ) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tuple[Tensor, Tensor]]:
    """The state and the evaluation after the correction of a long step, see `Amend`; R_0 in `changes` becomes that of the
    corrected evaluation.

    Args:
        seen: the state that the model saw, x but for rounding, which counts where lambda is small.
        past: `_score` of the step's start, its only holder, which is emptied; None for 0, at lambda = infinity.
        turn: its 1 / (alpha lambda^2) over that of now.
        bent: the weights of its bend on R_1, R_2, ... of now.
        known: 1 / v of the step before, where there is one.

    Returns:
        x, D, `_score` of both, 1 / v of each picture, 0 where there is none, and for `_reached` the step's bend by v and
        whether there is one.
    """
    change = _like(changes[0], x)
    score = _score(_like(seen, x), denoised, amend.alpha)
    before, old = past.pop(), None
    if amend.measure or known is None:
        if before is None:
            along = score * change
        else:
            old = None if amend.limit is None else _norm(before)
            along = torch.sub(score, before, alpha=turn, out=before).mul_(change)
        if x.ndim > 1:
            along = along.sum(dim=_rest(x.ndim), keepdim=True)
        square = _norm(change).square_().clamp_(min=_TINY)
        inverse = torch.addcdiv(by.zero, along, square, value=amend.factor).clamp_(0.0, _SURE)
    else:
        inverse = known
    del before
    sure = inverse > by.zero
    weight, by_law = _curves(by, torch.where(sure, inverse, by.usual)).unbind()
    found = change * weight
    for part, other in zip(bent, changes[1:]):
        found.addcmul_(_like(other, x), _like(part, x), value=-1.0)
    slope = sure / torch.addcmul(by.one, inverse, by.level)
    score.addcmul_(found, by.one - slope)
    if amend.limit is not None and amend.measure:
        slope = torch.minimum(slope, _mean_slope(amend, score, turn, old))
        found.div_((1.0 - weight * slope.pow(3) / amend.alpha).clamp_(min=0.5))
    changes[0] = change.addcmul_(found, slope, value=1.0 / amend.alpha)
    denoised = torch.addcmul(_like(denoised, x), found, slope, value=1.0 / amend.alpha)
    return found.add_(x), denoised, score, inverse, (by_law, sure)


def _mean_slope(amend: Amend, score: Tensor, turn: float, old: Optional[Tensor]) -> Tensor:
    """v / (v + level) of the mean over all directions, see `Limit`.

    score, turn, old: `_score` of now, what turns one of the step's start into that, and the length of that, None for 0.
    """
    limit, level = amend.limit, amend.level
    # |e|^2 of both over factor^2
    now, noise = _norm(score).square_(), math.prod(score.shape[1:]) * limit.fresh / amend.factor ** 2
    if old is None:
        room, gain = (now * -level).add_(noise), now
    else:
        past = old.square_().mul_(limit.held * turn ** 2)
        room, gain = (past * limit.level).sub_(now, alpha=level).add_(noise), now - past
    # v = room / gain; both are not negative at once.
    room = room.clamp_(min=0.0)
    return room / (room + gain.clamp_(min=0.0).mul_(level)).clamp_(min=_TINY)


def _curves(by: Numbers, inverse: Tensor) -> Tensor:
    """Both curves' f(v) of each picture, see `Curve`; shape (2, batch, 1, ...)."""
    start, end, scale, top, steep, bottom, deep = by.curve
    q = torch.addcmul(start, inverse, end).div_(torch.addcmul(by.one, inverse, scale)).sqrt_()
    return torch.addcmul(top, q, steep).div_(torch.addcmul(bottom, q, deep))


def _reached(step: Step, by: Numbers, denoised: Tensor, changes: Sequence[Tensor], law: Tuple[Tensor, Tensor],
             before: Optional[Tensor]) -> Tuple[Tensor, Tensor, Tensor]:
    """The weight on R_0 of a long step's bend, one number per picture (see `ersde.weights`), |D_0| and |R_0|.

    Args:
        law: the bend by v, and whether there is a v.
        before: |R_1| if it is known.
    """
    (by_law, sure), size, length = law, _norm(denoised), _norm(changes[0]).clamp_(min=_TINY)
    if not step.bend:
        return by_law * sure, size, length
    share = length / size               # infinite for D = 0
    by_line = by.line / torch.addcmul(by.one, share, share, value=step.common)
    if step.ratio == 0.0:
        return torch.maximum(by_law * sure, by_line), size, length
    fall = torch.add(by.one, ((_norm(changes[1]) if before is None else before) / length).pow_(4), alpha=step.ratio ** 4)
    return torch.where(sure, torch.maximum(by_law, by_line), by_line / fall), size, length


def _trust(denoised: Tensor, changes: Sequence[Tensor], step: Step, by: Numbers) -> Tuple[Tensor, Tensor, Tensor]:
    """theta = clamp(2 - m^2, 0, 1) / (1 + s^2) of each picture (see `ersde.weights`), |D_0| and |R_0|."""
    size, length = _norm(denoised), _norm(changes[0]).clamp_(min=_TINY)
    share = length / size               # infinite for D = 0, where the trust is 0
    wide = torch.addcmul(by.one, share, share, value=step.common)
    if step.ratio == 0.0:
        return wide.reciprocal_(), size, length
    miss = _norm(torch.sub(changes[0], changes[1], alpha=step.ratio)).div_(length)
    return torch.sub(by.most, miss.square_()).clamp_(0.0, 1.0).div_(wide), size, length


def _bent(x: Tensor, changes: Sequence[Tensor], bend: Sequence[float], trust: Tensor) -> Tensor:
    """x + trust * sum of bend_j R_j, a new tensor of x's dtype."""
    trust, out = _like(trust, x), x
    for change, weight in zip(changes, bend):
        change = _like(change, x)
        out = torch.addcmul(x, change, trust, value=weight) if out is x else out.addcmul_(change, trust, value=weight)
    return out


def _settled(settle: Settle, x: Tensor, base: Optional[Tensor], denoised: Tensor, changes: Sequence[Tensor],
             one: Tensor) -> Tensor:
    """D with the last correction, see `Settle`; exactly D where the evaluations did not change, as under a mask.

    base: x without the bend of the step before, or None; written over.
    """
    size = _norm(changes[0])
    removed = torch.sub(x, denoised, alpha=settle.alpha).mul_(changes[0])
    along = removed.to(one.dtype) if x.ndim == 1 else removed.sum(dim=_rest(x.ndim), keepdim=True, dtype=one.dtype)
    along = along / settle.alpha
    del removed
    found = torch.zeros_like(denoised)
    for change, weight in zip(changes, settle.changes):
        found.add_(change, alpha=weight)
    if base is not None:
        found.add_(torch.sub(base, x, out=base), alpha=1.0 / settle.alpha)
    # J = |v|^2 / <v, D - y> in [0, 1] with v = -slope R_0.
    slope = (settle.slope * size * size / along.clamp(min=_TINY)).clamp_(max=1.0) * (along > 0)
    far = _norm(found) / (settle.slope * size).clamp_(min=_TINY)
    gain = settle.share * slope / torch.addcmul(one, far, far)
    return torch.addcmul(denoised, found, gain.to(denoised.dtype), out=found)


def _check_finite(x: Tensor, sums: Sequence[Tensor], plan: Plan, start: Tensor) -> None:
    """The one look at the device, after the last step; only a bad result makes a second one, to name the first cause."""
    if x.isfinite().all().cpu().numpy():
        return
    if not start.isfinite().all().cpu().numpy():
        raise FloatingPointError(f"x was not finite at the start, sigma = {plan.sigmas[0]:.6g}")
    bad = torch.stack([~s.isfinite().all() for s in sums]).cpu().numpy()
    if bad.any():
        i = int(bad.argmax())
        narrow = f", or {x.dtype} too narrow for the state" if x.dtype in _HALF else ""
        cause = f" (its own doing, or the noise of the step before was not finite{narrow})" if i else ""
        raise FloatingPointError(f"the model returned NaN or infinity at step {i} of {len(sums)}, counted from 0, "
                                 f"sigma = {plan.sigmas[i]:.6g}{cause}")
    raise FloatingPointError(f"the state became NaN or infinite although every evaluation was finite: the noise of the "
                             f"last step was not finite, or dtype {x.dtype} is too narrow for sigma = {plan.sigmas[0]:.6g}")
