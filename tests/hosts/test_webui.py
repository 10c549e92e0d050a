"""The pack inside a real WebUI, over its API.  Skipped unless WEBUI_PATH names one that already starts by itself.

`webui_host.py` says what the environment variables mean.
"""
import base64
import io
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from problems import published
from webui_host import MARKS, choices, pixels, running

from ersde import PRESETS, sample_preset
from ersde.hosts.webui_settings import PREFIX, sampler_name

OURS = [sampler_name(preset) for preset in PRESETS.values()]

pytestmark = MARKS

STOCK = ["Euler a", "DPM++ 2M"]


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """What the host answers without the pack: its samplers and a picture of each of two."""
    with running(tmp_path_factory.mktemp("webui") / "without") as server:
        return {"samplers": server.get("/sdapi/v1/samplers"), "pictures": {name: stock(server, name) for name in STOCK}}


def stock(server, name):
    """A picture of the host's own, by the checkpoint that is the first by name: which one a host starts with may change."""
    first = os.environ.get("WEBUI_CHECKPOINT") or min(checkpoints(server))
    return server.make_as(name, override_settings={"sd_model_checkpoint": first})


def test_every_preset_is_listed_once_after_the_hosts_own(server, without):
    names = [entry["name"] for entry in server.get("/sdapi/v1/samplers")]
    own = [entry["name"] for entry in without["samplers"]]
    assert not [name for name in own if name.startswith(PREFIX)]
    assert names == own + OURS


def test_the_log_has_no_error_of_ours(server):
    log = server.log.read_text(errors="replace")
    assert "ER-SDE:" not in log and "Error loading script: ersde" not in log


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


# The last one is for Forge Neo, which takes no answer for a wrong one; the others do not know it.
HIRES = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.6,
         "hr_additional_modules": ["Use same choices"]}


def test_hires(server):
    (image,), _ = server.make_as(OURS[0], **HIRES)
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
    assert stock(server, name) == without["pictures"][name]


# What the accordion's settings change, over the API.

SDE = sampler_name(PRESETS["sde"])


def with_settings(values):
    return {"alwayson_scripts": {"ER-SDE": {"args": values}}}


def ours(infotext):
    """What an infotext says of us."""
    return {key.strip(): value.strip() for key, _, value in (part.partition(":") for part in infotext.split(","))
            if key.strip().startswith(PREFIX)}


def same(a, b):
    return abs(pixels(a) - pixels(b)).max() == 0


def test_the_api_tells_the_arguments(server):
    for tab in (False, True):
        info, = [s for s in server.get("/sdapi/v1/script-info") if s["name"] == "er-sde" and s["is_img2img"] == tab]
        assert info["is_alwayson"]
        assert [arg["label"] for arg in info["args"]] == ["preset", "noise scale", "eta", "s_noise", "order", "corrector",
                                                          "noise start", "noise end"]


def test_three_ways_to_say_the_same(server):
    """In their order, by name, and as settings of this request alone."""
    plain, = server.make_as(SDE)[0]
    texts, images = [], []
    for how in (with_settings(["", "sde_4", 0.5, None, 2, "off"]),
                with_settings([{"noise_scale": "sde_4", "eta": 0.5, "order": 2, "corrector": False}]),
                {"override_settings": {"ersde_noise_scale": "sde_4", "ersde_eta": 0.5, "ersde_order": "2",
                                       "ersde_corrector": "off"}}):
        (image,), (text,) = server.make_as(SDE, **how)
        images.append(image)
        texts.append(ours(text))
    assert texts[0] == texts[1] == texts[2] == {"ER-SDE noise scale": "sde_4", "ER-SDE eta": "0.5", "ER-SDE order": "2",
                                                "ER-SDE corrector": "off"}
    assert same(images[0], images[1]) and same(images[0], images[2]) and not same(images[0], plain)
    (image,), (text,) = server.make_as(SDE)
    assert same(image, plain) and not ours(text)            # nothing is left of them


def test_another_preset_is_that_presets_picture(server):
    for preset in ("flat", "few_steps", "comfyui"):
        (image,), (text,) = server.make_as(SDE, **with_settings([preset]))
        assert ours(text) == {"ER-SDE preset": preset}
        assert same(image, server.make_as(sampler_name(PRESETS[preset]))[0][0])


@pytest.mark.parametrize("how, words", [
    (with_settings([{"eta": -1}]), ["eta", "-1.0", "between 0 and 10"]),
    (with_settings([{"etta": 1}]), ["etta", "noise_scale"]),
    (with_settings(["gone"]), ["preset", "gone", "sde_5"]),
    (with_settings(["comfyui", "", "", "", 5]), ["order", "between 1 and 3"]),
    ({"override_settings": {"ersde_noise_scale": "sde_9"}}, ["noise scale", "sde_9", "sde_5"]),
], ids=str)
@pytest.mark.parametrize("kind", ["txt2img", "img2img"])
def test_a_wrong_value_is_refused(server, how, words, kind):
    start = [base64.b64encode(server.make_as("Euler a")[0][0]).decode()]
    status, answer = server.ask(f"/sdapi/v1/{kind}", server.request(SDE, **how, **({} if kind == "txt2img" else
                                                                                    {"init_images": start})))
    assert status == 422 and "ER-SDE: " in str(answer) and all(word in str(answer) for word in words), (status, answer)
    assert not ours(server.make_as(SDE)[1][0])              # and the next one is as if nothing had been


def test_img2img_with_settings(server):
    start = base64.b64encode(server.make_as("Euler a")[0][0]).decode()
    changes = {"kind": "img2img", "init_images": [start], "denoising_strength": 0.6}
    plain, = server.make_as(SDE, **changes)[0]
    (image,), (text,) = server.make_as(SDE, **changes, **with_settings([{"eta": 0.2}]))
    assert ours(text) == {"ER-SDE eta": "0.2"} and not same(image, plain)


@pytest.mark.parametrize("soft", [False, True], ids=["inpaint", "soft inpainting"])
def test_inpainting_keeps_what_is_masked(server, soft):
    Image = pytest.importorskip("PIL.Image")
    start = server.make_as("Euler a", width=128, height=128)[0][0]
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (64, 0, 128, 128))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    scripts = [s["name"] for s in server.get("/sdapi/v1/script-info")]
    if soft and "soft inpainting" not in scripts:
        pytest.skip("this WebUI has no soft inpainting")
    how = {"alwayson_scripts": {"soft inpainting": {"args": [True]}}} if soft else {}
    for name in ("Euler a", SDE, OURS[0]):
        (image,), _ = server.make_as(name, kind="img2img", init_images=[base64.b64encode(start).decode()], width=128,
                                     height=128, mask=base64.b64encode(buffer.getvalue()).decode(), mask_blur=0,
                                     inpainting_fill=1, denoising_strength=0.7, **how)
        change = abs(pixels(image) - pixels(start)).mean(axis=(0, 2))
        if name == "Euler a" and change.max() == 0:
            pytest.skip("inpainting like this changes nothing with this WebUI's own sampler either")
        # Soft inpainting keeps what is far from the mask, and blends in between.
        assert change[:16 if soft else 48].max() < 3 and change[80:].mean() > 5


def test_hires_with_another_sampler(server):
    """eta 0.5 is what `flat colours` has anyway: only the second pass differs from its preset."""
    flat = sampler_name(PRESETS["flat"])
    (image,), (text,) = server.make_as(flat, **HIRES, hr_sampler_name=SDE, **with_settings([{"eta": 0.5}]))
    assert ours(text) == {"ER-SDE eta": "0.5"} and f"Hires sampler: {SDE}" in text
    (plain,), (text,) = server.make_as(flat, **HIRES, hr_sampler_name=SDE)
    assert ours(text) == {} and not same(plain, image)


def test_infotext_over_the_api(server):
    (_,), (text,) = server.make_as("Euler a")
    status, answer = server.ask("/sdapi/v1/txt2img", {"infotext": text})
    if status != 200:
        pytest.skip(f"this WebUI's API cannot read an infotext: {answer}")
    (image,), (text,) = server.make_as(SDE, **with_settings([{"eta": 0.4, "noise_scale": "sde_2"}]))
    answer = server.post("/sdapi/v1/txt2img", {"infotext": text})
    assert same(base64.b64decode(answer["images"][0]), image)


def plot(server, values=None, check=True, **axes):
    """An X/Y/Z plot: axes as x=("label", "values"); the infotexts of its cells."""
    info, = [s for s in server.get("/sdapi/v1/script-info") if s["name"] == "x/y/z plot" and not s["is_img2img"]]
    args = [arg.get("value") for arg in info["args"]]
    labels = [arg["label"] for arg in info["args"]]
    names = info["args"][labels.index("X type")]["choices"]
    for letter in "xyz":            # the API gives the names and wants the numbers
        label, text = axes.get(letter, ("Nothing", ""))
        at = labels.index(f"{letter.upper()} type")
        args[at:at + 3] = [names.index(label), text, text.split(", ")]
    args[labels.index("Draw legend")] = False
    args[labels.index("Include Sub Images")] = True
    make = server.make_as if check else server.make
    return make(SDE, script_name="x/y/z plot", script_args=args, **(values or {}))


def test_the_axes_of_a_plot(server):
    images, texts = plot(server, x=("[ER-SDE] eta", "0, 0.5, 1"), y=("[ER-SDE] preset", "sde, flat"))
    cells = list(map(ours, texts[-6:]))
    assert cells == [{"ER-SDE eta": "0"}, {"ER-SDE eta": "0.5"}, {}, {"ER-SDE preset": "flat", "ER-SDE eta": "0"},
                     {"ER-SDE preset": "flat"}, {"ER-SDE preset": "flat", "ER-SDE eta": "1"}], texts
    images, texts = plot(server, x=("[ER-SDE] noise scale", "sde, sde_5"), y=("[ER-SDE] order", "1-3"))
    assert [ours(text).get("ER-SDE order", "3") for text in texts[-6:]] == ["1", "1", "2", "2", "3", "3"]
    assert [ours(text).get("ER-SDE noise scale") for text in texts[-6:]] == [None, "sde_5"] * 3


def test_a_plot_over_samplers_leaves_nothing_of_us_on_others(server):
    images, texts = plot(server, x=("Sampler", f"{SDE}, Euler a"), values=with_settings([{"eta": 0.5}]), check=False)
    assert [ours(text) for text in texts[-2:]] == [{"ER-SDE eta": "0.5"}, {}]


def test_batch_count_equals_single_images(server):
    gentle = {"cfg_scale": 1, "steps": 4}
    for settings in ({}, with_settings([{"eta": 0.7, "order": 2}])):
        images, texts = server.make_as(SDE, n_iter=3, **gentle, **settings)
        for k, image in enumerate(images[-3:]):
            assert abs(pixels(image) - pixels(server.make_as(SDE, seed=7 + k, **gentle, **settings)[0][0])).mean() < 0.5
        assert len({str(ours(text)) for text in texts[-3:]}) == 1


@pytest.mark.parametrize("size", [3])
def test_an_item_of_a_larger_batch_is_its_single_image(server, size):
    gentle = {"cfg_scale": 1, "steps": 4}
    images, _ = server.make_as(SDE, batch_size=size, **gentle)
    for k, image in enumerate(images[-size:]):
        assert abs(pixels(image) - pixels(server.make_as(SDE, seed=7 + k, **gentle)[0][0])).mean() < 0.5


def test_prompt_editing(server):
    plain, = server.make_as(SDE)[0]
    edited, = server.make_as(SDE, prompt="[a lighthouse:a forest at night:0.5]")[0]
    assert not same(plain, edited)


def checkpoints(server):
    return [model["title"] for model in server.get("/sdapi/v1/sd-models")]


def refiner(server):
    """The name of another checkpoint than the one that the requests use."""
    names = checkpoints(server)
    current = server.request(SDE).get("override_settings", {}).get("sd_model_checkpoint", names[0])
    return os.environ.get("WEBUI_REFINER") or next(name for name in names if not name.startswith(current))


def test_a_refiner(server):
    """Another checkpoint half-way; the picture is that of a run, the same each time, and the base is back afterwards."""
    if len(checkpoints(server)) < 2:
        pytest.skip("one checkpoint: no refiner")
    base = server.make_as(SDE)[0][0]
    how = {"refiner_checkpoint": refiner(server), "refiner_switch_at": 0.5, "steps": 10}
    pictures = [server.make_as(SDE, **how) for _ in range(2)]
    for (image,), (text,) in pictures:
        assert "Refiner switch at: 0.5" in text and pixels(image).std() > 1
    assert same(pictures[0][0][0], pictures[1][0][0])
    assert not same(pictures[0][0][0], server.make_as(SDE, steps=10)[0][0])
    assert same(base, server.make_as(SDE)[0][0])


class Run:
    """One picture as its network met it: sigmas of shape (steps + 1,), states, evaluations and their part for the condition
    alone by step, float64.
    """

    def __init__(self, server, sampler, **changes):
        server.get("/ersde-probe")                      # what was before is not ours
        _, (self.infotext,) = server.make_as(sampler, **changes)
        steps = server.get("/ersde-probe")
        self.fork = steps[0]["fork"]
        self.sigmas = torch.tensor([*(step["sigma"] for step in steps), 0.0], dtype=torch.float64)
        self.states, self.evaluations, self.conditional = (
            torch.tensor([step[key] for step in steps], dtype=torch.float64) for key in ("x", "denoised", "conditional"))

    def difference(self, sampler, first=0, mask=1.0):
        """How far, by step, are the states that `sampler(model, x, sigmas, excess)` asks for from the recorded ones,
        relative to them, if it begins at the step `first` and is answered as the host was.

        mask: 1 where the picture is new.
        """
        out = [0.0] * first

        def model(x, *_, **__):
            i = len(out)
            out.append(((x - self.states[i]).norm() / self.states[i].norm()).item())
            return self.evaluations[i]

        excess = lambda: (self.evaluations[len(out) - 1] - self.conditional[len(out) - 1]) * mask
        sampler(model, self.states[first], self.sigmas[first:], excess)
        return torch.tensor(out)


def by_library(preset, process="ve", told=True):
    """The library's run without noise; `told`: it knows what guidance adds."""
    return lambda model, x, sigmas, excess: sample_preset(model, x, sigmas, PRESETS[preset], disable=True, process=process,
                                                          excess=excess if told else None)


@pytest.mark.parametrize("steps", [4, 6])
def test_the_long_steps_are_told_what_guidance_adds(server, steps):
    """To the library's own run; without the prediction for the condition alone it would be another picture."""
    ode = sampler_name(PRESETS["ode"])
    run = Run(server, ode, steps=steps, cfg_scale=7)
    assert len(run.states) == steps and run.difference(by_library("ode")).max() < 1e-5
    assert run.difference(by_library("ode", told=False)).max() > 1e-3
    plain = Run(server, ode, steps=steps, cfg_scale=1)
    assert plain.difference(by_library("ode", told=False)).max() < 1e-5


def test_under_a_mask_guidance_adds_to_what_is_new(server):
    Image = pytest.importorskip("PIL.Image")
    start = base64.b64encode(server.make_as("Euler a", width=128, height=128)[0][0]).decode()
    picture, buffer = Image.new("L", (128, 128), 0), io.BytesIO()
    picture.paste(255, (64, 0, 128, 128))
    picture.save(buffer, "PNG")
    run = Run(server, sampler_name(PRESETS["ode"]), kind="img2img", init_images=[start], width=128, height=128,
              mask=base64.b64encode(buffer.getvalue()).decode(), mask_blur=0, inpainting_fill=1, denoising_strength=0.9,
              cfg_scale=7)
    if run.fork:
        pytest.skip("this WebUI exchanges the noise of what is kept before each call, so that no run can be made again")
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    assert len(run.states) > 4 and run.difference(by_library("ode"), mask=mask).max() < 1e-5
    assert run.difference(by_library("ode")).max() > 1e-3
    assert run.difference(by_library("ode", told=False)).max() > 1e-3


def test_nothing_is_left_with_the_host_after_a_guided_run(server):
    """The same pictures of its own sampler, with AND as well, and no error in its log."""
    plain, = server.make_as("Euler a", cfg_scale=7)[0]
    for changes in ({}, {"prompt": "a lighthouse AND a forest at night :0.5"}, {"batch_size": 2},
                    {"s_min_uncond": 8.0, "prompt": "a lighthouse AND a forest"}):
        (*_, image), _ = server.make_as(OURS[0], cfg_scale=7, steps=6, **changes)
        assert pixels(image).std() > 1
    assert same(server.make_as("Euler a", cfg_scale=7)[0][0], plain)
    assert "Error executing callback" not in server.log.read_text(errors="replace")


def test_no_history_crosses_a_refiners_switch(server):
    """The part after the switch is a run by itself, and no evaluation of the new model corrects a step of the old one."""
    if len(checkpoints(server)) < 2:
        pytest.skip("one checkpoint: no refiner")
    ode = sampler_name(PRESETS["ode"])
    assert Run(server, ode, steps=20).difference(by_library("ode")).max() < 1e-5
    run = Run(server, ode, steps=20, refiner_checkpoint=refiner(server), refiner_switch_at=0.5)
    whole = run.difference(by_library("ode"))
    switch = int((whole > 1e-3).nonzero()[0]) - 1           # the first step that the history would change
    # By part of the steps, of the schedule or, in Forge Neo, by the sigma: the hosts do not agree.
    assert 1 < switch < 18 and whole[:switch + 1].max() < 1e-5
    assert run.difference(by_library("ode"), first=switch).max() < 1e-5


def by_comfyui(seed, process):
    """ComfyUI's er_sde, from its formulas, with the noise of the host's generator for that seed."""
    def run(model, x, sigmas, _):
        if process == "flow":       # where the schedule begins at 1, it starts at 0.01 % of it (here for a shift of 3)
            sigmas = sigmas.clamp(max=1 - 1e-4 / 3)
        generator = torch.Generator().manual_seed(seed)
        noise = [torch.randn(x.shape[1:], generator=generator).double()[None] for _ in range(len(sigmas))]
        published(model, x, sigmas, noise[1:], lambda lam: lam * (torch.exp(lam ** 0.3) + 10.0), process, 200)

    return run


def test_comfyui_compatible_is_comfyuis_latent_for_the_same_noise(server):
    run = Run(server, sampler_name(PRESETS["comfyui"]), steps=12)
    assert len(run.states) == 12 and run.difference(by_comfyui(7, "ve")).max() < 1e-5
    assert run.difference(by_comfyui(8, "ve")).max() > 1e-2


def test_a_presets_schedule_is_what_automatic_means(server_of):
    """The sigmas and the picture of that schedule chosen by name, until another one is chosen."""
    with server_of('{"mine": {"scheduler": "karras"}, "plain": {}}') as server:
        mine, plain = PREFIX + "mine", PREFIX + "plain"
        automatic, named, own = Run(server, mine), Run(server, plain, scheduler="Karras"), Run(server, plain)
        assert torch.equal(automatic.sigmas, named.sigmas) and torch.equal(automatic.states, named.states)
        assert ((automatic.sigmas - own.sigmas).abs() > 0.01 * own.sigmas).any()
        assert same(server.make_as(mine)[0][0], server.make_as(plain, scheduler="Karras")[0][0])
        assert "Schedule type: Karras" in automatic.infotext
        other, same_other = (Run(server, name, scheduler="Exponential") for name in (mine, plain))
        assert torch.equal(other.sigmas, same_other.sigmas) and not torch.equal(other.sigmas, automatic.sigmas)


@pytest.mark.skipif(not os.environ.get("WEBUI_FLOW"), reason="WEBUI_FLOW is not set: no flow model to test with")
def test_a_flow_model(server):
    """Each step is the flow process's own, and the infotext says that it is."""
    how = {"steps": 12, **json.loads(os.environ["WEBUI_FLOW"])}
    run = Run(server, sampler_name(PRESETS["ode"]), **how)
    assert ours(run.infotext) == {"ER-SDE process": "flow"} and run.sigmas.max() <= 1
    assert run.difference(by_library("ode", "flow")).max() < 1e-5
    assert run.difference(by_library("ode", "ve")).max() > 1e-2
    for preset in PRESETS:
        run = Run(server, sampler_name(PRESETS[preset]), **how)
        assert ours(run.infotext) == {"ER-SDE process": "flow"} and run.states.isfinite().all()
    run = Run(server, sampler_name(PRESETS["comfyui"]), **how)
    assert run.difference(by_comfyui(7, "flow")).max() < 1e-5


def test_zero_terminal_snr(server):
    if "sd_noise_schedule" not in server.get("/sdapi/v1/options"):
        pytest.skip("this WebUI has no such setting")
    names = (SDE, OURS[0], sampler_name(PRESETS["comfyui"]))
    plain = {name: server.make_as(name)[0][0] for name in names}
    # Not override_settings: AUTOMATIC1111 does not put back a setting that was never saved.
    server.post("/sdapi/v1/options", {"sd_noise_schedule": "Zero Terminal SNR"})
    try:
        for name in names:
            (image,), (text,) = server.make_as(name)
            assert "Noise Schedule: Zero Terminal SNR" in text and pixels(image).std() > 1
            assert not same(image, plain[name])
    finally:
        server.post("/sdapi/v1/options", {"sd_noise_schedule": "Default"})


def test_every_checkpoint_of_the_host(server):
    """eps, v prediction, flow: whatever there is."""
    for name in checkpoints(server):
        for sampler in (SDE, OURS[0], sampler_name(PRESETS["comfyui"])):
            (image,), (text,) = server.make_as(sampler, override_settings={"sd_model_checkpoint": name})
            assert pixels(image).std() > 1, (name, sampler)
            print(name, sampler, ours(text))


@pytest.mark.parametrize("how", ["interrupt", "skip"])
def test_interrupt_and_skip(server, how):
    answers = []
    long = server.request(SDE, steps=150, width=128, height=128, batch_size=1)
    thread = threading.Thread(target=lambda: answers.append(server.ask("/sdapi/v1/txt2img", long)))
    thread.start()
    end = time.monotonic() + 120
    while time.monotonic() < end and server.get("/sdapi/v1/progress")["state"]["sampling_step"] < 3:
        time.sleep(0.1)
    began = server.get("/sdapi/v1/progress")["state"]["sampling_step"]
    server.post(f"/sdapi/v1/{how}", {})
    thread.join(timeout=300)
    (status, answer), = answers
    assert status == 200 and answer["images"] and 3 <= began < 140
    assert pixels(server.make_as(SDE)[0][0]).std() > 1


def test_live_preview(server):
    server.post("/sdapi/v1/options", {"live_previews_enable": True, "show_progress_every_n_steps": 1})
    try:
        long = server.request(SDE, steps=60, width=128, height=128)
        answers, seen = [], []
        thread = threading.Thread(target=lambda: answers.append(server.ask("/sdapi/v1/txt2img", long)))
        thread.start()
        while thread.is_alive():
            progress = server.get("/sdapi/v1/progress")
            if progress.get("current_image"):
                seen.append(progress["state"]["sampling_step"])
            time.sleep(0.1)
        assert answers[0][0] == 200 and seen, "no preview"
    finally:
        server.post("/sdapi/v1/options", {"live_previews_enable": False})


@pytest.mark.skipif(not os.environ.get("WEBUI_PICTURES"), reason="WEBUI_PICTURES is not set: no other host to compare with")
@pytest.mark.parametrize("preset", ["sde_5", "sde", "ode", "comfyui"])
def test_the_same_picture_as_in_other_hosts(server, preset):
    """The first host leaves its pictures in that folder; run the others with the same folder and checkpoint.

    They agree up to the rounding of what is theirs: text encoder, network and decoder, in float32 on the CPU.
    """
    file = Path(os.environ["WEBUI_PICTURES"]) / f"{preset}.png"
    (image,), _ = server.make_as(sampler_name(PRESETS[preset]), steps=8, cfg_scale=1, scheduler="Karras",
                                 override_settings={"CLIP_stop_at_last_layers": 1})     # Forge Neo's default is 2
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
        pytest.skip(f"left {file} for the other hosts")
    difference = abs(pixels(image) - pixels(file.read_bytes()))
    print(preset, "largest difference", difference.max(), "mean", difference.mean())
    assert difference.mean() < 1
