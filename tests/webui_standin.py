"""A stand-in for the WebUI's `modules.*` and for gradio: what the pack meets of them, traps included.

The traps are real ones, each met in a host's code: `eta` is filled in whenever a sampler's signature has it, a schedule's
name at the end of a sampler's name is cut off, names are remembered by a cache, set_samplers does not rebuild the map but
resets what is hidden, a script's errors are swallowed, `ui` is called again on another page to learn the defaults, an event
may only join components of one page, and a setting's component arguments are handed to its `update`.
"""
import collections
import functools
import importlib.util
import inspect
import json
import re
import sys
import types
from pathlib import Path

import torch

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "ersde_webui.py"

# The schedules of AUTOMATIC1111 1.10.1, Forge, reForge and Forge Neo: names, labels and aliases.
SCHEDULERS = """Automatic|Uniform|Karras|Exponential|Polyexponential|SGM Uniform|SGMUniform|KL Optimal|Align Your Steps
Simple|Normal|DDIM|DDIM Uniform|Beta|Beta57|Turbo|Align Your Steps GITS|Align Your Steps 11|Align Your Steps 32
Align Your Steps Custom|Sinusoidal SF|Invcosinusoidal SF|React Cosinusoidal DynSF|Cosine|Cosine-exponential Blend|Phi
Laplace|Karras Dynamic|Linear Quadratic|Bong Tangent|Flux|Flux2|Flow|sgm_uniform|kl_optimal|align_your_steps
ays|linear_quadratic|bong_tangent""".replace("\n", "|").split("|")

SamplerData = collections.namedtuple("SamplerData", "name constructor aliases options")


class FakeRNG:
    """One generator per image, as the host has it; `next()` is a whole batch."""

    def __init__(self, seeds, shape):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.draws = shape, 0

    def next(self):
        self.draws += 1
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])


class FakeModel:
    """What a sampler gets as `model`: the denoiser of N(0, 1) data, and the things a sampler may ask of it."""

    def __init__(self, p=None, inner=None, denoise=lambda x, sigma: x / (1 + sigma ** 2)):
        self.p, self.denoise, self.calls = p, denoise, 0
        self.inner_model = types.SimpleNamespace(sigmas=torch.linspace(0.03, 14.6, 1000)) if inner is None else inner

    def __call__(self, x, sigma, cond=None):
        self.calls += 1
        assert sigma.shape == (x.shape[0],)
        assert cond == "prompt"         # extra_args reach every call
        return self.denoise(x, sigma.reshape(-1, *[1] * (x.ndim - 1)))


class Part:
    """A prompt of an AND and its weight: the denoiser of N(mean, 1 + |mean|) data.

    Of one variance for all, guidance would be a Gaussian's, which long steps know without being told.
    """

    def __init__(self, mean, weight=1.0):
        self.mean, self.weight = mean, weight

    def __call__(self, x, sigma):
        v = 1.0 + abs(self.mean)
        return (v * x + sigma ** 2 * self.mean) / (v + sigma ** 2)


class Guided(FakeModel):
    """The host's CFGDenoiser over one prompt of parts per image; `skip`: the numbers of the calls without D_u.

    A test's own `extra_rows` makes an InstructPix2Pix model of it, and `combine` another extension's guidance.
    """

    extra_rows, combine = 0, None

    def __init__(self, prompts, mask=None, skip=(), p=None):
        super().__init__(p)
        self.prompts, self.skip, self.step, self.sampler = prompts, skip, 0, None
        self.mask, self.nmask, self.init_latent = None if mask is None else 1 - mask, mask, 3.0
        self.inner_model.inner_model = types.SimpleNamespace()

    def arguments(self, scale):
        return {"cond": types.SimpleNamespace(batch=self.prompts), "uncond": Part(-0.5), "cond_scale": scale}

    def __call__(self, x, sigma, cond, uncond, cond_scale):
        callbacks = sys.modules["modules.script_callbacks"]
        sigma, scale = sigma.reshape(-1, *[1] * (x.ndim - 1)), 1.0 if self.step in self.skip else cond_scale
        self.change()
        callbacks.run("cfg_denoiser", types.SimpleNamespace(denoiser=self))
        out = self.predict(callbacks, x, sigma, self.prompts, None if self.step in self.skip else uncond, scale)
        if self.mask is not None:
            out = self.blend(out)
        params = types.SimpleNamespace(x=out)
        callbacks.run("cfg_after_cfg", params)
        self.step += 1
        self.calls += 1
        return params.x

    def change(self):
        """Where a refiner comes."""

    def blend(self, out):
        return out * self.nmask + self.init_latent * self.mask

    def predict(self, callbacks, x, sigma, prompts, uncond, scale):
        rows = [part(x[i], sigma[i]) for i, parts in enumerate(prompts) for part in parts]
        firsts = [sum(map(len, prompts[:i])) for i in range(len(prompts))]
        rows += [uncond(x[i], sigma[i]) if uncond else rows[firsts[i]] for i in range(len(prompts))] * (1 + self.extra_rows)
        rows = torch.stack(rows)
        callbacks.run("cfg_denoised", types.SimpleNamespace(x=rows))
        if self.combine:
            return self.combine(rows)
        out = rows[-len(prompts):].clone()
        for i, parts in enumerate(prompts):
            for j, part in enumerate(parts):
                out[i] += (rows[firsts[i] + j] - rows[i - len(prompts)]) * (part.weight * scale)
        return out


class Patcher:
    """A fork's patcher of a network."""

    def __init__(self, **options):
        self.model_options = {"transformer_options": {}, **options}

    def set_model_sampler_post_cfg_function(self, function):
        before = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = before + [function]


class Forked(Guided):
    """Forge's: no rows, but the patcher's post-cfg functions.  Where there is no D_u it is 0, or None in reForge."""

    nothing = 0.0

    def __init__(self, prompts, *rest, **changes):
        super().__init__(prompts, *rest, **changes)
        self.load(Patcher())

    def load(self, unet):
        self.inner_model.inner_model.forge_objects = types.SimpleNamespace(unet=unet)

    def predict(self, callbacks, x, sigma, prompts, uncond, scale):
        parts = prompts[0]                  # a batch has the weights of its first image
        weight = sum(part.weight for part in parts)
        mean = torch.stack([sum(one(x[i], sigma[i]) * part.weight for one, part in zip(prompt, parts))
                            for i, prompt in enumerate(prompts)]) / weight
        plain = uncond(x, sigma) if uncond and scale != 1 else None if self.nothing is None else torch.zeros_like(x)
        out = mean if plain is None else plain + (mean - plain) * scale * weight
        options = self.inner_model.inner_model.forge_objects.unet.model_options
        for function in options.get("sampler_post_cfg_function", []):
            out = function({"denoised": out, "cond": [{"strength": part.weight} for part in parts], "uncond": [{}],
                            "cond_denoised": mean, "uncond_denoised": plain, "sigma": sigma, "model_options": options})
        return out


class FakeKDiffusionSampler:
    """The host's caller: looks at the function's signature for what to pass."""

    def __init__(self, function, sd_model, options=None):
        self.func, self.model, self.config, self.seen = function, sd_model, None, []

    def sample(self, p, x, sigmas):
        self.model.p = p
        kwargs = {"sigmas": sigmas}
        parameters = inspect.signature(self.func).parameters
        if "eta" in parameters:
            kwargs["eta"] = 0.37
            p.extra_generation_params["Eta"] = 0.37
        if (self.config.options or {}).get("brownian_noise"):
            kwargs["noise_sampler"] = None
        extra_args = self.model.arguments(p.cfg_scale) if isinstance(self.model, Guided) else {"cond": "prompt"}
        return self.func(self.model, x * sigmas[0], extra_args=extra_args, disable=False,
                         callback=lambda d: self.seen.append((d["i"], float(d["sigma"]))), **kwargs)


def make_host(names=("Euler a", "Euler", "DPM++ 2M")):
    """The modules by name, as a WebUI has them when it loads scripts."""
    host = {name: types.ModuleType(name) for name in (
        "modules", "modules.scripts", "modules.script_callbacks", "modules.options", "modules.shared", "modules.sd_samplers",
        "modules.sd_samplers_common", "modules.sd_samplers_kdiffusion", "modules.sd_schedulers")}
    for name, module in host.items():
        if "." in name:
            setattr(host["modules"], name.split(".")[1], module)
    host["modules"].__path__ = []
    host["modules.sd_samplers_common"].SamplerData = SamplerData
    host["modules.sd_samplers_kdiffusion"].KDiffusionSampler = FakeKDiffusionSampler

    host["modules.sd_schedulers"].schedulers = [types.SimpleNamespace(label=label) for label in SCHEDULERS]
    host["modules.shared"].opts = Options(hide_samplers=[])
    host["modules.options"].OptionInfo = OptionInfo
    s = host["modules.sd_samplers"]
    s.all_samplers = [SamplerData(name, lambda model, name=name: FakeKDiffusionSampler(name, model), [], {})
                      for name in names]
    s.all_samplers_map = {entry.name: entry for entry in s.all_samplers}
    s.samplers, s.samplers_map = [], {}

    def set_samplers():
        s.samplers, s.samplers_hidden = s.all_samplers, set(host["modules.shared"].opts.hide_samplers)
        s.samplers_map.clear()
        for entry in s.all_samplers:
            for name in [entry.name, *entry.aliases]:
                s.samplers_map[name.lower()] = entry.name

    @functools.lru_cache(None)
    def get_sampler_and_scheduler(name, scheduler=None):
        for label in SCHEDULERS:
            if name.endswith(" " + label):
                name, scheduler = name[:-len(label) - 1], label
        return s.all_samplers_map.get(name, s.samplers[0]).name, scheduler

    def create_sampler(name, model):
        entry = s.all_samplers_map[name]
        sampler = entry.constructor(model)
        sampler.config = entry
        return sampler

    s.set_samplers, s.create_sampler = set_samplers, create_sampler
    s.get_sampler_and_scheduler = get_sampler_and_scheduler
    add_page(host)
    set_samplers()
    return host


class Processing:
    """The host's p: what a request is, and what its picture will say of it."""

    def __init__(self, seeds=(1, 2), shape=(4, 8, 8), rng=True, is_api=False):
        self.extra_generation_params, self.comments, self.is_api, self.is_hr_pass = {}, {}, is_api, False
        self.rng = FakeRNG(seeds, shape) if rng else None
        self.script_args = ()

    def comment(self, text):
        self.comments[text] = 1


class Options:
    """shared.opts: what is saved comes first, then the defaults of what is known; anything else is an AttributeError."""

    def __init__(self, **data):
        self.__dict__.update(data=data, data_labels={})

    def __getattr__(self, name):
        if name in self.data:
            return self.data[name]
        if name in self.data_labels:
            return self.data_labels[name].default
        raise AttributeError(name)

    def __setattr__(self, name, value):
        self.data[name] = value

    def add_option(self, key, info):
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)


class OptionInfo:
    def __init__(self, default=None, label="", component=None, component_args=None, onchange=None, section=None,
                 infotext=None):
        self.default, self.label, self.component, self.component_args = default, label, component, component_args
        self.section, self.category_id, self.infotext = section, None, infotext

    def info(self, text):
        self.label += f" ({text})"
        return self

    def needs_reload_ui(self):
        return self


class Context:
    root_block = None


class Block:
    """A gradio component, or one that others stand in."""

    values = {"label", "value", "info", "elem_id", "visible"}

    def __init__(self, value=None, label=None, **arguments):
        self.value, self.label, self.arguments, self.changes = value, label, arguments, []
        self.page = Context.root_block
        assert not set(arguments) - self.values, arguments

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def change(self, fn, inputs, outputs, show_progress="full", queue=None):
        assert all(block.page is Context.root_block for block in (self, *inputs, *outputs)), "components of another page"
        self.changes.append((fn, inputs, outputs))


class Blocks(Block):
    def __enter__(self):
        self.before, Context.root_block = Context.root_block, self
        return self

    def __exit__(self, *error):
        Context.root_block = self.before
        return False


class Dropdown(Block):
    values = Block.values | {"choices", "allow_custom_value"}
    updates = {"value", "choices", "label", "info", "visible"}      # gradio 3's update knows less than its constructor


class Textbox(Block):
    values = Block.values | {"placeholder", "max_lines"}
    updates = values


class CheckboxGroup(Block):
    values = Block.values | {"choices"}
    updates = values


class Accordion(Block):
    values = Block.values | {"open"}


class Script:
    """scripts.Script."""

    on_after = ()
    infotext_fields = paste_field_names = None
    args_from = args_to = tabname = None

    def on_after_component(self, callback, *, elem_id):
        self.on_after = (*self.on_after, (elem_id, callback))

    def elem_id(self, item):
        title = re.sub("[^a-z_0-9]", "", self.title().lower())
        return f"script_{self.tabname}_{title}_{item}"

    def process(self, p, *args):
        pass


class AxisOption:
    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label, self.type, self.apply, self.confirm, self.choices = label, type, apply, confirm, choices


RE_PARAM = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def write_infotext(params):
    """The last line of an infotext, as the host quotes it."""
    quote = lambda text: json.dumps(text, ensure_ascii=False) if set(",\n:") & set(text) else text
    return ", ".join(f"{key}: {quote(str(value))}" for key, value in params.items())


def unquoted(value):
    """A value that only looks quoted, such as a lone quotation mark, stays as it is in the hosts."""
    try:
        return json.loads(value) if value[:1] == value[-1:] == '"' else value
    except json.JSONDecodeError:
        return value


def read_infotext(text):
    return {key: unquoted(value) for key, value in RE_PARAM.findall(text)}


class Runner:
    """scripts.ScriptRunner of one tab, with a page that has the sampler list before or after the scripts."""

    def __init__(self, classes, tab="txt2img", sampler_first=True, sampler="Euler a"):
        self.inputs, self.fields, self.scripts = [None], [], [kind() for kind in classes]
        with Blocks() as self.page:
            for script in self.scripts:
                script.tabname = tab
                assert script.show(tab == "img2img") == "always"
            if sampler_first:
                self.make_sampler(tab, sampler)
            for script in self.scripts:
                controls = script.ui(tab == "img2img")
                script.args_from, script.args_to = len(self.inputs), len(self.inputs) + len(controls)
                self.inputs += controls
                self.fields += script.infotext_fields or []
            if not sampler_first:
                self.make_sampler(tab, sampler)

    def make_sampler(self, tab, sampler):
        self.sampler = Dropdown(sampler, elem_id=f"{tab}_sampling")
        for script in self.scripts:
            for elem_id, callback in script.on_after:
                if elem_id == f"{tab}_sampling":
                    callback(types.SimpleNamespace(component=self.sampler))

    def defaults(self):
        """The API's default arguments: `ui` is called again, on a page of its own."""
        arguments = [0]
        with Blocks():
            for script in self.scripts:
                arguments += [control.value for control in script.ui(script.tabname == "img2img")]
        return arguments

    def process(self, p):
        for script in self.scripts:
            try:
                script.process(p, *p.script_args[script.args_from:script.args_to])
            except Exception as error:          # the host reports it and goes on
                self.failed = error

    def paste(self, host, text):
        """Paste an infotext: every field that it names gets the text, as the type of its value."""
        params = read_infotext(text)
        for callback in host["modules.script_callbacks"].pasted:
            callback(text, params)
        for component, label in self.fields:
            if params.get(label) is not None:
                component.value = type(component.value)(params[label])


def add_page(host):
    """scripts, script_callbacks and gradio, as far as the pack meets them."""
    scripts, callbacks = host["modules.scripts"], host["modules.script_callbacks"]
    scripts.Script, scripts.AlwaysVisible = Script, "always"
    xyz = types.ModuleType("xyz_grid.py")
    xyz.AxisOption, xyz.axis_options = AxisOption, [AxisOption("Seed", int, None)]
    other = types.SimpleNamespace(module=types.ModuleType("prompt_matrix.py"), path="prompt_matrix.py")
    scripts.scripts_data = [other, types.SimpleNamespace(module=xyz, path="xyz_grid.py")]
    callbacks.before_ui, callbacks.pasted = [], []
    callbacks.on_before_ui, callbacks.on_infotext_pasted = callbacks.before_ui.append, callbacks.pasted.append
    callbacks.callback_map = {f"callbacks_{name}": [] for name in ("cfg_denoiser", "cfg_denoised", "cfg_after_cfg")}
    for name in ("cfg_denoiser", "cfg_denoised", "cfg_after_cfg"):
        setattr(callbacks, f"on_{name}", callbacks.callback_map[f"callbacks_{name}"].append)

    def run(name, params):
        for callback in list(callbacks.callback_map[f"callbacks_{name}"]):
            callback(params)                # the host reports an exception and goes on; here it is to be seen

    def remove_callbacks_for_function(function):
        for functions in callbacks.callback_map.values():
            functions[:] = [one for one in functions if one != function]

    callbacks.run, callbacks.remove_callbacks_for_function = run, remove_callbacks_for_function
    gradio, context = types.ModuleType("gradio"), types.ModuleType("gradio.context")
    context.Context, gradio.context, gradio.__path__ = Context, context, []
    for kind in (Dropdown, Textbox, CheckboxGroup, Accordion, Blocks):
        setattr(gradio, kind.__name__, kind)
    gradio.Row, gradio.HTML = Block, Block
    fastapi = types.ModuleType("fastapi")
    fastapi.HTTPException = HTTPException
    host.update({"gradio": gradio, "gradio.context": context, "fastapi": fastapi})


class HTTPException(Exception):
    def __init__(self, status_code, detail):
        super().__init__(status_code, detail)
        self.status_code, self.detail = status_code, detail


def install(monkeypatch):
    """The stand-in in place of whatever there is; returns the modules by name."""
    modules = make_host()
    for name in list(sys.modules):
        if name.split(".")[0] in ("modules", "gradio", "fastapi"):
            monkeypatch.delitem(sys.modules, name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


def scripts_of(module):
    """The classes the host collects from a loaded script."""
    return [value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, Script)]


def load_as_host(path=SCRIPT):
    """Load a script as the WebUI does: its folder on a path that is put back, the module in no sys.modules."""
    before = sys.path
    try:
        sys.path = [str(path.parents[1]), *sys.path]
        spec = importlib.util.spec_from_file_location(path.name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path = before


def start(monkeypatch, tmp_path):
    """The stand-in's modules by name, with the pack's script loaded as "script"; no presets of a person's own."""
    monkeypatch.setenv("ERSDE_PRESETS", str(tmp_path / "none.json"))
    modules = install(monkeypatch)
    modules["script"] = load_as_host()
    return modules
