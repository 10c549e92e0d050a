"""Nodes for the tests alone, put into the scratch host's custom_nodes: an analytic model, latents of every kind, the library
called directly on the host's model, and latents as files."""
import copy
import os
import sys
import uuid

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import folder_paths
import numpy as np
import torch

sys.path.append(os.environ["ERSDE_TEST_REPOSITORY"])        # last: the host's modules go first
import ersde  # noqa: E402


class Denoiser:
    """The model's schedule with a denoiser in closed form, for latents of any shape: of unit Gaussian data, bent; or 0."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "patch", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)},
                "optional": {"noise_scale": ("FLOAT", {"default": 1.0}), "zero": ("BOOLEAN", {"default": False})}}

    def patch(self, model, noise_scale=1.0, zero=False):
        model = model.clone()
        sampling = model.get_model_object("model_sampling")
        if noise_scale != 1.0:
            sampling = copy.deepcopy(sampling)
            sampling.set_noise_scale(noise_scale)
            model.add_object_patch("model_sampling", sampling)
        flow = isinstance(sampling, comfy.model_sampling.CONST)

        def denoise(apply_model, given):
            x, sigma = given["input"], given["timestep"]
            s = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x)
            a = 1.0 - s if flow else torch.ones_like(s)
            kinds = torch.tensor(given["cond_or_uncond"]).repeat_interleave(len(x) // len(given["cond_or_uncond"]))
            bend = torch.where(kinds == 0, 0.3, 0.1).to(x).reshape(s.shape)
            return (a * x + bend * s * s * torch.tanh(x)) / (a * a + s * s) if not zero else torch.zeros_like(x)

        model.set_model_unet_function_wrapper(denoise)
        return (model,)


class Latent:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "probe"
    SHAPES = {"video": [(1, 16, 3, 8, 8)], "audio": [(2, 16, 40)], "nested": [(1, 16, 3, 8, 8), (1, 16, 40)]}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (list(cls.SHAPES),)}}

    def make(self, kind):
        generator = torch.Generator().manual_seed(3)
        tensors = [torch.randn(shape, generator=generator) for shape in self.SHAPES[kind]]
        if len(tensors) == 1:
            return ({"samples": tensors[0]},)
        from comfy.nested_tensor import NestedTensor
        return ({"samples": NestedTensor(tensors)},)


class Direct:
    """The library's function on the host's model, with the host's noise and schedule, and nothing of the pack's adapter."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "run", "probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "seed": ("INT", {"max": 2 ** 64 - 1}), "steps": ("INT", {}),
                             "cfg": ("FLOAT", {}), "preset": (list(ersde.PRESETS),), "scheduler": ("STRING", {}),
                             "positive": ("CONDITIONING",), "negative": ("CONDITIONING",), "latent_image": ("LATENT",)}}

    def run(self, model, seed, steps, cfg, preset, scheduler, positive, negative, latent_image):
        model, last = model.clone(), {}
        model.set_model_sampler_post_cfg_function(
            lambda args: last.update(added=args["denoised"] - args["cond_denoised"]) or args["denoised"])

        def sample(model_k, x, sigmas, extra_args=None, callback=None, disable=None):
            flow = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
            return ersde.sample_preset(model_k, x, sigmas, preset, extra_args, callback, disable,
                                       process="flow" if flow else "ve", excess=lambda: last["added"])

        image = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        noise = comfy.sample.prepare_noise(image, seed)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
        samples = comfy.sample.sample_custom(model, noise, cfg, comfy.samplers.KSAMPLER(sample), sigmas, positive, negative,
                                             image, seed=seed)
        return ({"samples": samples},)


class Save:
    """The latent's tensors as a file in the host's output folder."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "save", "probe", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}}

    def save(self, samples):
        samples = samples["samples"]
        path = os.path.join(folder_paths.get_output_directory(), f"{uuid.uuid4().hex}.npz")
        np.savez(path, *[tensor.float().cpu().numpy() for tensor in (samples.unbind() if samples.is_nested else [samples])])
        return {"ui": {"probe": [path]}}


NODE_CLASS_MAPPINGS = {"Probe_Denoiser": Denoiser, "Probe_Latent": Latent, "Probe_Direct": Direct, "Probe_Save": Save}
