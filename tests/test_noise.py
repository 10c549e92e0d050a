"""The kinds of noise: what each depends on, that it is normal, and what "brownian" promises of its path."""
import hashlib
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import gaussian, rms
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

import ersde
from ersde import noise
from ersde.noise import NOISES, BrownianNoise, DeviceNoise, SeededNoise, make_noise, step_key
from ersde.noise_scale import NOISE_SCALES, get_noise_scale
from ersde.process import get_process

SCALES = [name for name in NOISE_SCALES if name != "ode"]


def member(process, scale, eta=1.0):
    return {"process": process, "noise_scale": scale, "eta": eta}


def test_names():
    assert list(NOISES) == ["cpu", "device", "brownian"]
    for text in NOISES.values():
        assert text[0].islower() and not text.endswith(".") and "\n" not in text      # what stands behind "name: "
    with pytest.raises(TypeError):
        NOISES["mine"] = ""


# The streams: values that may never change, since pictures depend on them.

def test_known_values_of_cpu():
    got = noise.philox_normal(seed=42, image=0, step=step_key(14.6), count=4)
    np.testing.assert_allclose(got, [0.40106332, -0.91545612, 0.98530513, -0.30955005], rtol=1e-6)


@pytest.mark.parametrize("counter, key, words", [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2 ** 32 - 1,) * 4, (2 ** 32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_known_answers(counter, key, words):
    """The test vectors of the authors' Random123 library."""
    got = noise.philox4x32([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
    assert tuple(int(word) for word in got) == words


def bits_of(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def test_known_bits_of_device():
    """To the last bit, on every machine."""
    z = make_noise("device", torch.zeros(2, 50_000), 42)(14.6)
    assert bits_of(z) == DEVICE_BITS


def test_known_values_of_brownian():
    z = make_noise("brownian", torch.zeros(1, 4), 42, **member("ve", "sde_5"))(14.6, 11.3)
    np.testing.assert_allclose(z[0], BROWNIAN, rtol=1e-6)


DEVICE_BITS = "4bd1422d92b654ba"
BROWNIAN = [1.1343062, 0.8031168, 0.12995991, 0.04698115]


# Normal, and what it depends on: the same for all kinds.

def draws(kind, n, seed=1, image=0, sigma=7.0):
    return make_noise(kind, torch.zeros(1, n), seed, images=[image])(sigma, 0.9 * sigma)[0].double().numpy()


@pytest.mark.parametrize("kind", NOISES)
def test_normal(kind):
    """Distribution, moments and tails of 2e6 numbers, each within 4.5 standard errors."""
    n = 2_000_000 if kind != "brownian" else 500_000
    z = draws(kind, n)
    assert stats.kstest(z, "norm").pvalue > 1e-4
    for power, mean in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        variance = np.prod(np.arange(1, 2 * power, 2), dtype=float) - mean ** 2
        assert abs((z ** power).mean() - mean) < 4.5 * (variance / n) ** 0.5, power
    for far in (2.0, 3.0, 4.0, 4.5):
        for tail in (z > far, z < -far):
            expected = n * stats.norm.sf(far)
            assert abs(tail.sum() - expected) < 4.5 * expected ** 0.5 + 1, far


def test_box_muller_is_accurate_to_the_ends():
    """Against numpy's functions, over random words and the ends of their range; the largest number it can give is 6.66."""
    words = torch.tensor(np.random.default_rng(0).integers(0, 2 ** 32, (2, 100_000)))
    ends = torch.tensor(list(itertools.product([0, 1, 2, 2 ** 29 - 1, 2 ** 29, 2 ** 30, 2 ** 31, 3 * 2 ** 29, 2 ** 32 - 2,
                                                2 ** 32 - 1], repeat=2))).T
    first, second = torch.cat((words, ends), 1)
    got = torch.stack(noise.box_muller(first, second)).numpy()
    u, v = (first.double().numpy() + 1) / 2 ** 32, (second.double().numpy() + 0.5) / 2 ** 32
    radius, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * v
    np.testing.assert_allclose(got, [radius * np.cos(angle), radius * np.sin(angle)], rtol=0, atol=1e-14)
    assert 6.6 < np.abs(got).max() < 6.67


@pytest.mark.parametrize("kind", NOISES)
def test_streams_are_independent(kind):
    n = 200_000
    base = draws(kind, n)
    others = [draws(kind, n, **change) for change in (
        {"seed": 2}, {"seed": 1 + 2 ** 32}, {"seed": -1}, {"image": 1}, {"sigma": 6.3}, {"sigma": 7.0000005})]
    others += [np.roll(base, shift) for shift in (1, 2, 3, 4)]
    # Nor related to the host's starting noise of the same seed.
    others.append(torch.randn(n, generator=torch.Generator().manual_seed(1)).numpy())
    for other in others:
        if kind == "brownian" and other is others[5]:
            continue            # nearly the same step of the same path: nearly the same noise
        for a, b in ((base, other), (base ** 2 - 1, other ** 2 - 1)):
            assert abs((a * b).mean()) < 5 * (a.std() * b.std()) / n ** 0.5


@pytest.mark.parametrize("kind", NOISES)
def test_alone_in_a_batch_and_in_a_split_of_it(kind):
    x = torch.zeros(5, 4, 8, 7)
    whole = make_noise(kind, x, 5)(2.5, 2.0)
    assert torch.equal(whole, make_noise(kind, x, 5)(torch.tensor(2.5), torch.tensor(2.0)))
    assert torch.equal(whole[:1], make_noise(kind, x[:1], 5)(2.5, 2.0))
    assert torch.equal(whole[2:4], make_noise(kind, x[2:4], 5, images=[2, 3])(2.5, 2.0))
    assert torch.equal(whole[[4, 1]], make_noise(kind, x[:2], 5, images=np.array([4, 1]))(2.5, 2.0))
    assert not torch.equal(whole, make_noise(kind, x, 5)(2.4, 2.0)) and not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("kind", NOISES)
def test_images_with_seeds_of_their_own(kind):
    x = torch.zeros(3, 6)
    several = make_noise(kind, x, [7, 2 ** 40, 7])(2.5, 2.0)
    for image, seed in enumerate([7, 2 ** 40, 7]):
        assert torch.equal(several[image], make_noise(kind, x[:1], seed)(2.5, 2.0)[0])


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("change", [
    lambda x: x.half(), lambda x: x.bfloat16(), lambda x: x.double(), lambda x: x.to(memory_format=torch.channels_last),
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.expand(2, 4, 6, 6)])
def test_every_dtype_and_memory_format_has_the_same_numbers(kind, change):
    x = change(torch.zeros(2, 4, 6, 6))
    want = make_noise(kind, torch.zeros(2, 4, 6, 6), 1)(3.0, 2.0)
    got = make_noise(kind, x, 1)(3.0, 2.0)
    assert got.dtype == x.dtype and torch.equal(got, want.to(x.dtype))


@pytest.mark.parametrize("kind", NOISES)
def test_the_order_of_the_draws_and_torchs_defaults_change_nothing(kind):
    x = torch.zeros(2, 5)
    steps = [(9.0, 7.0), (7.0, 3.0), (3.0, 2.5)]
    sampler = make_noise(kind, x, 1)
    want = [sampler(*step) for step in steps]
    state = torch.get_rng_state()
    again = make_noise(kind, x, 1)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")            # anything made without a device of its own would be empty
        got = [again(*step) for step in reversed(steps)][::-1]
        assert isinstance(make_noise(kind, x).seeds[0], int)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(default)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    torch.set_rng_state(state)
    make_noise(kind, x, 1)(2.0, 1.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("seed", [0, -1, 2 ** 63, 2 ** 64 - 1, 2 ** 70, np.int64(3), torch.tensor(3)])
def test_any_seed(kind, seed):
    z = make_noise(kind, torch.zeros(1, 3), seed)(2.0, 1.0)
    assert torch.isfinite(z).all() and torch.equal(z, make_noise(kind, torch.zeros(1, 3), int(seed))(2.0, 1.0))


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 1), (3,), (2, 3, 1, 5, 7), (1, 70_001)])
def test_any_shape(kind, shape):
    """Also one whose numbers are made in several pieces."""
    z = make_noise(kind, torch.zeros(shape), 1)(2.0, 1.37)
    assert z.shape == shape and torch.isfinite(z).all()
    if z.numel():
        first = make_noise(kind, torch.zeros(1, 1), 1)(2.0, 1.37)
        assert z.flatten()[0] == first[0, 0]


@pytest.mark.parametrize("kind", ["device", "brownian"])
def test_pieces_do_not_show(kind, monkeypatch):
    x = torch.zeros(3, 1000)
    want = make_noise(kind, x, 1)(2.0, 1.37)
    for most in (8, 600, 1500):
        monkeypatch.setattr(DeviceNoise, "_pieces", lambda self, *shape, most=most: pieces(*shape[:2], most))
        assert torch.equal(make_noise(kind, x, 1)(2.0, 1.37), want)


def pieces(images, count, most):
    for image in range(images):
        for start in range(0, count, most):
            yield slice(image, image + 1), start, min(most, count - start)


@pytest.mark.parametrize("change, error, words", [
    ({"name": "gaussian"}, ValueError, ["noise", "gaussian", "brownian"]),
    ({"name": 3}, TypeError, ["noise", "3"]),
    ({"seed": 1.5}, TypeError, ["seed", "1.5", "integer"]),
    ({"seed": "1"}, TypeError, ["seed", "'1'", "integer"]),
    ({"seed": True}, TypeError, ["seed", "True", "integer"]),
    ({"seed": [1]}, ValueError, ["seed", "2 images", "got 1"]),
    ({"seed": [1, None]}, TypeError, ["seed", "None", "integer"]),
    ({"images": [0, 1, 2]}, ValueError, ["images", "2 images", "got 3"]),
    ({"images": 3}, ValueError, ["images", "2 images"]),
])
def test_bad_input_is_named(change, error, words):
    with pytest.raises(error) as info:
        make_noise(**{"name": "cpu", "x": torch.zeros(2, 3), "seed": 1, **change})
    for word in words:
        assert word in str(info.value)


# Devices.

class Exact(TorchDispatchMode):
    """Notes the operations that are run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__.strip("_"))
        assert not {"alpha", "value"} & set(kwargs or {})       # a product and a sum in one may be contracted
        return func(*args, **(kwargs or {}))


def test_device_noise_is_made_by_exactly_rounded_operations_alone():
    with Exact() as mode:
        noise.normals([1, 2], [0, 1], [5], 9, 0, 100, torch.device("cpu"))
    arithmetic = {"add", "sub", "rsub", "mul", "div", "gt"}
    near = {"sqrt"}             # not everywhere, but put right, see `nearest_root`
    integer = {"bitwise_and", "bitwise_xor", "and", "xor", "rshift", "lshift", "arange"}
    moving = {"view", "reshape", "alias", "stack", "where", "to_copy", "full_like", "lift_fresh", "slice", "detach",
              "unsqueeze", "clone", "expand", "copy", "empty_strided", "fill"}
    assert mode.seen <= arithmetic | near | integer | moving, mode.seen - (arithmetic | near | integer | moving)


@pytest.mark.parametrize("kind", NOISES)
def test_a_device_that_does_not_agree_gets_the_cpus_numbers(kind, monkeypatch):
    """"meta" cannot even show its numbers; then one that computes them wrongly."""
    assert make_noise(kind, torch.zeros(2, 3, device="meta"), 1)(2.0, 1.0).shape == (2, 3)
    assert noise._proven(torch.device("meta")) == torch.device("cpu")
    if kind == "cpu":
        return
    real = noise.normals
    monkeypatch.setattr(noise, "normals", lambda *args: (
        real(*args[:-1], torch.device("cpu")) * (1 + 2 ** -52 * (args[-1].type != "cpu"))))
    assert noise._proven(torch.device("meta")) == torch.device("cpu")


def test_the_normals_are_the_processor_s_own():
    """The same formulas by numpy, whose sums, products, quotients and roots are IEEE's: the numbers of any device."""
    g = np.random.default_rng(0)
    first, second = (g.integers(0, 2 ** 32, 50000) for _ in range(2))
    first[:3] = 2 ** 32 - 1, 0, 1

    def horner(x, coefficients):
        out = np.full_like(x, coefficients[-1])
        for c in coefficients[-2::-1]:
            out = out * x
            out = out + c
        return out

    bits = ((first + 1).astype(np.float64) * 2.0 ** -32).view(np.int64)
    exponent = (bits - noise._SQRT_HALF_BITS) >> 52
    mantissa = (bits - (exponent << 52)).view(np.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    log = exponent.astype(np.float64) * math.log(2.0) + horner(s * s, noise._LOG) * (s * 2.0)
    radius = np.sqrt(log * -2.0)
    shifted = second + (1 << 29)
    quarter = (shifted >> 30) & 3
    angle = (((shifted & ((1 << 30) - 1)) - (1 << 29)).astype(np.float64) + 0.5) * (math.pi * 2.0 ** -31)
    sin, cos = horner(angle * angle, noise._SIN) * angle, horner(angle * angle, noise._COS)
    want = radius * np.choose(quarter, (cos, -sin, -cos, sin)), radius * np.choose(quarter, (sin, cos, -sin, -cos))
    for found, truth in zip(noise.box_muller(torch.from_numpy(first), torch.from_numpy(second)), want):
        assert np.array_equal(found.numpy(), truth)


@pytest.mark.parametrize("off", range(-3, 4))
def test_a_square_root_that_is_off_by_units_is_put_right(off):
    """As torch's is on some CPUs, see `nearest_root`; numpy's is the processor's own, and right."""
    g = torch.Generator().manual_seed(off + 3)
    x = torch.cat([torch.rand(20000, generator=g, dtype=torch.float64) * 50.0,
                   torch.tensor([1.0, 4.0, 2.0, 1e-9, 44.36, 0.0]),
                   torch.rand(2000, generator=g, dtype=torch.float64) * 1e-8])
    truth = torch.from_numpy(np.sqrt(x.numpy()))
    near = (truth.view(torch.int64) + off * (x > 0)).view(torch.float64)
    assert torch.equal(noise.nearest_root(x, near), truth)
    for value, root in zip(x[:300].tolist(), truth[:300].tolist()):
        # |root - sqrt(value)| <= ulp / 2: exactly, with fractions
        half = Fraction(math.ulp(root)) / 2
        assert (Fraction(root) - half) ** 2 <= Fraction(value) <= (Fraction(root) + half) ** 2


def test_no_root_of_zero_is_lost():
    zero = torch.tensor([0.0, -0.0], dtype=torch.float64)
    assert torch.equal(noise.nearest_root(zero, zero.sqrt()).view(torch.int64), zero.sqrt().view(torch.int64))


DEVICES = [name for name, there in (("cuda", torch.cuda.is_available()),
                                    ("xpu", hasattr(torch, "xpu") and torch.xpu.is_available()),
                                    ("mps", torch.backends.mps.is_available())) if there]


@pytest.mark.skipif(not DEVICES, reason="NO GPU HERE: that a GPU's noise is the CPU's, bit for bit, was not tested")
@pytest.mark.parametrize("kind", NOISES)
def test_a_gpu_has_the_same_numbers(kind):
    for name in DEVICES:
        x = torch.zeros(3, 4, 33, 31)
        for dtype in (torch.float32, torch.float16):
            on_gpu = make_noise(kind, x.to(name, dtype), 9)
            assert torch.equal(on_gpu(3.3, 2.9).cpu(), make_noise(kind, x.to(dtype), 9)(3.3, 2.9))
            assert kind == "cpu" or name == "mps" or on_gpu.made_on.type == name


# The Brownian path.

def vector(sampler, sigma, sigma_next):
    """z as {unit normal: weight}."""
    return dict(sampler.terms(step_key(sigma), step_key(sigma_next)))


def dot(a, b):
    return sum(weight * b.get(name, 0.0) for name, weight in a.items())


def step_noise(m, sigma, sigma_next):
    """sqrt(1 - rho^2) sigma_t and (sigma_t / sigma_s) rho of a step, as the solver has them."""
    process, scale = get_process(m["process"]), get_noise_scale(m["noise_scale"])
    log_g = scale.log_g(torch.tensor(process.lam(np.array([sigma, sigma_next]))))
    log_rho = m["eta"] * float(log_g[1] - log_g[0])
    return sigma_next * np.sqrt(-np.expm1(2 * log_rho)), sigma_next / sigma * np.exp(log_rho)


def float32s(low, high):
    return st.floats(low, high, width=32)


MEMBERS = st.builds(member, st.sampled_from(["ve", "flow"]), st.sampled_from(SCALES), st.sampled_from([0.1, 1.0, 2.0]))


@settings(max_examples=150, deadline=None)
@given(MEMBERS, st.lists(float32s(2.0 ** -14, 1.0), min_size=4, max_size=4, unique=True), st.sampled_from([1.0, 4096.0]))
def test_path_is_brownian_in_the_members_clock(m, sigmas, factor):
    """By the weights themselves: unit variance; steps apart are independent; two steps add the noise of the one."""
    a, b, c, d = sorted((s * (factor if m["process"] == "ve" else 1.0) for s in sigmas), reverse=True)
    sampler = make_noise("brownian", torch.zeros(1, 1), 1, **m)
    steps = {pair: (*step_noise(m, *pair), vector(sampler, *pair)) for pair in ((a, b), (b, c), (a, c), (c, d))}
    if not all(z and size > 1e-6 * pair[1] for pair, (size, _, z) in steps.items()):
        return                  # a step without noise worth the name: g is flat there, to rounding
    for _, _, z in steps.values():
        assert dot(z, z) == pytest.approx(1.0, abs=1e-12)
    for one, other in (((a, b), (b, c)), ((a, b), (c, d)), ((a, c), (c, d))):
        assert dot(steps[one][2], steps[other][2]) == pytest.approx(0.0, abs=1e-5)
    (first, _, z1), (second, keep, z2), (whole, _, z) = steps[a, b], steps[b, c], steps[a, c]
    for name in {*z, *z1, *z2}:
        parts = keep * first * z1.get(name, 0.0) + second * z2.get(name, 0.0)
        assert parts == pytest.approx(whole * z.get(name, 0.0), abs=1e-5 * whole)


def test_path_ends():
    """sigma = 1 of a flow model is on it; a step without noise, or off the tree, gets the independent noise."""
    x = torch.zeros(1, 8)
    flow = make_noise("brownian", x, 1, **member("flow", "sde"))
    assert dot(*[vector(flow, 1.0, 0.8)] * 2) == pytest.approx(1.0)
    ve = make_noise("brownian", x, 1, **member("ve", "sde"))
    ode = ve.of_member(get_process("ve"), get_noise_scale("ode"), 1.0)
    for sampler, step in ((ve, (2.0, 2.0)), (ve, (2.0 ** 33, 1.0)), (ve, (1.0, 2.0 ** -33)), (ve, (1.0, 0.0)),
                          (flow, (1.5, 1.0)), (ode, (2.0, 1.0))):
        assert torch.equal(sampler(*step), make_noise("device", x, 1)(step[0]))
    assert torch.equal(ve(2.0, 1.0), -ve(1.0, 2.0))


def test_path_changes_with_the_member_continuously():
    x = torch.zeros(1, 10_000)
    base = make_noise("brownian", x, 1, **member("ve", "sde", 1.0))(2.0, 1.5)
    near = make_noise("brownian", x, 1, **member("ve", "sde", 1.01))(2.0, 1.5)
    far = make_noise("brownian", x, 1, **member("ve", "sde_3", 1.0))(2.0, 1.5)
    assert rms(base, near) < 0.01 and 0.01 < rms(base, far) < 0.5


def test_path_of_a_users_noise_scale():
    """Also of one that is 0 to rounding at the small end of the tree."""
    for phi in (lambda lam: lam ** 1.5, lambda lam: lam * torch.exp(-1 / lam)):
        model = gaussian(0.0)
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 14.6
        few, many = (path_run(member("ve", phi), n, "brownian", model, x) for n in (3, 48))
        assert rms(few, many) < 1e-6


def path_run(m, n, kind, model, x):
    u = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    sigmas = 14.6 * (0.05 / 14.6) ** u if m["process"] == "ve" else 1.0 - 0.95 * u
    return ersde.sample_er_sde(model, x, sigmas, {"seed": 3}, disable=True, noise_sampler=kind, **m)


@pytest.mark.parametrize("process", ["ve", "flow"])
@pytest.mark.parametrize("scale", SCALES)
def test_more_steps_refine_the_same_picture(process, scale):
    """Data in one point, where every step is exact: the same picture in 3, 6 and 96 steps, to float32's rounding of z."""
    m = member(process, scale, 0.7)
    model = gaussian(0.0, 0.7, process=process)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * 14.6 if process == "ve" else x
    few, more, many = (path_run(m, n, "brownian", model, x) for n in (3, 6, 96))
    scale_of_noise = rms(few, path_run(m, 3, "device", model, x))
    for other in (more, many):
        assert rms(few, other) < 2e-6 * scale_of_noise + 1e-12
    assert rms(few, path_run(m, 6, "device", model, x)) > 0.1 * scale_of_noise


@pytest.mark.parametrize("process", ["ve", "flow"])
@pytest.mark.parametrize("scale", SCALES)
def test_runs_converge_strongly(process, scale):
    """Gaussian data: each doubling of the steps halves, or better, the distance to the next doubling."""
    m = member(process, scale)
    model = gaussian(0.5, 0.3, dim=16, process=process)
    x = model.start(32, 14.6 if process == "ve" else 1.0, torch.Generator().manual_seed(0))
    steps = (32, 64, 128, 256)
    runs = [path_run(m, n, "brownian", model, x) for n in steps]
    distance = [rms(a, b) for a, b in zip(runs, runs[1:])]
    order = -np.polyfit(np.log(steps[:-1]), np.log(distance), 1)[0]
    assert order > 0.9 and distance[-1] < 0.02
    assert rms(runs[0], path_run(m, 32, "device", model, x)) > 5 * distance[0]      # what independent noise has


def test_samplers_take_a_kind_by_name_and_tell_it_the_member():
    model, x, sigmas = gaussian(), torch.full((2, 4), 9.0), torch.tensor([10.0, 4.0, 1.0, 0.0])
    for kind, cls in (("cpu", SeededNoise), ("device", DeviceNoise), ("brownian", BrownianNoise)):
        by_name = ersde.sample_er_sde(model, x, sigmas, {"seed": 3}, disable=True, noise_sampler=kind)
        made = make_noise(kind, x, 3, sigmas)
        assert type(made) is cls
        assert torch.equal(by_name, ersde.sample_er_sde(model, x, sigmas, disable=True, noise_sampler=made))
        assert torch.equal(by_name, ersde.sample_er_sde_sde_5(model, x, sigmas, {"seed": 3}, disable=True,
                                                              noise_sampler=kind))
        assert (kind == "cpu") == torch.equal(by_name, ersde.sample_er_sde(model, x, sigmas, {"seed": 3}, disable=True))
    with pytest.raises(ValueError, match="noise must be one of cpu, device, brownian, got 'gpu'"):
        ersde.sample_er_sde(model, x, sigmas, disable=True, noise_sampler="gpu")
    with pytest.raises(TypeError, match="seed must be an integer"):
        ersde.sample_er_sde(model, x, sigmas, {"seed": 1.0}, disable=True)
