"""ComfyUI: presets as SAMPLER objects and sampler names, a run through the host's own sampling code, the plot.

The host's modules are imported inside the functions, so that this module can be read anywhere.
"""
from __future__ import annotations

import json
import logging
import os
import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Callable, List, Optional, Sequence

import numpy as np
import torch

from ..errors import check_choice
from ..history import History
from ..noise import NOISES, make_noise
from ..noise_scale import NOISE_SCALES, NoiseScale, from_points, get_noise_scale, parse_points
from ..presets import PRESETS, Preset, all_presets, from_json, get_preset, save_preset, to_dict, user_presets_path
from ..samplers import etas_in_window, sample_preset
from ..weights import METHODS
from . import first_flow_sigma, read_process, window_sigmas

AS_PRESET = "as preset"
"""The lists' entry that leaves the preset's setting in place, as numbers below 0 and order 0 do."""

ON_OFF = ("on", "off")
AUTO, HOST_NOISE = "auto", "comfyui"
NOISE_NAMES = (AUTO, *NOISES, HOST_NOISE)
"""Where the steps' noise comes from: ours by name, the host's own generator, or whichever belongs to the method."""

POINTS = "points"
"""The noise scale list's entry for a curve of the user's own."""

SWITCH = "ERSDE_COMFYUI_DROPDOWN"
"""The environment variable that keeps our names out of the host's list of samplers, at 0, off, no or false."""

NAME = "ersde_"
"""What our names in the host's list of samplers begin with; `<NAME><preset>` never changes."""

_CFG_PP_NAMES = ("sde_5", "ode")

# What newer versions note in an empty latent so that the model's own size can be made of it; one argument each.
_EMPTY_LATENT_NOTES = ("downscale_ratio_spacial", "downscale_ratio_temporal")


@dataclass(frozen=True)
class CurveSetting:
    """What the noise scale node hands to a sampler: a function and its eta."""

    scale: NoiseScale
    eta: float


@dataclass(frozen=True)
class Settings:
    """What a sampler runs with, all checked.

    Attributes:
        preset: its fields but for the noise scale, where `scale` is given.
        scale: a function in place of the preset's, or None.
        noise: one of `NOISE_NAMES`.
        step_seed: the seed of the steps' noise, or None for the run's.
        cfg_pp: whether the noise direction is the unconditional prediction's.
        batch_index: each picture's place in the batch it was cut from, or None for 0, 1, ...
        history: what the part of the run before this one left, and where this one leaves the same, or None.
    """

    preset: Preset
    scale: Optional[NoiseScale] = None
    noise: str = AUTO
    step_seed: Optional[int] = None
    cfg_pp: bool = False
    batch_index: Optional[Sequence[int]] = None
    history: Optional[History] = None


def make_settings(preset, noise_scale=AS_PRESET, eta=-1.0, s_noise=-1.0, order=0, corrector=AS_PRESET, method=AS_PRESET,
                  start_percent=-1.0, end_percent=-1.0, noise=AUTO, step_noise_seed=-1, cfg_pp=False, custom_preset=None,
                  custom_scale=None) -> Settings:
    """The nodes' inputs, by their names, as `Settings`: a preset with single fields changed.

    Raises:
        ValueError, TypeError: a value is not allowed; names the input, the value and what is allowed.
    """
    base = custom_preset if custom_preset is not None else get_preset(preset, all_presets()[0])
    changes = {}
    if custom_scale is not None:
        changes["eta"] = custom_scale.eta
    elif noise_scale != AS_PRESET:
        changes["noise_scale"] = noise_scale
    # "not below" rather than "at or above": NaN goes on to the check, which names it.  The page's arrows can leave a 0 at
    # -3e-16, which is a 0.
    for field, value in (("eta", eta), ("s_noise", s_noise), ("start", start_percent), ("end", end_percent)):
        if not value < -1e-6:
            changes[field] = 0.0 if value < 0 else value
    if corrector != AS_PRESET:
        changes["corrector"] = check_choice("corrector", corrector, (AS_PRESET, *ON_OFF)) == "on"
    if method != AS_PRESET:
        changes["method"] = check_choice("method", method, (AS_PRESET, *METHODS))
    if order != 0:
        changes["order"] = order
    elif "method" in changes:
        changes["order"] = min(base.order, METHODS[method])      # the person asked for the method, not for this order
    return Settings(base.replace(**changes), custom_scale and custom_scale.scale,
                    check_choice("noise", noise, NOISE_NAMES), None if step_noise_seed < 0 else step_noise_seed,
                    bool(cfg_pp))


def build_sampler(settings: Settings):
    """The host's SAMPLER object for `settings`."""
    import comfy.samplers

    return comfy.samplers.KSAMPLER(sampler_function(lambda: settings))


def sampler_function(find: Callable[[], Settings]):
    """A function with k-diffusion's signature that knows what ComfyUI's models and its er_sde do.

    Args:
        find: () -> the settings, asked for in each run.
    """

    def sample_ersde(model, x, sigmas, extra_args=None, callback=None, disable=None, *, eta=None, s_noise=None,
                     noise_sampler=None):
        """Any of eta, s_noise and noise_sampler takes the place of the settings', as a caller of a name may ask for."""
        settings, extra_args = find(), dict(extra_args or {})
        changes = {name: value for name, value in (("eta", eta), ("s_noise", s_noise)) if value is not None}
        preset = settings.preset.replace(**changes) if changes else settings.preset
        # Newer versions: a model whose training noise was not of unit variance says so here.
        factor = getattr(model.inner_model.model_patcher.get_model_object("model_sampling"), "noise_scale", 1.0)
        if factor != 1.0:
            preset = preset.replace(s_noise=preset.s_noise * float(factor))
        if noise_sampler is None:
            noise_sampler = _noise(settings, preset.method, x, sigmas, extra_args.get("seed"))
        # CFG++ wants D - D_u, everything else what guidance adds to D_c.
        told = {"guidance": _difference(model, extra_args, "uncond", needed=True)} if settings.cfg_pp else \
            {"excess": _difference(model, extra_args, "cond")} if preset.method == "exact" else {}
        return sample_preset(model, x, sigmas, preset, extra_args, callback, disable, noise_sampler=noise_sampler,
                             noise_scale=settings.scale, history=settings.history, **told)

    return sample_ersde


def _noise(settings: Settings, method: str, x, sigmas, seed):
    """The run's noise sampler; in the compatible method the host's own unless another is asked for."""
    name = settings.noise
    if name == AUTO:
        name = HOST_NOISE if method == "comfyui" else next(iter(NOISES))
    seed = seed if settings.step_seed is None else settings.step_seed
    if name != HOST_NOISE:
        return make_noise(name, x, seed, sigmas, images=settings.batch_index)
    import comfy.k_diffusion.sampling

    return comfy.k_diffusion.sampling.default_noise_sampler(x, seed=seed)


def _difference(model, extra_args: dict, part: str, needed: bool = False) -> Callable[[], Optional[torch.Tensor]]:
    """Makes the model calls keep a part of their guidance; returns () -> D less that prediction, of the newest call.

    Under a mask both predictions are blended with the same picture, so that their difference counts by the mask.  Source:
    the host's cfg_function, which hands both to post_cfg functions, and KSamplerX0Inpaint.

    Args:
        part: "cond", the prediction for the positive prompt, or "uncond".
        needed: the host computes the unconditional prediction at cfg 1 too, and a call without is an error; else such a call
            gives None.
    """
    import comfy.model_patcher

    newest = {}

    def keep(args):
        newest.update(guided=args["denoised"], part=args.get(f"{part}_denoised"), sigma=args["sigma"], found=args.get(part))
        return args["denoised"]

    options = comfy.model_patcher.set_model_options_post_cfg_function(
        dict(extra_args.get("model_options") or {}), keep, disable_cfg1_optimization=needed)
    extra_args["model_options"] = options

    def difference():
        if newest.get("found") is None or newest["part"] is None:
            if not needed:
                return None
            raise ValueError("cfg_pp needs the prediction for the negative prompt, which this guider does not make: use a "
                             "guider with a negative prompt, or switch cfg_pp off")
        out = newest["guided"] - newest["part"]
        mask = extra_args.get("denoise_mask")
        if mask is None:
            return out
        if "denoise_mask_function" in options:
            mask = options["denoise_mask_function"](newest["sigma"], mask, extra_options={
                "model": model.inner_model, "sigmas": model.sigmas})
        return out * mask

    return difference


def preset_names() -> List[str]:
    """The presets to choose from, a person's own behind the built-in ones; what is wrong with their file goes to the log."""
    presets, problems = all_presets()
    for problem in problems:
        logging.warning("ER-SDE: %s", problem)
    return list(presets)


def preset_state(name) -> str:
    """What a preset of that name is now, "" for none: changes when the person's file does."""
    return repr(all_presets()[0].get(name, ""))


def scheduler_names():
    """The host's own list of schedulers, not a copy: other packs append to it."""
    import comfy.samplers

    return comfy.samplers.KSampler.SCHEDULERS


def add_sampler_names() -> List[str]:
    """Append the presets to the host's list of sampler names, `ersde_<preset>`, in place; returns the names added.

    A name that is there already is left alone, be it the host's or that of another copy of this pack.
    """
    if os.environ.get(SWITCH, "").strip().lower() in ("0", "off", "no", "false"):
        return []
    import comfy.k_diffusion.sampling as sampling
    import comfy.samplers

    names, added = comfy.samplers.KSampler.SAMPLERS, []
    wanted = {NAME + preset: (preset, False) for preset in preset_names()}
    wanted.update({f"{NAME}{preset}_cfg_pp": (preset, True) for preset in _CFG_PP_NAMES})
    for name, (preset, cfg_pp) in wanted.items():
        if name not in names and not hasattr(sampling, "sample_" + name):
            setattr(sampling, "sample_" + name,
                    sampler_function(lambda preset=preset, cfg_pp=cfg_pp: make_settings(preset, cfg_pp=cfg_pp)))
            names.append(name)
            added.append(name)
    return added


def schedule(model, scheduler, steps, denoise=1.0):
    """The sigmas of the host's KSampler for a model, a scheduler's name, steps and denoise: a tensor, empty at denoise 0."""
    import comfy.samplers

    # The name only tells the schedule that this sampler takes it whole.
    return comfy.samplers.KSampler(model, steps=steps, device=model.load_device, sampler="er_sde", scheduler=scheduler,
                                   denoise=denoise, model_options=model.model_options).sigmas


_HANDOVER = "ersde_history"         # where a latent dictionary has what a part of a run leaves for the next


@dataclass(frozen=True)
class Handover:
    """A part's history, on the CPU, and what it is of: the model, its conditions and their strength."""

    history: History
    model: Callable[[], object]         # a weak reference: a latent must not keep a model in memory
    positive: list
    negative: list
    cfg: float

    @classmethod
    def of(cls, history, model, *guided_by):
        """What a part leaves that ran with this model, positive, negative and cfg."""
        return cls(history.to("cpu"), weakref.ref(model), *guided_by)

    def fits(self, model, positive, negative, cfg) -> bool:
        """Whether a part with these goes on from it; conditions, which hold tensors, must be the very same object."""
        return self.model() is model and self.positive is positive and self.negative is negative and self.cfg == cfg


def sample_latent(settings: Settings, model, seed, steps, cfg, scheduler, positive, negative, latent, denoise=1.0, *,
                  add_noise=True, start_step=0, end_step=None, leftover_noise=False):
    """What the host's KSampler and KSampler Advanced do, with our sampler.

    Args:
        latent: the host's latent dictionary; its noise_mask and batch_index are honoured, and it is not written to.  What an
            earlier part of the run left, with the same model, conditions and cfg, is gone on from as if there were no cut;
            not under a mask, where the host puts the earlier part's noisy picture beside it.
        add_noise: whether the latent is noised to the first sigma; False: it comes with its noise.
        start_step, end_step: the part of the schedule that is run; None: to its end.
        leftover_noise: whether a run that ends early leaves its noise in; else its last step goes to 0.

    Returns:
        A latent dictionary.
    """
    import comfy.sample
    import comfy.utils
    import latent_preview

    out = dict(latent)
    notes = [out.pop(name, None) for name in _EMPTY_LATENT_NOTES]
    while notes and notes[-1] is None:      # a version without these arguments makes no such notes
        notes.pop()
    out["samples"] = image = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *notes)
    sigmas = schedule(model, scheduler, steps, denoise)
    last = len(sigmas) - 1
    if end_step is not None and end_step < last:
        sigmas = sigmas[:end_step + 1].clone()
        if not leftover_noise:
            sigmas[-1] = 0
    sigmas = sigmas[start_step:]
    if len(sigmas) < 2:
        return out
    index = latent.get("batch_index")
    noise = comfy.sample.prepare_noise(image, seed, index) if add_noise else _no_noise(image)
    if index is not None:
        settings = replace(settings, batch_index=tuple(int(i) for i in index))
    before, mine, history = out.pop(_HANDOVER, None), (model, positive, negative, float(cfg)), None
    if latent.get("noise_mask") is None:
        goes_on = before is not None and not add_noise and before.fits(*mine)
        history = before.history.to("cpu") if goes_on else History()        # a copy: another sampler may go on from it too
    settings = replace(settings, history=history)
    out["samples"] = comfy.sample.sample_custom(
        model, noise, cfg, build_sampler(settings), sigmas, positive, negative, image, noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, steps), disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed)
    if history:
        out[_HANDOVER] = Handover.of(history, *mine)
    return out


def _no_noise(image):
    """Zeros like a latent on the CPU; newer versions have nested latents and a function for it."""
    import comfy.sample

    if hasattr(comfy.sample, "prepare_empty_noise"):
        return comfy.sample.prepare_empty_noise(image)
    return torch.zeros_like(image, device="cpu")


def make_scale(function, eta=1.0, points="") -> CurveSetting:
    """What the noise scale node hands on: a function of the table, or at "points" the curve through the text's points."""
    if function == POINTS:
        return CurveSetting(from_points(parse_points(points)), float(eta))
    return CurveSetting(NOISE_SCALES[check_choice("function", function, (*NOISE_SCALES, POINTS))], float(eta))


def load_preset(name, carried="") -> Preset:
    """The preset that a workflow carries as JSON, else the one of that name on this machine.

    Raises:
        ValueError, TypeError: the text is no preset, or there is neither; says which.
    """
    if carried.strip():
        return from_json(f"{name} (changed)" if name in PRESETS else name, carried)
    presets = all_presets()[0]
    if name not in presets:
        raise ValueError(f"preset {name!r} is not on this machine, and the workflow does not carry its settings: put them "
                         f"into the node's settings, or choose one of {', '.join(presets)}")
    return presets[name]


def carried_texts():
    """{name: JSON text} of the person's own presets: what a workflow needs to carry of them."""
    return {name: json.dumps(to_dict(preset), ensure_ascii=False)
            for name, preset in all_presets()[0].items() if name not in PRESETS}


def store_preset(name, settings: Settings, overwrite=False, description="") -> Preset:
    """Add a preset to the person's file, and return it.

    Raises:
        ValueError: a name that is not allowed or taken by other settings, or settings that a preset cannot hold.
        OSError: the file cannot be written.
    """
    if settings.scale is not None and NOISE_SCALES.get(settings.scale.name) is not settings.scale:
        raise ValueError("a preset holds a noise scale by its name, which a curve through points has not: connect one of "
                         f"{', '.join(NOISE_SCALES)}, or leave custom_scale empty")
    changes = {"name": name.strip(), "label": name.strip(), "description": description.strip()}
    if settings.scale is not None:
        changes["noise_scale"] = settings.scale.name
    preset = settings.preset.replace(**changes)
    there = all_presets()[0].get(preset.name)
    if there == preset:
        return preset
    if there is not None and there.name not in PRESETS and not overwrite:
        raise ValueError(f"a preset {preset.name!r} with other settings is there already: choose another name, or switch "
                         "overwrite on")
    save_preset(user_presets_path(), preset)
    logging.info("ER-SDE: saved the preset %r to %s", preset.name, user_presets_path())
    return preset


def plot(settings: Settings, model, scheduler, steps, denoise=1.0, sigmas=None):
    """The chart of what a run does with a model: float32 tensor of shape (1, height, width, 3) in [0, 1].

    Args:
        sigmas: a schedule in place of the scheduler's.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a schedule without a step.
    """
    from .. import plot as charts

    # As a sampler sees the model.
    seen = SimpleNamespace(inner_model=SimpleNamespace(model_patcher=model))
    sigmas = schedule(model, scheduler, steps, denoise) if sigmas is None else sigmas
    preset, scale = settings.preset, get_noise_scale(settings.scale or settings.preset.noise_scale)
    values = np.asarray(torch.as_tensor(sigmas).cpu(), dtype=np.float64)
    start, end = window_sigmas(seen, values, preset.start, preset.end)
    process = read_process(seen)
    plan = charts.make_plot_plan(sigmas, process, scale, etas_in_window(values, preset.eta, start, end), preset.s_noise,
                                 preset.order, preset.corrector, preset.method, first_flow_sigma(seen))
    changed = preset.label if preset == all_presets()[0].get(preset.name) else f"{preset.label}, changed"
    title = f"{changed}: {preset.method}, order {preset.order}, eta {preset.eta:g}, s_noise {preset.s_noise:g}"
    image = charts.to_image(charts.plot_run(plan, process, scale, preset.eta, title))
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255.0)[None]


