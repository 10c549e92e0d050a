"""A small class-conditional denoiser of 32x32 colour pictures, trained for the processes `ve` and `flow`.

One network F serves both.  With alpha = 1 (`ve`) or 1 - sigma (`flow`), lambda = sigma / alpha, s = SIGMA_DATA and
r = sqrt(sigma^2 + alpha^2 s^2) it sees the state at unit size and the noise level as a number that stays finite at
sigma = 1 of a flow model:

    y = x / r,   c = clamp(log(lambda / s), -LIMIT, LIMIT),   F = F(y, c, label).

`ve`, the preconditioning of EDM (Karras et al., arXiv 2206.00364, table 1):

    D = (s^2 / r^2) x + (sigma s / r) F.

`flow` (rectified flow, Liu et al., arXiv 2209.03003) predicts the velocity v = eps - x_0; the term in y is its best linear
guess from x alone:

    v = ((sigma - alpha s^2) / r) y - (s / r) F,   D = x - sigma v.

Both are the same map from F to the estimate of x_0, so that weights of one process are a start for the other; they differ
in what they are trained on: the noise levels and their weight in the loss (benchmarks/train.py).

The weights lie in weights/ beside this file, as safetensors in float16; weights/README.md is their model card.
"""
from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Optional, Sequence, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import check_choice, check_real

Tensor = torch.Tensor

CLASSES = ("face", "person", "hand", "animal", "plant", "food", "flag", "vehicle", "shape", "sign")
NULL = len(CLASSES)             # the label that says nothing, for guidance
SIZE = 32
SIGMA_DATA = 0.8                # root mean square of the pictures in [-1, 1]: they are mostly white paper
LIMIT = 5.0                     # of |log(lambda / s)|
PROCESSES = ("ve", "flow")
FORMAT = "ersde-denoiser-1"     # in a file's metadata, below KEY
KEY = "ersde"
WEIGHTS = Path(__file__).resolve().parent / "weights"
LARGEST = 256                   # channels that a file may ask for


def _scaled(x: Tensor, affine: Tensor) -> Tensor:
    scale, shift = affine[:, :, None, None].chunk(2, 1)
    return torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """Residual block: GroupNorm, SiLU, convolution, twice; the condition scales and shifts the second norm.

    Args:
        inside, out: channels.
        condition: width of the condition.
        dropout: the share of the second convolution's inputs that is left out, in training alone.
    """

    def __init__(self, inside: int, out: int, condition: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.norm1 = nn.GroupNorm(8, inside)
        self.conv1 = nn.Conv2d(inside, out, 3, padding=1)
        self.affine = nn.Linear(condition, 2 * out)
        self.norm2 = nn.GroupNorm(8, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(inside, out, 1) if inside != out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(_scaled(self.norm2(h), self.affine(condition)))
        if self.training and self.dropout:
            h = F.dropout(h, self.dropout)
        return self.skip(x) + self.conv2(h)


class Attention(nn.Module):
    """Self-attention over the pixels of a small map, residual, heads of 32 channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = channels // 32
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, 32, height * width).transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(batch, channels, height, width)
        return x + self.out(h)


class Network(nn.Module):
    """The U-Net F(y, c, label): 2x2 patches, then 16x16, 8x8 (with attention) and 4x4.

    Args:
        channels: at 16x16, 8x8 and 4x4: multiples of 16, the second one of 32.
        blocks: at each of them, on the way down and on the way up.
        dropout: of a training, see `Block`.
    """

    def __init__(self, channels: Sequence[int] = (48, 64, 128), blocks: int = 1, dropout: float = 0.0):
        super().__init__()
        self.channels, self.blocks = tuple(channels), blocks
        width = 2 * channels[1]
        self.label = nn.Embedding(len(CLASSES) + 1, width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(12, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, at = [], channels[0]
        for level, out in enumerate(channels):
            if level:
                self.down.append(nn.Conv2d(at, out, 3, stride=2, padding=1))
                at = out
            for _ in range(blocks):
                self.down.append(Block(at, out, width, dropout))
                if level == 1:
                    self.down.append(Attention(out))
                skips.append(out)
                at = out
        self.middle = Block(at, at, width, dropout)
        for level, out in reversed(list(enumerate(channels))):
            for _ in range(blocks):
                self.up.append(Block(at + skips.pop(), out, width, dropout))
                if level == 1:
                    self.up.append(Attention(out))
                at = out
            if level:
                self.up.append(nn.Conv2d(at, channels[level - 1], 1))
                at = channels[level - 1]
        # The condition scales the end too: at low noise F is the noise, a small part of y that has to become large.
        self.affine = nn.Linear(width, 2 * at)
        self.norm = nn.GroupNorm(8, at)
        self.last = nn.Conv2d(at, 12, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        # Frequencies for c in [-LIMIT, LIMIT]: the slowest turns once over the range.
        self.register_buffer("frequency", math.pi / (2 * LIMIT) * torch.logspace(0, math.log10(20.0), 32),
                             persistent=False)

    def forward(self, y: Tensor, c: Tensor, labels: Tensor) -> Tensor:
        angle = c[:, None] * self.frequency
        condition = F.silu(self.time(torch.cat([angle.cos(), angle.sin()], 1)) + self.label(labels))
        h = self.first(F.pixel_unshuffle(y, 2))
        kept = []
        for layer in self.down:
            if isinstance(layer, Block):
                h = layer(h, condition)
                kept.append(h)
            elif isinstance(layer, Attention):
                h = kept[-1] = layer(h)
            else:
                h = layer(h)
        h = self.middle(h, condition)
        for layer in self.up:
            if isinstance(layer, Block):
                h = layer(torch.cat([h, kept.pop()], 1), condition)
            elif isinstance(layer, Attention):
                h = layer(h)
            else:
                h = F.interpolate(layer(h), scale_factor=2.0, mode="nearest")
        return F.pixel_shuffle(self.last(F.silu(_scaled(self.norm(h), self.affine(condition)))), 2)


class Denoiser(nn.Module):
    """D(x, sigma, labels), the estimate of x_0; formulas in the module's docstring.

    Args:
        process: "ve" (sigma in (0, inf)) or "flow" (sigma in (0, 1]).
        network: F; None makes one with random weights.

    Call:
        x: shape (batch, 3, SIZE, SIZE), the state at sigma, of pictures in [-1, 1].
        sigma: shape (batch,) or a number.
        labels: int64, shape (batch,), places in CLASSES, or NULL.

    Returns:
        D, of x's shape and dtype.  The network itself runs in its weights' dtype.
    """

    def __init__(self, process: str, network: Optional[Network] = None):
        super().__init__()
        self.process = check_choice("process", process, PROCESSES)
        self.network = Network() if network is None else network

    def parts(self, x: Tensor, sigma: Tensor, labels: Tensor):
        """alpha and r, shape (batch, 1, 1, 1), and F, all of x's dtype."""
        dtype = self.network.first.weight.dtype
        sigma = torch.as_tensor(sigma, device=x.device).to(torch.float64).expand(x.shape[0])
        alpha = 1 - sigma if self.process == "flow" else torch.ones_like(sigma)
        c = ((sigma / SIGMA_DATA).log() - alpha.log()).clamp(-LIMIT, LIMIT)
        r = (sigma ** 2 + (alpha * SIGMA_DATA) ** 2).sqrt()
        alpha, r = (value.to(x.dtype)[:, None, None, None] for value in (alpha, r))
        return alpha, r, self.network((x / r).to(dtype), c.to(dtype), labels).to(x.dtype)

    def velocity(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """v of the process `flow`, of x's shape and dtype."""
        alpha, r, out = self.parts(x, sigma, labels)
        sigma = _column(sigma, x)
        return ((sigma - alpha * SIGMA_DATA ** 2) / r ** 2) * x - (SIGMA_DATA / r) * out

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        if self.process == "flow":
            return x - _column(sigma, x) * self.velocity(x, sigma, labels)
        _, r, out = self.parts(x, sigma, labels)
        return (SIGMA_DATA ** 2 / r ** 2) * x + (_column(sigma, x) * SIGMA_DATA / r) * out


def _column(sigma, x: Tensor) -> Tensor:
    return torch.as_tensor(sigma, device=x.device).to(x.dtype).expand(x.shape[0])[:, None, None, None]


class Guided:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) as a sampler's model: see `guided`."""

    def __init__(self, model: Denoiser, labels: Tensor, cfg: float):
        self.model, self.labels, self.cfg = model, labels, cfg
        self.process = model.process
        self._excess: Optional[Tensor] = None

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, **_) -> Tensor:
        sigma = torch.as_tensor(sigma, device=x.device).expand(x.shape[0])
        labels = self.labels.to(x.device).expand(x.shape[0])
        if self.cfg == 1:
            return self.model(x, sigma, labels)
        null = torch.full_like(labels, NULL)
        if self.cfg == 0:
            return self.model(x, sigma, null)
        both = self.model(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([labels, null]))
        with_label, without = both.chunk(2)
        apart = with_label - without
        self._excess = (self.cfg - 1.0) * apart
        return without + self.cfg * apart

    def excess(self) -> Optional[Tensor]:
        """What guidance added to D_label at the newest call, (cfg - 1) (D_label - D_null); None where it adds nothing.

        `ersde.sample_preset`'s argument of that name.
        """
        return self._excess


def guided(model: Denoiser, labels: Union[int, str, Sequence, Tensor], cfg: float = 1.0) -> Guided:
    """`model(x, sigma) -> D` as k-diffusion's samplers call it, with D = D_null + cfg (D_label - D_null).

    Args:
        model: from `load_model`.
        labels: a class's name or place in CLASSES for all pictures, or one for each; NULL is allowed.
        cfg: guidance scale; 1 is the model as it is, at half of the cost of any other scale but 0.

    Raises:
        ValueError, TypeError: an unknown label or a scale that is no finite number; the text says what is allowed.
    """
    cfg = check_real("cfg", cfg, low=-math.inf)
    if isinstance(labels, (int, str)):
        labels = [labels]
    found = []
    for label in labels.tolist() if isinstance(labels, Tensor) else labels:
        if isinstance(label, str):
            label = CLASSES.index(check_choice("label", label, CLASSES))
        if int(label) != label or not 0 <= label <= NULL:
            raise ValueError(f"label must be between 0 and {NULL} or one of {', '.join(CLASSES)}, got {label!r}")
        found.append(int(label))
    return Guided(model, torch.tensor(found), cfg)


def save_model(model: Denoiser, path: Union[str, Path], **about: str) -> None:
    """Write `model` as safetensors in float16, whole or not at all, with `about` in its metadata."""
    from safetensors.torch import save

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    network = model.network
    state = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in network.state_dict().items()}
    about = {"format": FORMAT, "process": model.process, "channels": network.channels, "blocks": network.blocks,
             "classes": CLASSES, **about}
    # One entry: safetensors writes several in any order, and equal weights should make equal files.
    part.write_bytes(save(state, metadata={KEY: json.dumps(about)}))
    os.replace(part, path)


def load_model(which: Union[str, Path] = "ve", device: Union[str, torch.device] = "cpu") -> Denoiser:
    """The trained denoiser of a process, or one from a file of the same kind, float32, for evaluation.

    Args:
        which: "ve", "flow", or the path of a .safetensors file that `save_model` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is something else; the text names it and says what is allowed.
    """
    from safetensors import SafetensorError, safe_open

    path = WEIGHTS / f"{which}.safetensors" if which in PROCESSES else Path(which)
    allowed = f"a model is {', '.join(map(repr, PROCESSES))} or a .safetensors file that benchmarks/train.py wrote"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: {allowed}")
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {path} ({error}): {allowed}") from error
    try:
        about = json.loads(about or "{}")
        if about.get("format") != FORMAT:
            raise ValueError(f"its format is {about.get('format')!r}, not {FORMAT!r}")
        channels, blocks = about["channels"], about["blocks"]
        sound = (type(channels) is list and all(type(c) is int and 0 < c <= LARGEST and c % 16 == 0 for c in channels)
                 and len(channels) == 3 and channels[1] % 32 == 0 and type(blocks) is int and 0 < blocks <= 8)
        if not sound or about["classes"] != list(CLASSES):
            raise ValueError("its metadata ask for a network that this pack does not have")
        model = Denoiser(about["process"], Network(channels, blocks))
        model.network.load_state_dict({name: value.float() for name, value in state.items()})
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no denoiser of this pack: {' '.join(str(error).split())[:200]}; {allowed}") from error
    return model.to(device).eval().requires_grad_(False)
