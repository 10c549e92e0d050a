"""As much of ComfyUI's node schema (comfy_api.latest) as nodes.py meets, and the nodes read through it without a host."""
import sys
import types
from dataclasses import dataclass, field
from types import SimpleNamespace


class Kind:
    """An io type: its Input and Output keep what they are given, as `options` by name."""

    def __init__(self, name):
        self.name = name

    def Input(self, id, **options):
        optional = options.pop("optional", False)
        return SimpleNamespace(kind=self.name, id=id, optional=optional, options=options, extra_dict={})

    def Output(self, id=None, **options):
        return SimpleNamespace(kind=self.name, id=id, options=options)


@dataclass
class Schema:
    node_id: str
    display_name: str = None
    category: str = "sd"
    inputs: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    description: str = ""
    search_aliases: list = field(default_factory=list)
    is_output_node: bool = False


class NodeOutput:
    def __init__(self, *args):
        self.args = args


class ComfyNode:
    pass


class ComfyExtension:
    pass


KINDS = ("Combo", "Float", "Int", "Boolean", "String", "Model", "Conditioning", "Latent", "Sampler", "Sigmas", "Image")
io = SimpleNamespace(Schema=Schema, NodeOutput=NodeOutput, ComfyNode=ComfyNode, Custom=Kind,
                     **{name: Kind(name.upper()) for name in KINDS})


def modules():
    """{name: module} to be put into sys.modules."""
    package, latest = types.ModuleType("comfy_api"), types.ModuleType("comfy_api.latest")
    package.__path__ = []
    package.latest, latest.io, latest.ComfyExtension = latest, io, ComfyExtension
    return {"comfy_api": package, "comfy_api.latest": latest}


def load_nodes():
    """The module nodes.py, on the stand-in unless the host's own is there."""
    if "comfy_api.latest" not in sys.modules:
        sys.modules.update(modules())
    import nodes

    return nodes
