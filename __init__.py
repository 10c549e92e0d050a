"""ComfyUI's entry: the nodes, the sampler names and the page's part; nothing where there is no ComfyUI."""
import importlib.util

__all__ = []

if importlib.util.find_spec("comfy") is not None:
    if importlib.util.find_spec("comfy_api") is None or importlib.util.find_spec("comfy_api.latest") is None:
        raise ImportError("the ER-SDE pack needs ComfyUI 0.3.64 or newer: update ComfyUI")
    # The host would take a NODE_CLASS_MAPPINGS for the whole of it and not ask the entry point.
    from .ersde.hosts.comfyui import add_sampler_names
    from .nodes import comfy_entrypoint

    add_sampler_names()         # here: older versions never call the extension's on_load
    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
