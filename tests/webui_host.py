"""A real WebUI for the tests: started on a data folder of its own, and driven over its API.

    WEBUI_PATH          the WebUI's folder, the one with launch.py; nothing in it is changed
    WEBUI_PYTHON        its interpreter; else its venv's, else the one that runs the tests
    WEBUI_ARGS          further flags for launch.py, e.g. "--always-cpu" for Forge and reForge, "--cpu" for Forge Neo
    WEBUI_CHECKPOINT    the checkpoint's name, else the first one it finds
    WEBUI_REFINER       another checkpoint of the same kind, else the first other one
    WEBUI_FLOW          what makes a request one of a flow model, as JSON, if there is such a thing; run its test by itself
                        {"override_settings": {"sd_model_checkpoint": "a flow model"}}      AUTOMATIC1111, Forge, Neo
                        {"alwayson_scripts": {"Advanced Model Sampling for reForge": {"args": [true, "SD3", ...]}}}
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

PACK = Path(__file__).resolve().parents[1]
WEBUI = os.environ.get("WEBUI_PATH")
MARKS = [
    pytest.mark.host,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not WEBUI, reason="WEBUI_PATH is not set: no WebUI to test in"),
]


class Server:
    """A running WebUI: JSON over its API."""

    def __init__(self, port, log, process):
        self.url, self.log, self.process = f"http://127.0.0.1:{port}", log, process

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def ask(self, path, body):
        """The answer to a POST: its status and what it says."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def post(self, path, body):
        status, answer = self.ask(path, body)
        if status != 200:
            pytest.fail(f"{path} answered {status}: {answer[:2000]}")
        return answer

    def request(self, sampler, **changes):
        """A small request."""
        body = {"prompt": "a lighthouse", "seed": 7, "steps": 8, "width": 64, "height": 64, "cfg_scale": 4,
                "sampler_name": sampler, **changes}
        if os.environ.get("WEBUI_CHECKPOINT"):
            body["override_settings"] = {"sd_model_checkpoint": os.environ["WEBUI_CHECKPOINT"],
                                         **body.get("override_settings", {})}
        return body

    def make(self, sampler, kind="txt2img", **changes):
        """The answer to one small request: pictures (PNG bytes) and their infotexts."""
        answer = self.post(f"/sdapi/v1/{kind}", self.request(sampler, **changes))
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
               "--model-ref", str(webui / "models"), "--gradio-allowed-path", str(webui),
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


def choices(server, element):
    """What a person can choose from in a list of the page."""
    for component in server.get("/config")["components"]:
        if component["props"].get("elem_id") == element:
            return [c[0] if isinstance(c, list) else c for c in component["props"]["choices"]]
    raise AssertionError(f"no {element} in the page")


STARTED = "Startup time:"       # in the log when everything is up, and again after "Reload UI"


def wait_for(server, starts=1):
    """Until the log says so: a request that comes earlier makes the host fail ("Cannot add middleware ...")."""
    end = time.monotonic() + float(os.environ.get("WEBUI_TIMEOUT", 300))
    while time.monotonic() < end and server.process.poll() is None:
        if server.log.read_text(errors="replace").count(STARTED) >= starts:
            return
        time.sleep(0.5)
    pytest.fail("the WebUI did not start; the end of its log:\n" + server.log.read_text(errors="replace")[-4000:])
