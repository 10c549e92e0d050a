"""Noise that depends on (seed, image, step) alone, so that a picture can be made again.

The draws come from Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"), a counter-based generator
whose bits numpy guarantees across versions and machines, turned into normal deviates by Box-Muller in float64 here.  They
are made on the CPU in float32 and then moved, so that every device and dtype starts from the same numbers.
"""
from __future__ import annotations

import struct
from types import MappingProxyType
from typing import Mapping, Optional, Sequence

import numpy as np
import torch

Tensor = torch.Tensor

# Sets our streams apart from any other use of Philox with the user's seed as its key.
_STREAM = 0x4552534445000001


def philox_normal(seed: int, image: int, step: int, count: int) -> np.ndarray:
    """`count` standard normal float32 numbers of the stream (seed, image, step), three unsigned 64-bit numbers."""
    bits = np.random.Philox(key=np.array([seed % 2 ** 64, _STREAM], dtype=np.uint64),
                            counter=np.array([0, 0, image % 2 ** 64, step % 2 ** 64], dtype=np.uint64))
    pairs = (count + 1) // 2
    raw = bits.random_raw(pairs)
    # Two 32-bit uniforms of each draw, in (0, 1]: never 0, whose logarithm is infinite.
    first = ((raw >> np.uint64(32)).astype(np.float64) + 1.0) * 2.0 ** -32
    second = ((raw & np.uint64(0xFFFFFFFF)).astype(np.float64) + 1.0) * 2.0 ** -32
    radius, angle = np.sqrt(-2.0 * np.log(first)), 2.0 * np.pi * second
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1).ravel()[:count].astype(np.float32)


def step_key(sigma) -> int:
    """A step's name in the noise: the bits of its sigma in float32.

    By its sigma rather than its number, so that a run that is split, or starts in the middle, draws the same noise.
    """
    return struct.unpack("<I", struct.pack("<f", float(sigma)))[0]


class SeededNoise:
    """A noise sampler (sigma, sigma_next) -> z like x, unit variance, from (seed, index in the batch, sigma) alone.

    Image k of a batch gets what it gets in any other batch at that index, on every device and in every dtype.

    Args:
        x: the state, shape (batch, ...); its shape, dtype and device are the noise's.
        seed: any integer; None draws one from torch's global CPU generator, so that torch.manual_seed decides.
        images: the index in its batch of each picture of x; None: 0, 1, ...
    """

    def __init__(self, x: Tensor, seed: Optional[int] = None, images: Optional[Sequence[int]] = None):
        self.images = range(x.shape[0]) if images is None else [int(i) for i in images]
        if len(self.images) != x.shape[0]:
            raise ValueError(f"images must have one index for each of the {x.shape[0]} pictures, got {len(self.images)}")
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.seed = int(torch.randint(2 ** 63 - 1, ())) if seed is None else int(seed)

    def __call__(self, sigma, sigma_next=None) -> Tensor:
        """The noise of the step from `sigma`, a number or a CPU tensor (a device tensor would be read back)."""
        step = step_key(sigma)
        noise = np.empty((self.shape[0], self.shape[1:].numel()), dtype=np.float32)
        for row, image in enumerate(self.images):
            noise[row] = philox_normal(self.seed, image, step, noise.shape[1])
        return torch.from_numpy(noise).reshape(self.shape).to(self.device, self.dtype)


NOISES: Mapping[str, str] = MappingProxyType({"cpu": "the same on every device, from seed, picture and step alone"})
"""The noises of `make_noise` by name, the default first."""


def make_noise(name: str, x: Tensor, seed: Optional[int], sigmas, images: Optional[Sequence[int]] = None):
    """The noise sampler (sigma, sigma_next) -> z of a name of `NOISES`."""
    return SeededNoise(x, seed, images)
