"""A real ComfyUI on the CPU, driven through its HTTP API with two tiny random models.

    COMFYUI_PATH=/path/to/ComfyUI COMFYUI_PYTHON=/path/to/its/python python -m pytest tests/hosts/test_comfyui.py

COMFYUI_PYTHON may be left out when this Python has ComfyUI's packages.  Nothing is written to that folder: the server
runs from a scratch folder that links to it and has custom nodes, models and pictures of its own.
"""
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import pytest

from ersde import PRESETS

pytestmark = pytest.mark.host

REPOSITORY = Path(__file__).resolve().parents[2]
MAKERS = REPOSITORY.parent / "shared" / "tools"
MODELS = {"sd15": "make_tiny_sd15.py", "flow": "make_tiny_flow.py"}
AS_PRESET = {"noise_scale": "as preset", "eta": -1.0, "s_noise": -1.0, "order": 0}
START_S, RUN_S = 180, 300


# The host in a scratch folder

class ComfyUI:
    """A server of one scratch folder; `with` starts and stops it."""

    def __init__(self, base):
        self.base = base
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def __enter__(self):
        self.log = (self.base / f"server-{self.port}.log").open("w+", encoding="utf-8", errors="replace")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen(
            [os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", "--cpu", "--listen", "127.0.0.1",
             "--port", str(self.port), "--base-directory", str(self.base), "--front-end-root", str(self.base / "web"),
             "--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes",
             "--preview-method", "latent2rgb"],
            cwd=self.base, env=env, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT)
        end = time.monotonic() + START_S
        while True:
            try:
                self.nodes = self.get("/object_info")
                return self
            except (OSError, ValueError):
                if self.process.poll() is not None or time.monotonic() > end:
                    self.__exit__()
                    pytest.fail(f"ComfyUI did not start within {START_S} s:\n{self.read_log()[-6000:]}")
                time.sleep(0.5)

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)

    def read_log(self):
        return Path(self.log.name).read_text(encoding="utf-8", errors="replace")

    def get(self, path, raw=False):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            data = answer.read()
        return data if raw else json.loads(data)

    def post(self, path, body):
        """(HTTP status, JSON body or None)."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, data = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, data = error.code, error.read()
        return status, json.loads(data) if data else None

    def submit(self, prompt):
        status, body = self.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})
        assert status == 200, body
        return body["prompt_id"]

    def finish(self, prompt_id):
        """The run's record once it is over, well or badly."""
        end = time.monotonic() + RUN_S
        while time.monotonic() < end:
            record = self.get(f"/history/{prompt_id}").get(prompt_id)
            if record is not None:
                return record
            assert self.process.poll() is None, self.read_log()[-6000:]
            time.sleep(0.2)
        pytest.fail(f"the run took more than {RUN_S} s:\n{self.read_log()[-6000:]}")

    def pictures(self, prompt):
        """{node: first picture as an integer array} of the prompt's PreviewImage nodes."""
        record = self.finish(self.submit(prompt))
        assert record["status"]["status_str"] == "success", record["status"]["messages"]
        return {node: self.picture(output["images"][0]) for node, output in record["outputs"].items()}

    def picture(self, image):
        from PIL import Image
        data = self.get("/view?" + urllib.parse.urlencode(image), raw=True)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)

    def failure(self, prompt):
        """The message of a run that must fail while it executes."""
        record = self.finish(self.submit(prompt))
        assert record["status"]["status_str"] == "error"
        (message,) = [data for kind, data in record["status"]["messages"] if kind == "execution_error"]
        return message["exception_message"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The scratch folder, with the two models and without the pack."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("no ComfyUI to test against: set COMFYUI_PATH to its folder (and COMFYUI_PYTHON to its Python)")
    host = Path(path).resolve()
    if not (host / "main.py").is_file() or not (host / "comfy").is_dir():
        pytest.fail(f"COMFYUI_PATH is not a ComfyUI folder: {host}")
    absent = [name for name in MODELS.values() if not (MAKERS / name).is_file()]
    if absent:
        pytest.skip(f"the makers of the tiny models are not there: {', '.join(absent)} in ../shared/tools")
    base = tmp_path_factory.mktemp("comfyui")
    own = {"custom_nodes", "models", "input", "output", "temp", "user", ".git"}
    for entry in host.iterdir():
        if entry.name not in own:
            (base / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    for name in ("custom_nodes", "models/checkpoints", "input", "output", "temp", "user", "web"):
        (base / name).mkdir(parents=True)
    (base / "web" / "index.html").write_text("no page is needed")
    for name, maker in MODELS.items():
        target = base / "models" / "checkpoints" / f"{name}.safetensors"
        subprocess.run([sys.executable, str(MAKERS / maker), str(target)],
                       env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
                       check=True, stdout=subprocess.DEVNULL, timeout=300)
    return base


@pytest.fixture(scope="module")
def before(base):
    """What the host offers and draws without the pack: (its nodes, {model: {sampler: picture}})."""
    assert not list((base / "custom_nodes").iterdir())
    with ComfyUI(base) as comfy:
        return comfy.nodes, {model: stock_pictures(comfy, model) for model in MODELS}


@pytest.fixture(scope="module")
def comfy(base, before):
    """The host with the pack put in by its installer."""
    done = subprocess.run([sys.executable, str(REPOSITORY / "install.py"), "comfyui", str(base)],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((base / "custom_nodes").iterdir())) == 1
    with ComfyUI(base) as comfy:
        yield comfy


# Workflows in the API's form

def workflow(model, batch=1):
    """The nodes that all runs of a model share: a 64 x 64 picture from noise."""
    return {
        "model": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"{model}.safetensors"}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": "a red house"}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": "blurry"}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": batch}},
    }


def add_picture(prompt, name, samples):
    """Decode `samples`, an output of the prompt, into the picture called `name`."""
    prompt[name + " decoded"] = {"class_type": "VAEDecode", "inputs": {"samples": samples, "vae": ["model", 2]}}
    prompt[name] = {"class_type": "PreviewImage", "inputs": {"images": [name + " decoded", 0]}}


def add_run(prompt, name, kind, **inputs):
    """A KSampler or ERSDE_KSampler run, and its picture called `name`."""
    common = {"model": ["model", 0], "seed": 42, "steps": 8, "cfg": 4.0, "scheduler": "simple", "denoise": 1.0,
              "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    prompt[name + " run"] = {"class_type": kind, "inputs": {**common, **inputs}}
    add_picture(prompt, name, [name + " run", 0])


def add_ours(prompt, name, preset, **inputs):
    add_run(prompt, name, "ERSDE_KSampler", preset=preset, **{**AS_PRESET, **inputs})


def add_custom(prompt, name, preset, **inputs):
    """The same run through ERSDE_Sampler and the host's SamplerCustom."""
    prompt[name + " sampler"] = {"class_type": "ERSDE_Sampler", "inputs": {"preset": preset, **AS_PRESET, **inputs}}
    prompt[name + " sigmas"] = {"class_type": "BasicScheduler", "inputs": {
        "model": ["model", 0], "scheduler": "simple", "steps": 8, "denoise": 1.0}}
    prompt[name + " run"] = {"class_type": "SamplerCustom", "inputs": {
        "model": ["model", 0], "add_noise": True, "noise_seed": 42, "cfg": 4.0, "positive": ["positive", 0],
        "negative": ["negative", 0], "sampler": [name + " sampler", 0], "sigmas": [name + " sigmas", 0],
        "latent_image": ["latent", 0]}}
    add_picture(prompt, name, [name + " run", 0])


def stock_pictures(comfy, model):
    prompt = workflow(model)
    for sampler in ("euler", "er_sde", "dpmpp_2m_sde"):
        add_run(prompt, sampler, "KSampler", sampler_name=sampler)
    return comfy.pictures(prompt)


def difference(one, other):
    """The largest difference of a channel of a pixel, in 1/255."""
    return int(np.abs(one - other).max())


# The tests

def test_nodes_are_offered_with_every_tooltip(comfy):
    for key, title in (("ERSDE_Sampler", "ER-SDE Sampler"), ("ERSDE_KSampler", "KSampler (ER-SDE)")):
        node = comfy.nodes[key]
        assert node["display_name"] == title and node["category"].startswith("sampling") and node["description"]
        for name, (_, options) in node["input"]["required"].items():
            assert options["tooltip"], name
    shared = comfy.nodes["ERSDE_KSampler"]["input"]["required"]
    assert shared["scheduler"][0] == comfy.nodes["KSampler"]["input"]["required"]["scheduler"][0]
    assert shared["preset"][0] == list(PRESETS)


def test_the_hosts_own_nodes_and_lists_are_as_before(comfy, before):
    nodes, _ = before
    assert set(comfy.nodes) - set(nodes) == {"ERSDE_Sampler", "ERSDE_KSampler"}
    assert set(nodes) <= set(comfy.nodes)
    for key in ("KSampler", "KSamplerAdvanced", "KSamplerSelect", "SamplerER_SDE"):
        assert comfy.nodes[key] == nodes[key]


@pytest.mark.parametrize("model", MODELS)
def test_stock_pictures_are_bit_identical_with_the_pack(comfy, before, model):
    after = stock_pictures(comfy, model)
    for sampler, picture in before[1][model].items():
        assert np.array_equal(picture, after[sampler]), sampler
        assert picture.std() > 5, sampler


@pytest.mark.parametrize("model", MODELS)
def test_both_nodes_draw_the_same_picture_in_every_preset(comfy, model):
    prompt = workflow(model)
    for preset in PRESETS:
        add_ours(prompt, preset, preset)
        add_custom(prompt, preset + " custom", preset)
    pictures = comfy.pictures(prompt)
    for preset in PRESETS:
        assert np.array_equal(pictures[preset], pictures[preset + " custom"]), preset
        assert pictures[preset].std() > 5, preset
    assert difference(pictures["sde_5"], pictures["sde"]) > 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("steps, scheduler, denoise, batch", [
    (8, "simple", 1.0, 1), (20, "karras", 1.0, 1), (3, "normal", 1.0, 1), (8, "beta", 0.6, 1), (8, "simple", 1.0, 2)])
def test_the_compatible_preset_is_the_hosts_er_sde(comfy, model, steps, scheduler, denoise, batch):
    prompt = workflow(model, batch)
    settings = dict(steps=steps, scheduler=scheduler, denoise=denoise, seed=2 ** 63 + 5)
    add_run(prompt, "host", "KSampler", sampler_name="er_sde", **settings)
    add_ours(prompt, "ours", "comfyui", **settings)
    pictures = comfy.pictures(prompt)
    assert difference(pictures["host"], pictures["ours"]) <= 1
    assert pictures["host"].std() > 5


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("member, theirs", [("sde", "Reverse-time SDE"), ("ode", "ODE")])
def test_the_compatible_method_is_the_hosts_in_the_other_members(comfy, model, member, theirs):
    prompt = workflow(model)
    add_custom(prompt, "ours", "comfyui", noise_scale=member)
    add_custom(prompt, "host", "comfyui")
    prompt["host sampler"] = {"class_type": "SamplerER_SDE", "inputs": {
        "solver_type": theirs, "max_stage": 3, "eta": 1.0, "s_noise": 1.0}}
    pictures = comfy.pictures(prompt)
    assert difference(pictures["host"], pictures["ours"]) <= 1


@pytest.mark.parametrize("model", MODELS)
def test_picture_to_picture_with_a_mask_goes_through_the_hosts_code(comfy, model):
    prompt = workflow(model)
    prompt["source"] = {"class_type": "EmptyImage", "inputs": {
        "width": 64, "height": 64, "batch_size": 1, "color": 0x3060C0}}
    prompt["encoded"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["source", 0], "vae": ["model", 2]}}
    prompt["whole"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 64, "height": 64}}
    prompt["half"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 32, "height": 64}}
    prompt["mask"] = {"class_type": "MaskComposite", "inputs": {
        "destination": ["whole", 0], "source": ["half", 0], "x": 0, "y": 0, "operation": "add"}}
    prompt["latent"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["encoded", 0], "mask": ["mask", 0]}}
    add_picture(prompt, "untouched", ["encoded", 0])
    settings = dict(denoise=0.7, steps=10)
    add_run(prompt, "host", "KSampler", sampler_name="er_sde", **settings)
    add_ours(prompt, "ours", "comfyui", **settings)
    add_ours(prompt, "exact", "sde_5", **settings)
    pictures = comfy.pictures(prompt)
    assert difference(pictures["host"], pictures["ours"]) <= 1
    for name in ("ours", "exact"):
        assert difference(pictures[name][:, 40:], pictures["untouched"][:, 40:]) <= 3, name
        assert difference(pictures[name][:, :24], pictures["untouched"][:, :24]) > 10, name


def test_an_override_changes_the_picture_and_its_preset_value_does_not(comfy):
    prompt = workflow("flow")
    add_ours(prompt, "preset", "sde_5")
    add_ours(prompt, "same", "sde_5", noise_scale="sde_5", eta=1.0, s_noise=1.0, order=3)
    for name, change in (("scale", {"noise_scale": "sde"}), ("eta", {"eta": 0.0}), ("noise", {"s_noise": 0.5}),
                         ("order", {"order": 1})):
        add_ours(prompt, name, "sde_5", **change)
    pictures = comfy.pictures(prompt)
    assert np.array_equal(pictures["preset"], pictures["same"])
    for name in ("scale", "eta", "noise", "order"):
        assert difference(pictures["preset"], pictures[name]) > 0, name


@pytest.mark.parametrize("add", [add_ours, add_custom])
def test_a_bad_value_is_named_in_the_apis_error(comfy, add):
    prompt = workflow("flow")
    add(prompt, "picture", "comfyui", order=5)
    message = comfy.failure(prompt)
    assert "order must be between 1 and 3" in message.splitlines()[0] and "5" in message.splitlines()[0]


def test_a_bad_value_from_another_node_is_named_too(comfy):
    prompt = workflow("flow")
    prompt["number"] = {"class_type": "PrimitiveInt", "inputs": {"value": 9}}
    add_ours(prompt, "picture", "sde_5", order=["number", 0])
    message = comfy.failure(prompt)
    assert "order must be between 1 and 5" in message.splitlines()[0] and "9" in message.splitlines()[0]


@pytest.mark.parametrize("change, word", [({"preset": "sde_55"}, "preset"), ({"noise_scale": "x"}, "noise_scale"),
                                          ({"eta": -2.0}, "eta"), ({"order": 6}, "order")])
def test_a_bad_widget_value_is_refused_when_it_is_sent(comfy, change, word):
    prompt = workflow("flow")
    add_ours(prompt, "picture", **{"preset": "sde_5", **change})
    status, body = comfy.post("/prompt", {"prompt": prompt})
    assert status == 400
    (error,) = body["node_errors"]["picture run"]["errors"]
    assert error["extra_info"]["input_name"] == word


def test_a_run_can_be_interrupted(comfy):
    prompt = workflow("sd15")
    add_ours(prompt, "picture", "sde_5", steps=1000)
    prompt_id = comfy.submit(prompt)
    # The bar is drawn by the first step.
    end = time.monotonic() + 60
    while "/1000 [" not in comfy.read_log() and time.monotonic() < end:
        time.sleep(0.2)
    assert "/1000 [" in comfy.read_log()
    comfy.post("/interrupt", {})
    record = comfy.finish(prompt_id)
    assert "execution_interrupted" in [kind for kind, _ in record["status"]["messages"]]
