"""What the pack ships for ComfyUI's page: workflows and their pictures, help pages, locales, and the registry's file."""
import ast
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_workflows import FILES, FOLDER, NAMES, NOTES, load, to_prompt

ROOT = Path(__file__).resolve().parents[1]
IDS = ["ERSDE_Sampler", "ERSDE_KSampler", "ERSDE_KSamplerAdvanced", "ERSDE_NoiseScale", "ERSDE_Plot", "ERSDE_Preset",
       "ERSDE_PresetSave"]
MODELS = {"v1-5-pruned-emaonly-fp16.safetensors", "sd3.5_large_fp8_scaled.safetensors"}


# Workflows

def test_there_is_a_workflow_for_each_use():
    assert set(NAMES) == {f"ersde_{name}" for name in ("text_to_image", "flow", "few_steps", "image_to_image", "eta",
                                                       "noise_scales", "two_stages", "plot")}
    # The host serves one folder of this kind; files of another kind would be listed or ignored.
    assert {path.suffix for path in FOLDER.iterdir()} == {".json", ".jpg"}


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_has_a_picture_of_its_own(name):
    Image = pytest.importorskip("PIL.Image")
    file = FOLDER / f"{name}.jpg"
    with Image.open(file) as picture:
        assert picture.format == "JPEG" and picture.size == (480, 480)
    assert file.stat().st_size < 60_000


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_is_for_the_canvas_and_says_which_model_to_get(name):
    graph = load(name)
    assert {"nodes", "links", "version", "last_node_id", "last_link_id"} <= set(graph)
    assert None not in graph.values()               # which an older page would call invalid
    assert not re.search(r"/home/|/root/|/Users/|127\.0", json.dumps(graph))
    notes = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] in NOTES]
    loaders = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "CheckpointLoaderSimple"]
    assert loaders and set(loaders) <= MODELS
    assert all(any(loader in note and "models/checkpoints" in note for note in notes) for loader in loaders)
    assert any(node["type"].startswith("ERSDE") for node in graph["nodes"])


@pytest.mark.parametrize("name", NAMES)
def test_no_node_covers_another(name):
    title = 30
    boxes = [(node["pos"][0], node["pos"][1] - title, node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1])
             for node in load(name)["nodes"]]
    for (x, y, right, bottom), (x2, y2, right2, bottom2) in itertools.combinations(boxes, 2):
        assert right <= x2 or right2 <= x or bottom <= y2 or bottom2 <= y


@pytest.mark.parametrize("name", NAMES)
def test_a_workflows_values_are_those_of_the_nodes(name):
    """Every widget in its place: seeds fixed, a name of ours where a name is due."""
    graph = load(name)
    assert "randomize" not in json.dumps(graph)
    for node in to_prompt(graph).values():
        inputs = node["inputs"]
        if not node["class_type"].startswith("ERSDE") or node["class_type"] == "ERSDE_NoiseScale":
            continue
        assert inputs["order"] == 0 and inputs["noise_scale"] == "as preset" and inputs["method"] == "as preset"
        assert inputs["start_percent"] == inputs["end_percent"] == -1
        if "cfg_pp" in inputs:
            assert inputs["cfg_pp"] is False and inputs["noise"] == "auto" and inputs["step_noise_seed"] == -1


# Help and locales

def test_help_pages_and_locales_are_up_to_date():
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "make_comfyui_help.py"), "--check"], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("key", IDS)
def test_every_node_has_its_help_and_its_names_in_both_languages(key):
    nodes = {language: json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
             for language in ("en", "zh")}
    assert list(nodes["en"]) == list(nodes["zh"]) == IDS
    english, chinese = nodes["en"][key], nodes["zh"][key]
    assert list(english["inputs"]) == list(chinese["inputs"]) and list(english["outputs"]) == list(chinese["outputs"])
    han = re.compile("[\\u4e00-\\u9fff]")
    for text in (chinese["description"], chinese["display_name"], *(each["tooltip"] for each in chinese["inputs"].values())):
        assert han.search(text), text
    assert not han.search(json.dumps(english, ensure_ascii=False))
    for page, definition in ((f"{key}.md", english), (f"{key}/zh.md", chinese)):
        text = (ROOT / "web" / "docs" / page).read_text(encoding="utf-8")
        assert text.startswith("# ") and all(f"`{name}`" in text for name in definition["inputs"])


# The registry

def test_the_registrys_rules_are_kept():
    """No eval or exec, no subprocess or pip at run time, no network: nothing of the kind in what a host loads."""
    banned = {"subprocess", "socket", "urllib", "requests", "http", "pip", "ftplib"}
    files = [ROOT / "__init__.py", ROOT / "nodes.py",
             *(file for file in (ROOT / "ersde").rglob("*.py") if "demo" not in file.parts)]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), file
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & banned, file
            if isinstance(node, ast.ImportFrom):
                assert node.level or (node.module or "").split(".")[0] not in banned, file


def test_pyproject_is_complete_for_the_registry():
    tomllib = pytest.importorskip("tomllib")
    import ersde

    about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, comfy = about["project"], about["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{2,}", project["name"]) and "comfyui" not in project["name"]
    assert project["version"] == ersde.__version__ and re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["dependencies"] == []            # nothing is installed over a host's own
    assert project["description"] and project["readme"] == "README.md" and project["license"] == {"file": "LICENSE"}
    assert project["requires-python"] == ">=3.10" and "Operating System :: OS Independent" in project["classifiers"]
    assert len(project["name"]) < 100 and comfy["DisplayName"] and comfy["requires-comfyui"] == ">=0.3.64"
    assert FILES and (ROOT / "LICENSE").is_file()
    # What only the publisher knows: there to be filled in, empty or as the registry takes it.
    assert re.fullmatch(r"|[a-z0-9][a-z0-9-]*", comfy["PublisherId"])
    for address in (comfy["Icon"], *(project["urls"][name] for name in ("Repository", "Documentation", "Bug Tracker"))):
        assert re.fullmatch(r"|https://\S+", address), address
