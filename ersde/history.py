"""What a run leaves for the run after it, so that a run in parts is the whole run."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Callable, Tuple

import numpy as np
import torch

from .solver import Memory
from .weights import Plan

Tensor = torch.Tensor

_NEAR = 2e-3        # of the state's norm: what casts, to bfloat16 too, and scalings between two runs may change


@dataclass(frozen=True)
class _Past:
    """The steps so far: sigmas with the one reached, the eta of each, the run's memory, and what else the weights depend on
    (`rule`, whose first entry is the name of the process)."""

    sigmas: np.ndarray
    etas: np.ndarray
    memory: Memory
    rule: Tuple


class History:
    """Lets a run go on from the one before it as if the two were one: `sample_preset`'s argument `history`.

        history = ersde.History()
        x = ersde.sample_preset(model, x, sigmas[:11], preset, history=history)
        x = ersde.sample_preset(model, x, sigmas[10:], preset, history=history)

    is one run over `sigmas`, bit for bit, with the noise kinds of `NOISES` and the same seed.  A run goes on from the
    history if it starts at the sigma and from the state that the one before it ended at, up to casts and scalings (0.2 %); a
    state that was changed in between, as by a mask or by new noise, makes it start anew.  With another noise scale, order,
    corrector or method it goes on from the evaluations, but corrects none of the steps before.  A run that ends well leaves
    its own steps here, one that fails or is interrupted leaves all as it was, and one that ends at sigma = 0 leaves nothing.
    That the model and its conditions are the same is the caller's to know: a refiner wants a history of its own.
    """

    def __init__(self):
        self._past = None

    def __bool__(self) -> bool:
        """Whether there is a run to go on from."""
        return self._past is not None

    def to(self, device) -> "History":
        """A copy with its tensors on a device; a run from a copy leaves this one as it is."""
        copy, past = History(), self._past
        if past is not None:
            known, move = past.memory, lambda one: one.to(device) if isinstance(one, torch.Tensor) else one
            copy._past = dataclasses.replace(past, memory=Memory(
                move(known.x), move(known.newest), [move(change) for change in known.changes], move(known.base),
                move(known.score), [move(weight) for weight in known.bent], move(known.inverse), known.factor,
                move(known.excess), move(known.by_excess)))
        return copy

    def _before(self, x: Tensor, sigmas: np.ndarray, process: str):
        """The steps that a run from x over `sigmas` goes on from, or None.  Reads one number from the device."""
        past = self._past
        if past is None or past.rule[0] != process or past.sigmas[-1] != sigmas[0] or \
                past.memory.x.shape != x.shape or \
                (past.sigmas[0] - past.sigmas[-1]) * (sigmas[0] - sigmas[-1]) < 0:
            return None
        wide = torch.promote_types(x.dtype, torch.float32)       # not float64, which Apple's GPUs have not got
        old, new = past.memory.x.to(x).to(wide), x.detach().to(wide)
        return past if (new - old).norm() <= _NEAR * old.norm() else None

    def run(self, x: Tensor, sigmas: np.ndarray, etas: np.ndarray, rule: Tuple, make: Callable[..., Plan],
            go: Callable[[Plan, Tensor, Memory], Tensor]) -> Tensor:
        """Run `go(plan, x, memory)` on the plan that `make(sigmas, etas, history=())` gives for what is known."""
        past, memory = self._before(x, sigmas, rule[0]), Memory()
        if past is None:
            plan = make(sigmas, etas)
        else:
            known, wide = past.memory, x.to(torch.promote_types(x.dtype, torch.float32))
            like = lambda one: one.to(wide) if isinstance(one, torch.Tensor) else one       # None, or floats
            memory = Memory(like(known.x), known.newest.to(x.device), [change.to(x.device) for change in known.changes],
                            like(known.base), like(known.score), [like(weight) for weight in known.bent],
                            like(known.inverse), known.factor, like(known.excess), like(known.by_excess))
            done = len(past.etas)
            whole = np.concatenate((past.sigmas[:-1], sigmas)), np.concatenate((past.etas, etas))
            if past.rule == rule:
                plan = make(*whole)
                plan = dataclasses.replace(plan, sigmas=sigmas, steps=plan.steps[done:], orders=plan.orders[done:])
            else:
                plan = make(sigmas, etas, history=past.sigmas[-2::-1][:1 + len(memory.changes)])
            sigmas, etas = whole
        x = go(plan, x, memory)
        memory.x = memory.x.clone()         # the caller may write to what it gets
        self._past = _Past(sigmas, etas, memory, rule) if sigmas[-1] > 0 else None
        return x
