"""ComfyUI: presets as SAMPLER objects, and a run through the host's own sampling code.

The host's modules are imported inside the functions, so that this module can be read anywhere.
"""
from __future__ import annotations

import logging

from ..presets import Preset, all_presets, get_preset
from ..samplers import sample_preset

AS_PRESET = "as preset"
"""The noise scale list's entry that leaves the preset's in place, as eta and s_noise below 0 and order 0 do."""

# What newer versions note in an empty latent so that the model's own size can be made of it; one argument each.
_EMPTY_LATENT_NOTES = ("downscale_ratio_spacial", "downscale_ratio_temporal")


def changed_preset(preset, noise_scale=AS_PRESET, eta=-1.0, s_noise=-1.0, order=0) -> Preset:
    """The preset of that name with the nodes' inputs laid over it; ValueError or TypeError for a value not allowed."""
    changes = {}
    if noise_scale != AS_PRESET:
        changes["noise_scale"] = noise_scale
    # "not below" rather than "at or above": NaN goes on to the check, which names it.  The page's arrows can leave a 0 at
    # -3e-16, which is a 0.
    for field, value in (("eta", eta), ("s_noise", s_noise)):
        if not value < -1e-6:
            changes[field] = 0.0 if value < 0 else value
    if order != 0:
        changes["order"] = order
    return get_preset(preset, all_presets()[0]).replace(**changes)


def build_sampler(preset, noise_scale=AS_PRESET, eta=-1.0, s_noise=-1.0, order=0):
    """The host's SAMPLER object for a preset, changed by the nodes' inputs as in `changed_preset`."""
    import comfy.samplers

    return comfy.samplers.KSAMPLER(sampler_function(changed_preset(preset, noise_scale, eta, s_noise, order)))


def sampler_function(preset: Preset):
    """`preset` as a function with k-diffusion's signature that knows what ComfyUI's models and its er_sde do."""

    def sample_er_sde(model, x, sigmas, extra_args=None, callback=None, disable=None, *, noise_sampler=None):
        settings = preset
        sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
        # Newer versions: a model whose training noise was not of unit variance says so here.
        factor = getattr(sampling, "noise_scale", 1.0)
        if factor != 1.0:
            settings = preset.replace(s_noise=preset.s_noise * float(factor))
        if preset.method == "comfyui":
            import comfy.k_diffusion.sampling

            # The host's noise belongs to what this method reproduces.
            if noise_sampler is None:
                noise_sampler = comfy.k_diffusion.sampling.default_noise_sampler(x, seed=(extra_args or {}).get("seed"))
        return sample_preset(model, x, sigmas, settings, extra_args, callback, disable, noise_sampler=noise_sampler)

    return sample_er_sde


def preset_names():
    """The presets to choose from, a person's own behind the built-in ones; what is wrong with their file goes to the log."""
    presets, problems = all_presets()
    for problem in problems:
        logging.warning("ER-SDE: %s", problem)
    return list(presets)


def scheduler_names():
    """The host's own list of schedulers, not a copy: other packs append to it."""
    import comfy.samplers

    return comfy.samplers.KSampler.SCHEDULERS


def sample_latent(sampler, model, seed, steps, cfg, scheduler, positive, negative, latent, denoise=1.0):
    """What the host's KSampler does, with a SAMPLER object in place of a sampler's name.

    Args:
        sampler: from `build_sampler`.
        latent: the host's latent dictionary; its noise_mask and batch_index are honoured, and it is not written to.

    Returns:
        A latent dictionary.
    """
    import comfy.sample
    import comfy.samplers
    import comfy.utils
    import latent_preview

    out = dict(latent)
    notes = [out.pop(name, None) for name in _EMPTY_LATENT_NOTES]
    while notes and notes[-1] is None:      # a version without these arguments makes no such notes
        notes.pop()
    image = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *notes)
    noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
    # The name only tells the schedule that this sampler takes it whole.
    sigmas = comfy.samplers.KSampler(model, steps=steps, device=model.load_device, sampler="er_sde",
                                     scheduler=scheduler, denoise=denoise, model_options=model.model_options).sigmas
    out["samples"] = comfy.sample.sample_custom(
        model, noise, cfg, sampler, sigmas, positive, negative, image, noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, steps), disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed)
    return out
