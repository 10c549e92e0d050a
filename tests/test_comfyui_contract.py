"""The ComfyUI side without ComfyUI: what the entry exports, the nodes' form, and the adapter against a stand-in.

The stand-in is as much of the host as the adapter meets, with the host's shapes: a KSAMPLER calls its function with
(model, x, sigmas, extra_args, callback, disable), a model reaches its model_sampling through its patcher, and the noise
is one generator for the whole batch.  `tests/hosts/test_comfyui.py` asks the host itself.
"""
import asyncio
import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfy_schema import load_nodes

from ersde import NOISE_SCALES, PRESETS, Preset, sample_preset, save_preset
from ersde.hosts import comfyui
from ersde.noise import SeededNoise

nodes = load_nodes()
ROOT = Path(__file__).resolve().parents[1]

# Saved workflows hold these names, and the values by position: entries may be added at the end, never moved.
FIRST = ["noise_scale", "eta", "s_noise", "order"]
LATER = ["corrector", "method", "start_percent", "end_percent"]
RUN = ["noise", "step_noise_seed", "cfg_pp"]
SOCKETS = ["custom_preset", "custom_scale"]
PARTS = ["start_at_step", "end_at_step", "return_with_leftover_noise"]
BOTH = ["steps", "cfg", "preset", "scheduler", "positive", "negative", "latent_image"]
INPUTS = {
    "ERSDE_Sampler": (["preset", *FIRST], [*LATER, *RUN, *SOCKETS]),
    "ERSDE_KSampler": (["model", "seed", *BOTH, "denoise", *FIRST], [*LATER, *RUN, *SOCKETS]),
    "ERSDE_KSamplerAdvanced": (["model", "add_noise", "noise_seed", *BOTH, *PARTS, *FIRST], [*LATER, *RUN, *SOCKETS]),
    "ERSDE_NoiseScale": (["function", "eta", "points"], []),
    "ERSDE_Plot": (["model", "scheduler", "steps", "denoise", "preset", *FIRST], [*LATER, *SOCKETS, "sigmas"]),
    "ERSDE_Preset": (["preset"], ["settings"]),
    "ERSDE_PresetSave": (["name", "preset", *FIRST], [*LATER, *SOCKETS, "overwrite", "description"]),
}


# The entry

LOAD = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location({name!r}, {path!r})
sys.modules[{name!r}] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps([sorted(module.__all__), hasattr(module, "NODE_CLASS_MAPPINGS"), sorted(sys.modules)]))
"""
HOST = {"comfy/__init__.py": "", "comfy/k_diffusion/__init__.py": "", "comfy/k_diffusion/sampling.py": "",
        "comfy/samplers.py": "class KSampler:\n    SAMPLERS = ['euler', 'er_sde']",
        "comfy_api/__init__.py": "", "comfy_api/latest/__init__.py": (
            f"import sys\nsys.path.append({str(ROOT / 'tests')!r})\nfrom comfy_schema import ComfyExtension, io")}


def load_entry(folder, *path, files=(), ok=True):
    """The entry loaded as ComfyUI loads it, its folder's path as its name: (what it exports, V1 mappings?, sys.modules)."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(HOST[name])
    code = LOAD.format(name="/somewhere/custom_nodes/er-sde-samplers", path=str(ROOT / "__init__.py"))
    code = f"import sys; sys.path[:0] = {[str(part) for part in path]!r}\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) == ok, done.stderr
    return json.loads(done.stdout) if ok else done.stderr


def test_entry_without_a_host_exports_nothing_and_imports_none(tmp_path):
    exported, v1, modules = load_entry(tmp_path)
    assert exported == [] and not v1
    hosts = ("comfy", "comfy_api", "modules", "k_diffusion", "folder_paths")
    assert not [name for name in modules if name.split(".")[0] in hosts]


def test_entry_beside_a_host_exports_the_nodes_from_its_own_copy_of_the_library(tmp_path):
    exported, v1, modules = load_entry(tmp_path, tmp_path, files=HOST)
    # The host asks the entry point only of a module without V1 mappings.
    assert exported == ["WEB_DIRECTORY", "comfy_entrypoint"] and not v1
    # A library of another copy of the pack, or of the WebUI, must not be the one that is used.
    assert "ersde" not in modules and "nodes" not in modules
    assert "/somewhere/custom_nodes/er-sde-samplers.ersde" in modules


def test_a_host_that_is_too_old_is_told_so_in_one_sentence(tmp_path):
    error = load_entry(tmp_path, tmp_path, files=["comfy/__init__.py"], ok=False)
    assert error.strip().splitlines()[-1] == "ImportError: the ER-SDE pack needs ComfyUI 0.3.64 or newer: update ComfyUI"


# The nodes

@pytest.fixture
def schemas(host):
    """{id: schema}; the nodes in the order in which the host gets them."""
    listed = asyncio.run(asyncio.run(nodes.comfy_entrypoint()).get_node_list())
    return {schema.node_id: schema for schema in (node.define_schema() for node in listed)}


def inputs_of(schema):
    return {each.id: each for each in schema.inputs}


def test_ids_and_input_names_are_the_published_ones(schemas):
    assert {key: ([i.id for i in schema.inputs if not i.optional], [i.id for i in schema.inputs if i.optional])
            for key, schema in schemas.items()} == INPUTS


@pytest.mark.parametrize("key", INPUTS)
def test_every_node_says_what_it_is(key, schemas):
    schema = schemas[key]
    assert key.startswith("ERSDE_") and "ER-SDE" in schema.display_name
    assert len(schema.description) > 50 and schema.category.startswith("sampling")
    assert {"er_sde", "ersde"} <= set(schema.search_aliases)
    assert all(output.options["tooltip"] for output in schema.outputs) and schema.outputs


@pytest.mark.parametrize("key", INPUTS)
def test_every_input_has_a_tooltip_and_numbers_say_what_raising_them_does(key, schemas):
    required = [each.optional for each in schemas[key].inputs]
    assert required == sorted(required)             # what is optional stands behind what is required
    for name, each in inputs_of(schemas[key]).items():
        tooltip = each.options["tooltip"]
        assert len(tooltip) > 20, name
        assert "Read the help" not in tooltip
        if each.kind in ("INT", "FLOAT") and "seed" not in name:
            assert tooltip.startswith("Raise it"), name
            assert each.options["min"] <= each.options["default"] <= each.options["max"], name
        if each.kind == "COMBO":
            assert each.options.get("default", each.options["options"][0]) in each.options["options"], name
        # What a saved workflow does not have must have a default.
        assert not each.optional or "default" in each.options or each.kind.startswith("ERSDE") or each.kind == "SIGMAS", name


@pytest.mark.parametrize("key", INPUTS)
def test_execute_takes_the_inputs_and_needs_none_that_is_optional(key, schemas, host, monkeypatch):
    """What is bound where, with the adapter's functions left out."""
    node = next(node for node in nodes.NODES if node.define_schema().node_id == key)
    for name in ("build_sampler", "sample_latent", "make_scale", "plot", "load_preset", "store_preset"):
        monkeypatch.setattr(comfyui, name, lambda *args, **kw: "out")
    values = {name: each.options.get("default", (each.options.get("options") or [None])[0])
              for name, each in inputs_of(schemas[key]).items()}
    assert node.execute(**values).args == ("out",)
    assert node.execute(**{name: value for name, value in values.items() if name in INPUTS[key][0]}).args == ("out",)


def test_an_older_host_without_search_aliases_gets_none(monkeypatch, host):
    schema = dataclasses.make_dataclass("Schema", [(f.name, f.type, f) for f in dataclasses.fields(nodes.io.Schema)
                                                   if f.name != "search_aliases"])
    monkeypatch.setattr(nodes.io, "Schema", schema)
    assert not hasattr(nodes.Sampler.define_schema(), "search_aliases")


def test_the_lists_are_the_librarys_and_the_hosts(schemas):
    inputs = inputs_of(schemas["ERSDE_KSampler"])
    assert inputs["preset"].options["options"] == list(PRESETS)
    assert inputs["noise_scale"].options["options"] == ["as preset", *NOISE_SCALES]
    assert inputs["scheduler"].options["options"] is sys.modules["comfy.samplers"].KSampler.SCHEDULERS
    assert all(name in inputs["preset"].options["tooltip"] for name in PRESETS)


def test_a_node_runs_again_when_the_persons_own_preset_changed(mine):
    before = [nodes.KSampler.fingerprint_inputs(preset=name, steps=3) for name in ("mine", "sde", "none")]
    save_preset(mine, Preset("mine", eta=0.4))
    after = [nodes.KSampler.fingerprint_inputs(preset=name, steps=3) for name in ("mine", "sde", "none")]
    assert before[0] != after[0] and before[1:] == after[1:]


# The preset, unless a person changes something

@pytest.mark.parametrize("name", PRESETS)
def test_defaults_leave_the_preset_as_it_is(name, host):
    defaults = {key: each.options["default"] for key, each in inputs_of(nodes.Sampler.define_schema()).items()
                if "default" in each.options}
    assert comfyui.make_settings(**{**defaults, "preset": name}) == comfyui.Settings(PRESETS[name])


def changed(*args, **kw):
    return comfyui.make_settings(*args, **kw).preset


def test_each_input_changes_its_own_field():
    every = changed("flat", "sde", 0.25, 0.9, 2, "off", "paper", 0.1, 0.6)
    assert every == PRESETS["flat"].replace(noise_scale="sde", eta=0.25, s_noise=0.9, order=2, corrector=False,
                                            method="paper", start=0.1, end=0.6)
    for field, value in (("eta", 0.0), ("s_noise", 0.0)):
        assert getattr(changed("sde", **{field: value}), field) == 0.0
    assert changed("texture", start_percent=0.0).start == 0.0
    assert changed("flat", eta=-0.05, end_percent=-0.01) == PRESETS["flat"]
    assert changed("comfyui", corrector="on").corrector is True
    settings = comfyui.make_settings("sde", noise="comfyui", step_noise_seed=0, cfg_pp=True)
    assert settings == comfyui.Settings(PRESETS["sde"], noise="comfyui", step_seed=0, cfg_pp=True)


def test_values_from_other_nodes_replace_the_presets():
    own, curve = Preset("mine", "sde_2", eta=0.3), comfyui.make_scale("points", 0.7, "0.1 1\n10 5")
    assert changed("sde", custom_preset=own) == own
    settings = comfyui.make_settings("flat", noise_scale="sde_3", custom_scale=curve)
    assert settings.scale is curve.scale and settings.preset == PRESETS["flat"].replace(eta=0.7)
    assert changed("flat", custom_scale=curve, eta=0.2).eta == 0.2
    assert comfyui.make_settings("sde", custom_scale=comfyui.make_scale("sde_4", 0.5)).scale is NOISE_SCALES["sde_4"]


def test_a_method_that_a_person_chooses_takes_as_high_an_order_as_it_has():
    assert changed("few_steps").order == 4
    assert changed("few_steps", method="comfyui").order == 3


@pytest.mark.parametrize("values, words", [
    (dict(preset="comfyui", order=5), ["order", "5", "3"]),
    (dict(preset="few_steps", order=4, method="paper"), ["order", "4", "3"]),
    (dict(preset="sde_5", order=-1), ["order", "-1"]),
    (dict(preset="sde_5", eta=float("nan")), ["eta", "nan"]),
    (dict(preset="sde_5", s_noise=float("inf")), ["s_noise", "inf"]),
    (dict(preset="sde_5", noise_scale="sde_55"), ["noise_scale", "sde_55", "sde_5"]),
    (dict(preset="comfy"), ["preset", "comfy", "sde_5"]),
    (dict(preset="sde_5", corrector="yes"), ["corrector", "yes", "on"]),
    (dict(preset="sde_5", method="fast"), ["method", "fast", "exact"]),
    (dict(preset="sde_5", noise="gpu"), ["noise", "gpu", "cpu"]),
    (dict(preset="sde_5", start_percent=1.5), ["start", "1.5", "between 0 and 1"]),
    (dict(preset="flat", start_percent=0.8), ["start", "0.8", "end", "0.7"]),
])
def test_a_bad_value_is_named_in_one_sentence(values, words):
    with pytest.raises(ValueError) as error:
        comfyui.make_settings(**values)
    text = str(error.value)
    assert all(word in text for word in words) and "\n" not in text


# The adapter against the stand-in

class CONST:
    """Flow: the class of this name is what marks it in the host."""


class Flow(CONST):
    def percent_to_sigma(self, percent):
        return 3.0 * (1.0 - percent) / (1.0 + 2.0 * (1.0 - percent))


class Eps:
    def percent_to_sigma(self, percent):
        return 14.6 * (1.0 - percent)


class Model:
    """A sampler's model: D for data of unit variance, which differs with sigma, and a record of its calls."""

    def __init__(self, sampling):
        self.sampling, self.calls = sampling, []
        patcher = SimpleNamespace(get_model_object={"model_sampling": sampling}.__getitem__)
        self.inner_model = SimpleNamespace(model_patcher=patcher)

    def __call__(self, x, sigma, **extra_args):
        assert sigma.shape == (x.shape[0],) and set(extra_args) <= {"seed", "model_options", "denoise_mask"}
        self.calls.append(float(sigma[0]))
        s = sigma.reshape(-1, *[1] * (x.ndim - 1))
        a = 1.0 - s if isinstance(self.sampling, CONST) else torch.ones_like(s)
        return a * x / (a * a + s * s) + 0.1 * torch.tanh(x)


class KSAMPLER:
    def __init__(self, sampler_function, extra_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def run(self, model, x, sigmas, seed, callback=None):
        return self.sampler_function(model, x, sigmas, extra_args={"seed": seed}, callback=callback, disable=True,
                                     **self.extra_options)


class HostKSampler:
    SCHEDULERS = ["simple", "karras"]
    SAMPLERS = None

    def __init__(self, model, steps, device, sampler=None, scheduler=None, denoise=None, model_options=None):
        assert sampler == "er_sde" and scheduler in self.SCHEDULERS and device == model.load_device
        self.sigmas = torch.linspace(denoise, 0, steps + 1)


@pytest.fixture
def host(monkeypatch):
    """The stand-in in sys.modules; `drawn` counts the seeds of its noise samplers, `sampled` the runs."""
    made = SimpleNamespace(drawn=[], sampled=[])
    monkeypatch.setattr(HostKSampler, "SAMPLERS", ["euler", "er_sde"])

    def module(name, **content):
        one = types.ModuleType(name)
        one.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, one)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, one)
        return one

    def default_noise_sampler(x, seed=None):
        made.drawn.append(seed)
        generator = torch.Generator().manual_seed(seed)
        return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator, dtype=x.dtype)

    def sample_custom(model, noise, cfg, sampler, sigmas, positive, negative, latent_image, **rest):
        made.sampled.append(dict(model=model, noise=noise, cfg=cfg, sampler=sampler, sigmas=sigmas, positive=positive,
                                 negative=negative, latent_image=latent_image, **rest))
        return latent_image + 1

    def fix_empty_latent_channels(model, latent_image, *notes):
        made.notes = notes
        return latent_image.repeat(1, 4, 1, 1)

    module("comfy")
    made.samplers = module("comfy.samplers", KSAMPLER=KSAMPLER, KSampler=HostKSampler)
    module("comfy.sample", sample_custom=sample_custom, fix_empty_latent_channels=fix_empty_latent_channels,
           prepare_noise=lambda image, seed, inds=None: ("noise", tuple(image.shape), seed, inds))
    module("comfy.utils", PROGRESS_BAR_ENABLED=True)
    module("comfy.model_sampling", CONST=CONST)
    def set_model_options_post_cfg_function(options, function, disable_cfg1_optimization=False):
        options["sampler_post_cfg_function"] = options.get("sampler_post_cfg_function", []) + [function]
        options["disable_cfg1_optimization"] = disable_cfg1_optimization
        return options

    module("comfy.model_patcher", set_model_options_post_cfg_function=set_model_options_post_cfg_function)
    module("comfy.k_diffusion")
    made.sampling = module("comfy.k_diffusion.sampling", sample_er_sde="the host's",
                           default_noise_sampler=default_noise_sampler)
    module("latent_preview", prepare_callback=lambda model, steps: ("callback", steps))
    return made


SIGMAS = {"ve": torch.tensor([14.6, 5.0, 2.0, 0.7, 0.2, 0.0]), "flow": torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])}
SAMPLING = {"ve": Eps, "flow": Flow}


def start(process):
    torch.manual_seed(0)
    return torch.randn(2, 4, 3, 3) * SIGMAS[process][0]


def build(preset, **changes):
    return comfyui.build_sampler(comfyui.make_settings(preset, **changes))


@pytest.mark.parametrize("process", SIGMAS)
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "comfyui"])
def test_a_preset_runs_as_the_library_runs_it(host, process, name):
    x, steps = start(process), []
    kept = x.clone()
    model, same = Model(SAMPLING[process]()), Model(SAMPLING[process]())
    (sampler,) = nodes.Sampler.execute(preset=name, noise_scale="as preset", eta=-1.0, s_noise=-1.0, order=0).args
    got = sampler.run(model, x, SIGMAS[process], 7, steps.append)
    want = sample_preset(same, x, SIGMAS[process], name, {"seed": 7}, disable=True, process=process)
    assert torch.equal(got, want) and torch.equal(x, kept) and torch.isfinite(got).all()
    assert model.calls == SIGMAS[process][:-1].tolist() and [step["i"] for step in steps] == list(range(5))
    assert host.drawn == []                     # the library's own noise, by the run's seed


@pytest.mark.parametrize("process", SIGMAS)
def test_the_compatible_preset_takes_the_hosts_noise_and_first_sigma(host, process):
    x, model = start(process), Model(SAMPLING[process]())
    got = build("comfyui").run(model, x, SIGMAS[process], 7)
    sigmas = SIGMAS[process].clone()
    if process == "flow":
        sigmas[0] = Flow().percent_to_sigma(1e-4)
    generator = torch.Generator().manual_seed(7)
    want = sample_preset(Model(SAMPLING[process]()), x, sigmas, "comfyui", {"seed": 7}, disable=True, process=process,
                         noise_sampler=lambda *_: torch.randn(x.shape, generator=generator))
    assert torch.equal(got, want) and host.drawn == [7]
    assert model.calls == sigmas[:-1].tolist()
    assert SIGMAS["flow"][0] == 1.0             # the host's schedule is not written to


def test_a_noise_sampler_that_another_pack_puts_in_is_used(host):
    x = start("ve")
    seen = []

    def noise_sampler(sigma, sigma_next):
        seen.append(float(sigma))
        return torch.zeros_like(x)

    for name in ("sde", "comfyui"):
        sampler = build(name)
        sampler.extra_options["noise_sampler"] = noise_sampler
        sampler.run(Model(Eps()), x, SIGMAS["ve"], 7)
    assert seen == 2 * SIGMAS["ve"][:-2].tolist() and host.drawn == []


@pytest.mark.parametrize("name", ["sde", "comfyui"])
def test_a_model_with_noise_of_its_own_size_scales_the_added_noise(host, name):
    x, sampling = start("ve"), Eps()
    want = build(name, s_noise=0.5).run(Model(Eps()), x, SIGMAS["ve"], 7)
    sampling.noise_scale = 0.5
    assert torch.equal(build(name).run(Model(sampling), x, SIGMAS["ve"], 7), want)
    sampling.noise_scale = 1.0
    assert not torch.equal(build(name).run(Model(sampling), x, SIGMAS["ve"], 7), want)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("name", ["sde_5", "comfyui"])
def test_a_schedule_without_a_step_returns_the_state(host, name, count):
    x = start("flow")
    assert torch.equal(build(name).run(Model(Flow()), x, SIGMAS["flow"][:count], 7), x)


def ksampler(model, latent, node=nodes.KSampler, **changes):
    values = dict(model=model, seed=5, steps=4, cfg=6.0, scheduler="karras", positive="+", negative="-",
                  latent_image=latent, denoise=0.5, preset="sde", noise_scale="as preset", eta=-1.0, s_noise=-1.0,
                  order=0)
    if node is nodes.KSamplerAdvanced:
        values.update(noise_seed=values.pop("seed"), add_noise="enable", start_at_step=0, end_at_step=10000,
                      return_with_leftover_noise="disable")
        del values["denoise"]
    return node.execute(**{**values, **changes}).args[0]


def test_the_ksampler_node_hands_everything_to_the_hosts_code(host):
    model = SimpleNamespace(load_device="cpu", model_options={})
    latent = {"samples": torch.zeros(2, 1, 3, 3), "noise_mask": "mask", "batch_index": [3, 4], "kept": 1}
    before = dict(latent)
    out = ksampler(model, latent)
    assert latent == before and out["kept"] == 1 and out["noise_mask"] == "mask"
    assert torch.equal(out["samples"], torch.ones(2, 4, 3, 3))
    (run,) = host.sampled
    assert run["model"] is model and isinstance(run["sampler"], KSAMPLER)
    assert run["noise"] == ("noise", (2, 4, 3, 3), 5, [3, 4]) and run["noise_mask"] == "mask"
    assert run["sigmas"].tolist() == [0.5, 0.375, 0.25, 0.125, 0.0]
    assert (run["cfg"], run["positive"], run["negative"], run["seed"]) == (6.0, "+", "-", 5)
    assert run["callback"] == ("callback", 4) and run["disable_pbar"] is False and host.notes == ()


@pytest.mark.parametrize("notes, handed", [
    ({"downscale_ratio_spacial": 16}, (16,)),
    ({"downscale_ratio_spacial": 16, "downscale_ratio_temporal": 4}, (16, 4)),
    ({"downscale_ratio_temporal": 4}, (None, 4)),
])
def test_what_newer_versions_note_in_an_empty_latent_is_used_and_dropped(host, notes, handed):
    model = SimpleNamespace(load_device="cpu", model_options={})
    out = ksampler(model, {"samples": torch.zeros(1, 1, 3, 3), **notes})
    assert host.notes == handed and set(out) == {"samples"}


def test_a_bad_value_stops_the_ksampler_node_before_the_model_runs(host):
    with pytest.raises(ValueError, match="order"):
        ksampler(SimpleNamespace(load_device="cpu", model_options={}), {"samples": torch.zeros(1, 1, 3, 3)},
                 preset="comfyui", order=4)
    assert host.sampled == []


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The person's file, with a good preset and a bad one."""
    file = tmp_path / "mine.json"
    file.write_text('{"mine": {"eta": 0.2}, "bad": {"eta": -1}}')
    monkeypatch.setenv("ERSDE_PRESETS", str(file))
    return file


def test_a_persons_own_presets_are_in_the_list(mine, caplog):
    assert comfyui.preset_names() == [*PRESETS, "mine"]
    assert "'bad'" in caplog.text and str(mine) in caplog.text
    assert changed("mine").eta == 0.2
    with pytest.raises(ValueError, match="preset must be one of .*mine.*got 'bad'"):
        changed("bad")


def test_a_zero_that_the_pages_arrows_left_a_little_below_is_a_zero():
    zeros = changed("texture", eta=-3.19e-16, s_noise=-7.53e-16, start_percent=-1e-17)
    assert zeros.eta == 0.0 and zeros.s_noise == 0.0 and zeros.start == 0.0


# Parts of a run

@pytest.mark.parametrize("start, end, leftover, steps", [
    (0, 10000, "disable", [1.0, 0.75, 0.5, 0.25, 0.0]), (0, 2, "enable", [1.0, 0.75, 0.5]),
    (0, 2, "disable", [1.0, 0.75, 0.0]), (2, 10000, "enable", [0.5, 0.25, 0.0]), (1, 3, "enable", [0.75, 0.5, 0.25]),
    (0, 4, "disable", [1.0, 0.75, 0.5, 0.25, 0.0]),
])
def test_the_advanced_node_runs_the_hosts_part_of_the_schedule(host, start, end, leftover, steps):
    model = SimpleNamespace(load_device="cpu", model_options={})
    ksampler(model, {"samples": torch.zeros(1, 1, 3, 3)}, nodes.KSamplerAdvanced, start_at_step=start, end_at_step=end,
             return_with_leftover_noise=leftover, add_noise="disable")
    (run,) = host.sampled
    assert run["sigmas"].tolist() == steps
    assert torch.equal(run["noise"], torch.zeros(1, 4, 3, 3)) and run["noise"].device.type == "cpu"


@pytest.mark.parametrize("start, end", [(4, 10000), (9, 10000), (3, 3), (3, 2)])
def test_a_part_without_a_step_returns_the_latent(host, start, end):
    model = SimpleNamespace(load_device="cpu", model_options={})
    latent = {"samples": torch.zeros(1, 1, 3, 3), "kept": 1}
    out = ksampler(model, latent, nodes.KSamplerAdvanced, start_at_step=start, end_at_step=end)
    assert host.sampled == [] and out["kept"] == 1 and torch.equal(out["samples"], torch.zeros(1, 4, 3, 3))


def test_the_second_half_of_a_split_run_has_other_noise(host):
    seen = []
    x = start("ve")
    for part in (SIGMAS["ve"][:4], SIGMAS["ve"][3:]):
        calls = []
        sampler = build("sde", order=1, corrector="off")

        def model(x, sigma, **_):
            calls.append(x.clone())
            return torch.zeros_like(x)

        model = Recorder(Eps(), model)
        out = sampler.run(model, torch.zeros_like(x), part, 7)
        seen.append([(after - before * (t / s) ** 2).flatten() for before, after, s, t in
                     zip(calls, [*calls[1:], out], part[:-1], part[1:]) if t > 0])
    draws = torch.stack([draw / draw.norm() for half in seen for draw in half])
    assert (draws @ draws.T - torch.eye(len(draws))).abs().max() < 0.5


class Recorder(Model):
    """A model whose denoiser is a function."""

    def __init__(self, sampling, function):
        super().__init__(sampling)
        self.function = function

    def __call__(self, x, sigma, **extra_args):
        return self.function(x, sigma, **extra_args)


# The noise

def test_a_picture_cut_from_a_batch_gets_its_own_noise(host):
    x = start("ve").repeat(2, 1, 1, 1)
    settings = comfyui.make_settings("sde")
    whole = comfyui.build_sampler(settings).run(Model(Eps()), x, SIGMAS["ve"], 7)
    cut = dataclasses.replace(settings, batch_index=(2, 1))
    assert torch.equal(comfyui.build_sampler(cut).run(Model(Eps()), x[[2, 1]], SIGMAS["ve"], 7), whole[[2, 1]])


def test_the_ksampler_nodes_hand_on_where_the_pictures_were(host, monkeypatch):
    made = []
    monkeypatch.setattr(comfyui, "build_sampler", lambda settings: made.append(settings))
    model = SimpleNamespace(load_device="cpu", model_options={})
    for node in (nodes.KSampler, nodes.KSamplerAdvanced):
        ksampler(model, {"samples": torch.zeros(2, 1, 3, 3), "batch_index": [3, 1]}, node)
        ksampler(model, {"samples": torch.zeros(2, 1, 3, 3)}, node)
    assert [settings.batch_index for settings in made] == [(3, 1), None] * 2


def test_the_steps_noise_can_have_a_seed_and_a_source_of_its_own(host):
    x = start("ve")
    run = lambda seed=7, preset="sde", **changes: build(preset, **changes).run(Model(Eps()), x, SIGMAS["ve"], seed)
    assert torch.equal(run(step_noise_seed=5), run(5)) and not torch.equal(run(step_noise_seed=5), run())
    assert torch.equal(run(step_noise_seed=0), run(0)) and torch.equal(run(step_noise_seed=-1), run())
    assert torch.equal(run(noise="cpu"), run())
    assert host.drawn == []
    run(noise="comfyui")
    run(noise="comfyui", step_noise_seed=3)
    run(preset="comfyui")
    assert host.drawn == [7, 3, 7]
    run(preset="comfyui", noise="cpu")
    assert host.drawn == [7, 3, 7]


def test_numbers_not_device_tensors_name_the_steps_to_our_noise(host, monkeypatch):
    seen = []
    monkeypatch.setattr(SeededNoise, "__call__",
                        lambda self, sigma, after=None: seen.append(type(sigma)) or torch.zeros(self.shape))
    build("sde").run(Model(Eps()), start("ve"), SIGMAS["ve"], 7)
    assert seen and not any(issubclass(kind, torch.Tensor) for kind in seen)


# CFG++

class Guided(Model):
    """Calls the host's post-cfg functions as its cfg_function does; the conditional prediction is 0.7 of the way."""

    def __init__(self, sampling, uncond="negative", mask=None, latent=0.0):
        super().__init__(sampling)
        self.uncond, self.mask, self.latent, self.sigmas = uncond, mask, latent, "all sigmas"

    def __call__(self, x, sigma, model_options=None, **extra_args):
        plain = super().__call__(x, sigma, **extra_args)
        guided = plain + 0.3 * torch.cos(x)
        for function in (model_options or {}).get("sampler_post_cfg_function", []):
            guided = function({"denoised": guided, "cond_denoised": self.condition(x, plain), "cond": "positive",
                               "uncond_denoised": plain, "uncond": self.uncond, "sigma": sigma})
        if self.mask is not None:
            guided = guided * self.mask + self.latent * (1 - self.mask)
        return guided


    @staticmethod
    def condition(x, plain):
        return plain + 0.21 * torch.cos(x)


@pytest.mark.parametrize("process", SIGMAS)
@pytest.mark.parametrize("preset", ["few_steps", "sde_5"])
def test_the_steps_are_told_what_guidance_adds(host, process, preset):
    """As the library's own run with D - D_c, and without asking for predictions that the host would not make."""
    model, last, options = Guided(SAMPLING[process]()), {}, []
    sigmas = SIGMAS[process]

    class Watched(Guided):
        def __call__(self, x, sigma, model_options=None, **extra_args):
            options.append(model_options)
            return super().__call__(x, sigma, model_options, **extra_args)

    def call(x, sigma, **extra_args):
        plain = Model.__call__(model, x, sigma, **extra_args)
        last["added"] = 0.3 * torch.cos(x) + plain - model.condition(x, plain)
        return plain + 0.3 * torch.cos(x)

    run = lambda **kw: sample_preset(call, start(process), sigmas, preset, {"seed": 7}, disable=True, process=process, **kw)
    got = build(preset, noise="cpu").run(Watched(SAMPLING[process]()), start(process), sigmas, 7)
    assert torch.allclose(got, run(excess=lambda: last["added"]), atol=1e-5)
    assert not torch.allclose(got, run(), atol=1e-3)
    assert not any((each or {}).get("disable_cfg1_optimization") for each in options)


def test_a_guider_that_tells_nothing_samples_all_the_same(host):
    x = start("ve")
    got = build("few_steps").run(Model(Eps()), x, SIGMAS["ve"], 7)
    expected = sample_preset(Model(Eps()), x, SIGMAS["ve"], "few_steps", {"seed": 7}, disable=True, process="ve")
    assert torch.equal(got, expected)


@pytest.mark.parametrize("process", SIGMAS)
def test_cfg_pp_is_the_formula_and_asks_the_host_for_the_unconditional_prediction_at_cfg_1(host, process):
    x, model, sigmas = start(process), Guided(SAMPLING[process]()), SIGMAS[process]
    options = []
    inner = Guided.__call__

    class Watched(Guided):
        def __call__(self, x, sigma, model_options=None, **extra_args):
            options.append(model_options)
            return inner(self, x, sigma, model_options, **extra_args)

    got = build("ode", order=1, corrector="off", cfg_pp=True).run(Watched(SAMPLING[process]()), x, sigmas, 7)
    assert all(each["disable_cfg1_optimization"] for each in options)
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        a, b = (1 - s, 1 - t) if process == "flow" else (1.0, 1.0)
        plain = Model.__call__(model, x, s.repeat(2))
        x = b * (plain + 0.3 * torch.cos(x)) + t / s * (x - a * plain)
    assert torch.allclose(got, x, atol=1e-4)


@pytest.mark.parametrize("cfg_pp", [True, False])
def test_the_hosts_options_are_left_alone(host, cfg_pp):
    extra_args = {"seed": 7, "model_options": {"sampler_post_cfg_function": [], "kept": 1}}
    build("sde", cfg_pp=cfg_pp).sampler_function(Guided(Eps()), start("ve"), SIGMAS["ve"], extra_args=extra_args,
                                                 disable=True)
    assert extra_args == {"seed": 7, "model_options": {"sampler_post_cfg_function": [], "kept": 1}}


@pytest.mark.parametrize("function", [False, True])
def test_under_a_mask_cfg_pp_shifts_only_what_is_sampled(host, function):
    """The head of a run leaves the masked part as without CFG++."""
    mask = torch.zeros(2, 4, 3, 3)
    mask[..., 0] = 1.0
    extra_args = {"seed": 7, "denoise_mask": torch.ones_like(mask) if function else mask}
    if function:
        def narrow(sigma, whole, extra_options):
            assert extra_options["sigmas"] == "all sigmas" and (whole == 1).all()
            return mask
        extra_args["model_options"] = {"denoise_mask_function": narrow}
    run = lambda cfg_pp: build("ode", order=1, corrector="off", cfg_pp=cfg_pp).sampler_function(
        Guided(Eps(), mask=mask, latent=0.7), start("ve"), SIGMAS["ve"][:4], extra_args=extra_args, disable=True)
    with_it, without = run(True), run(False)
    assert torch.equal(with_it[..., 1:], without[..., 1:]) and not torch.allclose(with_it[..., 0], without[..., 0])


def test_cfg_pp_without_an_unconditional_prediction_is_one_sentence(host):
    for model in (Guided(Eps(), uncond=None), Model(Eps())):
        with pytest.raises(ValueError, match="^cfg_pp needs the prediction for the negative prompt.*switch cfg_pp off$"):
            build("sde", cfg_pp=True).run(model, start("ve"), SIGMAS["ve"], 7)


# The host's list of samplers

NAMES = [*(f"ersde_{name}" for name in PRESETS), "ersde_sde_5_cfg_pp", "ersde_ode_cfg_pp"]


def test_names_that_workflows_hold_are_never_renamed():
    """By name, not by what there is now: entries may be added, none changed."""
    published = ("sde_5", "ode", "sde", "sde_1", "sde_2", "sde_3", "sde_4", "comfyui", "few_steps", "flat", "texture",
                 "sde_5_cfg_pp", "ode_cfg_pp")
    assert {f"ersde_{name}" for name in published} <= set(NAMES)
    assert {"ode", "sde", "sde_1", "sde_2", "sde_3", "sde_4", "sde_5"} <= set(NOISE_SCALES)
    assert {"auto", "cpu", "device", "brownian", "comfyui"} <= set(comfyui.NOISE_NAMES)


def test_the_presets_are_appended_in_place_once_and_replace_nothing(host):
    names = host.samplers.KSampler.SAMPLERS
    before = dict(vars(host.sampling))
    assert comfyui.add_sampler_names() == NAMES
    assert names is host.samplers.KSampler.SAMPLERS and names == ["euler", "er_sde", *NAMES]
    assert {name: vars(host.sampling)[name] for name in before} == before
    made = {name: getattr(host.sampling, "sample_" + name) for name in NAMES}
    assert comfyui.add_sampler_names() == [] and names == ["euler", "er_sde", *NAMES]
    assert all(getattr(host.sampling, "sample_" + name) is function for name, function in made.items())


def test_a_name_that_is_taken_is_left_to_its_owner(host):
    host.sampling.sample_ersde_ode = "another's"
    host.samplers.KSampler.SAMPLERS.append("ersde_sde")
    added = comfyui.add_sampler_names()
    assert host.sampling.sample_ersde_ode == "another's" and not hasattr(host.sampling, "sample_ersde_sde")
    assert "ersde_ode" not in host.samplers.KSampler.SAMPLERS and {"ersde_ode", "ersde_sde"}.isdisjoint(added)


@pytest.mark.parametrize("value", ["0", "off", "No", " false "])
def test_a_variable_keeps_the_names_out(host, monkeypatch, value):
    monkeypatch.setenv("ERSDE_COMFYUI_DROPDOWN", value)
    assert comfyui.add_sampler_names() == [] and host.samplers.KSampler.SAMPLERS == ["euler", "er_sde"]


@pytest.mark.parametrize("process", SIGMAS)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_samples_as_the_node(host, process, name):
    comfyui.add_sampler_names()
    x, preset = start(process), name.removeprefix("ersde_").removesuffix("_cfg_pp")
    named = KSAMPLER(getattr(host.sampling, "sample_" + name)).run(Guided(SAMPLING[process]()), x, SIGMAS[process], 7)
    node = build(preset, cfg_pp=name.endswith("_cfg_pp")).run(Guided(SAMPLING[process]()), x, SIGMAS[process], 7)
    assert torch.equal(named, node)


def test_a_caller_of_a_name_can_change_eta_and_s_noise(host):
    comfyui.add_sampler_names()
    x = start("ve")
    named = KSAMPLER(host.sampling.sample_ersde_sde, {"eta": 0.5, "s_noise": 0.8}).run(Model(Eps()), x, SIGMAS["ve"], 7)
    assert torch.equal(named, build("sde", eta=0.5, s_noise=0.8).run(Model(Eps()), x, SIGMAS["ve"], 7))


def test_a_persons_own_presets_are_names_too_and_read_anew(host, mine):
    assert "ersde_mine" in comfyui.add_sampler_names()
    run = lambda: KSAMPLER(getattr(host.sampling, "sample_ersde_mine")).run(Model(Eps()), start("ve"), SIGMAS["ve"], 7)
    assert torch.equal(run(), build("sde_5", eta=0.2).run(Model(Eps()), start("ve"), SIGMAS["ve"], 7))
    save_preset(mine, Preset("mine", eta=0.9))
    assert torch.equal(run(), build("sde_5", eta=0.9).run(Model(Eps()), start("ve"), SIGMAS["ve"], 7))
    mine.write_text("{}")
    with pytest.raises(ValueError, match="preset must be one of .*got 'mine'"):
        run()


# The noise scale, the presets and the plot as nodes

def test_the_noise_scale_node_gives_a_function_or_a_curve():
    (value,) = nodes.NoiseScale.execute("sde_4", 0.5, "").args
    assert value == comfyui.CurveSetting(NOISE_SCALES["sde_4"], 0.5)
    (curve,) = nodes.NoiseScale.execute("points", 1.0, "0.1 1\n10 100").args
    assert curve.scale.log_g(1.0).exp().item() == pytest.approx(10.0)


@pytest.mark.parametrize("points, words", [
    ("0.1 2\n1 1", ["must not fall", "g = 2 at lambda = 0.1", "g = 1 at lambda = 1"]), ("", ["at least 2 points", "0"]),
    ("1 2 3", ["line 1", "two numbers", "1 2 3"])])
def test_a_bad_curve_is_one_sentence(points, words):
    with pytest.raises(ValueError) as error:
        nodes.NoiseScale.execute("points", 1.0, points)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_curve_samples_as_the_library_does_with_it(host):
    x = start("ve")
    curve = comfyui.make_scale("points", 0.8, "0.1 1\n10 100")
    got = build("sde", custom_scale=curve).run(Model(Eps()), x, SIGMAS["ve"], 7)
    want = sample_preset(Model(Eps()), x, SIGMAS["ve"], PRESETS["sde"].replace(eta=0.8), {"seed": 7}, disable=True,
                         noise_scale=curve.scale, process="ve")
    assert torch.equal(got, want)


def test_a_saved_preset_is_loaded_by_its_name_and_carried_in_full(mine, tmp_path, monkeypatch):
    save = lambda name="my look", **changes: nodes.PresetSave.execute(
        name, **{"preset": "flat", "noise_scale": "sde", "eta": 0.3, "s_noise": -1.0, "order": 0, **changes}).args[0]
    preset = save(method="paper", end_percent=0.5, description="for lines")
    assert preset == PRESETS["flat"].replace(name="my look", label="my look", noise_scale="sde", eta=0.3, method="paper",
                                             end=0.5, description="for lines")
    assert json.loads(mine.read_text())["mine"] == {"eta": 0.2}            # what was there stays
    assert nodes.Preset.execute("my look").args == (preset,)
    carried = nodes.Preset.define_schema().inputs[0].extra_dict["ersde_carried"]
    assert set(carried) == {"mine", "my look"}
    monkeypatch.setenv("ERSDE_PRESETS", str(tmp_path / "another machine's.json"))
    assert nodes.Preset.execute("my look", carried["my look"]).args == (preset,)
    with pytest.raises(ValueError, match="preset 'my look' is not on this machine, and the workflow does not carry"):
        nodes.Preset.execute("my look", " ")
    assert nodes.Preset.validate_inputs("my look") is True


def test_settings_that_are_carried_win_and_are_checked(mine):
    assert nodes.Preset.execute("mine", '{"eta": 0.6}').args[0].eta == 0.6
    assert nodes.Preset.execute("sde", '{"eta": 0.6}').args[0].eta == 0.6
    for text, words in (("{", ["'mine'", "not JSON"]), ('{"etta": 1}', ["etta"]), ('{"eta": -1}', ["eta", "-1"]),
                        ("[]", ["object"])):
        with pytest.raises((ValueError, TypeError)) as error:
            nodes.Preset.execute("mine", text)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "  ", "sde_5", "x" * 65, "a\nb", ".hidden"])
def test_a_name_that_is_not_allowed_writes_nothing(mine, name):
    before, folder = mine.read_text(), sorted(mine.parent.rglob("*"))
    with pytest.raises(ValueError, match="name"):
        nodes.PresetSave.execute(name, preset="sde", noise_scale="as preset", eta=0.5, s_noise=-1.0, order=0)
    assert mine.read_text() == before and sorted(mine.parent.rglob("*")) == folder


def test_another_preset_of_the_name_is_only_replaced_when_asked(mine):
    save = lambda **changes: nodes.PresetSave.execute("mine", preset="sde", noise_scale="as preset", eta=-1.0, s_noise=-1.0,
                                                      order=0, **changes).args[0]
    with pytest.raises(ValueError, match="'mine' with other settings is there already"):
        save()
    assert save(overwrite=True).noise_scale == "sde"
    before = mine.stat().st_mtime_ns
    assert save().noise_scale == "sde" and mine.stat().st_mtime_ns == before      # the same again writes nothing


def test_a_curve_cannot_be_saved_in_a_preset(mine):
    inputs = dict(preset="sde", noise_scale="as preset", eta=-1.0, s_noise=-1.0, order=0)
    with pytest.raises(ValueError, match="by its name"):
        nodes.PresetSave.execute("x", custom_scale=comfyui.make_scale("points", 1.0, "1 1\n2 2"), **inputs)
    saved = nodes.PresetSave.execute("x", custom_scale=comfyui.make_scale("sde_2", 0.5), **inputs).args[0]
    assert (saved.noise_scale, saved.eta) == ("sde_2", 0.5)


@pytest.mark.parametrize("process", SIGMAS)
@pytest.mark.parametrize("preset", ["sde_5", "flat", "few_steps", "comfyui"])
def test_the_plot_is_a_picture_of_the_run(host, process, preset, monkeypatch):
    charts = pytest.importorskip("ersde.plot")
    pytest.importorskip("matplotlib")
    drawn = []
    plot_run = charts.plot_run
    monkeypatch.setattr(charts, "plot_run", lambda plan, *rest: drawn.append(plan) or plot_run(plan, *rest))
    model = SimpleNamespace(load_device="cpu", model_options={},
                            get_model_object={"model_sampling": SAMPLING[process]()}.__getitem__)
    inputs = dict(model=model, scheduler="karras", steps=6, denoise=1.0, preset=preset, noise_scale="as preset", eta=-1.0,
                  s_noise=-1.0, order=0)
    (image,) = nodes.Plot.execute(**inputs).args
    assert image.shape == (1, 760, 1300, 3) and image.dtype == torch.float32 and 0 <= image.min() < image.max() <= 1
    # The plan is the one that a run makes.
    ran = []
    monkeypatch.setattr("ersde.samplers.run", lambda plan, *_, **__: ran.append(plan))
    build(preset).run(Model(SAMPLING[process]()), start(process), torch.linspace(1, 0, 7), 7)
    numbers = [[(step.x_scale, step.noise, step.denoised, len(step.changes)) for step in plan.steps] for plan in
               (drawn[0], ran[0])]
    # The compatible method rounds its first sigma in a flow model to the schedule's float32.
    assert torch.allclose(*torch.tensor(numbers, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    nodes.Plot.execute(**inputs, sigmas=SIGMAS[process])
    assert len(drawn[1].steps) == 5
