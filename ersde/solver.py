"""Running a plan: per step one linear combination of the state, the changes of the denoiser and the noise.

Nothing here reads from a device: the weights are Python floats made before the first model call, and what a long step
measures is a tensor of one number per picture, or floats where the picture is in the CPU's own memory anyway
(`ersde.measure`).  The one look at the result is after the last step.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from . import measure
from .errors import check_tensor_like
from .measure import HALF, TENSORS, TINY, Kind, Number, Numbers, Rows, like, numbers
from .weights import MAX_ORDER, Amend, Plan, Settle, Step

Tensor = torch.Tensor


@dataclass
class Memory:
    """What a run knows before a step: the state as it is computed, the newest evaluation, the changes R_0, R_1, ..., and of
    the step before the state without its bend; where it was a long one, `_score` of its start and the factor that makes it
    e, its bend's weights on R_0, ..., and 1 / v of each picture, and what guidance's excess was and its weight in the bend.
    """

    x: Optional[Tensor] = None
    newest: Optional[Tensor] = None
    changes: Sequence[Tensor] = ()
    base: Optional[Tensor] = None
    score: Optional[Tensor] = None
    bent: Sequence[Number] = ()
    inverse: Optional[Number] = None
    factor: float = 1.0
    excess: Optional[Tensor] = None
    by_excess: Number = 0.0


class Law(NamedTuple):
    """What the bend of a long step goes by, as the correction of the one before found it.

    Attributes:
        bend, sure: the weight on R_0 by v, and whether there is a v.
        rows, size: of R_0, and |R_0| if that is known.
    """

    bend: Number
    sure: Number
    rows: Rows
    size: Optional[Number]


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
        memory: Optional[Memory] = None, excess: Optional[Callable[[], Optional[Tensor]]] = None) -> Tensor:
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
        excess: () -> A, what guidance adds to the conditional evaluation of the newest model call, or None where it adds
            nothing; asked for in long steps after one that has been corrected.

    Raises:
        TypeError, ValueError: the model or the noise did not return a floating point tensor like x; names the step.
        FloatingPointError: the result is not finite; names the first step whose evaluation was not.
    """
    count, start = len(plan.steps), x
    at = None if callback is None else sigmas.unbind()
    form = x.shape, x.dtype, x.device, torch.strided
    # One contiguous copy of the schedule per batch item in x's dtype, so that a step makes no tensor of its own for it.
    for_model = sigmas.to(x.dtype, copy=True).to(x.device)[:, None]
    for_model = (for_model if x.shape[0] == 1 else for_model.repeat(1, x.shape[0])).unbind()
    narrow = x.dtype if x.dtype in HALF else None
    x = x if narrow is None else x.float()
    known = memory or Memory(newest=history[0] if history else None, changes=[a - b for a, b in zip(history, history[1:])])
    x, newest, changes = x if known.x is None else known.x, known.newest, list(known.changes)
    # These two are written over.
    base, score = (value if value is None else value.clone() for value in (known.base, known.score))
    m = measure.kind(x)
    bent, inverse, factor = [m.take(one, x) for one in known.bent], m.take(known.inverse, x), known.factor
    lean, by_lean = known.excess, known.by_excess if known.excess is None else m.take(known.by_excess, x)
    size: Optional[Number] = None       # |R_0| of the step before, where that measured it
    # One number per step, left on the device: a sum is not finite exactly where its terms are not (or overflow).
    sums: List[Number] = []
    now, first = plan, 0        # the plan in force and the number of its first step
    by_step = numbers(plan, x.ndim, x.dtype, x.device, m.floats)
    for i in _steps(count, disable):
        seen = x if narrow is None else x.to(narrow)
        denoised = model(seen, for_model[i], **extra_args)
        if not _alike(denoised, form):
            check_tensor_like(f"what the model returns (step {i}, sigma = {plan.sigmas[i]:.6g})", denoised, x)
        if callback is not None:
            callback({"x": seen, "i": i, "sigma": at[i], "sigma_hat": at[i], "denoised": denoised})
        new = None if replan is None else replan(i)
        if new is not None:
            now, first, newest, inverse, size = new, i, None, None, None
            changes.clear()
            by_step = numbers(now, x.ndim, x.dtype, x.device, m.floats)
        kept = now.history if memory is None else MAX_ORDER + 1
        # What is not needed any more goes before its successor comes.
        if newest is not None and kept:
            del changes[kept - 1:]
            changes.insert(0, denoised - newest)
        newest = None
        step, by, trust, reach, free, spare = now.steps[i - first], by_step[i - first], None, None, None, None
        with m.quiet():
            at_hand = _score(step, like(seen, x), denoised)
            lost = None if narrow is None or step.hold is None else x - seen    # to rounding, for the model
            del seen                # or the old state would outlive the new one
            if step.amend is not None:
                before, score, turn, factor = [score], None, factor / step.amend.factor, step.amend.factor
                denoised, inverse, law, free, spare = _amended(
                    m, step.amend, by, at_hand, denoised, changes, before, turn, bent, inverse, lean, by_lean,
                    excess is not None and step.excess != 0.0)
            elif step.score is not None:
                factor = step.score[1]
            newest, bent, lean, score = denoised, (), None, at_hand if step.score is not None else None
            if excess is not None and step.excess != 0.0 and free is not None:
                lean = excess()
                if lean is not None and not _alike(lean, form):
                    check_tensor_like(f"what excess returns (step {i})", lean, x)
            if step.reach is not None:
                reach, far, size, share = _reach(m, step, by, denoised, changes, law, size, lean)
            elif step.bend:
                trust, far, size = _trust(m, step, by, denoised, changes, size)
            else:
                far, size = denoised.sum(dtype=torch.float32), None
            law = None              # it holds R_0's memory
            sums.append(far)
        if step.last:
            if step.settle is not None:
                own = base if memory is None or base is None else base.clone()
                denoised = _settled(step.settle, x, own, denoised, changes)
            x = denoised.to(x.dtype)
            continue
        if step.hold is None:
            x = base.mul_(by.x_scale) if step.from_base else torch.mul(x, by.x_scale)
            x.add_(denoised, alpha=step.denoised)
        elif step.hold == 1.0 and narrow is None:
            x = torch.add(like(denoised, at_hand), at_hand, alpha=step.x_scale, out=spare)
        else:
            x = torch.mul(at_hand, by.x_scale, out=spare).add_(denoised, alpha=step.hold)
            if lost is not None:
                x.add_(lost, alpha=step.x_scale)
        del at_hand, spare, lost
        if shift is not None:
            x.add_(shift(i), alpha=step.x_scale)
        for change, weight in zip(changes, step.changes):
            x.add_(change, alpha=weight)
        if step.noise != 0.0:
            z = noise(i)
            if not _alike(z, form):
                check_tensor_like(f"what noise_sampler returns (step {i})", z, x)
            x.add_(z, alpha=step.noise)
            del z
        base = None
        if lean is not None:
            by_lean = step.excess * free
            if reach is not None:
                by_lean = by_lean * share
            m.add_(x, lean, by_lean)
        if reach is not None:
            bent = [reach]
            m.add_(x, changes[0], reach)
        elif step.long and step.bend:
            bent = [trust * weight for weight in step.bend]
            for change, weight in zip(changes, bent):
                m.add_(x, change, weight)
        elif step.bend:
            base = x
            x = _bent(m, x, changes, step.bend, trust)
    out = x if narrow is None else x.to(narrow)
    if memory is None:
        changes, base, score, lean = [], None, None, None
    _check_finite(out, sums, plan, start)
    if memory is not None:
        memory.x, memory.newest, memory.changes, memory.base = x, newest, changes, base
        memory.score, memory.bent, memory.inverse, memory.factor = score, bent, inverse, factor
        memory.excess, memory.by_excess = lean, by_lean
    return out


def _alike(value, form: Tuple) -> bool:
    """Whether `check_tensor_like` has nothing to look at: the common case, without its message."""
    return isinstance(value, torch.Tensor) and (value.shape, value.dtype, value.device, value.layout) == form


def _score(step: Step, x: Tensor, denoised: Tensor) -> Optional[Tensor]:
    """x - alpha D = alpha lambda^2 e of the state x = alpha y that the model saw, e = (y - D) / lambda^2: e's factor is left
    to where e is used.  None where the step needs none.
    """
    alpha = step.amend.alpha if step.amend is not None else step.score[0] if step.score is not None else None
    return None if alpha is None else torch.sub(x, like(denoised, x), alpha=alpha)


def _amended(m: Kind, amend: Amend, by: Numbers, score: Tensor, denoised: Tensor, changes: List[Tensor],
             past: List[Optional[Tensor]], turn: float, bent: Sequence[Number], known: Optional[Number],
             lean: Optional[Tensor] = None, by_lean: Number = 0.0, apart: bool = False
             ) -> Tuple[Tensor, Number, Law, Optional[Number], Optional[Tensor]]:
    """The evaluation after the correction of a long step, see `Amend`; in `changes`, R_0 becomes that of the corrected
    evaluation, and `score` becomes that of the corrected state, which is score + alpha D.

    Args:
        score: see `_score`.
        past: that of the step's start, its only holder, which is emptied; None for 0, at lambda = infinity.
        turn: its 1 / (alpha lambda^2) over that of now.
        bent: the weights of its bend on R_1, R_2, ... of now.
        known: 1 / v of the step before, where there is one.
        lean, by_lean: guidance's excess in its bend, and the weight of that.
        apart: whether the share of R_0 that v does not explain is asked for.

    Returns:
        D, 1 / v of each picture, 0 where there is none, what `_reach` goes by, that share, or None, and memory that is free,
        or None.
    """
    changes[0] = change = like(changes[0], score)
    rows = m.rows(change)
    before, old, inverse, size, free = past.pop(), None, known, None, None
    if amend.measure or known is None:
        if before is None:
            turned = score
        else:
            old = None if amend.limit is None else m.length(m.rows(before))
            turned = torch.sub(score, before, alpha=turn, out=before)
        flat = m.rows(turned)
        moved = m.length(flat) if apart else None
        along = m.inner(flat, rows, free=before is not None)
        size = m.length(rows)
        inverse = measure.inverse_variance(m, by, amend, along, size)
        if apart:
            free = measure.unexplained(m, by, along, moved, size)
        del turned, flat
    sure, weight, by_law, slope = measure.correction(m, by, inverse)
    # E over its weight: R_0 less what the step had of it already.
    found = change
    for part, other in (*zip(bent, changes[1:]), *(() if lean is None else ((by_lean, lean),))):
        found = m.add(found, like(other, found), m.div(part, weight), -1.0, out=before if found is change else found)
    spare = before if found is change else found
    gain = weight * slope
    m.add_(score, found, weight - gain)
    if amend.limit is not None and amend.measure:
        count = math.prod(score.shape[1:])
        slope = m.minimum(slope, measure.mean_slope(m, amend, count, m.length(m.rows(score)), turn, old))
        gain = weight * slope
        gain = m.div(gain, m.clamp(m.addcmul(by.one, gain * slope, slope, value=-1.0 / amend.alpha), min=0.5))
    if not m.none(gain):
        denoised, size = m.add(denoised, found, gain, 1.0 / amend.alpha), None
        m.add_(change, found, gain, 1.0 / amend.alpha)
    return denoised, inverse, Law(by_law, sure, rows, size), free, spare


def _reach(m: Kind, step: Step, by: Numbers, denoised: Tensor, changes: Sequence[Tensor], law: Law,
           before: Optional[Number], lean: Optional[Tensor] = None) -> Tuple[Number, Number, Number, Optional[Number]]:
    """The weight on R_0 of a long step's bend, |D_0|, |R_0|, and the share of its weight on A that is still to be added.

    Args:
        before: |R_1| if it is known.
        lean: guidance's excess A, if the step is told; without it there is no share.
    """
    far, newest = m.length(m.rows(denoised)), m.clamp(m.length(law.rows) if law.size is None else law.size, min=TINY)
    along, told = None, None
    if lean is not None:
        rows = m.rows(lean)
        large = m.inner(rows, rows)
        told = measure.told(m, large, far)
    if step.ratio != 0.0:
        last = m.rows(changes[1])
        if before is None:
            before = m.clamp(m.length(last), min=TINY)
        if step.common != 1.0:
            along = m.inner(law.rows, last)
    weight, share = measure.reach(m, by, step, law.bend, law.sure, far, newest, before, along, told), None
    if lean is not None:
        share = told * measure.left(m, by, step.excess, weight, m.inner(rows, law.rows), large)
    return weight, far, newest, share


def _trust(m: Kind, step: Step, by: Numbers, denoised: Tensor, changes: Sequence[Tensor], before: Optional[Number]
           ) -> Tuple[Number, Number, Number]:
    """The trust in a step's bend, |D_0| and |R_0|; `before` is |R_1| if it is known."""
    rows = m.rows(changes[0])
    far, newest, miss = m.length(m.rows(denoised)), m.clamp(m.length(rows), min=TINY), None
    if step.ratio != 0.0 and m.floats:
        last = m.rows(changes[1])
        miss = measure.missed(m, step.ratio, newest, m.length(last) if before is None else before, m.inner(rows, last))
    elif step.ratio != 0.0:
        miss = m.length(m.rows(torch.sub(changes[0], changes[1], alpha=step.ratio)))
    return measure.trust(m, by, step, far, newest, miss), far, newest


def _bent(m: Kind, x: Tensor, changes: Sequence[Tensor], bend: Sequence[float], trust: Number) -> Tensor:
    """x + trust * sum of bend_j R_j, a new tensor of x's dtype."""
    out = m.add(x, like(changes[0], x), trust, bend[0])
    for change, weight in zip(changes[1:], bend[1:]):
        m.add_(out, change, trust, weight)
    return out


def _settled(settle: Settle, x: Tensor, base: Optional[Tensor], denoised: Tensor, changes: Sequence[Tensor]) -> Tensor:
    """D with the last correction, see `Settle`; exactly D where the evaluations did not change, as under a mask.

    base: x without the bend of the step before, or None; written over.
    """
    size = TENSORS.length(changes[0])
    along = TENSORS.inner(torch.sub(x, denoised, alpha=settle.alpha), changes[0], free=True) / settle.alpha
    found = torch.zeros_like(denoised)
    for change, weight in zip(changes, settle.changes):
        found.add_(change, alpha=weight)
    if base is not None:
        found.add_(torch.sub(base, x, out=base), alpha=1.0 / settle.alpha)
    # J = |v|^2 / <v, D - y> in [0, 1] with v = -slope R_0.
    slope = (settle.slope * size * size / along.clamp(min=TINY)).clamp_(max=1.0) * (along > 0)
    far = TENSORS.length(found) / (settle.slope * size).clamp_(min=TINY)
    gain = settle.share * slope / (1.0 + far * far)
    return torch.addcmul(denoised, found, gain.to(denoised.dtype), out=found)


def _check_finite(x: Tensor, sums: Sequence[Number], plan: Plan, start: Tensor) -> None:
    """The one look at the device, after the last step; only a bad result makes a second one, to name the first cause."""
    # A sum is not finite where a term is not.  Where it is only too large, the second look finds nothing.
    if np.isfinite(x.sum(dtype=torch.float32 if x.dtype in HALF else None).cpu().numpy()) or \
            x.isfinite().all().cpu().numpy():
        return
    if not start.isfinite().all().cpu().numpy():
        raise FloatingPointError(f"x was not finite at the start, sigma = {plan.sigmas[0]:.6g}")
    bad = torch.stack([~torch.as_tensor(s).isfinite().all() for s in sums]).cpu().numpy()
    if bad.any():
        i = int(bad.argmax())
        narrow = f", or {x.dtype} too narrow for the state" if x.dtype in HALF else ""
        cause = f" (its own doing, or the noise of the step before was not finite{narrow})" if i else ""
        raise FloatingPointError(f"the model returned NaN or infinity at step {i} of {len(sums)}, counted from 0, "
                                 f"sigma = {plan.sigmas[i]:.6g}{cause}")
    raise FloatingPointError(f"the state became NaN or infinite although every evaluation was finite: the noise of the "
                             f"last step was not finite, or dtype {x.dtype} is too narrow for sigma = {plan.sigmas[0]:.6g}")
