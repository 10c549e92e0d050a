"""What a person sees of the pack in ComfyUI: its workflows run, its help and translations are served, and the real page in
headless Chromium loads each workflow.

The last part needs playwright and Chromium (on PATH) on the test's side, and the host's own front end package.  Its pictures
go to the folder that ERSDE_SCREENSHOTS names, or stay in pytest's.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_host import REPOSITORY, ComfyUI
from comfy_workflows import FOLDER, NAMES, load, to_prompt

pytestmark = pytest.mark.host
SWAPPED = {"v1-5-pruned-emaonly-fp16.safetensors": "sd15.safetensors",
           "sd3.5_large_fp8_scaled.safetensors": "flow.safetensors"}
PACK = "comfyui-er-sde"
IDS = ["ERSDE_Sampler", "ERSDE_KSampler", "ERSDE_KSamplerAdvanced", "ERSDE_NoiseScale", "ERSDE_Plot", "ERSDE_Preset",
       "ERSDE_PresetSave"]


def swapped(prompt):
    """The prompt with the tiny models in place of the public ones, and small pictures."""
    for node in prompt.values():
        inputs = node["inputs"]
        if "ckpt_name" in inputs:
            inputs["ckpt_name"] = SWAPPED[inputs["ckpt_name"]]
        for side in ("width", "height"):
            if side in inputs:
                inputs[side] = 64
    return prompt


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_runs(comfy, name):
    prompt = swapped(to_prompt(load(name)))
    pictures = comfy.pictures(prompt)
    shown = [key for key, node in prompt.items() if node["class_type"] in ("PreviewImage", "SaveImage")]
    assert sorted(pictures) == sorted(shown) and all(picture.std() > 5 for picture in pictures.values())


def test_the_workflows_are_in_the_template_browser(comfy):
    assert sorted(comfy.get("/api/workflow_templates")[PACK]) == NAMES
    for name in NAMES:
        for ending in ("json", "jpg"):
            served = comfy.get(f"/api/workflow_templates/{PACK}/{name}.{ending}", raw=True)
            assert served == (FOLDER / f"{name}.{ending}").read_bytes()


def test_help_and_translations_are_served(comfy):
    for key in IDS:
        for page in (f"{key}.md", f"{key}/zh.md"):
            served = comfy.get(f"/extensions/{PACK}/docs/{page}", raw=True)
            assert served == (REPOSITORY / "web" / "docs" / page).read_bytes()
    assert f"/extensions/{PACK}/js/ersde.js" in comfy.get("/extensions")
    words = comfy.get("/i18n")
    for language in ("en", "zh"):
        assert set(IDS) <= set(words[language]["nodeDefs"])
        for key in IDS:
            given = {name for group in ("required", "optional") for name in comfy.nodes[key]["input"].get(group, {})}
            assert set(words[language]["nodeDefs"][key]["inputs"]) == given


# The page itself

@pytest.fixture(scope="module")
def front(installed):
    """The host with its real page."""
    pytest.importorskip("playwright.sync_api", reason="no playwright here: the real page was not looked at")
    if not shutil.which("chromium"):
        pytest.skip("no chromium on PATH: the real page was not looked at")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import comfyui_frontend_package"], capture_output=True).returncode:
        pytest.skip("the host's Python has no comfyui-frontend-package: the real page was not looked at")
    settings = installed / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    (installed / "presets.json").write_text(json.dumps({"my look": {"noise_scale": "sde", "eta": 0.3}}))
    with ComfyUI(installed, frontend=True) as comfy:
        yield comfy
    (installed / "presets.json").unlink()


@pytest.fixture(scope="module")
def chromium(front):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, front):
    """The canvas, and in `page.wrong` what went wrong: errors in the console, and bad answers to the pack's own requests."""
    page = chromium.new_page(viewport={"width": 1900, "height": 1000})
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(f"error: {error}"))
    page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
    page.on("response", lambda answer: page.wrong.append(f"{answer.status} {answer.url}")
            if answer.status >= 400 and "ersde" in answer.url.lower() else None)
    page.goto(front.address)
    page.wait_for_function("!!(window.app?.graph && window.LiteGraph?.registered_node_types?.ERSDE_KSampler)",
                           timeout=120_000)
    page.wait_for_timeout(1000)
    assert page.evaluate("() => window.app.extensions.map(each => each.name)").count("ersde.preset") == 1
    page.before = list(page.wrong)          # the host's own, without anything of ours on the canvas
    yield page
    page.close()


def screenshot(page, name, tmp_path):
    folder = Path(os.environ.get("ERSDE_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(800)
    page.screenshot(path=folder / f"{name}.png")
    assert (folder / f"{name}.png").stat().st_size > 20_000


def errors(page):
    """What went wrong since the page was ready, but for what the host asks of the network that it has not got."""
    since = page.wrong[len(page.before):]
    return [text for text in since if "ersde" in text.lower() or not ("Failed to load resource" in text or "net::" in text)]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_loads_each_workflow(page, name, tmp_path):
    graph = load(name)
    page.evaluate("graph => window.app.loadGraphData(graph)", graph)
    page.wait_for_timeout(1000)
    missing = page.evaluate("""() => window.app.graph.nodes.filter(
        node => !(node.type in window.LiteGraph.registered_node_types)).map(node => node.type)""")
    assert missing == []
    # What the page would send is what the tests run.
    sent = page.evaluate("() => window.app.graphToPrompt().then(prompt => prompt.output)")
    assert {key: (node["class_type"], node["inputs"]) for key, node in sent.items()} == \
        {key: (node["class_type"], node["inputs"]) for key, node in to_prompt(graph).items()}
    page.keyboard.press("Escape")           # the dialog on models that are not there
    assert page.get_by_text("Invalid workflow").count() == 0
    screenshot(page, name, tmp_path)
    assert errors(page) == []


def test_choosing_a_preset_of_ones_own_copies_its_settings_into_the_workflow(page, front, tmp_path):
    page.evaluate("""() => { const node = window.LiteGraph.createNode("ERSDE_Preset"); window.app.graph.clear();
                             window.app.graph.add(node); node.pos = [300, 200]; node.setSize([420, 220]); }""")
    choose = """(name) => { const node = window.app.graph.nodes[0], find = (n) => node.widgets.find((w) => w.name === n);
                            const preset = find("preset"); preset.value = name;
                            preset.callback(name, window.app.canvas, node);
                            window.app.canvas.setDirty(true, true);
                            return find("settings").value; }"""
    carried = json.loads(page.evaluate(choose, "my look"))
    assert (carried["noise_scale"], carried["eta"], carried["method"]) == ("sde", 0.3, "exact")
    screenshot(page, "preset node", tmp_path)
    assert page.evaluate(choose, "sde_5") == ""
    # One that was saved since: after a refresh of the lists.
    file = front.base / "presets.json"
    before = file.read_text()
    file.write_text(json.dumps({"my look": {"noise_scale": "ode"}}))
    try:
        page.evaluate("() => window.app.refreshComboInNodes()")
        assert json.loads(page.evaluate(choose, "my look"))["noise_scale"] == "ode"
    finally:
        file.write_text(before)
    assert errors(page) == []


def test_the_nodes_are_there_in_chinese(front, chromium, tmp_path):
    context = chromium.new_context(viewport={"width": 1900, "height": 1000}, locale="zh-CN")
    page = context.new_page()
    front.post("/settings/Comfy.Locale", "zh")
    try:
        page.goto(front.address)
        page.wait_for_function("!!(window.app?.graph && window.LiteGraph?.registered_node_types?.ERSDE_KSampler)",
                               timeout=120_000)
        page.evaluate("""() => { window.app.graph.clear(); let x = 100;
            for (const type of ["ERSDE_KSampler", "ERSDE_NoiseScale", "ERSDE_Preset"]) {
                const node = window.LiteGraph.createNode(type); window.app.graph.add(node); node.pos = [x, 100]; x += 420;
            } }""")
        titles = page.evaluate("() => window.app.graph.nodes.map(node => node.title)")
        assert titles == ["K采样器(ER-SDE)", "ER-SDE 噪声尺度", "ER-SDE 预设"]
        screenshot(page, "chinese", tmp_path)
    finally:
        front.post("/settings/Comfy.Locale", "en")
        context.close()


def test_a_workflow_of_the_first_version_keeps_its_values_and_gets_the_defaults(page):
    """Saved before the later inputs were there."""
    graph = load("ersde_text_to_image")
    (node,) = [node for node in graph["nodes"] if node["type"] == "ERSDE_KSampler"]
    new = to_prompt(graph)[str(node["id"])]["inputs"]
    later = list(new)[list(new).index("corrector"):]
    node["inputs"] = [slot for slot in node["inputs"] if slot["name"] not in (*later, "custom_preset", "custom_scale")]
    node["widgets_values"] = [7, "fixed", 15, 6.5, "flat", "karras", 0.9, "sde", 0.25, 1.1, 2]
    page.evaluate("graph => window.app.loadGraphData(graph)", graph)
    page.wait_for_timeout(500)
    sent = page.evaluate("() => window.app.graphToPrompt().then(prompt => prompt.output)")[str(node["id"])]["inputs"]
    old = {"seed": 7, "steps": 15, "cfg": 6.5, "preset": "flat", "scheduler": "karras", "denoise": 0.9, "noise_scale": "sde",
           "eta": 0.25, "s_noise": 1.1, "order": 2}
    assert {name: sent[name] for name in old} == old
    assert {name: sent[name] for name in later} == {name: new[name] for name in later}
