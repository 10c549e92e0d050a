"""ER-SDE wherever ComfyUI is used: model kinds, parts of runs, latents of every shape, CFG++, dtypes."""
import numpy as np
import pytest
from comfy_host import (
    AS_PRESET,
    ComfyUI,
    add,
    add_custom,
    add_host,
    add_ours,
    add_part,
    add_picture,
    difference,
    workflow,
)

from ersde.hosts.comfyui import NOISE_NAMES

pytestmark = pytest.mark.host
BOTH = ("sd15", "flow")
ORDER_1 = {"order": 1, "corrector": "off"}


# Kinds of models

SAMPLINGS = {
    "eps": ("sd15", "ModelSamplingDiscrete", dict(sampling="eps", zsnr=False)),
    "v": ("sd15", "ModelSamplingDiscrete", dict(sampling="v_prediction", zsnr=False)),
    "v, zero terminal SNR": ("sd15", "ModelSamplingDiscrete", dict(sampling="v_prediction", zsnr=True)),
    "EDM": ("sd15", "ModelSamplingContinuousEDM", dict(sampling="edm", sigma_max=80.0, sigma_min=0.002)),
    "v in EDM": ("sd15", "ModelSamplingContinuousEDM", dict(sampling="v_prediction", sigma_max=120.0, sigma_min=0.002)),
    "flow of shift 1.32": ("flow", "ModelSamplingSD3", dict(shift=1.32)),       # sigma = 1.0000001 in float32
    "flow of shift 8": ("flow", "ModelSamplingSD3", dict(shift=8.0)),
    "flow as Flux's": ("flow", "ModelSamplingFlux", dict(max_shift=1.15, base_shift=0.5, width=1024, height=1024)),
}


def patched(name):
    model, node, inputs = SAMPLINGS[name]
    prompt = workflow(model)
    return prompt, add(prompt, "patched", node, model=["model", 0], **inputs)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_every_kind_of_model_is_the_hosts_er_sde_in_the_compatible_method_and_exact_otherwise(comfy, name):
    prompt, model = patched(name)
    add_host(prompt, "host", model=model)
    add_ours(prompt, "ours", "comfyui", model=model)
    add_ours(prompt, "method", "sde_5", method="comfyui", corrector="off", model=model)
    add_ours(prompt, "exact", "sde_5", model=model)
    # Fewer differences than steps: with many steps both solve the same ODE.
    for steps in (8, 60):
        add_ours(prompt, f"ode {steps}", "ode", model=model, steps=steps, cfg=1.0)
        add_host(prompt, f"euler {steps}", "euler", model=model, steps=steps, cfg=1.0)
    pictures = comfy.pictures(prompt)
    assert difference(pictures["host"], pictures["ours"]) <= 1
    assert np.array_equal(pictures["ours"], pictures["method"])
    distance = [np.abs(pictures[f"ode {n}"] - pictures[f"euler {n}"]).mean() for n in (8, 60)]
    assert distance[1] < max(1.5, distance[0]), distance


def test_a_model_whose_noise_is_not_of_unit_variance(comfy):
    """The state and the added noise scale with it: with a linear model the result does, too."""
    prompt = workflow("flow")
    if "def set_noise_scale" not in (comfy.base / "comfy" / "model_sampling.py").read_text(encoding="utf-8"):
        pytest.skip("this ComfyUI has no model_sampling.noise_scale")
    for scale in (1.0, 3.0):
        model = add(prompt, f"model {scale}", "Probe_Denoiser", model=["model", 0], noise_scale=scale)
        for preset in ("sde", "comfyui"):
            add_ours(prompt, f"{preset} {scale}", preset, model=model, cfg=1.0)
        add_host(prompt, f"host {scale}", model=model, cfg=1.0)
    pictures = comfy.pictures(prompt)
    assert difference(pictures["comfyui 3.0"], pictures["host 3.0"]) <= 1
    assert difference(pictures["sde 3.0"], pictures["sde 1.0"]) > 20


# Parts of runs

@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize("preset", ["sde_5", "sde", "ode"])
def test_chained_halves_are_the_whole_run(comfy, model, preset):
    """By the advanced node, by SplitSigmas, and by the host's nodes with our name; what is lost between is the history."""
    prompt = workflow(model)
    add_ours(prompt, "whole", preset, **ORDER_1)
    head = add_part(prompt, "head", preset, end_at_step=3, return_with_leftover_noise="enable", **ORDER_1)
    add_part(prompt, "advanced", preset, latent_image=head, add_noise="disable", start_at_step=3, **ORDER_1)
    sigmas = add(prompt, "sigmas", "BasicScheduler", model=["model", 0], scheduler="simple", steps=8, denoise=1.0)
    add(prompt, "split", "SplitSigmas", sigmas=sigmas, step=5)
    head = add_custom(prompt, "custom head", preset, sigmas=["split", 0], **ORDER_1)
    add_custom(prompt, "split sigmas", preset, sigmas=["split", 1], latent=head, add_noise=False, **ORDER_1)
    pictures = comfy.pictures(prompt)
    for name in ("advanced", "split sigmas"):
        assert difference(pictures[name], pictures["whole"]) <= 1, name
    assert difference(pictures["head"], pictures["whole"]) > 5


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize("preset", ["sde_5", "sde", "few_steps", "comfyui"])
def test_parts_with_what_the_latent_carries_are_the_whole_run(comfy, model, preset):
    """Our advanced node in two parts and in three, at full order; with another cfg or prompt it is another run."""
    prompt = workflow(model)
    noise = {"noise": "cpu"} if preset == "comfyui" else {}        # the host's own generator would start anew in each part
    add_ours(prompt, "whole", preset, **noise)
    part = dict(return_with_leftover_noise="enable", **noise)
    head = add_part(prompt, "head", preset, end_at_step=3, **part)
    rest = dict(add_noise="disable", **noise)
    middle = add_part(prompt, "middle", preset, latent_image=head, start_at_step=3, end_at_step=6, **{**part, **rest})
    add_part(prompt, "two", preset, latent_image=head, start_at_step=3, **rest)
    add_part(prompt, "three", preset, latent_image=middle, start_at_step=6, **rest)
    add_part(prompt, "another cfg", preset, latent_image=head, start_at_step=3, cfg=2.0, **rest)
    text = add(prompt, "other text", "CLIPTextEncode", clip=["model", 1], text="a green bicycle")
    add_part(prompt, "another prompt", preset, latent_image=head, start_at_step=3, positive=text, **rest)
    pictures = comfy.pictures(prompt)
    for name in ("two", "three"):
        assert difference(pictures[name], pictures["whole"]) <= 1, name
    for name in ("another cfg", "another prompt"):
        assert difference(pictures[name], pictures["whole"]) > 1, name


@pytest.mark.parametrize("model", BOTH)
def test_a_head_or_a_tail_at_full_order_is_finite_and_near(comfy, model):
    prompt = workflow(model)
    add_ours(prompt, "whole", "sde_5", steps=20, cfg=1.5)
    head = add_part(prompt, "head", "sde_5", steps=20, cfg=1.5, end_at_step=10, return_with_leftover_noise="enable")
    add_part(prompt, "tail", "sde_5", steps=20, cfg=1.5, latent_image=head, add_noise="disable", start_at_step=10)
    add_part(prompt, "no leftover", "sde_5", steps=20, cfg=1.5, end_at_step=10)
    pictures = comfy.pictures(prompt)
    assert np.abs(pictures["tail"] - pictures["whole"]).mean() < 4
    assert pictures["no leftover"].std() > 5


@pytest.mark.parametrize("model", BOTH)
def test_the_advanced_node_is_the_hosts_in_every_part(comfy, model):
    prompt = workflow(model)
    for name, part in (("whole", {}), ("late", dict(start_at_step=3)), ("early", dict(end_at_step=5)),
                       ("leftover", dict(end_at_step=5, return_with_leftover_noise="enable")),
                       ("none", dict(start_at_step=8)),
                       ("unnoised", dict(start_at_step=2, end_at_step=6, add_noise="disable"))):
        add_part(prompt, "ours " + name, "comfyui", **part)
        add_part(prompt, "host " + name, "er_sde", kind="KSamplerAdvanced", **part)
    pictures = comfy.pictures(prompt)
    for name in ("whole", "late", "early", "leftover", "none", "unnoised"):
        assert difference(pictures["ours " + name], pictures["host " + name]) <= 1, name


def test_the_noise_of_a_second_half_does_not_repeat_the_firsts(comfy):
    """A model that returns 0 leaves nothing but noise; the host's own generator, to compare, starts anew in each part."""
    prompt = workflow("sd15")
    model = add(prompt, "analytic", "Probe_Denoiser", model=["model", 0], zero=True)
    common = dict(model=model, cfg=1.0, return_with_leftover_noise="enable", eta=4.0)
    for noise in NOISE_NAMES[1:]:
        head = add_part(prompt, noise + " head", "sde", end_at_step=2, noise=noise, **common)
        tail = add_part(prompt, noise + " tail", "sde", latent_image=head, start_at_step=2, end_at_step=4,
                        add_noise="disable", noise=noise, **common)
        add(prompt, noise + " h", "Probe_Save", samples=head)
        add(prompt, noise + " t", "Probe_Save", samples=tail)
    found = comfy.latents(prompt)
    alike = {noise: np.corrcoef(found[noise + " h"][0].ravel(), found[noise + " t"][0].ravel())[0, 1]
             for noise in NOISE_NAMES[1:]}
    assert alike.pop("comfyui") > 0.8 > 0.4 > max(map(abs, alike.values())), alike


@pytest.mark.parametrize("model", BOTH)
def test_flipped_sigmas_invert_a_picture_and_back(comfy, model):
    prompt = workflow(model)
    patched = add(prompt, "analytic", "Probe_Denoiser", model=["model", 0])
    source = add(prompt, "source", "EmptyImage", width=64, height=64, batch_size=1, color=0x3060C0)
    latent = add(prompt, "encoded", "VAEEncode", pixels=source, vae=["model", 2])
    add_picture(prompt, "picture", latent)
    sigmas = add(prompt, "sigmas", "BasicScheduler", model=patched, scheduler="simple", steps=40, denoise=0.6)
    flipped = add(prompt, "flipped", "FlipSigmas", sigmas=sigmas)
    noise = add_custom(prompt, "inverted", "ode", sigmas=flipped, latent=latent, add_noise=False, cfg=1.0)
    add_custom(prompt, "back", "ode", sigmas=sigmas, latent=noise, add_noise=False, cfg=1.0)
    for name in ("inverted run", "back run"):
        prompt[name]["inputs"]["model"] = patched
    pictures = comfy.pictures(prompt)
    assert difference(pictures["back"], pictures["picture"]) <= 6
    assert difference(pictures["inverted"], pictures["picture"]) > 6


def test_flipped_sigmas_with_noise_are_one_sentence(comfy):
    prompt = workflow("flow")
    sigmas = add(prompt, "sigmas", "BasicScheduler", model=["model", 0], scheduler="simple", steps=8, denoise=1.0)
    add_custom(prompt, "picture", "sde", sigmas=add(prompt, "flipped", "FlipSigmas", sigmas=sigmas), add_noise=False)
    message = comfy.failure(prompt)
    assert "sigmas that rise (inversion) need the ODE" in message and "eta" in message


def test_a_refiner_takes_over(comfy):
    prompt = workflow("sd15")
    refiner = add(prompt, "refiner", "CheckpointLoaderSimple", ckpt_name="refiner.safetensors")
    head = add_part(prompt, "head", "sde_5", end_at_step=6, return_with_leftover_noise="enable")
    common = dict(latent_image=head, add_noise="disable", start_at_step=6)
    add_part(prompt, "base", "sde_5", **common)
    add_part(prompt, "refined", "sde_5", model=refiner, **common)
    add_part(prompt, "refined alone", "sde_5", model=refiner)
    pictures = comfy.pictures(prompt)
    assert pictures["refined"].std() > 5
    assert difference(pictures["refined"], pictures["base"]) > 1
    assert difference(pictures["refined"], pictures["refined alone"]) > 5


# Latents

@pytest.mark.parametrize("model", BOTH)
def test_a_picture_of_a_batch_is_that_picture_alone(comfy, model):
    """By its batch_index, in the noise of the steps too."""
    prompt = workflow(model, batch=3)
    add(prompt, "second", "LatentFromBatch", samples=["latent", 0], batch_index=1, length=1)
    add_ours(prompt, "batch", "sde")
    add_ours(prompt, "alone", "sde", latent_image=["second", 0])
    add(prompt, "first", "LatentFromBatch", samples=["latent", 0], batch_index=0, length=1)
    add_ours(prompt, "first alone", "sde", latent_image=["first", 0])
    add_custom(prompt, "first by the sampler", "sde", latent=["first", 0])
    pictures = comfy.pictures(prompt)
    assert pictures["batch"].shape == (3, 64, 64, 3)
    assert difference(pictures["batch"][1], pictures["alone"]) <= 1
    assert difference(pictures["batch"][0], pictures["first alone"]) <= 1
    assert difference(pictures["batch"][0], pictures["first by the sampler"]) <= 1
    assert difference(pictures["batch"][0], pictures["batch"][1]) > 5


@pytest.mark.parametrize("model", BOTH)
def test_every_source_of_noise_draws_a_picture_of_its_own(comfy, model):
    sources = NOISE_NAMES[1:]
    prompt = workflow(model, batch=2)
    add(prompt, "second", "LatentFromBatch", samples=["latent", 0], batch_index=1, length=1)
    for source in sources:
        add_ours(prompt, source, "sde", noise=source)
        add_ours(prompt, source + " alone", "sde", noise=source, latent_image=["second", 0])
        add_ours(prompt, source + " varied", "sde", noise=source, step_noise_seed=5)
    add_ours(prompt, "auto", "sde")
    pictures = comfy.pictures(prompt)
    assert np.array_equal(pictures["auto"], pictures["cpu"])
    assert len({pictures[source].tobytes() for source in sources}) == len(sources)
    for source in sources:
        assert pictures[source].std() > 5
        assert difference(pictures[source], pictures[source + " varied"]) > 5, source
        if source != "comfyui":             # the host's own is one generator for the whole batch
            assert difference(pictures[source][1], pictures[source + " alone"]) <= 1, source


@pytest.mark.parametrize("kind", ["video", "audio", "nested"])
def test_latents_of_video_and_audio(comfy, kind):
    """An analytic model on latents that are no pictures: as the host's er_sde in the compatible method, and exact."""
    if kind == "nested" and not (comfy.base / "comfy" / "nested_tensor.py").is_file():
        pytest.skip("this ComfyUI has no nested latents")
    prompt = workflow("flow")
    model = add(prompt, "analytic", "Probe_Denoiser", model=["model", 0])
    latent = add(prompt, "made", "Probe_Latent", kind=kind)
    common = dict(model=model, latent_image=latent, denoise=0.9)
    for name, preset in (("ours", "comfyui"), ("exact", "sde_5"), ("few", "few_steps")):
        add_ours(prompt, name, preset, **common)
    add_ours(prompt, "cfg_pp", "sde_5", cfg_pp=True, **{**common, "cfg": 1.2})
    add_host(prompt, "host", **common)
    names = ("ours", "exact", "few", "cfg_pp", "host")
    for name in names:
        del prompt[name], prompt[name + " decoded"]
        add(prompt, name, "Probe_Save", samples=[name + " run", 0])
    add_part(prompt, "part", "sde_5", model=model, latent_image=latent, start_at_step=2, end_at_step=6,
             return_with_leftover_noise="enable", add_noise="disable")
    del prompt["part"], prompt["part decoded"]
    add(prompt, "part", "Probe_Save", samples=["part run", 0])
    add(prompt, "source", "Probe_Save", samples=latent)
    found = comfy.latents(prompt)
    for name in (*names, "part"):
        assert [a.shape for a in found[name]] == [a.shape for a in found["source"]], name
        assert all(np.isfinite(a).all() and a.std() > 0.01 for a in found[name]), name
    assert all(np.abs(a - b).max() < 2e-3 for a, b in zip(found["ours"], found["host"]))


def test_a_mask_leaves_the_rest_of_a_video_alone_with_and_without_cfg_pp(comfy):
    prompt = workflow("flow")
    model = add(prompt, "analytic", "Probe_Denoiser", model=["model", 0])
    latent = add(prompt, "made", "Probe_Latent", kind="video")
    whole = add(prompt, "whole", "SolidMask", value=0.0, width=64, height=64)
    half = add(prompt, "half", "SolidMask", value=1.0, width=32, height=64)
    mask = add(prompt, "mask", "MaskComposite", destination=whole, source=half, x=0, y=0, operation="add")
    masked = add(prompt, "masked", "SetLatentNoiseMask", samples=latent, mask=mask)
    for name, cfg_pp in (("plain", False), ("cfg_pp", True)):
        add_ours(prompt, name, "sde_5", model=model, latent_image=masked, cfg=1.5, cfg_pp=cfg_pp)
        del prompt[name], prompt[name + " decoded"]
        add(prompt, name, "Probe_Save", samples=[name + " run", 0])
    add(prompt, "source", "Probe_Save", samples=latent)
    found = {name: arrays[0] for name, arrays in comfy.latents(prompt).items()}
    for name in ("plain", "cfg_pp"):
        assert np.abs(found[name] - found["source"])[..., 5:].max() < 1e-4
        assert np.abs(found[name] - found["source"])[..., :3].max() > 0.1
    assert np.abs(found["plain"] - found["cfg_pp"])[..., :3].max() > 1e-3


# CFG++

@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("model", BOTH)
def test_cfg_pp_at_order_1_is_the_hosts_euler_cfg_pp(comfy, model, cfg):
    prompt = workflow(model)
    add_host(prompt, "host", "euler_cfg_pp", cfg=cfg)
    add_ours(prompt, "ours", "ode", cfg=cfg, cfg_pp=True, **ORDER_1)
    add_custom(prompt, "sampler", "ode", cfg=cfg, cfg_pp=True, **ORDER_1)
    add_ours(prompt, "plain", "ode", cfg=cfg, **ORDER_1)
    pictures = comfy.pictures(prompt)
    assert difference(pictures["host"], pictures["ours"]) <= 1
    assert difference(pictures["host"], pictures["sampler"]) <= 1
    assert difference(pictures["host"], pictures["plain"]) > 1


def test_cfg_pp_by_name_is_cfg_pp_by_node(comfy):
    prompt = workflow("sd15")
    for preset in ("ode", "sde_5"):
        add_host(prompt, preset + " name", f"ersde_{preset}_cfg_pp", cfg=1.5)
        add_ours(prompt, preset + " node", preset, cfg=1.5, cfg_pp=True)
    pictures = comfy.pictures(prompt)
    for preset in ("ode", "sde_5"):
        assert np.array_equal(pictures[preset + " name"], pictures[preset + " node"])


def test_cfg_pp_without_a_negative_prompt_is_one_sentence(comfy):
    prompt = workflow("flow")
    sampler = add(prompt, "sampler", "ERSDE_Sampler", preset="sde_5", cfg_pp=True, **AS_PRESET)
    sigmas = add(prompt, "sigmas", "BasicScheduler", model=["model", 0], scheduler="simple", steps=4, denoise=1.0)
    run = add(prompt, "run", "SamplerCustomAdvanced", noise=add(prompt, "noise", "RandomNoise", noise_seed=1),
              guider=add(prompt, "guider", "BasicGuider", model=["model", 0], conditioning=["positive", 0]),
              sampler=sampler, sigmas=sigmas, latent_image=["latent", 0])
    add_picture(prompt, "picture", run)
    assert comfy.failure(prompt).startswith("cfg_pp needs the prediction for the negative prompt")
    prompt["sampler"]["inputs"]["cfg_pp"] = False
    assert comfy.pictures(prompt)["picture"].std() > 5


# Precision

@pytest.mark.parametrize("option", ["--fp16-unet", "--bf16-unet"])
def test_models_in_half_precision(installed, comfy, option):
    def pictures(server):
        found = {}
        for model in BOTH:
            prompt = workflow(model)
            for preset in ("sde_5", "ode", "comfyui"):
                add_ours(prompt, preset, preset)
            add_host(prompt, "host")
            found.update({(model, name): picture for name, picture in server.pictures(prompt).items()})
        return found

    full = pictures(comfy)
    with ComfyUI(installed, option) as half:
        found = pictures(half)
    for model in BOTH:
        assert difference(found[model, "comfyui"], found[model, "host"]) <= 1
    for key, picture in found.items():
        assert picture.std() > 5 and np.abs(picture - full[key]).mean() < 4, key
