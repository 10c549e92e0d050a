"""The benchmark on EDM's ImageNet network: its sampler, its table, and a whole run with a random network of its class.

The run needs EDM's code: `EDM_PATH=... python -m pytest tests/test_imagenet64.py`, a clone of github.com/NVlabs/edm.
"""
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm")

import ersde  # noqa: E402
from benchmarks import imagenet64, quality  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
EDM = os.environ.get("EDM_PATH")


class Net(torch.nn.Module):
    """What EDM's networks have, for Gaussian data."""

    sigma_min, sigma_max, img_resolution, label_dim = 0.0, float("inf"), 8, 3

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None):
        assert sigma.shape == (len(x),) and class_labels.shape == (len(x), 3)
        return (x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)).float()


@pytest.mark.parametrize("name", ["ours sde_5", "paper sde_5", "ours few_steps"])
def test_the_sampler_follows_the_paper_s_schedule(name):
    method, = (one for one in quality.methods() if one.name == name)
    sigmas, net = [], Net()
    net.register_forward_hook(lambda module, given, out: sigmas.append(given[1][0].item()))
    seen = {}
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = imagenet64.edm_sampler(method, 10, seen)(net, latents, torch.zeros(2, 3), lambda x: torch.ones_like(x))
    ramp = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 10, dtype=torch.float64) ** 7
    assert sigmas == pytest.approx(ramp.tolist(), rel=1e-9)
    assert out.dtype == torch.float64 and torch.isfinite(out).all()
    assert seen == {"class": "Net", "size": 8, "classes": 3, "parameters": 0}
    expected = ersde.sample_preset(lambda x, sigma: net(x, sigma, torch.zeros(2, 3)).double(), latents.double() * 80,
                                   torch.cat([ramp, torch.zeros(1)]), method.preset, disable=True, process="ve",
                                   noise_sampler=lambda s, t: torch.ones_like(latents).double())
    assert torch.allclose(out, expected)


def row(**changes):
    net = {"class": "EDMPrecond", "size": 64, "classes": 1000, "parameters": imagenet64.PARAMETERS}
    return {"method": "ours sde_5", "calls": 20, "count": 50000, "fid": 3.5, "torch": "2", "network file": "a",
            "reference file": "b", "network": net, **changes}


def test_whatever_is_not_the_paper_s_setting_is_said():
    assert "Not the paper's setting" not in imagenet64.table([row(), row(calls=50)])
    assert "| ours sde_5 | 3.50 | 2.20 |" in imagenet64.table([row(), row(calls=50, fid=2.2)])
    assert "100 images, not 50000" in imagenet64.table([row(), row(count=100)])
    small = {"class": "EDMPrecond", "size": 16, "classes": 10, "parameters": 7}
    text = imagenet64.table([row(network=small)])
    assert "16x16" in text and "7 parameters" in text and "nothing about a sampler" in text


def test_what_is_missing_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "a.pkl").write_bytes(b"")
    np.savez(tmp_path / "b.npz", mu=np.zeros(2))
    base = ["--edm", str(tmp_path), "--network", str(tmp_path / "a.pkl"), "--reference", str(tmp_path / "b.npz")]
    for arguments, words in ((base[:4] + ["--reference", "nothing"], "no file nothing"), (base, "no mu and sigma"),
                             (base + ["--filter", "nobody"], "nobody")):
        with pytest.raises(SystemExit) as end:
            imagenet64.main(arguments)
        assert end.value.code == 2 and words in capsys.readouterr().err
    np.savez(tmp_path / "b.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(SystemExit):
        imagenet64.main(base)
    assert "is no clone of NVlabs/edm" in capsys.readouterr().err


def test_a_scipy_that_edm_cannot_use_is_told_before_the_images(tmp_path, monkeypatch):
    for name in ("dnnlib", "torch_utils", "training"):
        (tmp_path / name).mkdir()
    (tmp_path / "generate.py").write_text("")
    (tmp_path / "fid.py").write_text("import types\nscipy = types.SimpleNamespace(__version__='9.9', linalg="
                                     "types.SimpleNamespace(sqrtm=lambda A: A))\n")
    (tmp_path / "torch_utils" / "distributed.py").write_text("")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("generate", "fid", "torch_utils", "torch_utils.distributed"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        with pytest.raises(ValueError, match="scipy 9.9 does not have any more"):
            imagenet64.Edm(tmp_path)
    finally:
        for name in ("generate", "fid", "torch_utils", "torch_utils.distributed"):
            sys.modules.pop(name, None)


DETECTOR = '''import torch
class Detector(torch.nn.Module):
    """A random feature network with the width of EDM's."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inner = torch.nn.Conv2d(3, 2048, 4, stride=4)
    def forward(self, x, return_features=True):
        return torch.relu(self.inner(x.float() / 127.5 - 1)).mean((2, 3))
'''


@pytest.mark.skipif(not EDM, reason="EDM_PATH IS NOT SET: the folder of a clone of github.com/NVlabs/edm")
def test_a_random_network_of_the_same_class_at_small_size(tmp_path):
    """Two processes and one make the same images, and a run that was stopped goes on."""
    (tmp_path / "randomdetector.py").write_text(DETECTOR)
    make = f"""
import sys, pickle, torch, numpy as np
sys.path[:0] = [{EDM!r}, {str(tmp_path)!r}]
from training.networks import EDMPrecond
import randomdetector
torch.manual_seed(0)
net = EDMPrecond(16, 3, label_dim=10, model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
for value in net.parameters():
    value.data.add_(0.02 * torch.randn_like(value))
net.eval().requires_grad_(False)
pickle.dump({{'ema': net}}, open('net.pkl', 'wb'))
pickle.dump(randomdetector.Detector().eval().requires_grad_(False), open('detector.pkl', 'wb'))
np.savez('ref.npz', mu=np.zeros(2048), sigma=np.eye(2048) * 1e-3)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path, env=environment, check=True, timeout=300)
    with open(tmp_path / "net.pkl", "rb") as file:
        assert file.read(1) == pickle.PROTO
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    options = ["-m", "benchmarks.imagenet64", "--edm", EDM, "--network", "net.pkl", "--reference", "ref.npz", "--detector",
               "detector.pkl", "--calls", "4", "--count", "10", "--batch", "2", "--workers", "1"]

    def run(processes, out, *more):
        done = subprocess.run([sys.executable, *command, str(processes), *options, "--out", out, *more], cwd=tmp_path,
                              env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        images = {path.relative_to(tmp_path / out).as_posix(): path.read_bytes() for path in (tmp_path / out).rglob("*.png")}
        return images, list(quality.load(tmp_path / out / "imagenet64.jsonl", "key").values())

    one, rows = run(1, "one", "--filter", "^(ours|paper) sde_5$")
    assert len(one) == 20 and [r["method"] for r in rows] == ["ours sde_5", "paper sde_5"]
    assert all(np.isfinite(r["fid"]) and r["network"]["class"] == "EDMPrecond" for r in rows)
    assert len({r["fid"] for r in rows}) == 2
    text = (tmp_path / "one" / "imagenet64.md").read_text()
    assert "Not the paper's setting: 10 images" in text and "16x16" in text
    two, others = run(2, "two", "--filter", "ours sde_5")
    assert {name: data for name, data in one.items() if name in two} == two and len(two) == 10
    assert others[0]["fid"] == pytest.approx(rows[0]["fid"], rel=1e-5)
    # Stopped in the middle of an image, and of the last line.
    lost = sorted((tmp_path / "two").rglob("*.png"))
    lost[0].unlink()
    lost[1].write_bytes(lost[1].read_bytes()[:50])
    path = tmp_path / "two" / "imagenet64.jsonl"
    path.write_text(path.read_text()[:-20])
    again, others = run(2, "two", "--filter", "ours sde_5")
    assert again == two and len(others) == 1
