"""Train the demo's denoisers, `ve` and `flow`, from nothing.

    python -m benchmarks.train [--models ve flow] [--steps N] [--flow-steps N] [--device cpu] [--threads 1] [--fresh]

Prepares the pictures if need be (benchmarks/data.py), trains `ve`, then `flow` from the weights of `ve` (the same map
from F to the estimate of x_0, see ersde/demo/network.py, so that it is a fine-tuning in flow's own frame and loss; with
--flow-from nothing it starts from random weights), and writes float16 weights with their model card to
ersde/demo/weights.

Loss: mean squared error of F under `ve` (EDM's weight: arXiv 2206.00364, table 1), of the velocity under `flow`.
Noise levels: log sigma ~ N(-0.7, 1.3) under `ve`, logit sigma ~ N(0, 1.2) under `flow`; one picture in sixteen gets its
level evenly over the whole range of c instead, so that the ends are learned too.  One label in seven is dropped, for
guidance.  Muon (https://kellerjordan.github.io/posts/muon) for the matrices and kernels inside, AdamW for the rest, warm-up,
cosine decay, an exponential moving average (EMA) of the weights, which is what is written.

On a GPU, where a step is recorded as a CUDA graph, the defaults take minutes (an H100, shared with another training: 165
seconds and 46); on a CPU core, which does some 120 pictures a second, hours: give fewer --steps and a smaller --batch there.
Equal seeds give equal weights on the CPU; a GPU draws other numbers, and may sum them in another order each time.

Every --every steps the state goes to build/train, from where the same command goes on after a stop, drawing the same
numbers as if it had not stopped; beside it a PNG with two pictures of each class and guidance 1 (above) and 3 (below).
"""
from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch

from ersde.demo.network import (
    CLASSES,
    LIMIT,
    NULL,
    PROCESSES,
    SIGMA_DATA,
    SIZE,
    WEIGHTS,
    Denoiser,
    Network,
    guided,
    load_model,
    save_model,
)

from . import data

Tensor = torch.Tensor

WORK = data.ROOT / "build" / "train"
SIGMAS = {"ve": (0.05, 0.2, 0.8, 3.2), "flow": (0.05, 0.2, 0.5, 0.8)}      # where losses are told

CARD = """# The demo's denoisers

Two class-conditional denoisers of 32x32 colour pictures, one network (ersde/demo/network.py) trained for the processes `ve`
and `flow`, written by `python -m benchmarks.train`.

| file | parameters | size | started from | trained on | peak rate | time | training loss at the end |
|---|---|---|---|---|---|---|---|
{rows}

The loss is the mean squared error of the network's output under `ve` (EDM's weight, pictures scaled by {scale:g}), of the
velocity under `flow`, over the noise levels that are trained on, averaged over the last hundred steps or so, before the
moving average of the weights that is stored.  The error of D itself, root mean square per value in [-1, 1], with the right
label and without guidance, of the stored files:

| process | sigma | 512 pictures it was trained on | held-out glyphs |
|---|---|---|---|
{tables}

**Data**: Noto Color Emoji by Google, from the npm package {package} {version}, prepared by benchmarks/data.py: 32x32
RGB on white, in the classes {classes}.
A tenth of the glyphs is held out.

A model that has learned its pictures by heart would be right on them alone: `ve` errs 5 to 18 % more on glyphs that it never
saw, `flow` 5 to 29 %, so that some of what it draws is close to one of the 1819 pictures.  Dropout (a tenth) holds that
back: half as many steps without it err as much more, and more in all (`ve` at sigma 0.8: 0.1395 and 0.1664).

**What to expect** of the weights in this repository (9600 steps of `ve`, 4800 of `flow`): pictures that show their class,
most of them one thing that can be named (a tram, an avocado, a bottle); animals and people are broken at times, and writing
cannot be read.  Guidance of 2 to 4 helps.  They are here to show what samplers do with a trained network at a few
milliseconds a picture and call, not to draw emoji.

**Licence**: the pictures are under the Apache License 2.0 (flags: public domain or not subject to copyright); the weights
are under this repository's licence, and pictures that resemble Noto Emoji stay under Google's.

**Files**: safetensors in float16, the moving average (0.999) of the weights; `load_model` runs them in float32.
"""


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal by five Newton-Schulz steps.

    Here 200 steps of it reached a loss of 0.42 where AdamW's reached 0.53 (the same network, mean over eight noise levels).
    Takes matrices and convolution kernels (one row for each output channel).  Jordan et al. 2024, see the docstring above;
    a step has the spectral norm lr sqrt(max(1, rows / columns)).
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @staticmethod
    def orthogonal(matrix: Tensor) -> Tensor:
        """The orthogonal polar factor of each matrix, roughly: singular values between about 0.7 and 1.2.

        matrix: shape (..., rows, columns).
        """
        wide = matrix.shape[-2] <= matrix.shape[-1]
        x = matrix if wide else matrix.mT
        x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
        for _ in range(5):
            square = x @ x.mT
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return x if wide else x.mT

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            values = group["params"]
            for value in values:
                if not self.state[value]:
                    self.state[value]["mean"] = torch.zeros_like(value)
            means, grads = [self.state[value]["mean"] for value in values], [value.grad for value in values]
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, means, group["momentum"])
            # Matrices of one shape as one: a GPU waits for the number of operations here, not for their size.
            alike: Dict[Tuple[int, int], List[int]] = {}
            for i, value in enumerate(values):
                alike.setdefault((len(value), value[0].numel()), []).append(i)
            steps: List[Optional[Tensor]] = [None] * len(values)
            for (rows, columns), places in alike.items():
                found = self.orthogonal(torch.stack([ahead[i].reshape(rows, columns) for i in places]))
                found = found * (max(1.0, rows / columns) ** 0.5)
                for i, one in zip(places, found):
                    steps[i] = one.reshape(values[i].shape)
            torch._foreach_mul_(values, 1 - group["decay"] * group["lr"])
            torch._foreach_add_(values, torch._foreach_mul(steps, -group["lr"]))


def optimizers(model: Denoiser, rate: float) -> list:
    """Muon for what is inside, AdamW for the first and last layer, the labels, norms and biases.

    Their rates are tensors on the model's device, so that a recorded step (see `Step`) can have another one each time.
    """
    inside, rest = [], []
    for name, value in model.network.named_parameters():
        (rest if value.ndim < 2 or name.split(".")[0] in ("first", "last", "label") else inside).append(value)
    device = _device(model)
    rates = [torch.tensor(value, device=device) for value in (rate, 0.3 * rate)]
    return [Muon(inside, rates[0]), torch.optim.AdamW(rest, lr=rates[1], betas=(0.9, 0.99), weight_decay=0.0,
                                                      capturable=device.type == "cuda")]


def levels(process: str, count: int, generator: torch.Generator) -> Tensor:
    """Noise levels to train at, shape (count,), float32, on the generator's device."""
    on = {"generator": generator, "device": generator.device}
    z, u, v = torch.randn(count, **on), *torch.rand(2, count, **on)
    anywhere = SIGMA_DATA * (LIMIT * (2 * u - 1)).exp()         # lambda, evenly over the range of c
    if process == "flow":
        return torch.where(v < 1 / 16, anywhere / (1 + anywhere), (1.2 * z).sigmoid())
    return torch.where(v < 1 / 16, anywhere, (1.3 * z - 0.7).exp())


def loss_of(model: Denoiser, x0: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """The training loss of each picture, shape (batch,)."""
    at = sigma[:, None, None, None]
    if model.process == "flow":
        error = model.velocity((1 - at) * x0 + at * noise, sigma, labels) - (noise - x0)
    else:
        # EDM's weight (sigma^2 + s^2) / (sigma s)^2 on the error of D
        error = (model(x0 + at * noise, sigma, labels) - x0) * ((at ** 2 + SIGMA_DATA ** 2).sqrt() / (at * SIGMA_DATA))
    return error.square().mean((1, 2, 3))


@torch.no_grad()
def errors(model: Denoiser, x0: Tensor, labels: Tensor, seed: int = 0) -> Dict[str, float]:
    """Root mean square error of D at SIGMAS over the pictures x0, the same noise for every model."""
    out = {}
    for sigma in SIGMAS[model.process]:
        generator = torch.Generator().manual_seed(seed)
        total = 0.0
        for some, some_labels in zip(x0.split(128), labels.split(128)):
            noise = torch.randn(some.shape, generator=generator)
            alpha = 1 - sigma if model.process == "flow" else 1.0
            clean, some_labels = some.to(_device(model)), some_labels.to(_device(model))
            noisy = (alpha * some + sigma * noise).to(clean)
            total += (model(noisy, torch.full((len(some),), sigma).to(clean), some_labels) - clean).square().sum().item()
        out[f"{sigma:g}"] = round(math.sqrt(total / x0.numel()), 4)
    return out


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def preview(model: Denoiser, path: Path, seed: int = 1) -> None:
    """Draw pictures with 12 Heun steps of the probability flow: rows of guidance 1 and 3."""
    from PIL import Image

    count = 2 * len(CLASSES)
    noise = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(_device(model))
    labels = torch.arange(len(CLASSES)).repeat_interleave(2)
    if model.process == "ve":
        sigmas = [*torch.linspace(30 ** (1 / 7), 0.02 ** (1 / 7), 12).pow(7).tolist(), 0.0]
    else:
        sigmas = [1 - i / 12 for i in range(12)] + [0.0]
        sigmas = [3 * t / (1 + 2 * t) for t in sigmas]
    rows = []
    for cfg in (1.0, 3.0):
        call = guided(model, labels, cfg)
        x = noise * sigmas[0]
        for now, then in zip(sigmas, sigmas[1:]):
            # dx / dsigma = (x - D) / sigma in both frames
            slope = (x - call(x, x.new_full((count,), now))) / now
            ahead = x + (then - now) * slope
            if then:
                slope = (slope + (ahead - call(ahead, x.new_full((count,), then))) / then) / 2
            x = x + (then - now) * slope
        for half in x.split(10):
            rows.append(torch.cat(list(half), -1))
    page = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(page).resize((page.shape[1] * 3, page.shape[0] * 3), Image.Resampling.NEAREST).save(path)


def _without_tensors(tree, tensors: Dict[str, Tensor]):
    """`tree` in JSON's terms, its tensors moved to `tensors` under the names that stand in their place."""
    if isinstance(tree, Tensor):
        name = f"{len(tensors):05d}"
        tensors[name] = tree.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": [[key, _without_tensors(value, tensors)] for key, value in tree.items()]}
    return [_without_tensors(value, tensors) for value in tree] if isinstance(tree, (list, tuple)) else tree


def _with_tensors(tree, tensors: Dict[str, Tensor]):
    if isinstance(tree, list):
        return [_with_tensors(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    return {key: _with_tensors(value, tensors) for key, value in tree["dict"]}


def save_state(state: dict, path: Path) -> None:
    """Write a training's state, tensors in any nesting, as safetensors, whole or not at all; tuples become lists."""
    from safetensors.torch import save

    tensors: Dict[str, Tensor] = {}
    tree = _without_tensors(state, tensors)
    part = path.with_suffix(".part")
    part.write_bytes(save(tensors, metadata={"state": json.dumps(tree)}))
    os.replace(part, path)


def load_state(path: Path) -> dict:
    """What `save_state` wrote; its tensors are on the CPU."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return _with_tensors(json.loads(file.metadata()["state"]), {name: file.get_tensor(name) for name in file.keys()})


class Step:
    """One step of training: a batch is drawn, the weights and their moving average move.

    It is two thousand small operations, which Python starts more slowly than a GPU does them.  So on a GPU the fourth
    step is recorded as a CUDA graph, and that one and all after it play the record.

    Args:
        rate: the factor of the optimizers' rates, and keep: that of the average before, both set before each call.
    """

    RECORD = 3          # steps that are made before, so that all that is made once is there

    def __init__(self, model: Denoiser, ema: Denoiser, pictures: data.Pictures, both: list, batch: int,
                 generator: torch.Generator, record: bool = True):
        self.model, self.ema, self.pictures, self.both = model, ema, pictures, both
        self.batch, self.generator, self.device = batch, generator, _device(model)
        self.peaks = [[group["lr"].clone() for group in optimizer.param_groups] for optimizer in both]
        self.rate, self.keep, self.loss = (torch.zeros((), device=self.device) for _ in range(3))
        self.seen, self.graph = 0, None
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" and record else None

    def __call__(self, rate: float, keep: float) -> Tensor:
        """The loss, which the next call writes over."""
        self.rate.fill_(rate)
        self.keep.fill_(keep)
        if self.stream is None:
            self._make()
            return self.loss
        with torch.cuda.stream(self.stream):
            self.stream.wait_stream(torch.cuda.default_stream())
            if self.seen < self.RECORD:
                self._make()
            else:
                if self.graph is None:
                    self.graph = torch.cuda.CUDAGraph()
                    self.graph.register_generator_state(self.generator)
                    with torch.cuda.graph(self.graph, stream=self.stream):
                        self._make()
                self.graph.replay()
        torch.cuda.default_stream().wait_stream(self.stream)
        self.seen += 1
        return self.loss

    def _make(self) -> None:
        model, generator, on = self.model, self.generator, {"generator": self.generator, "device": self.device}
        x0, labels = self.pictures.batch(self.batch, generator)
        labels = torch.where(torch.rand(self.batch, **on) < 1 / 7, NULL, labels)
        sigma = levels(model.process, self.batch, generator)
        noise = torch.randn(x0.shape, **on)
        model.zero_grad()
        loss = loss_of(model, x0.to(memory_format=torch.channels_last), labels, sigma, noise).mean()
        loss.backward()
        for optimizer, peaks in zip(self.both, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                torch.mul(peak, self.rate, out=group["lr"])
            optimizer.step()
        with torch.no_grad():
            average = list(self.ema.parameters())
            torch._foreach_mul_(average, self.keep)
            torch._foreach_add_(average, torch._foreach_mul(list(model.parameters()), 1 - self.keep))
            self.loss.copy_(loss)


def train(process: str, options: argparse.Namespace, start: Optional[Path] = None) -> dict:
    """Train one process, or take up its training; returns its record for the model card."""
    from tqdm import tqdm

    steps = options.flow_steps if process == "flow" else options.steps
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    model = Denoiser(process, Network(dropout=options.dropout)).to(device).to(memory_format=torch.channels_last)
    if start is not None:
        if not start.is_file():
            raise data.DataError(f"flow starts from ve, and there is no {start}: train ve first, or --flow-from nothing")
        held = load_state(start)
        if held["done"] < held["setting"]["steps"]:
            raise data.DataError(f"flow starts from ve, and {start} is not finished: train ve to its end first")
        model.network.load_state_dict(held["ema"])
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    rate = options.rate / 2 if start is not None else options.rate
    both = optimizers(model, rate)
    generator = torch.Generator(device).manual_seed(options.seed)
    done, spent, mean_loss = 0, 0.0, None
    state = options.work / f"{process}_state.safetensors"
    setting = {"process": process, "steps": steps, "batch": options.batch, "rate": rate, "seed": options.seed,
               "dropout": options.dropout, "device": device.type,
               "start": "the weights of ve" if start else "random weights"}
    if state.is_file() and not options.fresh:
        held = load_state(state)
        if held["setting"] != setting:
            raise data.DataError(f"{state} is of another training ({held['setting']}): --fresh starts over")
        model.network.load_state_dict(held["model"])
        ema.network.load_state_dict(held["ema"])
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in both]
        for optimizer, its, own in zip(both, held["optimizers"], rates):
            optimizer.load_state_dict(its)
            for group, lr in zip(optimizer.param_groups, own):
                group["lr"] = lr
        generator.set_state(held["generator"])
        done, spent, mean_loss = held["done"], held["seconds"], held["loss"].to(device)
    pictures = data.load("train").to(device)
    step = Step(model, ema, pictures, both, options.batch, generator, not options.eager)
    begin = time.monotonic() - spent

    def keep() -> None:
        nonlocal spent
        spent = time.monotonic() - begin
        save_state({"setting": setting, "model": model.network.state_dict(), "ema": ema.network.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in both],
                    "generator": generator.get_state(), "done": done, "seconds": spent, "loss": mean_loss}, state)
        save_model(ema, options.work / f"{process}_latest.safetensors", steps=str(done))
        preview(ema, options.work / f"{process}_{done:06d}.png")

    with tqdm(total=steps, initial=done, desc=process, unit="step", mininterval=2) as bar:
        while done < steps:
            if options.dropout:         # what it leaves out depends on the step alone, so that a stop changes nothing
                torch.manual_seed((options.seed << 32) + done)
            now = min((done + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * done / steps))
            loss = step(now, min(0.999, (2 + done) / (11 + done)))
            done += 1
            # Stays on the device: to read it at every step would be to wait for every step.
            mean_loss = loss.clone() if mean_loss is None else mean_loss.lerp(loss, 0.01)
            bar.update()
            if done % 50 == 0:
                bar.set_postfix_str(f"loss {mean_loss.item():.4f}")
            if done % options.every == 0 or done == steps:
                keep()

    path = options.weights / f"{process}.safetensors"
    save_model(ema, path, steps=str(steps), data=f"Noto Color Emoji ({data.PACKAGE} {data.VERSION}), Apache-2.0")
    told = load_model(path, device)             # what is told is of the file, rounded to float16
    seen, held_out = data.load("train"), data.load("held")
    some = torch.randperm(len(seen.labels), generator=torch.Generator().manual_seed(0))[:512]
    cores = "one CPU core" if options.threads == 1 else f"{options.threads} CPU cores"
    record = {**setting, "seconds": round(spent), "machine": cores if device.type == "cpu" else "one GPU",
              "loss": round(mean_loss.item(), 4), "parameters": sum(value.numel() for value in model.parameters()),
              "bytes": path.stat().st_size, "torch": torch.__version__.split("+")[0],
              "train": errors(told, seen.plain()[some], seen.labels[some]),
              "held": errors(told, held_out.plain(), held_out.labels)}
    # Beside the weights, so that a card can be written of two models that were not trained in one run.
    (options.weights / f"{process}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def card(weights: Path) -> None:
    """Write the folder's README.md from the records of what lies there."""
    rows, tables = [], []
    for process in PROCESSES:
        file = weights / f"{process}.json"
        if not file.is_file():
            continue
        one = json.loads(file.read_text(encoding="utf-8"))
        rows.append(f"| `{process}.safetensors` | {one['parameters']:,} | {one['bytes'] / 1e6:.1f} MB | {one['start']} | "
                    f"{one['steps']} x {one['batch']} pictures | {one['rate']:g} | {one['seconds'] / 60:.0f} min on "
                    f"{one['machine']} | {one['loss']:.4f} |")
        tables += [f"| `{process}` | {sigma} | {one['train'][sigma]:.4f} | {one['held'][sigma]:.4f} |"
                   for sigma in one["train"]]
    text = CARD.format(rows="\n".join(rows), tables="\n".join(tables), package=data.PACKAGE, version=data.VERSION,
                       classes=", ".join(CLASSES), scale=SIGMA_DATA)
    part = weights / "README.md.part"
    part.write_text(text, encoding="utf-8")
    os.replace(part, weights / "README.md")


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=("ve", "flow"), default=["ve", "flow"])
    parser.add_argument("--steps", type=int, default=9600, help="of ve (default: 9600)")
    parser.add_argument("--flow-steps", type=int, default=4800, help="of flow (default: 4800)")
    parser.add_argument("--flow-from", choices=("ve", "nothing"), default="ve")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=0.012,
                        help="peak learning rate of Muon, 0.3 of it of AdamW; half of it where flow starts from ve")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the state and the previews")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the finished weights and their card")
    parser.add_argument("--every", type=int, default=400, help="steps between two states on disk")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="on a GPU: start each operation anew, record no CUDA graph")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU; small tensors gain little from more")
    parser.add_argument("--fresh", action="store_true", help="start over, even where build/train holds a state")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        for process in options.models:
            from_ve = process == "flow" and options.flow_from == "ve"
            train(process, options, options.work / "ve_state.safetensors" if from_ve else None)
            card(options.weights)
    except data.DataError as error:
        print(f"benchmarks.train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.train: stopped; the same command goes on from the last state", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
