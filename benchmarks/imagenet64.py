"""The paper's headline setting: FID on ImageNet 64x64 with EDM's pretrained network, ours beside `paper`.

    torchrun --standalone --nproc_per_node 8 -m benchmarks.imagenet64 --edm FOLDER --network FILE --reference FILE
        [--detector FILE] [--calls 10 20 30 50] [--count 50000] [--filter REGEX] [--batch 64] [--out DIR]

FOLDER is a clone of https://github.com/NVlabs/edm with its requirements installed (click, requests, scipy).  From
https://nvlabs-fi-cdn.nvidia.com/edm come the network, pretrained/edm-imagenet-64x64-cond-adm.pkl, and the reference
statistics, fid-refs/imagenet-64x64.npz; without --detector EDM's code fetches the feature network (inception-2015-12-05.pkl)
by itself.  Those files, not in this repository, are under NVIDIA's CC BY-NC-SA 4.0.

What is the paper's (Cui et al., arXiv 2309.06169): its schedule (rho 7, sigma 80 to 0.002, then 0), a step for each model
call, 50,000 images of random classes; it reports 3.45 at 20 calls and 2.24 at 50.  What is EDM's, run as it is: seeds 0 to
49999, each with its own generator for class, start and noise, so that any number of processes makes the same images; the
images as 8-bit PNGs; the features and the distance.  Ours is the sampler alone: EDM's generate.py is started with its
`edm_sampler` replaced, and its process group made beforehand, with gloo where there is no GPU.

**Pickles.**  The network and the feature network are pickles, which run what is in them when they are read.  This file reads
none: EDM's generate.py and fid.py do, from the files that you name.  Take them from NVIDIA alone.

DIR (shared by all machines) gets the images, a line of JSON per finished cell, and imagenet64.md; a run takes up where the
last one stopped, image by image.  Whatever is not the setting above, such as another network, fewer images or images of
another size, is said at the top of the table.
"""
from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
from pathlib import Path
from typing import Dict, List, Optional

import torch
import torch.distributed as dist

from ersde.demo.mixture import karras

from . import quality

CALLS = (10, 20, 30, 50)
SHOWN = r"^(ours|paper) sde_5$|^ours few_steps$"
COUNT, SIZE, CLASSES, PARAMETERS = 50000, 64, 1000, 295_899_267     # of the paper's setting; EDM's ADM network
DETECTOR = "inception-2015-12-05.pkl"


class Edm:
    """EDM's modules from a folder, in this process's group.

    Args:
        folder: a clone of NVlabs/edm.
        detector: the feature network's file, in place of its address; None: EDM fetches it.

    Raises:
        ValueError: the folder is something else, or its requirements are missing; says what.
    """

    def __init__(self, folder: Path, detector: Optional[Path] = None):
        for name in ("generate.py", "fid.py", "dnnlib", "torch_utils", "training"):
            if not (folder / name).exists():
                raise ValueError(f"--edm: {folder} is no clone of NVlabs/edm: it has no {name}")
        sys.path.insert(0, str(folder.resolve()))
        try:
            self.generate, self.fid = importlib.import_module("generate"), importlib.import_module("fid")
            shared = importlib.import_module("torch_utils.distributed")
        except ImportError as error:
            raise ValueError(f"--edm: EDM's code needs {error.name}, which this Python does not have") from error
        # Its last line of all would fail, after all images.
        if "disp" not in inspect.signature(self.fid.scipy.linalg.sqrtm).parameters:
            raise ValueError(f"--edm: EDM's fid.py asks scipy's sqrtm for disp, which scipy {self.fid.scipy.__version__} "
                             f"does not have any more: install scipy 1.17 or older")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not dist.is_initialized():
            for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500"), ("RANK", "0"), ("LOCAL_RANK", "0"),
                                ("WORLD_SIZE", "1")):
                os.environ.setdefault(name, value)
            # The first process looks through the images alone.
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=6))
        if self.device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        shared.init = lambda: None          # the group is there
        if detector is not None:
            opened = self.fid.dnnlib.util.open_url
            self.fid.dnnlib.util.open_url = lambda url, **options: opened(
                str(detector) if str(url).endswith(DETECTOR) else url, **options)

    def draw(self, sampler, network: Path, seeds: List[int], folder: Path, batch: int) -> None:
        """EDM's generate.py with `sampler(net, latents, class_labels, randn_like)` in place of its own."""
        before = self.generate.edm_sampler
        self.generate.edm_sampler = sampler
        try:
            self.generate.main.callback(network_pkl=str(network), outdir=str(folder), subdirs=True, seeds=seeds,
                                        class_idx=None, max_batch_size=batch, device=self.device)
        finally:
            self.generate.edm_sampler = before

    def distance(self, folder: Path, reference: Dict[str, object], count: int, batch: int, workers: int) -> float:
        """EDM's FID of the images in a folder."""
        mean, covariance = self.fid.calculate_inception_stats(str(folder), count, max_batch_size=batch, num_workers=workers,
                                                              device=self.device)
        return self.fid.calculate_fid_from_inception_stats(mean, covariance, reference["mu"], reference["sigma"])


class Model:
    """EDM's network as a sampler's model: (x, sigma of shape (batch,)) -> D in float64."""

    process = "ve"

    def __init__(self, net, labels):
        self.net, self.labels, self.calls = net, labels, 0

    def __call__(self, x, sigma, **_):
        self.calls += 1
        return self.net(x, sigma, self.labels).to(torch.float64)


def edm_sampler(method: quality.Method, calls: int, seen: dict):
    """`method` with `calls` model calls as EDM's generate.py calls a sampler; `seen` gets what the network is."""
    def sample(net, latents, class_labels=None, randn_like=torch.randn_like, **_):
        sigma_min, sigma_max = max(0.002, net.sigma_min), min(80.0, net.sigma_max)
        steps = karras(method.steps(calls), sigma_max, sigma_min)
        sigmas = torch.cat([net.round_sigma(steps[:-1].to(latents.device)), steps[-1:].to(latents.device)])
        model = Model(net, class_labels)
        x = latents.to(torch.float64) * sigmas[0]
        out = method.run(model, x, sigmas, lambda sigma, sigma_next: randn_like(x), lambda preset: (float("inf"), 0.0))
        if model.calls != calls:
            raise RuntimeError(f"{method.name} made {model.calls} model calls, not {calls}")
        seen.update({"class": type(net).__name__, "size": net.img_resolution, "classes": net.label_dim,
                     "parameters": sum(value.numel() for value in net.parameters())})
        return out

    return sample


def missing(folder: Path, count: int) -> List[int]:
    """The seeds whose image is not there, or was cut off, as the first process sees it."""
    from PIL import Image

    found: List[Optional[List[int]]] = [None]
    if dist.get_rank() == 0:
        found[0] = []
        for seed in range(count):
            path = folder / f"{seed - seed % 1000:06d}" / f"{seed:06d}.png"
            try:
                with Image.open(path) as image:
                    image.load()
            except OSError:
                found[0].append(seed)
    dist.broadcast_object_list(found)
    return found[0]


@functools.lru_cache(None)
def digest(path: Path) -> str:
    """Of a file's bytes."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 24):
            found.update(part)
    return found.hexdigest()[:16]


def table(rows: List[dict]) -> str:
    """The Markdown of all rows, headed by what is not the paper's setting."""
    apart = set()
    for row in rows:
        net = row["network"]
        apart |= {text for wrong, text in (
            (row["count"] != COUNT, f"{row['count']} images, not {COUNT}"),
            (net["size"] != SIZE or net["classes"] != CLASSES, f"images of {net['size']}x{net['size']} in {net['classes']} "
                                                               f"classes, not ImageNet's {SIZE}x{SIZE} in {CLASSES}"),
            (net["parameters"] != PARAMETERS, f"a network of {net['parameters']:,} parameters, not EDM's of {PARAMETERS:,}"),
        ) if wrong}
    lines = ["# ImageNet 64x64 with EDM's network", "", "`python -m benchmarks.imagenet64`, whose docstring says how.", ""]
    if apart:
        lines += [f"**Not the paper's setting: {'; '.join(sorted(apart))}. These numbers show that the benchmark runs, and "
                  "nothing about a sampler.**", ""]
    calls = sorted({row["calls"] for row in rows})
    lines += ["FID to EDM's reference statistics, by model calls:", "",
              "| sampler | " + " | ".join(map(str, calls)) + " |", "|---" * (len(calls) + 1) + "|"]
    for name in dict.fromkeys(row["method"] for row in rows):
        of = {row["calls"]: f"{row['fid']:.2f}" for row in rows if row["method"] == name}
        lines.append(f"| {name} | " + " | ".join(of.get(n, "") for n in calls) + " |")
    lines += ["", "The paper reports 3.45 at 20 calls and 2.24 at 50.", "", *(
        f"{what}: {value}." for what, value in dict.fromkeys(
            (what, row[what]) for row in rows for what in ("network file", "reference file", "torch")))]
    return "\n".join(lines) + "\n"


def main(argv=None) -> int:
    """The command line."""
    import numpy as np

    parser = argparse.ArgumentParser(prog="python -m benchmarks.imagenet64", description=__doc__.splitlines()[0])
    parser.add_argument("--edm", type=Path, required=True, metavar="FOLDER", help="a clone of NVlabs/edm")
    parser.add_argument("--network", type=Path, required=True, metavar="FILE", help="edm-imagenet-64x64-cond-adm.pkl")
    parser.add_argument("--reference", type=Path, required=True, metavar="FILE", help="imagenet-64x64.npz of EDM's fid-refs")
    parser.add_argument("--detector", type=Path, metavar="FILE", help=f"{DETECTOR} (default: EDM's code fetches it)")
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS), metavar="N")
    parser.add_argument("--count", type=int, default=COUNT, metavar="N", help="images")
    parser.add_argument("--filter", default=SHOWN, metavar="REGEX", help="samplers of benchmarks/quality.py")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images at once in a process")
    parser.add_argument("--workers", type=int, default=3, metavar="N", help="processes that read images, at least 1")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/imagenet64"))
    args = parser.parse_args(argv)
    for name in ("network", "reference", "detector"):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            parser.error(f"--{name}: there is no file {path}")
    methods = [method for method in quality.methods() if re.search(args.filter, method.name)]
    if not methods:
        parser.error(f"--filter: no sampler has {args.filter!r} in its name")
    try:
        reference = dict(np.load(args.reference))
        if not {"mu", "sigma"} <= reference.keys():
            raise ValueError("it has no mu and sigma")
    except ValueError as error:
        parser.error(f"--reference: {args.reference} is no file of statistics: {error}")
    try:
        edm = Edm(args.edm, args.detector)
    except ValueError as error:
        parser.error(str(error))
    path, rows = args.out / "imagenet64.jsonl", []
    done = quality.load(path, "key")
    for method in methods:
        for calls in args.calls:
            if not method.steps(calls):
                continue
            key = quality._digest(method.name, method.source, str(calls), str(args.count), digest(args.network),
                                  digest(args.reference))
            if key not in done:
                folder = args.out / "images" / key
                folder.mkdir(parents=True, exist_ok=True)
                seen = quality.load(folder / "network.json", "name").get("network", {})
                seeds = missing(folder, args.count)
                if seeds:
                    edm.draw(edm_sampler(method, calls, seen), args.network, seeds, folder, args.batch)
                everyone: List[Optional[dict]] = [None] * dist.get_world_size()
                dist.all_gather_object(everyone, seen)
                seen = next(one for one in everyone if one)
                if dist.get_rank() == 0:
                    (folder / "network.json").write_text(json.dumps({"name": "network", **seen}) + "\n")
                fid = edm.distance(folder, reference, args.count, args.batch, args.workers)
                done[key] = {"key": key, "method": method.name, "calls": calls, "count": args.count, "fid": fid,
                             "network": seen, "network file": f"{args.network.name} {digest(args.network)}",
                             "reference file": f"{args.reference.name} {digest(args.reference)}", "torch": torch.__version__}
                if dist.get_rank() == 0:
                    with quality.appending(path) as file:
                        file.write(json.dumps(done[key]) + "\n")
            rows.append(done[key])
            if dist.get_rank() == 0:
                (args.out / "imagenet64.md").write_text(table(rows), encoding="utf-8")
    if dist.get_rank() == 0:
        print(table(rows))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
