"""The WebUI's samplers against a stand-in for the host: what is listed, and what a sampler meets of a run."""
import importlib.util
import inspect
import itertools
import subprocess
import sys
import types

import pytest
import torch
import webui_standin as standin
from webui_standin import SCHEDULERS, SCRIPT, FakeModel, FakeRNG, Forked, Guided, Part, Patcher, SamplerData, load_as_host

from ersde import PRESETS, Preset, sample_preset
from ersde.hosts import webui


@pytest.fixture
def host(monkeypatch):
    return standin.install(monkeypatch)["modules.sd_samplers"]


def names_of(host):
    return [entry.name for entry in host.all_samplers]


def run_preset(host, name, x=None, seeds=(1, 2), steps=8, rng=True, model=None):
    shape = (4, 8, 8)
    p = types.SimpleNamespace(extra_generation_params={}, rng=FakeRNG(seeds, shape) if rng else None)
    x = p.rng.next() if x is None else x
    sampler = host.create_sampler(name, model or FakeModel())
    sigmas = torch.cat([torch.logspace(1.16, -1.5, steps), torch.zeros(1)])
    return sampler.sample(p, x, sigmas), p, sampler


OURS = [webui.sampler_name(preset) for preset in PRESETS.values()]


def test_every_preset_stands_after_the_hosts_own_in_order(host):
    assert webui.register() == OURS
    assert names_of(host) == ["Euler a", "Euler", "DPM++ 2M", *OURS]
    assert [host.all_samplers_map[name].name for name in OURS] == OURS
    assert host.samplers is host.all_samplers
    for preset in PRESETS.values():
        assert host.samplers_map[webui.sampler_name(preset).lower()] == webui.sampler_name(preset)
        assert host.samplers_map[f"er_sde_{preset.name}"] == webui.sampler_name(preset)


def test_registering_again_replaces_in_place(host):
    webui.register()
    after_us = SamplerData("another extension's", lambda model: None, [], {})
    host.all_samplers.append(after_us)
    first = list(host.all_samplers)
    listed = host.all_samplers
    webui.register()
    assert host.all_samplers is listed
    assert names_of(host) == [entry.name for entry in first]
    for old, new in zip(first, host.all_samplers):
        assert (new is not old) == (old.name in OURS), old.name
        if old.name in OURS:
            assert host.all_samplers_map[old.name] is new


def test_entries_of_an_older_import_are_known_as_ours(host):
    """After an update the module may be imported anew; its marks must still be read."""
    spec = importlib.util.spec_from_file_location("ersde.hosts.webui_again", webui.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    again.register()
    assert webui.register() == OURS
    assert names_of(host) == ["Euler a", "Euler", "DPM++ 2M", *OURS]


def test_the_hosts_own_er_sde_is_left_alone(monkeypatch, host):
    own = SamplerData("ER SDE", lambda model: None, ["k_er_sde"], {})
    host.all_samplers.insert(1, own)
    host.all_samplers_map["ER SDE"] = own
    for _ in range(2):
        webui.register()
    assert host.all_samplers[1] is own and host.all_samplers_map["ER SDE"] is own
    assert host.samplers_map["er sde"] == "ER SDE" and host.samplers_map["k_er_sde"] == "ER SDE"
    assert names_of(host).count("ER SDE") == 1 and len(names_of(host)) == 4 + len(OURS)


def test_a_foreign_entry_of_our_name_is_kept_and_reported(host, capsys):
    foreign = SamplerData(OURS[1], lambda model: None, [], {})
    host.all_samplers.append(foreign)
    host.all_samplers_map[OURS[1]] = foreign
    assert webui.register() == [OURS[0], *OURS[2:]]
    assert host.all_samplers[3] is foreign and host.all_samplers_map[OURS[1]] is foreign
    assert names_of(host).count(OURS[1]) == 1
    assert OURS[1] in capsys.readouterr().err


def test_a_name_asked_for_before_we_came_is_found_after(host):
    assert host.get_sampler_and_scheduler(OURS[0])[0] == "Euler a"
    webui.register()
    assert host.get_sampler_and_scheduler(OURS[0])[0] == OURS[0]


@pytest.mark.parametrize("name", OURS)
def test_names_survive_the_hosts_parsing(host, name):
    webui.register()
    assert host.get_sampler_and_scheduler(name) == (name, None)
    # Other forks fold the case.
    assert not any(name.lower().endswith(" " + label.lower()) for label in SCHEDULERS)
    assert not set(name) & set(",:\"\n<>|")         # the infotext's and the file names' own marks


def test_names_are_distinct_and_not_the_hosts(host):
    folded = [name.lower() for name in OURS]
    assert len(set(folded)) == len(PRESETS)
    assert "er sde" not in folded and not set(folded) & {f"er_sde_{name}" for name in PRESETS}
    assert all(name.startswith("ER-SDE ") for name in OURS)


def test_entries_fit_the_api(host):
    webui.register()
    for entry in host.all_samplers[3:]:
        assert isinstance(entry, SamplerData)
        assert all(isinstance(alias, str) for alias in entry.aliases)
        assert all(isinstance(value, (str, bool, int, float)) for value in entry.options.values())


def test_a_presets_schedule_is_the_hosts_hint(host):
    assert webui.sampler_entry(Preset("mine", scheduler="karras")).options == {"scheduler": "karras"}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_each_preset_samples(host, preset):
    webui.register()
    model = FakeModel()
    out, p, sampler = run_preset(host, webui.sampler_name(preset), model=model)
    parameters = inspect.signature(sampler.func).parameters
    assert list(parameters) == ["model", "x", "sigmas", "extra_args", "callback", "disable"]
    assert p.extra_generation_params == {}      # no "Eta" of the host's slider
    assert out.shape == (2, 4, 8, 8) and out.isfinite().all()
    assert model.calls == 8 and [i for i, _ in sampler.seen] == list(range(8))
    # Noise comes from the host: one draw for the first x, then one for each noisy step.
    noisy = preset.eta > 0 and preset.noise_scale != "ode"
    assert (p.rng.draws > 1) == noisy
    assert host.all_samplers_map[webui.sampler_name(preset)].options == {}


def test_the_presets_are_different_samplers(host):
    """A late-binding mistake would give every entry the last preset.  In steps of both kinds: orders tell in short ones."""
    webui.register()
    results = {name: run_preset(host, name, steps=16)[0] for name in OURS}
    assert not [pair for pair in itertools.combinations(OURS, 2) if torch.equal(results[pair[0]], results[pair[1]])]


def test_a_window_is_read_off_the_hosts_table(host):
    """texture makes no noise in the first part of the schedule: its first noisy step starts below the table's 80 %."""
    webui.register()
    texture = PRESETS["texture"]
    assert texture.start > 0
    p = types.SimpleNamespace(extra_generation_params={}, rng=FakeRNG((1,), (4, 8, 8)))
    model = FakeModel(p)
    sampler = host.create_sampler(webui.sampler_name(texture), model)
    edge = float(torch.quantile(model.inner_model.sigmas, 1 - texture.start))
    sigmas = torch.tensor([edge * 1.2, edge * 1.1, edge * 1.05])
    sampler.sample(p, torch.ones(1, 4, 8, 8), sigmas)
    assert p.rng.draws == 0
    sampler.sample(p, torch.ones(1, 4, 8, 8), torch.tensor([edge * 0.95, edge * 0.9, edge * 0.8]))
    assert p.rng.draws == 2


@pytest.mark.parametrize("name", ["sde", "sde_5"])
def test_a_batch_equals_its_single_images(host, name):
    webui.register()
    name = webui.sampler_name(PRESETS[name])
    both = run_preset(host, name, seeds=(11, 12))[0]
    for k, seed in enumerate((11, 12)):
        torch.testing.assert_close(run_preset(host, name, seeds=(seed,))[0][0], both[k], rtol=0, atol=1e-6)
    assert (both[0] - both[1]).abs().max() > 0.1


def test_without_the_hosts_generators_the_librarys_noise_is_used(host):
    webui.register()
    name = webui.sampler_name(PRESETS["sde"])
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(run_preset(host, name, x=torch.ones(2, 4, 8, 8), rng=False)[0])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    bare = FakeModel()
    del bare.p              # a host, or an extension, whose model has no p at all
    assert webui.host_noise(bare, torch.ones(1)) is None


def test_host_noise_follows_the_states_dtype():
    p = types.SimpleNamespace(rng=FakeRNG((1, 2), (4, 8, 8)))
    noise = webui.host_noise(FakeModel(p), torch.zeros(2, 4, 8, 8, dtype=torch.float64))(1.0, 0.5)
    assert noise.dtype == torch.float64 and noise.shape == (2, 4, 8, 8)


class CONST:
    pass


class FluxSampling(CONST):
    pass


SPACE = types.SimpleNamespace
FLOW_MODELS = {
    "AUTOMATIC1111, SD3": SPACE(inner_model=SPACE(add_noise_to_latent=lambda *a: None, parameterization="eps")),
    "Forge": SPACE(predictor=SPACE(prediction_type="const")),
    "Forge, linked": SPACE(inner_model=SPACE(predictor=SPACE(prediction_type="const"))),
    "reForge": SPACE(inner_model=SPACE(forge_objects=SPACE(unet=SPACE(model=SPACE(model_sampling=FluxSampling()))))),
    # Its script "Advanced Model Sampling" runs a U-Net as a flow model: its wrapper knows better than the U-Net.
    "reForge, patched": SPACE(
        model_patcher=SPACE(get_model_object={"model_sampling": FluxSampling()}.get),
        inner_model=SPACE(forge_objects=SPACE(unet=SPACE(model=SPACE(model_sampling=object()))))),
}
VE_MODELS = {
    "AUTOMATIC1111": SPACE(inner_model=SPACE(parameterization="eps")),
    "Forge": SPACE(predictor=SPACE(prediction_type="epsilon")),
    "reForge": SPACE(inner_model=SPACE(forge_objects=SPACE(unet=SPACE(model=SPACE(model_sampling=object()))))),
}


@pytest.mark.parametrize("inner, alpha", [
    *[pytest.param(inner, lambda s: 1 - s, id=f"flow, {who}") for who, inner in FLOW_MODELS.items()],
    *[pytest.param(inner, lambda s: 1.0, id=f"ve, {who}") for who, inner in VE_MODELS.items()],
])
def test_the_process_is_read_off_the_model(host, inner, alpha):
    """With a constant denoiser c and no noise drawn, a step of the reverse-time SDE is, with rho = lambda_t / lambda_s,

        x_t = alpha_t c + sigma_t / sigma_s rho (x_s - alpha_s c)

    (the ODE's step would be the same for both processes).
    """
    webui.register()
    c, start, end = 0.7, 0.9, 0.5
    x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    p = SPACE(extra_generation_params={}, rng=SPACE(next=lambda: torch.zeros_like(x)))
    model = FakeModel(p, inner, denoise=lambda x, sigma: torch.full_like(x, c))
    sampler = host.create_sampler(webui.sampler_name(PRESETS["sde"]), model)
    out = sampler.sample(p, x, torch.tensor([start, end]))
    rho = (end / alpha(end)) / (start / alpha(start))
    expected = alpha(end) * c + end / start * rho * (start * x - alpha(start) * c)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("p, name", [
    (SPACE(is_api=True, scheduler="Uniform"), "Uniform"), (SPACE(is_api=True, scheduler=None), "Automatic"),
    (SPACE(scheduler="Simple", hr_scheduler="Uniform", is_hr_pass=True), "Uniform"), (SPACE(), "Automatic"),
], ids=str)
def test_a_schedule_above_a_flow_models_is_refused_with_a_way_out(host, p, name):
    """Forge Neo's get_sigmas asks a model of times 0 to 1 for the sigma at 999: at a shift of 3, 3 * 999 / 1999."""
    webui.register()
    p.extra_generation_params = {}
    sampler = host.create_sampler(webui.sampler_name(PRESETS["sde"]), FakeModel(p, FLOW_MODELS["Forge, linked"]))
    with pytest.raises(standin.HTTPException if hasattr(p, "is_api") else ValueError) as error:
        sampler.sample(p, torch.ones(1, 1, 8, 8), torch.tensor([1.49925, 1.4985, 0.0]))
    text = getattr(error.value, "detail", str(error.value))
    assert all(word in text for word in (f"'{name}'", "1.49925", "above 1", "Simple")) and "\n" not in text
    assert getattr(error.value, "status_code", 422) == 422 and sampler.model.calls == 0 and not p.extra_generation_params
    p.rng = SPACE(next=lambda: torch.zeros(1, 1, 8, 8))
    sampler.sample(p, torch.ones(1, 1, 8, 8), torch.tensor([1.0 + 2 ** -23, 0.5, 0.0]))     # a rounding


def test_an_interruption_of_the_host_passes_through(host):
    """The host stops a run with an exception that is no Exception; nobody but the host may catch it."""
    class Stop(BaseException):
        pass

    def denoise(x, sigma):
        raise Stop

    webui.register()
    with pytest.raises(Stop):
        run_preset(host, OURS[0], model=FakeModel(denoise=denoise))


def test_the_script_registers_and_reload_keeps_the_list(host, capsys):
    path = list(sys.path)
    load_as_host()
    first = list(host.all_samplers)
    assert names_of(host) == ["Euler a", "Euler", "DPM++ 2M", *OURS]
    load_as_host()
    assert names_of(host) == [entry.name for entry in first]
    assert all(old is not new for old, new in zip(first[3:], host.all_samplers[3:]))
    assert sys.path == path
    assert capsys.readouterr() == ("", "")


def test_the_script_leaves_one_class_for_the_host_to_collect(host):
    """The host takes every Script class it finds in a script's namespace, imported ones too."""
    module = load_as_host()
    assert len([value for value in vars(module).values() if inspect.isclass(value)]) == len(standin.scripts_of(module)) == 1


def test_a_failure_is_one_line_and_the_host_starts(host, capsys):
    before = list(host.all_samplers)
    del sys.modules["modules.sd_samplers_kdiffusion"].KDiffusionSampler
    load_as_host()
    err = capsys.readouterr().err
    assert err.startswith("ER-SDE: no samplers: ") and "KDiffusionSampler" in err and err.count("\n") == 1
    assert host.all_samplers == before          # nothing half done


@pytest.mark.parametrize("missing, words", [
    ("modules.options", "no settings page"), ("modules.script_callbacks", "no axes"), ("gradio.context", "no accordion")])
def test_without_one_part_of_the_host_the_others_are_there(host, capsys, monkeypatch, missing, words):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delattr(sys.modules[missing.split(".")[0]], missing.split(".")[1])
    load_as_host()
    err = capsys.readouterr().err
    assert err.startswith(f"ER-SDE: {words}") and err.count("\n") == 1
    assert names_of(host) == ["Euler a", "Euler", "DPM++ 2M", *OURS]


def test_outside_a_webui_the_script_does_nothing():
    code = ("import runpy, sys; runpy.run_path(sys.argv[1]); "
            "print(sorted(name for name in sys.modules if name.split('.')[0] in ('ersde', 'modules', 'torch')))")
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPT)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_the_script_finds_its_package_by_itself(tmp_path):
    """No folder of ours on the path before, none after."""
    code = ("import runpy, sys, types; path = list(sys.path); "
            "sys.modules.update({name: types.ModuleType(name) for name in ('modules', 'modules.scripts')}); "
            "runpy.run_path(sys.argv[1]); print('ersde.hosts.webui' in sys.modules, sys.path == path)")
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPT)], capture_output=True, text=True, timeout=120,
                          cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "True True"), done.stderr
    assert done.stderr.startswith("ER-SDE: ") and "modules" in done.stderr      # the bare host has no sampler list


def test_importing_the_adapter_imports_no_host():
    code = "import ersde.hosts.webui, sys; print([name for name in sys.modules if name.split('.')[0] == 'modules'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          cwd=SCRIPT.parents[1])
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_a_persons_own_presets_are_registered_and_broken_ones_reported(host, tmp_path, monkeypatch, capsys):
    file = tmp_path / "mine.json"
    file.write_text("""{"mine": {"eta": 0.2, "label": "my look"}, "bad": {"eta": -1}, "twin": {"label": "ODE"},
                        "cut": {"label": "soft Karras"}}""")
    monkeypatch.setenv("ERSDE_PRESETS", str(file))
    assert webui.register() == [*OURS, "ER-SDE my look"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for line, words in zip(lines, ([str(file), "'bad'", "eta"], ["'twin'", "ODE"], ["'cut'", "soft Karras", "schedule"])):
        assert line.startswith("ER-SDE: ") and all(word in line for word in words)


def test_a_version_without_a_list_of_schedules(host, monkeypatch):
    monkeypatch.delitem(sys.modules, "modules.sd_schedulers")
    monkeypatch.delattr(sys.modules["modules"], "sd_schedulers")
    assert webui.register() == OURS


# What guidance adds.

ONE, AND = [Part(1.0)], [Part(1.0, 0.7), Part(-2.0, 0.5)]
MASK = torch.linspace(0, 1, 8).expand(4, 8, 8)
X = torch.linspace(-3, 3, 2 * 4 * 64).reshape(2, 4, 8, 8)
CALLS = {"single": ([ONE], None), "batch": ([ONE, [Part(2.0)]], None), "weight": ([[Part(1.0, 0.8)]], None),
         "AND": ([AND], None), "batch of AND": ([AND, AND], None), "masked": ([ONE, [Part(2.0)]], MASK),
         "masked AND": ([AND, AND], MASK)}
UNLIKE = {"AND in one of a batch": ([AND, ONE], None), "masked, AND in one": ([ONE, AND], MASK)}


SIGMAS = torch.cat([torch.logspace(1.16, -1.5, 6), torch.zeros(1)])


def callbacks_left():
    return sum(sys.modules["modules.script_callbacks"].callback_map.values(), [])


def ask(model, scale, calls=1, dtype=torch.float32):
    """A and D of the newest of some calls."""
    x, extra_args = X[:len(model.prompts)].to(dtype), model.arguments(scale)
    with webui.guidance_excess(model, x, extra_args) as excess:
        for _ in range(calls):
            out = model(x, x.new_full((len(x),), 2.0), **extra_args)
        return excess(), out


def conditional(prompts, mask):
    """D_c, as the host has it: D at scale 1."""
    return ask(Guided(prompts, mask), 1.0)[1]


@pytest.mark.parametrize("scale", [7.0, 1.0, 0.0])
@pytest.mark.parametrize("kind, prompts, mask", [
    pytest.param(kind, *call, id=f"{kind.__name__}, {name}")
    for kind, calls in ((Guided, {**CALLS, **UNLIKE}), (Forked, CALLS)) for name, call in calls.items()])
def test_the_excess_is_the_result_less_the_conditional_one(host, kind, prompts, mask, scale):
    """At scale 1 it is 0; at 0 the unconditional prediction lacks the condition."""
    excess, out = ask(kind(prompts, mask), scale, calls=2)
    expected = ask(Guided(prompts, mask), scale)[1] - conditional(prompts, mask)
    torch.testing.assert_close(excess, expected, rtol=0, atol=2e-6)
    assert (expected.abs().max() > 0.1) == (scale != 1)
    assert excess.dtype == X.dtype and excess.shape == out.shape and not callbacks_left()


@pytest.mark.parametrize("kind", [Guided, Forked])
@pytest.mark.parametrize("prompts, mask", CALLS.values(), ids=list(CALLS))
def test_a_call_without_the_unconditional_prediction_has_no_excess(host, kind, prompts, mask):
    """It comes after a guided one, whose excess it must not have."""
    model = kind(prompts, mask, skip=(1,))
    excess, _ = ask(model, 7.0, calls=2)
    assert excess is None or excess.abs().max() < 1e-6
    assert ask(model, 7.0)[0].abs().max() > 0.1


def test_a_call_without_it_in_reforge(host):
    model = Forked([ONE], skip=(1,))
    model.nothing = None
    assert ask(model, 7.0, calls=2)[0] is None and ask(model, 1.0)[0] is None and ask(model, 7.0)[0] is not None


def test_an_excess_of_another_call_is_none(host):
    """Of no call, of one that the host shows nothing of, of another denoiser."""
    for kind in (Guided, Forked):
        model = kind([ONE])
        with webui.guidance_excess(model, X[:1], model.arguments(7.0)) as excess:
            assert excess() is None
            model(X[:1], torch.ones(1), **model.arguments(7.0))
            assert excess() is not None
            model.step += 1
            assert excess() is None
            other = kind([ONE])
            other.step = model.step - 1
            other(X[:1], torch.ones(1), **other.arguments(7.0))
            assert excess() is None


def test_an_editing_model_has_no_excess(host):
    """InstructPix2Pix: two guidances, and a row more per image."""
    model = Guided([ONE, ONE])
    model.extra_rows = 1
    assert ask(model, 7.0)[0] is None


def test_the_excess_knows_another_extensions_guidance(host):
    """A dynamic threshold, say: D is what was returned, whatever made it, a callback after ours too."""
    model = Guided([ONE])
    model.combine = lambda rows: torch.tanh(rows[1:] + 7.0 * (rows[:1] - rows[1:]))
    callbacks = sys.modules["modules.script_callbacks"]

    def halve(params):
        params.x = params.x * 0.5

    x, extra_args, part = X[:1], model.arguments(7.0), conditional([ONE], None)
    with webui.guidance_excess(model, x, extra_args) as excess:
        callbacks.on_cfg_after_cfg(halve)
        out = model(x, torch.full((1,), 2.0), **extra_args)
        torch.testing.assert_close(excess(), out - part, rtol=0, atol=1e-6)
    assert callbacks_left() == [halve]


@pytest.mark.parametrize("kind", [Guided, Forked])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_the_excess_has_the_states_dtype(host, kind, mask):
    assert ask(kind([ONE], mask), 7.0, dtype=torch.float64)[0].dtype == torch.float64
    model, x = kind([ONE], mask), X[:1].half()
    with webui.guidance_excess(model, x, model.arguments(7.0)) as excess:
        model(x.float(), torch.ones(1), **model.arguments(7.0))
        assert excess().dtype == torch.float16


def test_the_excess_when_a_forks_refiner_comes(host):
    """Its patcher is another one; the one before is as it was, with another extension's function on it."""
    others = [lambda args: args["denoised"] * 0.5]
    first, second = Patcher(sampler_post_cfg_function=others), Patcher()
    model = Forked([ONE])
    model.load(first)
    model.change = lambda: model.load(second) if model.step else None
    x, extra_args = X[:1], model.arguments(7.0)
    with webui.guidance_excess(model, x, extra_args) as excess:
        for _ in range(3):
            out = model(x, torch.full((1,), 2.0), **extra_args)
            torch.testing.assert_close(excess(), out - conditional([ONE], None), rtol=0, atol=1e-6)
    assert first.model_options["sampler_post_cfg_function"] == others
    assert "sampler_post_cfg_function" not in second.model_options and not callbacks_left()


def guided_run(host, model, preset="few_steps", scale=7.0):
    webui.register()
    p = types.SimpleNamespace(extra_generation_params={}, rng=FakeRNG((1, 2), (4, 8, 8)), cfg_scale=scale)
    sampler = host.create_sampler(webui.sampler_name(PRESETS[preset]), model)
    return sampler.sample(p, p.rng.next(), SIGMAS)


@pytest.mark.parametrize("preset", ["few_steps", "sde_5", "ode", "comfyui"])
@pytest.mark.parametrize("kind", [Guided, Forked])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_a_run_is_the_librarys_with_the_excess(host, kind, preset, mask):
    prompts, last = [ONE, [Part(2.0)]], {}
    got = guided_run(host, kind(prompts, mask), preset)

    def model(x, sigma):
        plain = ask_at(x, sigma, 1.0)
        out = ask_at(x, sigma, 7.0)
        last["excess"] = out - plain
        return out

    def ask_at(x, sigma, scale):
        model = Guided(prompts, mask)
        return model(x, sigma, **model.arguments(scale))

    def library(**told):
        rng = FakeRNG((1, 2), (4, 8, 8))
        return sample_preset(model, rng.next() * SIGMAS[0], SIGMAS, preset, disable=True, process="ve",
                             noise_sampler=lambda *_: rng.next(), **told)

    torch.testing.assert_close(got, library(excess=lambda: last["excess"]), rtol=1e-5, atol=1e-5)
    assert ((got - library()).abs().max() > 1e-3) == (preset != "comfyui")


@pytest.mark.parametrize("kind", [Guided, Forked])
def test_nothing_of_ours_is_left_after_a_run(host, kind):
    """Be it that the host stops it, or that it fails."""
    def others(params):
        pass

    callbacks = sys.modules["modules.script_callbacks"]
    callbacks.on_cfg_denoised(others)
    seen = []

    class Stop(BaseException):
        pass

    def change():
        seen.append(len(callbacks_left()))
        if model.stop and model.step == 3:
            raise model.stop

    for stop in (None, Stop, ValueError):
        model = kind([ONE, ONE])
        model.change, model.stop = change, stop
        if stop is None:
            guided_run(host, model)
        else:
            with pytest.raises(stop):
                guided_run(host, model)
        assert callbacks_left() == [others]
        if kind is Forked:
            assert model.inner_model.inner_model.forge_objects.unet.model_options == {"transformer_options": {}}
    assert min(seen) > 1
    model = kind([ONE, ONE])
    model.change, model.stop, seen[:] = change, None, []
    guided_run(host, model, "comfyui")
    assert set(seen) == {1}             # that method has no use for it


@pytest.mark.parametrize("missing", ["on_cfg_denoised", "on_cfg_after_cfg", "remove_callbacks_for_function"])
def test_without_the_hosts_callbacks_it_samples_all_the_same(host, monkeypatch, missing):
    told = guided_run(host, Guided([ONE, ONE]))
    monkeypatch.delattr(sys.modules["modules.script_callbacks"], missing)
    untold = guided_run(host, Guided([ONE, ONE]))
    assert untold.isfinite().all() and (untold - told).abs().max() > 1e-3 and not callbacks_left()
    with webui.guidance_excess(types.SimpleNamespace(), X, {}) as excess:
        assert excess is None
