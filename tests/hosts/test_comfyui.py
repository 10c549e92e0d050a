"""A real ComfyUI, driven through its HTTP API and websocket with tiny random models.

    COMFYUI_PATH=/path/to/ComfyUI COMFYUI_PYTHON=/path/to/its/python python -m pytest tests/hosts -k comfyui

COMFYUI_PATH may be left out when the pack lies in a ComfyUI's custom_nodes, and COMFYUI_PYTHON when this Python has its
packages.  COMFYUI_ARGS are further flags for its main.py, `--cpu` where it is not set; with `--force-fp32` the host runs on
its GPU, and with nothing there in half precision, where two pictures that should be the same can be 2 of 255 apart: seven
tests allow 1.  Nothing is written to that folder: the server runs from a scratch folder that links to it.
"""
import json
import time

import numpy as np
import pytest
from comfy_host import (
    AS_PRESET,
    MODELS,
    ComfyUI,
    Events,
    add,
    add_custom,
    add_host,
    add_ours,
    add_part,
    add_picture,
    add_run,
    difference,
    stock_pictures,
    workflow,
)

from ersde import PRESETS

pytestmark = pytest.mark.host
TITLES = {"ERSDE_Sampler": "ER-SDE Sampler", "ERSDE_KSampler": "KSampler (ER-SDE)",
          "ERSDE_KSamplerAdvanced": "KSampler Advanced (ER-SDE)", "ERSDE_NoiseScale": "ER-SDE Noise Scale",
          "ERSDE_Plot": "ER-SDE Plot", "ERSDE_Preset": "ER-SDE Preset", "ERSDE_PresetSave": "ER-SDE Preset Save"}
NAMES = [*(f"ersde_{name}" for name in PRESETS), "ersde_sde_5_cfg_pp", "ersde_ode_cfg_pp"]
BOTH = ("sd15", "flow")


def choices(definition):
    """A list input's choices, as either node schema has them."""
    kind, options = definition
    return kind if isinstance(kind, list) else options["options"]


def test_nodes_are_offered_with_every_tooltip(comfy):
    for key, title in TITLES.items():
        node = comfy.nodes[key]
        assert node["display_name"] == title and node["category"].startswith("sampling") and node["description"]
        for group in node["input"].values():
            for name, definition in group.items():
                assert name in ("prompt", "extra_pnginfo") or definition[1]["tooltip"], (key, name)
        assert all(node["output_tooltips"])
        # Only newer versions have them.
        assert "search_aliases" not in comfy.nodes["KSampler"] or "er_sde" in node["search_aliases"]
    inputs, theirs = (comfy.nodes[key]["input"]["required"] for key in ("ERSDE_KSampler", "KSampler"))
    assert choices(inputs["scheduler"]) == choices(theirs["scheduler"])
    assert choices(inputs["preset"]) == list(PRESETS)


def test_the_hosts_own_nodes_are_as_before_but_for_our_names_in_its_list_of_samplers(comfy, before):
    nodes = before[0]
    assert set(comfy.nodes) - set(nodes) == set(TITLES)
    assert set(nodes) <= set(comfy.nodes)
    without = lambda node: json.dumps(node).replace(", " + json.dumps(NAMES)[1:-1], "")
    named = {key for key in nodes if without(comfy.nodes[key]) != json.dumps(comfy.nodes[key])}
    assert {"KSampler", "KSamplerAdvanced", "KSamplerSelect"} <= named
    other = {key for key, node in nodes.items() if without(comfy.nodes[key]) != json.dumps(node)}
    assert all(key.startswith("LoadImage") for key in other), other         # what lies in the input folder


@pytest.mark.parametrize("model", MODELS)
def test_stock_pictures_are_bit_identical_with_the_pack(comfy, before, model):
    after = stock_pictures(comfy, model)
    for sampler, picture in before[1][model].items():
        assert np.array_equal(picture, after[sampler]), sampler
        assert picture.std() > 5, sampler


@pytest.mark.parametrize("model", BOTH)
def test_every_way_draws_the_same_picture_in_every_preset(comfy, model):
    """The two nodes, the name in the host's list, and the library on the host's model with nothing of the pack between."""
    prompt = workflow(model)
    for preset in PRESETS:
        add_ours(prompt, preset, preset)
        add_custom(prompt, preset + " custom", preset)
        add_host(prompt, preset + " name", "ersde_" + preset)
        if preset != "comfyui":                             # that takes the host's noise
            add_run(prompt, preset + " library", "Probe_Direct", preset=preset)
            del prompt[preset + " library run"]["inputs"]["denoise"]
    pictures = comfy.pictures(prompt)
    for name, picture in pictures.items():
        assert np.array_equal(picture, pictures[name.split()[0]]), name
        assert picture.std() > 5, name
    assert difference(pictures["sde_5"], pictures["sde"]) > 1


def test_a_name_is_a_sampler_of_the_hosts_own_nodes(comfy):
    prompt = workflow("flow")
    add_ours(prompt, "node", "sde")
    add_custom(prompt, "selected", sampler=add(prompt, "select", "KSamplerSelect", sampler_name="ersde_sde"))
    add_part(prompt, "advanced", "ersde_sde", kind="KSamplerAdvanced")
    pictures = comfy.pictures(prompt)
    assert np.array_equal(pictures["node"], pictures["selected"]) and np.array_equal(pictures["node"], pictures["advanced"])


def test_without_the_pack_a_workflow_with_our_name_is_refused_by_that_name(before):
    ((name, details),) = before[2]["named run"]
    assert name == "sampler_name" and "ersde_sde_5" in details and "not in" in details


def test_without_the_pack_a_workflow_with_our_node_is_refused_by_its_name(before):
    status, body = before[3]
    assert status == 400 and "ERSDE_KSampler" in body["error"]["message"] + body["error"]["details"], body


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize("steps, scheduler, denoise, batch", [
    (8, "simple", 1.0, 1), (20, "karras", 1.0, 1), (3, "normal", 1.0, 1), (8, "beta", 0.6, 1), (8, "simple", 1.0, 2)])
def test_the_compatible_preset_is_the_hosts_er_sde(comfy, model, steps, scheduler, denoise, batch):
    prompt = workflow(model, batch)
    settings = dict(steps=steps, scheduler=scheduler, denoise=denoise, seed=2 ** 63 + 5)
    add_host(prompt, "host", **settings)
    add_ours(prompt, "ours", "comfyui", **settings)
    pictures = comfy.pictures(prompt)
    assert difference(pictures["host"], pictures["ours"]) <= 1
    assert pictures["host"].std() > 5


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize("member, theirs", [("sde", "Reverse-time SDE"), ("ode", "ODE")])
def test_the_compatible_method_is_the_hosts_in_the_other_members(comfy, model, member, theirs):
    prompt = workflow(model)
    add_custom(prompt, "ours", "comfyui", noise_scale=member)
    add_custom(prompt, "host", "comfyui")
    prompt["host sampler"] = {"class_type": "SamplerER_SDE", "inputs": {
        "solver_type": theirs, "max_stage": 3, "eta": 1.0, "s_noise": 1.0}}
    pictures = comfy.pictures(prompt)
    assert difference(pictures["host"], pictures["ours"]) <= 1


@pytest.mark.parametrize("model", BOTH)
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
    add_host(prompt, "host", **settings)
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


ERRORS = {
    "an order too high for the method": (dict(preset="comfyui", order=5), ["order must be between 1 and 3", "5"]),
    "a window the wrong way round": (dict(preset="flat", start_percent=0.9), ["start must not be above end", "0.9", "0.7"]),
}


@pytest.mark.parametrize("add_sampler", [add_ours, add_custom, add_part])
@pytest.mark.parametrize("case", ERRORS)
def test_a_bad_value_is_one_sentence_in_the_error_box(comfy, add_sampler, case):
    inputs, words = ERRORS[case]
    prompt = workflow("flow")
    add_sampler(prompt, "picture", **inputs)
    message = comfy.failure(prompt)
    assert all(word in message for word in words), message


def test_a_bad_value_from_another_node_is_named_too(comfy):
    prompt = workflow("flow")
    prompt["number"] = {"class_type": "PrimitiveInt", "inputs": {"value": 9}}
    add_ours(prompt, "picture", "sde_5", order=["number", 0])
    message = comfy.failure(prompt)
    assert "order must be between 1 and 5" in message and "9" in message


@pytest.mark.parametrize("change, word", [({"preset": "sde_55"}, "preset"), ({"noise_scale": "x"}, "noise_scale"),
                                          ({"eta": -2.0}, "eta"), ({"order": 6}, "order")])
def test_a_bad_widget_value_is_named(comfy, change, word):
    """When it is sent, or, where the host does not look at a list's value (0.3.64), when it runs."""
    prompt = workflow("flow")
    add_ours(prompt, "picture", **{"preset": "sde_5", **change})
    status, body = comfy.post("/prompt", {"prompt": prompt})
    if status == 200:
        comfy.finish(body["prompt_id"])
        message = comfy.failure(prompt)
        assert message.startswith(word + " must be one of") and list(change.values())[0] in message
    else:
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


@pytest.mark.parametrize("kind", ["node", "part", "custom", "name"])
def test_progress_and_previews_arrive(comfy, kind):
    prompt = workflow("sd15")
    seed = {"node": 101, "part": 102, "custom": 103, "name": 104}[kind]         # a run that is not cached
    if kind == "node":
        add_ours(prompt, "picture", "sde_5", seed=seed)
    elif kind == "part":
        add_part(prompt, "picture", "sde_5", noise_seed=seed, end_at_step=6, return_with_leftover_noise="enable")
    elif kind == "custom":
        add_custom(prompt, "picture", "sde_5", seed=seed)
    else:
        add_host(prompt, "picture", "ersde_sde_5", seed=seed)
    events = Events(comfy)
    try:
        prompt_id = comfy.submit(prompt, events.client)
        events.wait_for("execution_success", prompt_id)
        progress = [(m["data"]["value"], m["data"]["max"]) for m in events.messages
                    if m["type"] == "progress" and m["data"].get("node") == "picture run"]
    finally:
        events.close()
    steps = 6 if kind == "part" else 8
    assert progress == [(i, steps) for i in range(1, steps + 1)]
    assert len(events.previews) >= 1 and all(min(image.size) >= 8 for image in events.previews)


def test_a_variable_keeps_our_names_out_of_the_list_and_the_nodes_work(installed):
    with ComfyUI(installed, ERSDE_COMFYUI_DROPDOWN="off") as comfy:
        assert not [name for name in choices(comfy.nodes["KSampler"]["input"]["required"]["sampler_name"])
                    if name.startswith("ersde")]
        prompt = workflow("flow")
        add_ours(prompt, "picture", "sde_5")
        assert comfy.pictures(prompt)["picture"].std() > 5


# The nodes for noise scales, presets and plots

def test_noise_scales_plug_in(comfy):
    prompt = workflow("sd15")
    scales = {"function": dict(function="sde", eta=0.4, points=""),
              "power": dict(function="points", eta=0.4, points="1e-4 1e-4\n1e4 1e4"),
              "curve": dict(function="points", eta=1.0, points="0.1 1\n1 1\n10 30")}
    for name, inputs in scales.items():
        add_ours(prompt, name, "sde_5", custom_scale=add(prompt, name + " scale", "ERSDE_NoiseScale", **inputs))
    add_ours(prompt, "plain", "sde", eta=0.4)
    pictures = comfy.pictures(prompt)
    assert np.array_equal(pictures["function"], pictures["plain"])
    assert difference(pictures["power"], pictures["plain"]) <= 1
    assert difference(pictures["curve"], pictures["plain"]) > 1


def test_a_falling_curve_is_named_in_the_error_box(comfy):
    prompt = workflow("flow")
    scale = add(prompt, "scale", "ERSDE_NoiseScale", function="points", eta=1.0, points="0.1 2\n1 1.5\n10 30")
    add_ours(prompt, "picture", "sde_5", custom_scale=scale)
    message = comfy.failure(prompt)
    assert "must not fall" in message and "g = 2 at lambda = 0.1" in message and "g = 1.5 at lambda = 1" in message


def test_a_preset_is_saved_shown_loaded_and_carried_to_another_machine(comfy):
    prompt = workflow("flow")
    settings = {"noise_scale": "sde_2", "eta": 0.4, "s_noise": -1.0, "order": 2, "end_percent": 0.8}
    saved = add(prompt, "saved", "ERSDE_PresetSave", name="my look", preset="flat", description="for lines", **settings)
    add_ours(prompt, "at once", "sde_5", custom_preset=saved)
    add_ours(prompt, "inputs", "flat", **settings)
    pictures = comfy.pictures(prompt)
    file = comfy.base / "presets.json"
    assert list(json.loads(file.read_text())) == ["my look"]
    node = comfy.get("/object_info/ERSDE_Preset")["ERSDE_Preset"]["input"]["required"]["preset"]
    assert choices(node)[-1] == "my look"
    carried = node[1]["ersde_carried"]["my look"]

    prompt = workflow("flow")
    add_ours(prompt, "loaded", "sde_5", custom_preset=add(prompt, "load", "ERSDE_Preset", preset="my look", settings=""))
    add_ours(prompt, "by name", "my look")
    pictures.update(comfy.pictures(prompt))
    file.rename(file.with_suffix(".elsewhere"))
    try:                                                    # another machine, which has no such preset
        prompt = workflow("flow")
        add_ours(prompt, "carried", "sde_5", custom_preset=add(prompt, "load", "ERSDE_Preset", preset="my look",
                                                               settings=carried))
        pictures.update(comfy.pictures(prompt))
        prompt["load"]["inputs"]["settings"] = ""
        message = comfy.failure(prompt)
        assert "'my look' is not on this machine" in message
    finally:
        file.with_suffix(".elsewhere").rename(file)
    for name, picture in pictures.items():
        assert np.array_equal(picture, pictures["inputs"]), name

    prompt = workflow("flow")
    add(prompt, "saved", "ERSDE_PresetSave", name="my look", preset="sde", **AS_PRESET)
    assert "'my look' with other settings is there already" in comfy.failure(prompt)
    prompt["saved"]["inputs"]["name"] = "../my look"
    assert comfy.failure(prompt).startswith("name must be 1 to 64 letters")
    assert list(json.loads(file.read_text())) == ["my look"]

    # A node that names it runs again once it was changed, and not before.
    prompt = workflow("flow")
    add_ours(prompt, "by name", "my look")
    assert comfy.outputs(prompt) == comfy.outputs(prompt)
    prompt["saved"] = {"class_type": "ERSDE_PresetSave", "inputs": {"name": "my look", "preset": "sde", "overwrite": True,
                                                                    **AS_PRESET}}
    comfy.finish(comfy.submit(prompt))
    del prompt["saved"]
    assert difference(comfy.pictures(prompt)["by name"], pictures["inputs"]) > 1
    file.unlink()


def test_the_plot_is_a_chart_of_the_model(comfy):
    charts = {}
    for model in BOTH:
        prompt = workflow(model)
        for preset in ("sde_5", "few_steps"):
            chart = add(prompt, preset + " plot", "ERSDE_Plot", model=["model", 0], scheduler="simple", steps=12,
                        denoise=1.0, preset=preset, **AS_PRESET)
            add(prompt, preset, "PreviewImage", images=chart)
        charts.update({(model, name): picture for name, picture in comfy.pictures(prompt).items()})
    assert {chart.shape for chart in charts.values()} == {(760, 1300, 3)}
    assert all(0.02 < (chart < 250).any(-1).mean() < 0.5 for chart in charts.values())
    assert len({chart.tobytes() for chart in charts.values()}) == 4
