"""The command line, `python -m ersde`: pictures of the trained network, samplers beside each other, charts of a run."""
from __future__ import annotations

import argparse
import io
import json
import math
import os
import secrets
import sys
from pathlib import Path
from typing import List, Optional, Sequence

_SETTINGS = ("noise_scale", "eta", "s_noise", "order")      # options that change a preset


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


class _Wrong(Exception):
    """Something the person has to put right; its text is one line."""


def _whole(low: int, high: int):
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be between {low} and {high}, got {value}")
        return value
    return convert


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    top = _Parser(prog="python -m ersde", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="sample | compare | plot")

    def command(name: str, text: str, out: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        many = name == "compare"
        sub.add_argument("--model", default="ve", metavar="M",
                         help="ve or flow, the embedded models, or a .safetensors file that benchmarks/train.py wrote")
        sub.add_argument("--preset", nargs="+" if many else None, metavar="NAME", default=[
            "sde_5", "few_steps", "comfyui"] if many else "sde_5", help="a preset, built in or your own" + (
            ", or a sampler of k-diffusion: euler, euler_ancestral, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde; a row each"
            if many else ""))
        sub.add_argument("--steps", type=_whole(1, 1000), nargs="+" if many else None, metavar="N", default=[
            6, 10, 20] if many else 12, help="steps" + ("; a column each" if many else ""))
        # No defaults: what is not said is the preset's.
        said = {"default": argparse.SUPPRESS}
        sub.add_argument("--noise-scale", metavar="NAME", help="in place of the preset's: ode, sde, sde_1 ... sde_5", **said)
        sub.add_argument("--eta", type=_number, metavar="X", help="in place of the preset's: 0 is no noise", **said)
        sub.add_argument("--s-noise", type=_number, metavar="X", help="in place of the preset's", **said)
        sub.add_argument("--order", type=_whole(1, 5), metavar="K", help="in place of the preset's: 1 to 5", **said)
        if name != "plot":
            sub.add_argument("--cfg", type=_number, default=3.0, metavar="W", help="guidance scale")
            sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the first picture, and so on")
            sub.add_argument("--batch", type=_whole(1, 256), default=4 if many else 10, metavar="N", help="pictures")
            sub.add_argument("--label", metavar="CLASS", help="class of all pictures; else in turn")
        sub.add_argument("--out", type=Path, default=Path(out), metavar="FILE", help="the .png file to write")
        return sub

    command("sample", "draw pictures", "ersde_sample.png")
    command("compare", "draw the same pictures with several presets and numbers of steps", "ersde_compare.png")
    command("plot", "chart what a run does: noise scale, noise, weights and orders by step", "ersde_plot.png")
    return top


def _presets(names: Sequence[str], options: argparse.Namespace, process: str) -> list:
    """Each name's preset with the options' changes, or the name of one of k-diffusion's samplers."""
    from ersde.errors import check_choice
    from ersde.presets import all_presets

    from . import trained

    known, problems = all_presets()
    for problem in problems:
        print(f"ersde: {problem}", file=sys.stderr)
    changes = {field: getattr(options, field) for field in _SETTINGS if hasattr(options, field)}
    peers = [name for name in trained.samplers(process) if name in trained.PEERS] if options.command == "compare" else []
    out = []
    for name in names:
        check_choice("--preset", name, [*known, *peers])
        try:
            out.append(known[name].replace(**changes) if name in known else name)
        except (TypeError, ValueError) as error:
            raise _Wrong(f"--preset {name}: {error}") from error
    if peers and trained.k_diffusion() is None and set(names) & set(peers):
        raise _Wrong(f"--preset: {', '.join(sorted(set(names) & set(peers)))} is of k-diffusion, which this Python does not "
                     "have; `python install.py demo` brings it")
    return out


def _writable(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise _Wrong(f"--out must be a .png file, got {path}")
    folder = path.parent
    if path.is_dir() or not folder.is_dir():
        raise _Wrong(f"--out: {path} is a folder" if path.is_dir() else f"--out: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _Wrong(f"--out: no permission to write in {folder}")


def _write(image, path: Path, settings: dict) -> None:
    """The picture with its settings as a text chunk, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    info, data = PngInfo(), io.BytesIO()
    info.add_text("ersde", json.dumps(settings))
    image.save(data, "PNG", optimize=True, pnginfo=info)
    part = path.with_name(f".{path.name}-{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(data.getvalue())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _image(options: argparse.Namespace, model):
    """The picture of one command, and what it was made of."""
    from tqdm import tqdm

    from ersde import plot
    from ersde.presets import to_dict

    from . import pictures, trained
    from .network import CLASSES

    process = model.process
    names = options.preset if options.command == "compare" else [options.preset]
    made = _presets(names, options, process)
    steps = options.steps if options.command == "compare" else [options.steps]
    about = {"command": options.command, "model": options.model, "process": process, "steps": steps,
             "samplers": [one if isinstance(one, str) else {"name": one.name, **to_dict(one)} for one in made]}
    if options.command == "plot":
        preset, sigmas = made[0], trained.schedule(process, steps[0])
        start, end = trained.window(process, preset)
        etas = [preset.eta if start >= sigma > end else 0.0 for sigma in sigmas[:-1].tolist()]
        plan = plot.make_plot_plan(sigmas, process, preset.noise_scale, etas, preset.s_noise, preset.order, preset.corrector,
                                   preset.method)
        title = f"{preset.name}, {process}, {steps[0]} steps: {preset.noise_scale}, eta {preset.eta:g}, order {preset.order}"
        return plot.to_image(plot.plot_run(plan, process, preset.noise_scale, preset.eta, title)), about
    labels = trained.labels_of(options.batch, options.label)
    seeds = range(options.seed, options.seed + options.batch)
    about.update(cfg=options.cfg, seed=options.seed, batch=options.batch, labels=[
        label if isinstance(label, str) else CLASSES[label] for label in labels])
    with tqdm(total=len(made) * sum(steps), unit="call", disable=None) as bar:
        cells = [[trained.sample(model, one, n, seeds, labels, cfg=options.cfg, callback=lambda info: bar.update())
                  for n in steps] for one in made]
    across = next(n for n in range(1, options.batch + 1) if n * n >= options.batch)
    if options.command == "sample":
        return pictures.cell(cells[0][0], min(options.batch, max(across, 5)), 4), about
    return pictures.grid(cells, names, [str(n) for n in steps], "steps", 3, across), about


def main(arguments: Optional[List[str]] = None) -> int:
    """Run a command; returns the exit code: 0, or 2 for something the person has to put right."""
    options = parser().parse_args(arguments)
    say = lambda text: print(f"python -m ersde {options.command}: {' '.join(str(text).split())}", file=sys.stderr)
    try:
        _writable(options.out)
        import torch

        from .network import load_model

        torch.set_num_threads(1)        # the tensors are small: more threads cost more than they gain
        image, about = _image(options, load_model(options.model))
        _write(image, options.out, about)
    except ImportError as error:
        missing = f"needs {error.name}, which this Python does not have; `python install.py demo` brings it"
        say(missing if error.name else error)
        return 2
    except (_Wrong, ValueError, TypeError, FileNotFoundError, FloatingPointError) as error:
        say(error)
        return 2
    except OSError as error:
        say(f"cannot write {options.out}: {error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        say("stopped")
        return 130
    print(options.out)
    return 0
