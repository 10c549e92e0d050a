"""One ComfyUI and one WebUI for all the tests of a session: either takes a while to start."""
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from comfy_host import MODELS, REPOSITORY, ComfyUI, add_host, add_ours, make_base, stock_pictures, workflow
from webui_host import put_in, running


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The scratch folder, with the models and without the pack."""
    return make_base(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="session")
def before(base):
    """The host without the pack: (its nodes, {model: {sampler: picture}}, what it says to one of our sampler names and to
    one of our nodes)."""
    assert [entry.name for entry in (base / "custom_nodes").iterdir()] == ["ersde_probe"]
    with ComfyUI(base) as comfy:
        prompt = workflow("flow")
        add_host(prompt, "named", "ersde_sde_5")
        nodes = workflow("flow")
        add_ours(nodes, "picture", "sde_5")
        return (comfy.nodes, {model: stock_pictures(comfy, model) for model in MODELS}, comfy.refusal(prompt),
                comfy.post("/prompt", {"prompt": nodes}))


@pytest.fixture(scope="session")
def installed(base, before):
    """The scratch folder once the installer has put the pack in."""
    done = subprocess.run([sys.executable, str(REPOSITORY / "install.py"), "comfyui", str(base)],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((base / "custom_nodes").iterdir())) == 2
    return base


@pytest.fixture(scope="session")
def comfy(installed):
    """The host with the pack."""
    with ComfyUI(installed) as comfy:
        yield comfy


@contextmanager
def watched(data):
    """A WebUI on `data` with the pack, and with a script that tells what the network was asked."""
    put_in(data)
    probe = data / "extensions" / "ersde_probe" / "scripts"
    probe.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("webui_probe.py"), probe)
    with running(data) as server:
        yield server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with watched(tmp_path_factory.mktemp("webui") / "with") as server:
        yield server


@pytest.fixture
def server_of(tmp_path, monkeypatch):
    """A WebUI of one test's own whose person has these presets, as JSON."""
    @contextmanager
    def start(presets):
        (tmp_path / "presets.json").write_text(presets)
        monkeypatch.setenv("ERSDE_PRESETS", str(tmp_path / "presets.json"))
        with watched(tmp_path / "webui") as server:
            yield server

    return start
