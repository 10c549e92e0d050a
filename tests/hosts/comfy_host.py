"""A real ComfyUI in a scratch folder: the server, its HTTP API and websocket, and graphs in the API's form."""
import base64
import io
import json
import os
import shlex
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MAKERS = REPOSITORY.parent / "shared" / "tools"
MODELS = {"sd15": ("make_tiny_sd15.py",), "flow": ("make_tiny_flow.py",), "refiner": ("make_tiny_sd15.py", "--seed", "1")}
AS_PRESET = {"noise_scale": "as preset", "eta": -1.0, "s_noise": -1.0, "order": 0}
START_S, RUN_S = 180, 300


def host_folder():
    """The host to test against: COMFYUI_PATH, or the one in whose custom_nodes the pack lies; skips where there is none."""
    path = os.environ.get("COMFYUI_PATH")
    if not path and REPOSITORY.parent.name == "custom_nodes":
        path = REPOSITORY.parents[1]
    if not path:
        pytest.skip("no ComfyUI to test against: set COMFYUI_PATH to its folder (and COMFYUI_PYTHON to its Python)")
    host = Path(path).resolve()
    if not (host / "main.py").is_file() or not (host / "comfy").is_dir():
        pytest.fail(f"COMFYUI_PATH is not a ComfyUI folder: {host}")
    absent = [maker[0] for maker in MODELS.values() if not (MAKERS / maker[0]).is_file()]
    if absent:
        pytest.skip(f"the makers of the tiny models are not there: {', '.join(absent)} in ../shared/tools")
    return host


def make_base(base):
    """Fill a scratch folder that links to the host, with custom nodes and models of its own and without the pack."""
    from PIL import Image

    host = host_folder()
    own = {"custom_nodes", "models", "input", "output", "temp", "user", ".git"}
    for entry in host.iterdir():
        if entry.name not in own:
            (base / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    for name in ("custom_nodes/ersde_probe", "models/checkpoints", "input", "output", "temp", "user", "web"):
        (base / name).mkdir(parents=True)
    (base / "web" / "index.html").write_text("no page is needed")
    Image.new("RGB", (80, 60), (40, 90, 180)).save(base / "input" / "example.png")      # as the host ships one
    (base / "custom_nodes" / "ersde_probe" / "__init__.py").write_text(
        Path(__file__).with_name("comfy_probe.py").read_text(encoding="utf-8"), encoding="utf-8")
    for name, (maker, *options) in MODELS.items():
        target = base / "models" / "checkpoints" / f"{name}.safetensors"
        subprocess.run([sys.executable, str(MAKERS / maker), str(target), *options],
                       env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
                       check=True, stdout=subprocess.DEVNULL, timeout=300)
    return base


class ComfyUI:
    """A server of one scratch folder; `with` starts and stops it.

    Args:
        options: more of its command line; frontend: whether it serves the real page; env: more of its environment.
    """

    def __init__(self, base, *options, frontend=False, **env):
        self.base, self.env = base, env
        self.options = options if frontend else ("--front-end-root", str(base / "web"), *options)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        self.log = (self.base / f"server-{self.port}.log").open("w+", encoding="utf-8", errors="replace")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1",
               "ERSDE_PRESETS": str(self.base / "presets.json"), "ERSDE_TEST_REPOSITORY": str(REPOSITORY), **self.env}
        self.process = subprocess.Popen(
            [os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", "--listen", "127.0.0.1", "--port", str(self.port),
             "--base-directory", str(self.base), "--database-url", "sqlite:///:memory:", "--disable-auto-launch",
             "--disable-api-nodes", "--preview-method", "latent2rgb",
             *shlex.split(os.environ.get("COMFYUI_ARGS", "--cpu")), *self.options],
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
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            data = answer.read()
        return data if raw else json.loads(data)

    def post(self, path, body):
        """(HTTP status, JSON body or None)."""
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, data = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, data = error.code, error.read()
        return status, json.loads(data) if data else None

    def submit(self, prompt, client=None):
        status, body = self.post("/prompt", {"prompt": prompt, "client_id": client or uuid.uuid4().hex})
        assert status == 200, body
        return body["prompt_id"]

    def refusal(self, prompt):
        """{node: [(input, details)]} of a prompt that is refused when it is sent."""
        status, body = self.post("/prompt", {"prompt": prompt})
        assert status == 400, body
        return {node: [(error["extra_info"].get("input_name"), error["details"]) for error in found["errors"]]
                for node, found in body["node_errors"].items()}

    def finish(self, prompt_id):
        """The run's record once it is over, well or badly."""
        end = time.monotonic() + RUN_S
        while time.monotonic() < end:
            record = self.get(f"/history/{prompt_id}").get(prompt_id)
            if record is not None:
                return record
            assert self.process.poll() is None, self.read_log()[-6000:]
            time.sleep(0.1)
        pytest.fail(f"the run took more than {RUN_S} s:\n{self.read_log()[-6000:]}")

    def outputs(self, prompt):
        record = self.finish(self.submit(prompt))
        assert record["status"]["status_str"] == "success", record["status"]["messages"]
        return record["outputs"]

    def pictures(self, prompt):
        """{PreviewImage node: its picture as an integer array, (pictures, height, width, 3) where there are more}."""
        found = {}
        for node, output in self.outputs(prompt).items():
            if "images" in output:
                images = [self.picture(image) for image in output["images"]]
                found[node] = images[0] if len(images) == 1 else np.stack(images)
        return found

    def latents(self, prompt):
        """{node: its arrays} of Probe_Save nodes."""
        found = {}
        for node, output in self.outputs(prompt).items():
            if "probe" in output:
                with np.load(output["probe"][0]) as arrays:
                    found[node] = [arrays[name] for name in arrays.files]
        return found

    def picture(self, image):
        from PIL import Image
        data = self.get("/view?" + urllib.parse.urlencode(image), raw=True)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)

    def failure(self, prompt):
        """The message of a run that must fail while it executes, as the error box shows it; it is one sentence."""
        record = self.finish(self.submit(prompt))
        assert record["status"]["status_str"] == "error", record["status"]
        (message,) = [data for kind, data in record["status"]["messages"] if kind == "execution_error"]
        text = message["exception_message"].strip()
        assert len(text.splitlines()) == 1 and "Traceback" not in text, text
        return text


class Events:
    """What the server's websocket sends to a client: `messages`, and `previews` as PIL pictures.  RFC 6455, receiving."""

    def __init__(self, comfy):
        self.client, self.messages, self.previews = uuid.uuid4().hex, [], []
        self.socket = socket.create_connection(("127.0.0.1", comfy.port), timeout=RUN_S)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall((f"GET /ws?clientId={self.client} HTTP/1.1\r\nHost: 127.0.0.1:{comfy.port}\r\nUpgrade: websocket"
                             f"\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
                             ).encode())
        self.stream = self.socket.makefile("rb")
        assert b"101" in self.stream.readline()
        while self.stream.readline().strip():
            pass
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        from PIL import Image
        whole, kind = b"", 0
        try:
            while True:
                first, second = self.stream.read(2)
                length = second & 127
                if length > 125:
                    form, size = (">H", 2) if length == 126 else (">Q", 8)
                    (length,) = struct.unpack(form, self.stream.read(size))
                kind, whole = first & 15 or kind, whole + self.stream.read(length)
                if not first & 128:
                    continue
                if kind == 1:
                    self.messages.append(json.loads(whole))
                elif kind == 2 and struct.unpack(">I", whole[:4])[0] == 1:
                    self.previews.append(Image.open(io.BytesIO(whole[8:])))
                whole = b""
        except (OSError, ValueError):
            pass                                # closed

    def wait_for(self, kind, prompt_id):
        end = time.monotonic() + RUN_S
        while time.monotonic() < end:
            for message in list(self.messages):
                if message["type"] == kind and message["data"].get("prompt_id") == prompt_id:
                    return message["data"]
            time.sleep(0.05)
        pytest.fail(f"no {kind} for the run among {self.messages}")

    def close(self):
        self.socket.close()


# Graphs in the API's form

def workflow(model, batch=1):
    """The nodes that all runs of a model share: a 64 x 64 picture from noise."""
    return {
        "model": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"{model}.safetensors"}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": "a red house"}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": "blurry"}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": batch}},
    }


def add(prompt, name, class_type, /, **inputs):
    """A node; returns its first output."""
    prompt[name] = {"class_type": class_type, "inputs": inputs}
    return [name, 0]


def add_picture(prompt, name, samples):
    """Decode `samples`, an output of the prompt, into the picture called `name`."""
    decoded = add(prompt, name + " decoded", "VAEDecode", samples=samples, vae=["model", 2])
    add(prompt, name, "PreviewImage", images=decoded)


def add_run(prompt, name, kind, **inputs):
    """A KSampler or ERSDE_KSampler run, and its picture called `name`."""
    common = {"model": ["model", 0], "seed": 42, "steps": 8, "cfg": 4.0, "scheduler": "simple", "denoise": 1.0,
              "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    add_picture(prompt, name, add(prompt, name + " run", kind, **{**common, **inputs}))


def add_host(prompt, name, sampler_name="er_sde", **inputs):
    add_run(prompt, name, "KSampler", sampler_name=sampler_name, **inputs)


def add_ours(prompt, name, preset, **inputs):
    add_run(prompt, name, "ERSDE_KSampler", preset=preset, **{**AS_PRESET, **inputs})


def add_part(prompt, name, preset, kind="ERSDE_KSamplerAdvanced", **inputs):
    """A part of a run by the advanced nodes; returns its latent."""
    common = {"model": ["model", 0], "add_noise": "enable", "noise_seed": 42, "steps": 8, "cfg": 4.0, "scheduler": "simple",
              "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0], "start_at_step": 0,
              "end_at_step": 10000, "return_with_leftover_noise": "disable"}
    which = {"preset": preset, **AS_PRESET} if kind.startswith("ERSDE") else {"sampler_name": preset}
    out = add(prompt, name + " run", kind, **{**common, **which, **inputs})
    add_picture(prompt, name, out)
    return out


def add_custom(prompt, name, preset=None, sampler=None, sigmas=None, latent=("latent", 0), add_noise=True, cfg=4.0, seed=42,
               **inputs):
    """A run through the host's SamplerCustom with ERSDE_Sampler or another sampler; returns its latent."""
    if sampler is None:
        sampler = add(prompt, name + " sampler", "ERSDE_Sampler", preset=preset, **{**AS_PRESET, **inputs})
    if sigmas is None:
        sigmas = add(prompt, name + " sigmas", "BasicScheduler", model=["model", 0], scheduler="simple", steps=8,
                     denoise=1.0)
    out = add(prompt, name + " run", "SamplerCustom", model=["model", 0], add_noise=add_noise, noise_seed=seed, cfg=cfg,
              positive=["positive", 0], negative=["negative", 0], sampler=sampler, sigmas=sigmas, latent_image=list(latent))
    add_picture(prompt, name, out)
    return out


def difference(one, other):
    """The largest difference of a channel of a pixel, in 1/255."""
    return int(np.abs(one - other).max())


def stock_pictures(comfy, model):
    prompt = workflow(model)
    for sampler in ("euler", "er_sde", "dpmpp_2m_sde"):
        add_host(prompt, sampler, sampler)
    return comfy.pictures(prompt)
