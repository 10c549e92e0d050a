"""Noise that depends on (seed, image, step) alone, so that a picture can be made again.

Three kinds, `NOISES`.  In all of them

* every image of a batch has a stream of its own, so that it gets the same noise alone, in any batch and in any split of one;
* a step is known by its sigma, not by its number, so that a run that is split, or starts in the middle, draws the noise that
  the whole run would have drawn;
* the numbers are float32 and then cast, so that every device, dtype and memory format starts from the same ones;
* nothing is kept between two steps and nothing global is read or written: the order of the draws, other threads and a run
  that was interrupted change nothing.

Another seed, image or sigma is an independent stream.  The other way round: two runs over the same sigmas with the same seed
(sampling a picture twice in a chain) draw the same noise, so they want two seeds.

**cpu** takes its bits from numpy's Philox4x64-10, which numpy guarantees across versions and machines, and makes them normal
by Box-Muller with numpy's float64 log, cos and sin.  Made on the CPU and moved, hence the same on every device of a machine;
between machines those functions may differ in the last bit of float64, which survives the rounding to float32 for about one
number in 1e8.

**device** needs no transfer: Philox4x32-10 in int64 operations, and Box-Muller in float64 by nothing but additions,
multiplications, divisions and square roots, which IEEE 754 rounds exactly, each an operation of its own, so that no compiler
can contract two of them.  The same numbers bit for bit on every machine and device.  Each device proves it on a sample
against the CPU before it is used; where it does not (no float64 or int64, as on Apple's GPUs, or inexact arithmetic), the
same numbers are made on the CPU and moved.

**brownian** is a path in place of independent draws: see `BrownianNoise`.
"""
from __future__ import annotations

import copy
import math
import struct
from numbers import Integral
from types import MappingProxyType
from typing import Callable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch

from .errors import check_choice, check_eta, check_state, shown
from .noise_scale import NoiseScale, get_noise_scale
from .process import Process, get_process

Tensor = torch.Tensor
Seed = Union[None, int, Sequence[int]]

NOISES: Mapping[str, str] = MappingProxyType({
    "cpu": "made on the CPU, the same on every device, from seed, picture and step alone",
    "device": "the same promise, made on the device itself, with no transfer",
    "brownian": "a path that more steps follow more finely, so that runs converge to one picture; slower to draw",
})
"""The kinds of noise by name, each with what it is for in one sentence."""

# Sets our streams apart from any other use of Philox with the user's seed as its key.
_STREAM = 0x4552534445000001
# The same for Philox4x32, in the highest word of the counter: torch's own CUDA generator, which is Philox4x32-10 with the
# seed as key, has the number of a thread there, and so 0.
_DEVICE_STREAM, _BROWNIAN_STREAM = 0x45525301, 0x45525302


def step_key(sigma) -> int:
    """A step's name in the noise: the bits of its sigma in float32, which order positive sigmas as the sigmas themselves.

    By its sigma rather than its number, so that a run that is split, or starts in the middle, draws the same noise.
    """
    try:
        return struct.unpack("<I", struct.pack("<f", float(sigma)))[0]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"sigma must be a number that float32 can hold, got {shown(sigma)}") from None


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


# Philox4x32-10 and Box-Muller in torch, the same bits everywhere.

_WORD = 0xFFFFFFFF
# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: multipliers and Weyl constants.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Sequence, key: Sequence) -> Tuple[Tensor, ...]:
    """Philox4x32-10: four words of 32 random bits from a counter of four words and a key of two.

    Args:
        counter, key: int64 tensors, or ints, that broadcast, with values in [0, 2^32); the first and third word of the
            counter are tensors.

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    # The multiplier less 2^32, so that the product with a word stays within a signed 64-bit number.
    m0, m1 = (m - 2 ** 32 for m in _MULTIPLIERS)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = ((p1 >> 32) + c2) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) + c0) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """sum of coefficients_k x^k; a multiplication and an addition are two operations, each rounded by itself."""
    out = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        out.mul_(x).add_(c)
    return out


_LOG = tuple(1.0 / (2 * k + 1) for k in range(11))                                   # of atanh(s) / s in s^2
_SIN = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(8))              # of sin(a) / a in a^2
_COS = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(9))                  # of cos(a) in a^2
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD


def _log(u: Tensor) -> Tensor:
    """log of positive normal float64 numbers to some 2e-16, by exactly rounded operations alone."""
    bits = u.view(torch.int64)
    exponent = (bits - _SQRT_HALF_BITS) >> 52
    mantissa = (bits - (exponent << 52)).view(torch.float64)        # in [sqrt(1/2), sqrt(2))
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent.to(torch.float64) * math.log(2.0) + _horner(s * s, _LOG) * (s * 2.0)


def nearest_root(x: Tensor, near: Tensor) -> Tensor:
    """The float64 nearest to sqrt(x), x >= 0, from one within a few units in the last place of it.

    torch's square root on a CPU is MKL's where there is one, off by one unit in 0.8 % of all numbers; other CPUs and GPUs
    round as IEEE 754 says.  This is one of Newton's steps, whose x - near^2 is exact: near in two halves of 26 bits
    (Veltkamp), whose products need no rounding (Dekker, "A floating-point technique for extending the available
    precision", 1971).
    """
    split = near * 134217729.0              # 2^27 + 1
    high = split - (split - near)
    low = near - high
    square = near * near
    beyond = ((high * high - square) + high * low * 2.0) + low * low
    return torch.where(x > 0.0, near + ((x - square) - beyond) / (near * 2.0), near)


def box_muller(first: Tensor, second: Tensor) -> Tuple[Tensor, Tensor]:
    """Two independent standard normal float64 tensors from two int64 tensors of 32 random bits each.

    sqrt(-2 log u) cos(2 pi v) and its sine with u = (first + 1) / 2^32 and v = (second + 1/2) / 2^32 less its multiple of
    1/4, which only swaps and negates the two.  Largest value 6.66; error some 1e-15.
    """
    square = _log((first + 1).to(torch.float64) * 2.0 ** -32) * -2.0
    radius = nearest_root(square, square.sqrt())
    shifted = second + (1 << 29)
    quarter = shifted >> 30
    angle = (((shifted & ((1 << 30) - 1)) - (1 << 29)).to(torch.float64) + 0.5) * (math.pi * 2.0 ** -31)
    turn = angle * angle
    sin, cos = _horner(turn, _SIN) * angle, _horner(turn, _COS)
    odd = (quarter & 1).to(torch.bool)
    sin, cos = torch.where(odd, cos, sin), torch.where(odd, sin, cos)
    return radius * cos * (1 - ((quarter + 1) & 2)), radius * sin * (1 - (quarter & 2))


def _sent(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device.

    A copy to a GPU from memory that may be paged out waits for all that the GPU was given before: the model.
    """
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def _words(values: Sequence[int], device: torch.device, axes: int) -> Tensor:
    """The values modulo 2^32 as an int64 tensor with `axes` more axes of length 1."""
    words = torch.tensor([v & _WORD for v in values], dtype=torch.int64, device="cpu")
    return _sent(words, device).reshape(-1, *[1] * axes)


def normals(seeds: Sequence[int], images: Sequence[int], steps: Sequence[int], stream: int, start: int, count: int,
            device: torch.device) -> Tensor:
    """Standard normal float64 numbers, shape (steps, images, count), the same bits on every device.

    Args:
        seeds, images: of each image; steps: names of the streams within an image; stream: a constant of the use.
        start, count: which numbers of the streams; start is a multiple of 4.
    """
    key = _words(seeds, device, 1), _words([seed >> 32 for seed in seeds], device, 1)
    block = torch.arange(start // 4, (start + count + 3) // 4, dtype=torch.int64, device=device)
    words = philox4x32((block, _words(images, device, 1), _words(steps, device, 2), stream), key)
    parts = [part for pair in (words[:2], words[2:]) for part in box_muller(*pair)]
    return torch.stack(parts, dim=-1).flatten(-2)[..., :count]


def _proven(device: torch.device) -> torch.device:
    """`device` if it makes the very numbers that the CPU makes, else the CPU."""
    if device.type == "cpu":
        return device
    sample = ((1, 2 ** 63 + 5), (0, 7), (step_key(1.0), step_key(14.6)), _DEVICE_STREAM, 0, 4096)
    try:
        same = torch.equal(normals(*sample, device).cpu(), normals(*sample, torch.device("cpu")))
    except (RuntimeError, TypeError, NotImplementedError):
        same = False
    return device if same else torch.device("cpu")


class Noise:
    """A noise sampler (sigma, sigma_next) -> z like x, unit variance, from (seed, image, sigma) alone.

    Args:
        x: the state, shape (batch, ...); its shape, dtype and device are the noise's.
        seed: any integer; or one for each image of the batch, which then is image 0 of its own seed, as in hosts whose
            images have seeds of their own; None draws one from torch's global CPU generator, so that torch.manual_seed
            decides.
        images: the number of each image, where a part of a batch is made by itself; None: 0, 1, ... in order.

    Raises:
        TypeError, ValueError: a seed or number is no integer, or there is not one for each image.
    """

    def __init__(self, x: Tensor, seed: Seed = None, images: Optional[Sequence[int]] = None):
        check_state(x)
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        batch = self.shape[0]
        seed, images = (v.tolist() if isinstance(v, (Tensor, np.ndarray)) else v for v in (seed, images))
        single = seed is None or isinstance(seed, Integral) and not isinstance(seed, bool)
        if seed is None:
            seed = int(torch.randint(2 ** 63 - 1, (), device="cpu"))
        self.seeds = [int(seed)] * batch if single else _integers("seed", seed, batch)
        self.images = _integers("images", images, batch) if images is not None else \
            list(range(batch)) if single else [0] * batch

    def __call__(self, sigma, sigma_next=None) -> Tensor:
        """The noise of the step from `sigma` to `sigma_next`, numbers or CPU tensors (others would be read back)."""
        raise NotImplementedError

    def of_member(self, process: Process, noise_scale: NoiseScale, eta: float) -> "Noise":
        """The same noise for a member of the family; itself where it does not matter."""
        return self


def _integers(name: str, values, count: int) -> List[int]:
    try:
        values = list(values)
    except TypeError:
        values = [values]
    for value in values:
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, or one for each image, got {shown(value)}")
    if len(values) != count:
        raise ValueError(f"{name} must have one integer for each of {count} images, got {len(values)}")
    return [int(value) for value in values]


class SeededNoise(Noise):
    """The noise "cpu", see the module's text."""

    def __call__(self, sigma, sigma_next=None) -> Tensor:
        step = step_key(sigma)
        noise = np.empty((len(self.seeds), self.shape[1:].numel()), dtype=np.float32)
        for row, seed, image in zip(noise, self.seeds, self.images):
            row[:] = philox_normal(seed, image, step, len(row))
        return _sent(torch.from_numpy(noise).reshape(self.shape), self.device).to(self.dtype)


class DeviceNoise(Noise):
    """The noise "device", see the module's text."""

    def __init__(self, x: Tensor, seed: Seed = None, images: Optional[Sequence[int]] = None):
        super().__init__(x, seed, images)
        self.made_on = _proven(self.device)

    def __call__(self, sigma, sigma_next=None) -> Tensor:
        return self._sum([(step_key(sigma), 1.0)], _DEVICE_STREAM)

    def _sum(self, terms: Sequence[Tuple[int, float]], stream: int) -> Tensor:
        """sum of weight * (the unit noise called `step`) over the terms (step, weight), in their order."""
        out = torch.empty(len(self.seeds), self.shape[1:].numel(), dtype=torch.float32, device=self.made_on)
        steps = [step for step, _ in terms]
        for rows, start, count in self._pieces(*out.shape, len(terms)):
            unit = normals(self.seeds[rows], self.images[rows], steps, stream, start, count, self.made_on)
            total = unit[0] * terms[0][1]
            for noise, (_, weight) in zip(unit[1:], terms[1:]):
                total.add_(noise * weight)
            out[rows, start:start + count] = total
        return _sent(out.reshape(self.shape), self.device).to(self.dtype)

    def _pieces(self, images: int, count: int, terms: int) -> Iterator[Tuple[slice, int, int]]:
        """Parts of the noise small enough for the memory (on the CPU, for its cache): rows, start and count."""
        most = (1 << 16 if self.made_on.type == "cpu" else 1 << 22) // terms // 4 * 4
        if count == 0 or images == 0:
            return
        if count <= most:
            together = most // count
            for first in range(0, images, together):
                yield slice(first, first + together), 0, count
        else:
            for image in range(images):
                for start in range(0, count, most):
                    yield slice(image, image + 1), start, min(most, count - start)


class BrownianNoise(DeviceNoise):
    """The noise "brownian": the increments of one path W for each number of each image, so that more steps refine it.

    The exact step s -> t of the member phi = lambda g^eta (`ersde.weights`), divided by sigma_t g_t^eta, is

        v_t = v_s + (what D adds) + W(T_t) - W(T_s),    v = x / (sigma g^eta),    T(sigma) = g(lambda(sigma))^(-2 eta),

    since (sigma_t / sigma_s) rho = (sigma_t g_t^eta) / (sigma_s g_s^eta) and (1 - rho^2) / g_t^(2 eta) = T_t - T_s.  So in
    the clock T the step's noise is the increment of a path with nothing in front of it, and z = (W(T_t) - W(T_s)) /
    sqrt(T_t - T_s).  Two steps s -> r -> t then add the very noise that one step s -> t adds: exact for this member alone,
    in any other clock, such as sigma's, only in the limit.  `ersde`'s samplers tell the noise their member (`of_member`).

    Guaranteed: z is standard normal, and independent for steps that do not overlap; a step's noise is the combination of its
    parts' to rounding; the path depends on neither the schedule, nor where it begins and ends, nor on which steps were asked
    for before; as eta or g changes continuously, so does it; image, batch, device and dtype as for "device", and bit for bit
    on one machine (the weights below come from its float64 log and exp, so another may differ in the last bit of a float32).
    With it the run converges strongly, at order 1, as steps grow.  For float32 sigmas from 2^-32 to 2^32 (others are rounded
    to float32); a step outside, or with no noise of its own, gets the independent noise "device".

    How: Levy's construction on the fixed tree whose leaves are the float32 numbers, as integers: the midpoint of a cell is a
    float32 again, and its bits name the cell's unit normal, xi.  W is the sum of xi over hat functions of T, of which an
    increment meets those on the way to its ends: at most 58 normals, whose weights are made in float64.  Unlike torchsde's
    tree it needs neither the end points of the run nor a tolerance, and holds image by image on every device.

    Args:
        process, noise_scale, eta: the member.
    """

    def __init__(self, x: Tensor, seed: Seed = None, images: Optional[Sequence[int]] = None, process="ve",
                 noise_scale="sde", eta: float = 1.0):
        super().__init__(x, seed, images)
        self.process, self.noise_scale, self.eta = get_process(process), get_noise_scale(noise_scale), check_eta(eta)

    def of_member(self, process: Process, noise_scale: NoiseScale, eta: float) -> "BrownianNoise":
        out = copy.copy(self)
        out.process, out.noise_scale, out.eta = process, noise_scale, eta
        return out

    def __call__(self, sigma, sigma_next) -> Tensor:
        terms = self.terms(step_key(sigma), step_key(sigma_next))
        return self._sum(terms, _BROWNIAN_STREAM) if terms else super().__call__(sigma)

    def terms(self, start: int, end: int) -> List[Tuple[int, float]]:
        """The increment from `start` to `end`, keys of sigmas, as (name of a unit normal, weight); squares add up to 1."""
        high, low = max(start, end), min(start, end)
        top, bottom = step_key(min(2.0 ** 32, self.process.sigma_max)), step_key(2.0 ** -32)
        if high == low or high > top or low < bottom:
            return []
        cells = sorted({*_cells(high, bottom, top), *_cells(low, bottom, top)}, reverse=True)
        points = np.array(sorted({high, low, top, bottom, *(point for cell in cells for point in cell)}, reverse=True))
        # log T, which grows as sigma falls; rounding must not make it fall.
        log_t = np.maximum.accumulate(self._log_clock(points))
        at = dict(zip(points.tolist(), log_t))
        s, t = at[high], at[low]
        if not s < t:
            return []
        weights = [np.sqrt(_share(t, s, at[bottom], at[top]))]
        if cells:
            # A cell from a over its middle m to b, in falling sigma.  Its hat rises from a to m and falls to b, and is
            # sqrt((m - a) (b - m) / (b - a)) high.
            b, m, a = (np.array([at[point] for point in column]) for column in zip(*cells))
            up, down = np.maximum(s, a), np.maximum(s, m)           # the part of the step in [a, m] and in [m, b]
            up_end, down_end = np.minimum(t, m), np.minimum(t, b)
            rise = np.sqrt(_share(up_end, up, m, a) * _share(up_end, up, t, s) * _share(b, m, b, a))
            fall = np.sqrt(_share(down_end, down, b, m) * _share(down_end, down, t, s) * _share(m, a, b, a))
            weights = np.concatenate((weights, rise - fall))
        sign = 1.0 if start > end else -1.0
        weights = sign * np.asarray(weights) / np.linalg.norm(weights)
        names = [bottom, *(m for _, m, _ in cells)]
        return [(name, weight) for name, weight in zip(names, weights.tolist()) if weight]

    def _log_clock(self, keys: np.ndarray) -> np.ndarray:
        """log T at the keys' sigmas, falling; above 1e6 it is as good as infinite."""
        lam = self.process.lam(keys.astype(np.uint32).view(np.float32).astype(np.float64))
        try:
            log_g = self.noise_scale.log_g_array(lam)
        except ValueError:          # a user's phi that underflows to 0 on the tree, far below the schedule
            log_g = np.array([self._log_g_or_none(one) for one in lam])
        return np.minimum(-2.0 * self.eta * log_g, 1e6)

    def _log_g_or_none(self, lam: float) -> float:
        try:
            return float(self.noise_scale.log_g(lam))
        except ValueError:
            return -np.inf


def _cells(point: int, low: int, high: int) -> Iterator[Tuple[int, int, int]]:
    """The cells (low, middle, high) of the tree on the way to a point, whose end it is not."""
    while point not in (low, high):
        middle = (low + high) // 2
        yield low, middle, high
        low, high = (low, middle) if point <= middle else (middle, high)


def _share(end, start, whole_end, whole_start):
    """(e^end - e^start) / (e^whole_end - e^whole_start) of a part of a whole, 0 where the part is empty."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        share = np.exp(end - whole_end) * np.expm1(start - end) / np.expm1(whole_start - whole_end)
        return np.where((start < end) & (whole_start < whole_end), np.minimum(share, 1.0), 0.0)


_KINDS: Mapping[str, Callable[..., Noise]] = MappingProxyType(
    {"cpu": SeededNoise, "device": DeviceNoise, "brownian": BrownianNoise})


def make_noise(name: str, x: Tensor, seed: Seed = None, sigmas=None, *, images: Optional[Sequence[int]] = None,
               **member) -> Noise:
    """The noise sampler (sigma, sigma_next) -> z of a name of `NOISES`.

    Args:
        x: the state, shape (batch, ...): the noise's shape, dtype and device.
        seed, images: as in `Noise`.
        sigmas: the schedule.  No kind depends on it, so that parts of a run draw what the whole draws.
        member: process, noise_scale and eta of "brownian" (see there) where the sampler is not `ersde`'s.

    Raises:
        TypeError, ValueError: an argument is not allowed; says what is.
    """
    return _KINDS[check_choice("noise", name, NOISES)](x, seed, images, **member)
