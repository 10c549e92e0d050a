"""A small classifier of the demo's pictures: features for distances between sets of pictures, and a judge of classes.

    python -m benchmarks.classifier [--steps N] [--device cpu] [--threads 1]

A residual network on the pictures of benchmarks/data.py, 32x32 to 128 features (the mean over the last 4x4 map, after
ReLU) to ten classes.  It is trained with the drawing of batches of data.py, on pictures with up to 10 % of noise so that
it looks at more than pixels, and writes float16 weights to benchmarks/weights/classifier.safetensors; the accuracy on the
held-out glyphs, mean over the classes, stands in the file's metadata.  It knows these ten classes of pictures, nothing else.
"""
from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
from pathlib import Path
from typing import List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ersde.demo.network import CLASSES, KEY

from . import data

Tensor = torch.Tensor

WEIGHTS = Path(__file__).resolve().parent / "weights" / "classifier.safetensors"
FORMAT = "ersde-classifier-1"
FEATURES = 128


class Block(nn.Module):
    """Residual block that halves the map: GroupNorm, ReLU, convolution, twice."""

    def __init__(self, inside: int, out: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inside), nn.GroupNorm(8, out)
        self.conv1 = nn.Conv2d(inside, out, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(inside, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return self.skip(F.avg_pool2d(x, 2)) + h


class Classifier(nn.Module):
    """Pictures of shape (batch, 3, 32, 32) in [-1, 1] to (features (batch, FEATURES), logits (batch, classes))."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.blocks = nn.Sequential(Block(24, 48), Block(48, 96), Block(96, FEATURES))
        self.norm = nn.GroupNorm(8, FEATURES)
        self.last = nn.Linear(FEATURES, len(CLASSES))

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        features = F.relu(self.norm(self.blocks(self.first(x)))).mean((2, 3))
        return features, self.last(F.dropout(features, 0.2, self.training))

    @torch.no_grad()
    def features(self, x: Tensor, batch: int = 256) -> Tensor:
        """Features of pictures on any device, in slices of `batch`; clamped to [-1, 1] as a saved picture is. float32."""
        weight = self.first.weight
        return torch.cat([self(some.to(weight).clamp(-1, 1))[0] for some in x.split(batch)])

    @torch.no_grad()
    def classes(self, x: Tensor, batch: int = 256) -> Tensor:
        """The likeliest class of each picture, int64."""
        weight = self.first.weight
        return torch.cat([self(some.to(weight).clamp(-1, 1))[1].argmax(1) for some in x.split(batch)])


def accuracy(model: Classifier, pictures: data.Pictures) -> float:
    """The share of pictures told right, mean over the classes."""
    right = (model.classes(pictures.plain()).cpu() == pictures.labels).float()
    return sum(right[pictures.labels == k].mean().item() for k in range(len(CLASSES))) / len(CLASSES)


def load_classifier(path: Path = WEIGHTS, device: str = "cpu") -> Classifier:
    """The trained classifier, float32, for evaluation.

    Raises:
        FileNotFoundError, ValueError: the file is not there, or is none of its kind; the text names it.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}: python -m benchmarks.classifier makes it")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "{}"))
            state = {name: file.get_tensor(name).float() for name in file.keys()}
        if about.get("format") != FORMAT or about["classes"] != list(CLASSES):
            raise ValueError(f"its metadata are not of format {FORMAT} and these classes")
        model = Classifier()
        model.load_state_dict(state)
    except (SafetensorError, OSError, AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no classifier that benchmarks/classifier.py wrote: "
                         f"{' '.join(str(error).split())[:200]}") from error
    return model.to(device).eval().requires_grad_(False)


def train(steps: int, device: str = "cpu", seed: int = 0, batch: int = 64) -> Classifier:
    """Train from nothing; returns the moving average of the weights."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pictures = data.load("train")
    model = Classifier().to(device).to(memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    with tqdm(range(steps), desc="classifier", unit="step", mininterval=2) as bar:
        for step in bar:
            x, labels = pictures.batch(batch, generator)
            x = x + 0.1 * torch.rand(batch, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            logits = model(x.to(device, memory_format=torch.channels_last))[1]
            loss = F.cross_entropy(logits, labels.to(device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            keep = min(0.99, (2 + step) / (11 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - keep)
            if step % 20 == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f}")
    return ema


def about(path: Path = WEIGHTS) -> dict:
    """What the file says of itself: format, classes, accuracy on the held-out glyphs, steps."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[KEY])


def main(arguments: Optional[List[str]] = None) -> int:
    from safetensors.torch import save

    parser = argparse.ArgumentParser(prog="python -m benchmarks.classifier", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        model = train(options.steps, options.device, options.seed)
        held, seen = accuracy(model, data.load("held")), accuracy(model, data.load("train"))
    except data.DataError as error:
        print(f"benchmarks.classifier: {error}", file=sys.stderr)
        return 2
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    part = WEIGHTS.with_name(WEIGHTS.name + ".part")
    said = {"format": FORMAT, "classes": CLASSES, "accuracy": round(held, 4), "steps": options.steps}
    part.write_bytes(save({name: value.to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()},
                          metadata={KEY: json.dumps(said)}))
    os.replace(part, WEIGHTS)
    parameters = sum(value.numel() for value in model.parameters())
    print(f"{parameters} parameters; accuracy, mean over the classes: held-out glyphs {held:.3f}, trained on {seen:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
