"""The curve under the WebUI's controls: how much of the noise a preset renews along the schedule, as inline SVG.

At the noise level lambda the member phi = lambda g^eta replaces the share 1 - (g(lambda / 2) / g(lambda))^(2 eta) of the
noise's variance by fresh noise while lambda halves: 0 is the ODE, and it tends to 1 as eta grows.
"""
from __future__ import annotations

from html import escape
from typing import Optional

import torch

from ..noise_scale import get_noise_scale
from ..presets import Preset

_POINTS = 161
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 512, 12, 150


def _levels() -> torch.Tensor:
    """sigma of Stable Diffusion's training schedule at equal parts of it, from pure noise to the picture, float64."""
    beta = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    alpha = torch.cumprod(1.0 - beta, 0)
    table = ((1.0 - alpha) / alpha).sqrt().log()
    at = torch.linspace(1.0, 0.0, _POINTS, dtype=torch.float64) * 999
    low = at.floor().long().clamp(max=998)
    return torch.lerp(table[low], table[low + 1], at - low).exp()


def renewed(preset: Preset) -> torch.Tensor:
    """The share of fresh noise at each of the 161 points of the schedule, shape (161,); 0 outside the stochastic window."""
    lam, scale = _levels(), get_noise_scale(preset.noise_scale)
    share = -torch.expm1(2.0 * preset.eta * (scale.log_g(lam / 2.0) - scale.log_g(lam)))
    part = torch.linspace(0.0, 1.0, _POINTS, dtype=torch.float64)
    inside = (part >= preset.start) & ((part < preset.end) | (preset.end == 1.0))
    return torch.where(inside, share, torch.zeros_like(share)) if preset.s_noise > 0 else torch.zeros_like(share)


def _line(share: torch.Tensor, style: str) -> str:
    step = (_RIGHT - _LEFT) / (_POINTS - 1)
    points = " ".join(f"{_LEFT + i * step:.1f},{_BOTTOM - y * (_BOTTOM - _TOP):.1f}" for i, y in enumerate(share.tolist()))
    return f'<polyline points="{points}" fill="none" {style}/>'


def draw(used: Preset, base: Optional[Preset] = None) -> str:
    """The curve of `used`, and that of `base` dashed where they differ.  The page's own text colour draws all but the curve,
    whose orange is readable on white and on black."""
    parts = []
    for share in (0, 25, 50, 75, 100):
        x, y = _LEFT + share / 100 * (_RIGHT - _LEFT), _BOTTOM - share / 100 * (_BOTTOM - _TOP)
        parts.append(f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
                     f'stroke-opacity="{0.5 if share == 0 else 0.15}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{share} %</text>')
        anchor = "end" if share == 100 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 16}" text-anchor="{anchor}">{share} %</text>')
    curve, before = renewed(used), None if base is None else renewed(base)
    if before is not None and not torch.equal(curve, before):
        parts.append(_line(before, 'stroke="currentColor" stroke-opacity="0.6" stroke-width="1.5" stroke-dasharray="5 4"'))
    parts.append(_line(curve, 'stroke="#e0731d" stroke-width="2.5" stroke-linejoin="round"'))
    title = f"Fresh noise of {used.noise_scale} at eta {used.eta:g} along the schedule"
    parts.append(f'<text x="{(_LEFT + _RIGHT) / 2:.0f}" y="{_BOTTOM + 32}" text-anchor="middle">part of the schedule, from '
                 'noise to picture: how much of the noise is renewed while its level halves</text>')
    return (f'<svg viewBox="0 0 520 186" role="img" aria-label="{escape(title)}" fill="currentColor" font-size="11" '
            f'style="width:100%;max-width:600px;display:block">{"".join(parts)}</svg>')
