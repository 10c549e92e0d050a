"""The ComfyUI nodes: inputs and tooltips.  What they do is in `ersde.hosts.comfyui`.

Saved workflows keep the widgets' values by position, so a new input goes to the end of its node.
"""
if __package__:
    from .ersde import NOISE_SCALES, PRESETS
    from .ersde.hosts import comfyui
else:                                   # imported by itself from the folder, outside ComfyUI
    from ersde import NOISE_SCALES, PRESETS
    from ersde.hosts import comfyui


def _er_sde_inputs():
    """The sampler's own inputs, the same on both nodes: a preset, then what may differ from it."""
    # One short line each: the page cuts a tooltip that is higher than its window.
    presets = "\n".join(f"{name}: {preset.description.partition(':')[0].lower()}" for name, preset in PRESETS.items())
    return {
        "preset": (comfyui.preset_names(), {"default": "sde_5", "tooltip":
            "The settings to begin with; the inputs below change single ones of them.\n" + presets}),
        "noise_scale": ([comfyui.AS_PRESET, *NOISE_SCALES], {"default": comfyui.AS_PRESET, "tooltip":
            "How much noise is added, and when. Rising: ode adds none, sde_1 hardly any, sde_2 some, sde "
            "more, sde_3 most, evenly over the run; sde_5 adds a little and mostly early, sde_4 much and "
            "late. More noise wants more steps. \"as preset\": the preset's. With eta 0 it makes no "
            "difference."}),
        "eta": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 10.0, "step": 0.05, "round": 0.001, "tooltip":
            "Raise it for more fresh noise in every step: more varied detail, and more steps needed. 0 is "
            "the noise-free ODE, 1 the noise scale as published. Below 0, such as -1: as the preset has it."}),
        "s_noise": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 10.0, "step": 0.01, "round": 0.001, "tooltip":
            "Raise it for stronger noise than the method calls for: more grain and texture, soon a dirty "
            "picture; under 1 the picture gets smoother. 1 is right in theory. Below 0, such as -1: as the "
            "preset has it."}),
        "order": ("INT", {"default": 0, "min": 0, "max": 5, "tooltip":
            "Raise it to let each step look back on more of the earlier ones: more accurate at many steps, "
            "less steady at few steps with high cfg. It costs no time. 3 at most in the preset comfyui. 0: "
            "as the preset has it."}),
    }


class ERSDESampler:
    """ER-SDE as a SAMPLER, for SamplerCustom and SamplerCustomAdvanced."""

    DESCRIPTION = ("The ER-SDE sampler, for a custom sampling node. Choose a preset; change single settings of it "
                   "where you want to. Works on noise-prediction and on flow models.")
    CATEGORY = "sampling/custom_sampling/samplers"
    FUNCTION = "build"
    RETURN_TYPES = ("SAMPLER",)
    OUTPUT_TOOLTIPS = ("The sampler, to be connected to a custom sampling node.",)
    SEARCH_ALIASES = ["er_sde", "extended reverse-time SDE"]

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": _er_sde_inputs()}

    def build(self, preset, noise_scale, eta, s_noise, order):
        return (comfyui.build_sampler(preset, noise_scale, eta, s_noise, order),)


class ERSDEKSampler:
    """The host's KSampler with ER-SDE and its settings in one node."""

    DESCRIPTION = ("A KSampler that samples with ER-SDE. Choose a preset; change single settings of it where you want "
                   "to. Works on noise-prediction and on flow models.")
    CATEGORY = "sampling"
    FUNCTION = "sample"
    RETURN_TYPES = ("LATENT",)
    OUTPUT_TOOLTIPS = ("The denoised latent.",)
    SEARCH_ALIASES = ["er_sde", "extended reverse-time SDE"]

    @classmethod
    def INPUT_TYPES(cls):
        ours = _er_sde_inputs()
        return {"required": {
            "model": ("MODEL", {"tooltip": "The model that removes the noise."}),
            "seed": ("INT", {"default": 0, "min": 0, "max": 2 ** 64 - 1, "control_after_generate": True, "tooltip":
                "Any other number gives another picture; the same number the same picture again. It decides the first "
                "noise and the noise of every step."}),
            "steps": ("INT", {"default": 20, "min": 1, "max": 10000, "tooltip":
                "Raise it for a more accurate result, in proportion to the time. The more noise a preset adds, the "
                "more steps it wants."}),
            "cfg": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01, "tooltip":
                "Raise it to follow the prompt more closely; too high burns colours and contrast. At 1 the negative "
                "prompt has no effect."}),
            "preset": ours.pop("preset"),       # where the host's KSampler has the sampler's name
            "scheduler": (comfyui.scheduler_names(), {"tooltip":
                "How the noise levels are spread over the steps."}),
            "positive": ("CONDITIONING", {"tooltip": "What the picture should show."}),
            "negative": ("CONDITIONING", {"tooltip": "What the picture should not show."}),
            "latent_image": ("LATENT", {"tooltip": "The latent to start from: an empty one, or a picture's."}),
            "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip":
                "Raise it to keep less of the latent it starts from; 1 keeps nothing."}),
            **ours,
        }}

    def sample(self, model, seed, steps, cfg, preset, scheduler, positive, negative, latent_image, denoise,
               noise_scale, eta, s_noise, order):
        sampler = comfyui.build_sampler(preset, noise_scale, eta, s_noise, order)
        return (comfyui.sample_latent(sampler, model, seed, steps, cfg, scheduler, positive, negative, latent_image,
                                      denoise),)


NODE_CLASS_MAPPINGS = {"ERSDE_Sampler": ERSDESampler, "ERSDE_KSampler": ERSDEKSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"ERSDE_Sampler": "ER-SDE Sampler", "ERSDE_KSampler": "KSampler (ER-SDE)"}
