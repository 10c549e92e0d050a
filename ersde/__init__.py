"""ER-SDE samplers for diffusion and flow models: k-diffusion-style functions over sigmas.

    import ersde
    x = ersde.sample_er_sde(model, x, sigmas, eta=1.0, noise_scale="sde_5")
    x = ersde.sample_er_sde_few_steps(model, x, sigmas)
"""
from .history import History
from .noise import NOISES, make_noise
from .noise_scale import NOISE_SCALES, NoiseScale
from .presets import PRESETS, Preset, all_presets, get_preset, load_presets, save_preset
from .samplers import SAMPLERS, sample_er_sde, sample_preset

__version__ = "0.1.0"

globals().update(SAMPLERS)

__all__ = ["History", "NOISES", "NOISE_SCALES", "PRESETS", "NoiseScale", "Preset", "all_presets", "get_preset",
           "load_presets", "make_noise", "sample_er_sde", "sample_preset", "save_preset", *SAMPLERS]
