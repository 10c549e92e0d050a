"""The pack inside a real WebUI, over its API.  Skipped unless WEBUI_PATH names one that already starts by itself.

    WEBUI_PATH          the WebUI's folder, the one with launch.py; nothing in it is changed
    WEBUI_PYTHON        its interpreter; else its venv's, else the one that runs the tests
    WEBUI_ARGS          further flags for launch.py, e.g. "--always-cpu" for Forge
    WEBUI_CHECKPOINT    the checkpoint's name, else the first one it finds
    WEBUI_TIMEOUT       seconds to wait for the start, else 300

The host gets a data folder of its own (settings, extensions, outputs), so that it starts as if new; its models are
shared.  It runs with its page, since what a person can pick is decided when that is built.
"""
import base64
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ersde import PRESETS
from ersde.hosts.webui import PREFIX, sampler_name

PACK = Path(__file__).resolve().parents[2]
WEBUI = os.environ.get("WEBUI_PATH")
OURS = [sampler_name(preset) for preset in PRESETS.values()]

pytestmark = [
    pytest.mark.host,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not WEBUI, reason="WEBUI_PATH is not set: no WebUI to test in"),
]


class Server:
    """A running WebUI: JSON over its API."""

    def __init__(self, port, log, process):
        self.url, self.log, self.process = f"http://127.0.0.1:{port}", log, process

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path, body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            pytest.fail(f"{path} answered {error.code}: {error.read().decode(errors='replace')[:2000]}")

    def make(self, sampler, kind="txt2img", **changes):
        """The answer to one small request: pictures (PNG bytes) and their infotexts."""
        body = {"prompt": "a lighthouse", "seed": 7, "steps": 8, "width": 64, "height": 64, "cfg_scale": 4,
                "sampler_name": sampler, **changes}
        if os.environ.get("WEBUI_CHECKPOINT"):
            body.setdefault("override_settings", {})["sd_model_checkpoint"] = os.environ["WEBUI_CHECKPOINT"]
        answer = self.post(f"/sdapi/v1/{kind}", body)
        return [base64.b64decode(image) for image in answer["images"]], json.loads(answer["info"])["infotexts"]

    def make_as(self, sampler, **changes):
        """`make`, sure that it was this sampler: the host takes its first one for a name it does not know."""
        images, texts = self.make(sampler, **changes)
        assert texts and all(used_sampler(text) == sampler for text in texts), texts
        return images, texts


def used_sampler(infotext):
    return infotext.rpartition("Sampler: ")[2].partition(",")[0]


def pixels(png):
    np = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(png))
    return np.asarray(image.convert("RGB")).astype(int)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def put_in(data):
    """The pack as an extension of the data folder: a copy, so that what the installer leaves out is missing."""
    for folder in ("extensions", "modules"):
        (data / folder).mkdir(parents=True)
    (data / "launch.py").touch()        # the installer looks for a WebUI; only `extensions` means anything to the host
    done = subprocess.run([sys.executable, str(PACK / "install.py"), "webui", str(data), "--copy"], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def running(data):
    """A WebUI on `data` until the block ends."""
    webui = Path(WEBUI).resolve()
    own = [webui / "venv/bin/python", webui / "venv/Scripts/python.exe"]
    own = next((path for path in own if path.exists()), sys.executable)
    port, log = free_port(), data / "log.txt"
    command = [os.environ.get("WEBUI_PYTHON") or str(own), "-u", "launch.py", "--api", "--port", str(port),
               "--server-name", "127.0.0.1", "--data-dir", str(data), "--models-dir", str(webui / "models"),
               "--skip-prepare-environment", "--skip-torch-cuda-test", "--skip-python-version-check",
               "--skip-version-check", "--use-cpu", "all", "--no-half", "--no-download-sd-model",
               "--do-not-download-clip", "--no-hashing", *shlex.split(os.environ.get("WEBUI_ARGS", ""))]
    # The forks do not all know the same flags.  No service outside this machine is asked.
    env = {**os.environ, "IGNORE_CMD_ARGS_ERRORS": "1", "COMMANDLINE_ARGS": "", "SD_WEBUI_RESTARTING": "1",
           "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)         # or the pack might be found without being installed
    data.mkdir(parents=True, exist_ok=True)
    # Live previews may need a small model of their own, which a host fetches.  Forge Neo waits for a key without its mark.
    (data / "config.json").write_text(json.dumps({"VERSION_UID": "PY313", "live_previews_enable": False,
                                                  "show_progress_type": "Approx cheap"}))
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=webui, env=env, stdout=out, stderr=subprocess.STDOUT,
                                   start_new_session=os.name != "nt")
    try:
        server = Server(port, log, process)
        wait_for(server)
        yield server
    finally:
        if os.name == "nt":
            process.kill()
        else:
            with suppress(ProcessLookupError):      # it may have ended by itself
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()


STARTED = "Startup time:"       # in the log when everything is up, and again after "Reload UI"


def wait_for(server, starts=1):
    """Until the log says so: a request that comes earlier makes the host fail ("Cannot add middleware ...")."""
    end = time.monotonic() + float(os.environ.get("WEBUI_TIMEOUT", 300))
    while time.monotonic() < end and server.process.poll() is None:
        if server.log.read_text(errors="replace").count(STARTED) >= starts:
            return
        time.sleep(0.5)
    pytest.fail("the WebUI did not start; the end of its log:\n" + server.log.read_text(errors="replace")[-4000:])


STOCK = ["Euler a", "DPM++ 2M"]


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """What the host answers without the pack: its samplers and a picture of each of two."""
    with running(tmp_path_factory.mktemp("webui") / "without") as server:
        return {"samplers": server.get("/sdapi/v1/samplers"),
                "pictures": {name: server.make_as(name) for name in STOCK}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    data = tmp_path_factory.mktemp("webui") / "with"
    put_in(data)
    with running(data) as server:
        yield server


def test_every_preset_is_listed_once_after_the_hosts_own(server, without):
    names = [entry["name"] for entry in server.get("/sdapi/v1/samplers")]
    own = [entry["name"] for entry in without["samplers"]]
    assert not [name for name in own if name.startswith(PREFIX)]
    assert names == own + OURS


def test_the_log_has_no_error_of_ours(server):
    log = server.log.read_text(errors="replace")
    assert "ER-SDE:" not in log and "Error loading script" not in log


def choices(server, element):
    for component in server.get("/config")["components"]:
        if component["props"].get("elem_id") == element:
            return [c[0] if isinstance(c, list) else c for c in component["props"]["choices"]]
    raise AssertionError(f"no {element} in the page")


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_a_person_can_pick_every_preset(server, tab):
    listed = choices(server, f"{tab}_sampling")
    assert [name for name in listed if name.startswith(PREFIX)] == OURS


def test_no_name_ends_in_one_of_the_hosts_schedules(server):
    for scheduler in server.get("/sdapi/v1/schedulers"):
        for label in [scheduler["name"], scheduler["label"], *(scheduler["aliases"] or [])]:
            assert not [name for name in OURS if name.endswith(" " + label)]


def test_an_unknown_name_is_noticed(server):
    """The check that all the others rest on."""
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        server.make_as(PREFIX + "nonsense")


@pytest.mark.parametrize("name", OURS)
def test_txt2img(server, name):
    (image,), (text,) = server.make_as(name)
    assert "Eta:" not in text
    assert pixels(image).std() > 1          # not a flat picture
    assert server.make_as(name)[0] == [image]


def test_the_presets_make_different_pictures(server):
    names = [*OURS, *STOCK]
    # Their pixels: the file itself has the sampler's name in it.
    assert len({pixels(server.make_as(name)[0][0]).tobytes() for name in names}) == len(names)


@pytest.mark.parametrize("preset", ["sde_5", "sde"])
def test_a_batch_equals_its_single_images(server, preset):
    """But for rounding: a model computes a batch of two otherwise, which guidance and many steps would blow up."""
    name, gentle = sampler_name(PRESETS[preset]), {"cfg_scale": 1, "steps": 4}
    images, _ = server.make_as(name, batch_size=2, **gentle)
    first, second = map(pixels, images[-2:])            # a grid, where the host makes one, comes before them
    for seed, image in ((7, first), (8, second)):
        single = pixels(server.make_as(name, seed=seed, **gentle)[0][0])
        assert abs(single - image).mean() < 0.5
    assert abs(first - second).mean() > 10


def test_img2img(server):
    start = base64.b64encode(server.make_as("Euler a")[0][0]).decode()
    name = OURS[0]
    changes = {"kind": "img2img", "init_images": [start], "denoising_strength": 0.5}
    (image,), (text,) = server.make_as(name, **changes)
    assert "Denoising strength: 0.5" in text
    assert server.make_as(name, **changes)[0] == [image]
    assert abs(pixels(image) - pixels(base64.b64decode(start))).max() > 8


def test_hires(server):
    (image,), _ = server.make_as(OURS[0], enable_hr=True, hr_scale=2, hr_upscaler="Latent", denoising_strength=0.6)
    assert pixels(image).shape == (128, 128, 3)


def test_eta_noise_seed_delta_is_written_where_it_matters(server):
    """The setting changes the noise of the stochastic presets, and only theirs."""
    cases = ((OURS[0], True), (sampler_name(PRESETS["ode"]), False))
    plain = {name: server.make_as(name)[0] for name, _ in cases}
    server.post("/sdapi/v1/options", {"eta_noise_seed_delta": 31337})
    try:
        for name, noisy in cases:
            images, (text,) = server.make_as(name)
            assert ("ENSD: 31337" in text) == noisy, text
            assert (abs(pixels(images[0]) - pixels(plain[name][0])).max() > 0) == noisy, name
    finally:
        server.post("/sdapi/v1/options", {"eta_noise_seed_delta": 0})


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_sampler_is_bit_identical_with_the_pack(server, without, name):
    assert server.make_as(name) == without["pictures"][name]


def test_reload_ui_keeps_the_list(server):
    """"Reload UI" runs the scripts again in the same process.  Last in this file: the page is away for a moment."""
    before = server.get("/sdapi/v1/samplers")
    picture = server.make_as(OURS[0])
    config = server.get("/config")
    button = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "settings_restart_gradio")
    press = next(i for i, d in enumerate(config["dependencies"])
                 if any((t[0] if isinstance(t, list) else t) == button for t in d["targets"]))
    server.post("/run/predict", {"fn_index": press, "data": [], "session_hash": "reload"})
    wait_for(server, starts=2)
    assert server.get("/sdapi/v1/samplers") == before
    assert [name for name in choices(server, "txt2img_sampling") if name.startswith(PREFIX)] == OURS
    assert server.make_as(OURS[0]) == picture
    assert "ER-SDE:" not in server.log.read_text(errors="replace")
