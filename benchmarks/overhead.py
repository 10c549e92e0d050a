"""What a sampler costs outside the model: torch operations, device read-backs and time per step, ours beside k-diffusion's.

    python -m benchmarks.overhead [--steps 20] [--shape 1 4 64 64] [--repeats 100] [--json FILE] [--device cuda [--busy MS]]

The model and the noise return tensors made beforehand, so every operation counted is the sampler's own.  Operations are
the outermost aten calls that the torch profiler sees in a whole run, over its steps; a read-back is a call that brings a
number from the device to Python (item, a branch on a tensor; not numpy's look at the CPU's own memory, for which nothing is
waited for, and which has two operations that do nothing).  Times are medians over the repeats, which take the samplers
in turns, with the 95 % interval of the median by bootstrap; the ratios are what to read on a machine with other work.

Every repeat is two runs over a schedule that no repeat before had: the first makes what depends on the schedule, the second,
as the next picture's, finds it made.  Set-up, until the first model call, is given of both, all else of the second.  The
whole run is everything outside the model, set-up included, over the steps.

Memory is the most that a run holds beside the x that it was given, in tensors of x's size, with all that passes between the
model calls, and D and z, which the model and the noise make anew at every call.

On a GPU a run ends when the device has done all of it.  With --busy the model keeps the device busy for MS milliseconds a
call, as a real one does, and the time of a step is what it takes beyond that: what a picture waits for its sampler.

With a ComfyUI's folder in COMFYUI_PATH its own `sample_er_sde` is a row too; that wants the Python that runs it.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import time
import weakref
from types import SimpleNamespace
from typing import Callable, Dict, Tuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ersde
from ersde.noise_scale import get_noise_scale
from ersde.process import get_process
from ersde.weights import known_plan


class Canned:
    """A model that does nothing: it returns tensors made beforehand, one after the other.

    Args:
        busy: clock cycles of the GPU that a call takes.
        fresh: copies of the tensors, for the memory.
    """

    def __init__(self, x: torch.Tensor, steps: int, busy: int = 0, fresh: bool = False):
        self.busy, self.fresh = busy, fresh
        self.out = [torch.randn_like(x) for _ in range(2 * steps + 2)]
        self.noise = [torch.randn_like(x) for _ in range(2 * steps + 2)]
        # What ComfyUI's samplers ask a model for; a model_sampling that is none of its classes is ve.
        self.inner_model = SimpleNamespace(model_patcher=SimpleNamespace(get_model_object=lambda name: None))
        self.reset()

    def reset(self) -> None:
        self.at = self.drawn = 0
        self.first = 0.0

    def __call__(self, x, sigma, **_):
        if not self.at:
            self.first = time.perf_counter()
        self.at += 1
        if self.busy:
            torch.cuda._sleep(self.busy)
        return self._given(self.out[self.at - 1])

    def draw(self, sigma, sigma_next):
        self.drawn += 1
        return self._given(self.noise[self.drawn - 1])

    def _given(self, value):
        return value.clone() if self.fresh else value


def _comfyui(folder: str, device: str) -> Callable:
    """The host's own function, from its folder."""
    arguments, path = sys.argv, list(sys.path)
    sys.path.insert(0, folder)
    sys.argv = [*arguments[:1], *(["--cpu"] if device == "cpu" else [])]        # it reads its command line when imported
    try:
        import comfy.options
        comfy.options.enable_args_parsing()
        from comfy.k_diffusion.sampling import sample_er_sde
    finally:
        sys.argv, sys.path[:] = arguments, path
    return lambda model, x, sigmas, noise: sample_er_sde(model, x, sigmas, disable=True, noise_sampler=noise)


def bare(model, x, sigmas, noise) -> torch.Tensor:
    """The result of `exact` with order 1 in the three operations that its formula a x + b D + c z has, and nothing else: no
    check, no history, no measurement.  No step with noise takes less.
    """
    values = sigmas.double().cpu().numpy()
    plan = known_plan(values, get_process("ve"), get_noise_scale("sde_5"), np.ones(len(values) - 1), 1.0, 1, False, "exact",
                      torch.finfo(x.dtype).eps)
    each = sigmas[:, None].repeat(1, x.shape[0]).unbind()
    for sigma, step in zip(each, plan.steps):
        denoised = model(x, sigma)
        if step.last:
            return denoised
        x = torch.mul(x, step.x_scale).add_(denoised, alpha=step.denoised).add_(noise(None, None), alpha=step.noise)
    return x


def samplers(device: str = "cpu") -> Dict[str, Callable]:
    """Name -> function(model, x, sigmas, noise_sampler): ours by method, and the peers that are installed."""
    def ours(**kw):
        return lambda model, x, sigmas, noise: ersde.sample_er_sde(model, x, sigmas, disable=True, process="ve",
                                                                   noise_sampler=noise, **kw)

    def guided(model, x, sigmas, noise):
        return ersde.sample_preset(model, x, sigmas, "sde_5", disable=True, process="ve", noise_sampler=noise,
                                   excess=lambda: model.out[0] - model.out[1])

    found = {"ersde exact": ours(), "ersde exact, ODE": ours(eta=0.0), "ersde exact, no corrector": ours(corrector=False),
             "ersde exact, told the guidance": guided,
             "ersde exact, order 5": ours(order=5), "ersde exact, order 1": ours(order=1, corrector=False),
             "ersde comfyui": ours(method="comfyui"), "order 1, nothing checked": bare}
    if os.environ.get("COMFYUI_PATH"):
        found["ComfyUI er_sde"] = _comfyui(os.environ["COMFYUI_PATH"], device)
    try:
        from k_diffusion import sampling
    except ImportError:
        print("k_diffusion is not installed: no peers (python install.py test installs it)")
        return found
    for name, noisy in (("euler", False), ("euler_ancestral", True), ("dpmpp_2m", False), ("dpmpp_2m_sde", True),
                        ("dpmpp_3m_sde", True), ("lms", False)):
        function = getattr(sampling, f"sample_{name}")
        found[f"k-diffusion {name}"] = (
            lambda model, x, sigmas, noise, f=function, noisy=noisy:
            f(model, x, sigmas, disable=True, **({"noise_sampler": noise} if noisy else {})))
    return found


def count(function: Callable, model: Canned, x: torch.Tensor, sigmas: torch.Tensor) -> Dict[str, float]:
    """Outermost operations and read-backs of one run, per step."""
    steps = len(sigmas) - 1
    model.reset()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function(model, x, sigmas, model.draw)
    events = profiler.events()
    outer = [e for e in events if e.name.startswith("aten::") and (
        e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::"))]
    backs = [e for e in events if e.name == "aten::_local_scalar_dense"] + [e for e in outer if e.name == "aten::equal"]
    return {"operations": len(outer) / steps, "read_backs": len(backs) / steps}


def timed(function: Callable, model: Canned, x: torch.Tensor, sigmas: torch.Tensor) -> Tuple[float, float]:
    """Seconds of one run before the first model call and after it, until the device has done its work."""
    wait = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    model.reset()
    wait()
    start = time.perf_counter()
    function(model, x, sigmas, model.draw)
    wait()
    return model.first - start, time.perf_counter() - model.first


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make and that are still there; `most` is the peak."""

    def __init__(self):
        super().__init__()
        self.bytes: Dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.bytes:
                    self.bytes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.bytes.pop(key)


def memory(function: Callable, x: torch.Tensor, sigmas: torch.Tensor) -> float:
    """The most memory that a run takes beside x, D and z among it, in tensors of x's size: the allocator's peak on a GPU."""
    model = Canned(x, len(sigmas) - 1, fresh=True)
    function(model, x, sigmas, model.draw)
    model.reset()
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(model, x, sigmas, model.draw)
        most = torch.cuda.max_memory_allocated() - before
    else:
        with Held() as held:
            function(model, x, sigmas, model.draw)
        most = held.most
    return most / (x.numel() * x.element_size())


def cycles(milliseconds: float) -> int:
    """So many of the GPU's clock cycles."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):                  # the first time it has its clock to raise
        start.record()
        torch.cuda._sleep(50_000_000)
        end.record()
        end.synchronize()
    return int(50_000_000 / start.elapsed_time(end) * milliseconds)


def measure(steps: int = 20, shape=(1, 4, 64, 64), repeats: int = 100, device: str = "cpu",
            busy: float = 0.0) -> Dict[str, Dict[str, float]]:
    """Operations, read-backs and times of every sampler, in one run, turn by turn; the ratios are to the first."""
    x = torch.randn(shape, device=device)
    sigmas = torch.cat([torch.logspace(1.1, -1.5, steps), torch.zeros(1)]).to(device)
    model = Canned(x, steps, cycles(busy) if busy else 0)
    found = samplers(device)
    rows = {}
    for name, function in found.items():
        timed(function, model, x, sigmas)
        rows[name] = {**count(function, model, x, sigmas), "memory": memory(function, x, sigmas)}
    times = {name: [] for name in found}
    for i in range(1, repeats + 1):
        new = sigmas * (1.0 + 1e-5 * i)
        # The model's own time: calls alone, no sampler.
        alone = timed(lambda model, x, sigmas, noise: [model(x, sigma) for sigma in sigmas[:-1]],
                      model, x, new)[1] if busy else 0.0
        for name, function in found.items():
            (first, _), (again, after) = (timed(function, model, x, new) for _ in range(2))
            after -= alone
            times[name].append((first * 1e3, again * 1e3, after / steps * 1e6, (again + after) / steps * 1e6))
    rng = np.random.default_rng(0)
    for name, row in rows.items():
        first, again, step, whole = np.array(times[name]).T
        row.update(new_setup_ms=float(np.median(first)), setup_ms=float(np.median(again)))
        for key, values in (("step", step), ("whole", whole)):
            medians = np.median(rng.choice(values, (1000, len(values))), axis=1)
            row[key] = {"microseconds": float(np.median(values)), "low": float(np.quantile(medians, 0.025)),
                        "high": float(np.quantile(medians, 0.975))}
    base = next(iter(rows.values()))
    for row in rows.values():
        for key, ratio in (("step", "ratio"), ("whole", "whole_ratio")):
            row[ratio] = row[key]["microseconds"] / base[key]["microseconds"]
    return rows


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shape", type=int, nargs="+", default=[1, 4, 64, 64])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--busy", type=float, default=0.0, metavar="MS", help="of the model's call, on a GPU")
    args = parser.parse_args(argv)
    gpu = args.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.busy < 0 or args.busy and not gpu:
        parser.error("--busy is a time above 0, and for --device cuda alone")
    torch.set_num_threads(1)
    rows = measure(args.steps, args.shape, args.repeats, args.device, args.busy)
    where = torch.cuda.get_device_name() if gpu else "CPU, 1 thread"
    print(f"{args.steps} steps, x of shape {tuple(args.shape)}, float32, {where}, torch {torch.__version__}, "
          f"{args.repeats} repeats in turns" + (f", a model of {args.busy:g} ms, which the times are without" if args.busy
                                               else "") + "\n")
    print("| sampler | operations per step | read-backs per step | set-up, ms: new schedule | the same again | "
          "microseconds per step after it (95 %) | ratio | whole run, microseconds per step (95 %) | ratio | "
          "memory, in tensors |\n" + "|---" * 10 + "|")
    for name, row in rows.items():
        step, whole = ("{microseconds:.0f} ({low:.0f} to {high:.0f})".format(**row[key]) for key in ("step", "whole"))
        print(f"| {name} | {row['operations']:.1f} | {row['read_backs']:.2f} | {row['new_setup_ms']:.2f} | "
              f"{row['setup_ms']:.2f} | {step} | {row['ratio']:.2f} | {whole} | {row['whole_ratio']:.2f} | "
              f"{row['memory']:.1f} |")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"steps": args.steps, "shape": args.shape, "repeats": args.repeats, "torch": torch.__version__,
                       "device": where, "busy": args.busy, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
