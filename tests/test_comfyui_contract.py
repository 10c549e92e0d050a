"""The ComfyUI side without ComfyUI: what the entry exports, the nodes' form, and the adapter against a stand-in.

The stand-in is as much of the host as the adapter meets, with the host's shapes: a KSAMPLER calls its function with
(model, x, sigmas, extra_args, callback, disable), a model reaches its model_sampling through its patcher, and the noise
is one generator for the whole batch.  `tests/hosts/test_comfyui.py` asks the host itself.
"""
import inspect
import json
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nodes
from ersde import NOISE_SCALES, PRESETS, sample_preset
from ersde.hosts import comfyui

ROOT = Path(__file__).resolve().parents[1]

# Saved workflows hold these names, and the values by position: entries may be added at the end, never moved.
ER_SDE_INPUTS = ["preset", "noise_scale", "eta", "s_noise", "order"]
KSAMPLER_INPUTS = ["model", "seed", "steps", "cfg", "preset", "scheduler", "positive", "negative", "latent_image", "denoise",
                   "noise_scale", "eta", "s_noise", "order"]
INPUTS = {"ERSDE_Sampler": ER_SDE_INPUTS, "ERSDE_KSampler": KSAMPLER_INPUTS}


# The entry

LOAD = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location({name!r}, {path!r})
sys.modules[{name!r}] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps([sorted(module.NODE_CLASS_MAPPINGS), sorted(module.NODE_DISPLAY_NAME_MAPPINGS), sorted(sys.modules)]))
"""


def load_entry(folder, *path):
    """The entry loaded as ComfyUI loads it, under its folder's path as a name: (ids, ids with a title, sys.modules)."""
    code = LOAD.format(name="/somewhere/custom_nodes/er-sde-samplers", path=str(ROOT / "__init__.py"))
    code = f"import sys; sys.path[:0] = {[str(part) for part in path]!r}\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_entry_without_a_host_exports_nothing_and_imports_none(tmp_path):
    ids, titles, modules = load_entry(tmp_path)
    assert ids == titles == []
    hosts = {name for name in modules if name.split(".")[0] in ("comfy", "modules", "k_diffusion", "folder_paths")}
    assert not hosts


def test_entry_beside_a_host_exports_the_nodes_from_its_own_copy_of_the_library(tmp_path):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "__init__.py").write_text("")
    ids, titles, modules = load_entry(tmp_path, tmp_path)
    assert ids == titles == sorted(INPUTS)
    # A library of another copy of the pack, or of the WebUI, must not be the one that is used.
    assert "ersde" not in modules and "nodes" not in modules
    assert "/somewhere/custom_nodes/er-sde-samplers.ersde" in modules
    # The host's modules are asked for when a node is used.
    assert [name for name in modules if name.startswith("comfy.")] == []


# The nodes

def signature(call):
    return list(inspect.signature(call).parameters)


@pytest.mark.parametrize("key", INPUTS)
def test_nodes_have_the_form_that_the_host_reads(key, host):
    node = nodes.NODE_CLASS_MAPPINGS[key]
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS[key]
    assert node.DESCRIPTION and node.CATEGORY.startswith("sampling")
    assert len(node.RETURN_TYPES) == len(node.OUTPUT_TOOLTIPS) == 1
    inputs = node.INPUT_TYPES()
    assert list(inputs) == ["required"] and list(inputs["required"]) == INPUTS[key]
    assert signature(getattr(node(), node.FUNCTION)) == INPUTS[key]
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS) == set(INPUTS)


@pytest.mark.parametrize("key", INPUTS)
def test_every_input_has_a_tooltip_and_numbers_say_what_raising_them_does(key, host):
    for name, (kind, options) in nodes.NODE_CLASS_MAPPINGS[key].INPUT_TYPES()["required"].items():
        assert len(options["tooltip"]) > 20, name
        if kind in ("INT", "FLOAT") and name != "seed":
            assert options["tooltip"].startswith("Raise it"), name
            assert options["min"] <= options["default"] <= options["max"], name
        if isinstance(kind, list):
            assert options.get("default", kind[0]) in kind, name


def test_the_lists_are_the_librarys_and_the_hosts(host):
    inputs = nodes.ERSDEKSampler.INPUT_TYPES()["required"]
    assert inputs["preset"][0] == list(PRESETS)
    assert inputs["noise_scale"][0] == ["as preset", *NOISE_SCALES]
    assert inputs["scheduler"][0] is host.samplers.KSampler.SCHEDULERS
    assert all(name in inputs["preset"][1]["tooltip"] for name in PRESETS)


# The preset, unless a person changes something

@pytest.mark.parametrize("name", PRESETS)
def test_defaults_leave_the_preset_as_it_is(name, host):
    defaults = {key: options["default"] for key, (_, options) in nodes.ERSDESampler.INPUT_TYPES()["required"].items()}
    assert comfyui.changed_preset(**{**defaults, "preset": name}) == PRESETS[name]


def test_each_input_changes_its_own_field():
    changed = comfyui.changed_preset("flat", "sde", 0.25, 0.9, 2)
    assert changed == PRESETS["flat"].replace(noise_scale="sde", eta=0.25, s_noise=0.9, order=2)
    assert comfyui.changed_preset("sde", eta=0.0).eta == 0.0
    assert comfyui.changed_preset("sde", s_noise=0.0).s_noise == 0.0
    assert comfyui.changed_preset("flat", eta=-0.05) == PRESETS["flat"]


@pytest.mark.parametrize("values, words", [
    (dict(preset="comfyui", order=5), ["order", "5", "3"]),
    (dict(preset="sde_5", order=-1), ["order", "-1"]),
    (dict(preset="sde_5", eta=float("nan")), ["eta", "nan"]),
    (dict(preset="sde_5", s_noise=float("inf")), ["s_noise", "inf"]),
    (dict(preset="sde_5", noise_scale="sde_55"), ["noise_scale", "sde_55", "sde_5"]),
    (dict(preset="comfy"), ["preset", "comfy", "sde_5"]),
])
def test_a_bad_value_is_named_in_one_sentence(values, words):
    with pytest.raises(ValueError) as error:
        comfyui.changed_preset(**values)
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
        assert sigma.shape == (x.shape[0],) and set(extra_args) == {"seed"}
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

    def __init__(self, model, steps, device, sampler=None, scheduler=None, denoise=None, model_options=None):
        assert sampler == "er_sde" and scheduler in self.SCHEDULERS and device == model.load_device
        self.sigmas = torch.linspace(denoise, 0, steps + 1)


@pytest.fixture
def host(monkeypatch):
    """The stand-in in sys.modules; `drawn` counts the seeds of its noise samplers, `sampled` the runs."""
    made = SimpleNamespace(drawn=[], sampled=[])

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
    module("comfy.k_diffusion")
    module("comfy.k_diffusion.sampling", default_noise_sampler=default_noise_sampler)
    module("latent_preview", prepare_callback=lambda model, steps: ("callback", steps))
    return made


SIGMAS = {"ve": torch.tensor([14.6, 5.0, 2.0, 0.7, 0.2, 0.0]), "flow": torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])}
SAMPLING = {"ve": Eps, "flow": Flow}


def start(process):
    torch.manual_seed(0)
    return torch.randn(2, 4, 3, 3) * SIGMAS[process][0]


@pytest.mark.parametrize("process", SIGMAS)
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "comfyui"])
def test_a_preset_runs_as_the_library_runs_it(host, process, name):
    x, steps = start(process), []
    kept = x.clone()
    model, same = Model(SAMPLING[process]()), Model(SAMPLING[process]())
    (sampler,) = nodes.ERSDESampler().build(name, "as preset", -1.0, -1.0, 0)
    got = sampler.run(model, x, SIGMAS[process], 7, steps.append)
    want = sample_preset(same, x, SIGMAS[process], name, {"seed": 7}, disable=True, process=process)
    assert torch.equal(got, want) and torch.equal(x, kept) and torch.isfinite(got).all()
    assert model.calls == SIGMAS[process][:-1].tolist() and [step["i"] for step in steps] == list(range(5))
    assert host.drawn == []                     # the library's own noise, by the run's seed


@pytest.mark.parametrize("process", SIGMAS)
def test_the_compatible_preset_takes_the_hosts_noise_and_first_sigma(host, process):
    x, model = start(process), Model(SAMPLING[process]())
    got = comfyui.build_sampler("comfyui").run(model, x, SIGMAS[process], 7)
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
        sampler = comfyui.build_sampler(name)
        sampler.extra_options["noise_sampler"] = noise_sampler
        sampler.run(Model(Eps()), x, SIGMAS["ve"], 7)
    assert seen == 2 * SIGMAS["ve"][:-2].tolist() and host.drawn == []


@pytest.mark.parametrize("name", ["sde", "comfyui"])
def test_a_model_with_noise_of_its_own_size_scales_the_added_noise(host, name):
    x, sampling = start("ve"), Eps()
    want = comfyui.build_sampler(name, s_noise=0.5).run(Model(Eps()), x, SIGMAS["ve"], 7)
    sampling.noise_scale = 0.5
    assert torch.equal(comfyui.build_sampler(name).run(Model(sampling), x, SIGMAS["ve"], 7), want)
    sampling.noise_scale = 1.0
    assert not torch.equal(comfyui.build_sampler(name).run(Model(sampling), x, SIGMAS["ve"], 7), want)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("name", ["sde_5", "comfyui"])
def test_a_schedule_without_a_step_returns_the_state(host, name, count):
    x = start("flow")
    assert torch.equal(comfyui.build_sampler(name).run(Model(Flow()), x, SIGMAS["flow"][:count], 7), x)


def ksampler(model, latent, **changes):
    values = dict(model=model, seed=5, steps=4, cfg=6.0, scheduler="karras", positive="+", negative="-",
                  latent_image=latent, denoise=0.5, preset="sde", noise_scale="as preset", eta=-1.0, s_noise=-1.0,
                  order=0)
    return nodes.ERSDEKSampler().sample(**{**values, **changes})[0]


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


def test_a_persons_own_presets_are_in_the_list(tmp_path, monkeypatch, caplog):
    file = tmp_path / "mine.json"
    file.write_text('{"mine": {"eta": 0.2}, "bad": {"eta": -1}}')
    monkeypatch.setenv("ERSDE_PRESETS", str(file))
    assert comfyui.preset_names() == [*PRESETS, "mine"]
    assert "'bad'" in caplog.text and str(file) in caplog.text
    assert comfyui.changed_preset("mine").eta == 0.2
    with pytest.raises(ValueError, match="preset must be one of .*mine.*got 'bad'"):
        comfyui.changed_preset("bad")


def test_a_zero_that_the_pages_arrows_left_a_little_below_is_a_zero():
    changed = comfyui.changed_preset("sde", eta=-3.19e-16, s_noise=-7.53e-16)
    assert changed.eta == 0.0 and changed.s_noise == 0.0
