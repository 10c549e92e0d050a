"""The WebUI's page and a run's settings against the stand-in: accordion, settings page, infotext, API, plot, refiner."""
import copy
import sys
import types
from functools import partial

import pytest
import torch
import webui_standin as standin
from problems import published
from webui_standin import FakeModel, Processing, Runner, load_as_host, read_infotext, scripts_of, write_infotext

from ersde import PRESETS, sample_er_sde, sample_preset
from ersde.hosts import webui, webui_page
from ersde.hosts.webui_settings import AS_PRESET, LABELS, SETTINGS, sampler_name

SDE, SDE_5, FLAT, ODE = (sampler_name(PRESETS[name]) for name in ("sde", "sde_5", "flat", "ode"))
FIELDS = [setting.field for setting in SETTINGS]
BARE = {setting.label: setting.unset for setting in SETTINGS}


@pytest.fixture
def host(monkeypatch, tmp_path):
    return standin.start(monkeypatch, tmp_path)


def runner(host, **how):
    return Runner(scripts_of(host["script"]), **how)


def arguments(**values):
    return [values.get(setting.field, setting.unset) for setting in SETTINGS]


def run(host, sampler, p, values=(), steps=6, model=None, hr_sampler=None):
    """A picture: the script's process, then a pass or two; returns the latent and the infotext."""
    page = runner(host)
    p.script_args = (0, *(values or arguments()))
    page.process(p)
    assert not hasattr(page, "failed")
    sigmas = torch.cat([torch.logspace(1.16, -1.5, steps), torch.zeros(1)])
    out = None
    for name in filter(None, (sampler, hr_sampler)):
        out = host["modules.sd_samplers"].create_sampler(name, model or FakeModel()).sample(p, p.rng.next(), sigmas)
        p.is_hr_pass = True
    return out, write_infotext({"Steps": steps, "Sampler": sampler, **p.extra_generation_params,
                                **({"Hires sampler": hr_sampler} if hr_sampler else {})})


def expected(preset, p=None, steps=6, **changes):
    """The latent that the library makes with the same noise."""
    p, model = p or Processing(), FakeModel()
    x = p.rng.next()
    sigmas = torch.cat([torch.logspace(1.16, -1.5, steps), torch.zeros(1)])
    return sample_preset(model, x * sigmas[0], sigmas, PRESETS[preset].replace(**changes), {"cond": "prompt"}, disable=True,
                         noise_sampler=lambda a, b: p.rng.next(), process="ve")


def test_every_control_is_as_the_preset_and_told_to_the_host(host):
    for tab in ("txt2img", "img2img"):
        page = runner(host, tab=tab)
        script, = page.scripts
        controls = page.inputs[script.args_from:script.args_to]
        assert [control.label for control in controls] == [setting.name for setting in SETTINGS]
        assert [control.value for control in controls] == list(BARE.values()) == page.defaults()[1:]
        assert [label for _, label in script.infotext_fields] == script.paste_field_names == list(BARE)
        for control, setting in zip(controls, SETTINGS):
            assert AS_PRESET in (control.value, control.arguments.get("placeholder"))
            assert control.arguments["elem_id"] == f"script_{tab}_ersde_{setting.field}"
            if setting.choices:
                assert control.arguments["choices"][0] == AS_PRESET and control.arguments["allow_custom_value"]


@pytest.mark.parametrize("sampler_first", [True, False])
def test_the_curve_follows_every_control_and_the_sampler(host, sampler_first):
    """The order of the page's parts is the user's to choose."""
    page = runner(host, sampler_first=sampler_first, sampler=SDE_5)
    controls = page.inputs[1:]
    curves = set()
    for block in (page.sampler, *controls):
        (fn, inputs, (curve,)), = block.changes
        assert inputs == [page.sampler, *controls]
        curves.add(curve)
        assert fn(SDE_5, *arguments()).startswith("<svg")
    assert len(curves) == 1 and "SDE 5" in curve.value and "<svg" in curve.value
    page.defaults()                 # on another page, without a sampler list: nothing is joined to the first one's
    assert len(page.sampler.changes) == 1


def test_what_the_accordion_says():
    plain = webui_page.shown(SDE_5, *arguments())
    assert plain.count("<polyline") == 1 and "<b>" not in plain and "eta 1," in plain
    changed = webui_page.shown(SDE_5, *arguments(eta="0.3", preset="texture"))
    assert changed.count("<polyline") == 2
    assert "<b>texture</b>" in changed and "<b>eta 0.3</b>" in changed and "<b>noise scale sde_4</b>" in changed
    assert "<svg" not in webui_page.shown("Euler a", *arguments())
    bad = webui_page.shown(SDE_5, *arguments(eta="<script>"))
    assert "the sampler's preset" in bad.replace("&#x27;", "'") and "<script>" not in bad and "eta must be a number" in bad
    assert "not be above end" in webui_page.shown(SDE_5, *arguments(start="0.8", end="0.2"))


def test_a_preset_file_with_errors_is_said_on_the_page_and_the_others_work(monkeypatch, tmp_path):
    file = tmp_path / "mine.json"
    monkeypatch.setenv("ERSDE_PRESETS", str(file))
    file.write_text('{"mine": {"eta": 0.2}, "bad": {"eta": -1}}')
    for sampler, words in ((SDE_5, "SDE 5"), ("ER-SDE mine", "eta 0.2"), ("Euler a", "not one of ours")):
        html = webui_page.shown(sampler, *arguments())
        assert words in html and html.count("bad") == 1 and "eta must be" in html
    file.write_text("{ nonsense")
    html = webui_page.shown(SDE_5, *arguments())
    assert "<svg" in html and "mine.json" in html


def test_the_settings_page_shows_what_its_components_take(host):
    opts = host["modules.shared"].opts
    assert list(opts.data_labels) == [*(setting.option for setting in SETTINGS), webui.HIDDEN]
    for key, info in opts.data_labels.items():
        assert set(info.component_args) <= info.component.updates, key
        assert info.section == ("ersde", "ER-SDE") and getattr(opts, key) == info.default
        assert key == webui.HIDDEN or info.default in ("", AS_PRESET)
    assert opts.data_labels[webui.HIDDEN].component_args["choices"] == [sampler_name(preset) for preset in PRESETS.values()]


def test_hidden_entries_are_not_listed_but_known(host):
    samplers, opts = host["modules.sd_samplers"], host["modules.shared"].opts
    opts.hide_samplers = ["Euler"]
    opts.ersde_hidden = [SDE_5, "Euler a", "gone"]
    load_as_host()                                      # "Reload UI"
    assert samplers.samplers_hidden == {"Euler", SDE_5}
    assert SDE_5 in samplers.all_samplers_map and samplers.get_sampler_and_scheduler(SDE_5)[0] == SDE_5
    opts.ersde_hidden = "nonsense"
    load_as_host()
    assert samplers.samplers_hidden == {"Euler"}


def test_left_alone_a_picture_is_the_presets_and_its_infotext_bare(host):
    for name, preset in PRESETS.items():
        p = Processing()
        out, text = run(host, sampler_name(preset), p)
        assert not set(read_infotext(text)) & set(LABELS)
        torch.testing.assert_close(out, expected(name), rtol=0, atol=0)


CASES = [
    ({"eta": "0.3"}, {"eta": 0.3}), ({"noise_scale": "sde_4", "order": "2"}, {"noise_scale": "sde_4", "order": 2}),
    ({"s_noise": "1.1", "corrector": "off"}, {"s_noise": 1.1, "corrector": False}),
    ({"start": "0.1", "end": "0.6"}, {"start": 0.1, "end": 0.6}),
]


@pytest.mark.parametrize("given, changes", CASES, ids=str)
def test_the_accordion_changes_the_picture_and_the_infotext_says_how(host, given, changes):
    out, text = run(host, SDE, Processing(), arguments(**given))
    torch.testing.assert_close(out, expected("sde", **changes), rtol=0, atol=0)
    assert (out - expected("sde")).abs().max() > 1e-3
    params = read_infotext(text)
    assert {s.field: params[s.label] for s in SETTINGS if s.label in params} == given


@pytest.mark.parametrize("given", [{}, *(given for given, _ in CASES), {"preset": "texture", "eta": "0.4"}], ids=str)
@pytest.mark.parametrize("defaults", [{}, {"ersde_eta": "0.8", "ersde_preset": "flat"}], ids=["", "other defaults"])
def test_pasting_gives_the_same_picture(host, given, defaults):
    out, text = run(host, SDE, Processing(), arguments(**given))
    page = runner(host)
    page.inputs[3].value = "0.123"              # what was there before is gone
    host["modules.shared"].opts.data.update(defaults)
    page.paste(host, text)
    again, _ = run(host, SDE, Processing(), [control.value for control in page.inputs[1:]])
    torch.testing.assert_close(again, out, rtol=0, atol=0)


def test_the_settings_page_is_the_default_and_the_infotext_has_it(host):
    host["modules.shared"].opts.ersde_eta = "0.25"
    out, text = run(host, SDE, Processing())
    torch.testing.assert_close(out, expected("sde", eta=0.25), rtol=0, atol=0)
    assert read_infotext(text)["ER-SDE eta"] == "0.25"
    out, text = run(host, SDE, Processing(), arguments(eta="0.5"))
    assert read_infotext(text)["ER-SDE eta"] == "0.5"


def test_the_api_takes_numbers_and_a_dict(host):
    wanted = expected("sde", eta=0.3, order=2, corrector=False)
    keyed = [{"eta": 0.3, "order": 2, "corrector": False}, *arguments()[1:]]
    for values in ([None, None, 0.3, None, 2, False, None, None], keyed):
        out, _ = run(host, SDE, Processing(is_api=True), values)
        torch.testing.assert_close(out, wanted, rtol=0, atol=0)
    host["modules.shared"].opts.data.update(ersde_eta=0.3, ersde_order=2, ersde_corrector=False)     # override_settings
    out, _ = run(host, SDE, Processing(is_api=True))
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)


BAD = [({"eta": "-1"}, ["eta", "-1.0", "between 0 and 10"]), ({"preset": "gone"}, ["preset", "gone", "sde_5"]),
       ({"order": "9"}, ["order", "between 1 and 5"]), ({"start": "0.9", "end": "0.1"}, ["start", "end"])]


@pytest.mark.parametrize("given, words", BAD, ids=str)
@pytest.mark.parametrize("where", ["arguments", "settings"])
def test_the_api_refuses_a_wrong_value(host, given, words, where):
    model, values = FakeModel(), arguments(**given) if where == "arguments" else arguments()
    if where == "settings":
        host["modules.shared"].opts.data.update({f"ersde_{field}": value for field, value in given.items()})
    with pytest.raises(standin.HTTPException) as error:
        run(host, SDE_5, Processing(is_api=True), values, model=model)
    assert error.value.status_code == 422 and error.value.detail.startswith("ER-SDE: ") and "\n" not in error.value.detail
    assert all(word in error.value.detail for word in words) and model.calls == 0


def test_the_api_refuses_an_unknown_key(host):
    with pytest.raises(standin.HTTPException) as error:
        run(host, SDE_5, Processing(is_api=True), [{"etta": 1}])
    assert "etta" in error.value.detail and "eta" in error.value.detail


def said(capsys):
    """Our lines in the log, among the progress bars."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("ER-SDE:")]


@pytest.mark.parametrize("given, words", BAD, ids=str)
def test_a_persons_run_goes_on_with_the_samplers_preset_and_says_so_once(host, given, words, capsys):
    p = Processing()
    out, text = run(host, SDE, p, arguments(s_noise="1.3", **given))
    torch.testing.assert_close(out, expected("sde"), rtol=0, atol=0)
    assert not set(read_infotext(text)) & set(LABELS)
    comment, = p.comments
    line, = said(capsys)
    assert comment == line and line.startswith("ER-SDE: ") and "'SDE'" in line and all(word in line for word in words)


def test_one_line_for_both_passes_of_a_picture(host, capsys):
    p = Processing()
    run(host, SDE, p, arguments(eta="-1"), hr_sampler=SDE)
    assert len(p.comments) == 1 and len(said(capsys)) == 1


def test_the_hires_pass_adds_what_only_it_differs_in(host):
    """eta 0.5 is what `flat colours` has anyway, and not what SDE has."""
    _, text = run(host, FLAT, Processing(), arguments(eta="0.5"), hr_sampler=SDE)
    assert read_infotext(text)["ER-SDE eta"] == "0.5"
    _, text = run(host, SDE, Processing(), arguments(eta="1"), hr_sampler=FLAT)
    assert read_infotext(text)["ER-SDE eta"] == "1"


@pytest.mark.parametrize("sampler, given, noisy", [
    (SDE, {}, True), (ODE, {}, False), (SDE, {"eta": "0"}, False), (SDE, {"s_noise": "0"}, False),
    (ODE, {"noise_scale": "sde", "eta": "0.5"}, True), (SDE, {"noise_scale": "ode"}, False)], ids=str)
def test_the_hosts_seed_delta_is_written_where_noise_is_drawn(host, sampler, given, noisy):
    """Whatever the settings make of the preset."""
    for delta, wanted in ((31337, "31337" if noisy else None), (0, None)):
        host["modules.shared"].opts.eta_noise_seed_delta = delta
        p = Processing()
        _, text = run(host, sampler, p, arguments(**given))
        assert read_infotext(text).get("ENSD") == wanted and (p.rng.draws > 1) == noisy


def test_a_flow_model_is_told(host):
    inner = types.SimpleNamespace(predictor=types.SimpleNamespace(prediction_type="const"))
    p, sigmas = Processing(), torch.tensor([0.9, 0.5, 0.0])
    host["modules.sd_samplers"].create_sampler(SDE, FakeModel(inner=inner)).sample(p, p.rng.next(), sigmas)
    assert p.extra_generation_params == {"ER-SDE process": "flow"}


def test_a_p_without_our_script_uses_the_settings_page(host):
    """Other extensions make requests of their own and leave scripts out."""
    host["modules.shared"].opts.ersde_order = "1"
    p = Processing()
    sigmas = torch.cat([torch.logspace(1.16, -1.5, 6), torch.zeros(1)])
    out = host["modules.sd_samplers"].create_sampler(SDE, FakeModel()).sample(p, p.rng.next(), sigmas)
    torch.testing.assert_close(out, expected("sde", order=1), rtol=0, atol=0)


def axes(host):
    for callback in host["modules.script_callbacks"].before_ui:
        callback()
    return {axis.label: axis for axis in host["modules.scripts"].scripts_data[1].module.axis_options}


def test_the_axes_are_there_once(host):
    for _ in range(2):
        found = axes(host)
        assert list(found) == ["Seed", *(f"[ER-SDE] {setting.name}" for setting in SETTINGS)]
        assert len(host["modules.scripts"].scripts_data[1].module.axis_options) == 1 + len(SETTINGS)
    assert found["[ER-SDE] preset"].choices() == list(PRESETS)
    assert found["[ER-SDE] eta"].choices is None and found["[ER-SDE] eta"].type is float
    assert found["[ER-SDE] order"].type is int


def test_the_cells_of_a_plot(host):
    """They are shallow copies that share a dict of infotext: none may hand on its values."""
    found, first = axes(host), Processing()
    cells = []
    for eta in (0.0, 1.0, 0.5):
        for preset in ("sde", "flat"):
            p = copy.copy(first)
            p.rng = standin.FakeRNG((1, 2), (4, 8, 8))
            found["[ER-SDE] eta"].apply(p, eta, [])
            found["[ER-SDE] preset"].apply(p, preset, [])
            out, text = run(host, SDE, p, arguments(eta="0.9", order="2"))
            torch.testing.assert_close(out, expected(preset, eta=eta, order=2), rtol=0, atol=0)
            cells.append({key: value for key, value in read_infotext(text).items() if key in LABELS})
    assert cells[2] == {"ER-SDE order": "2"}        # eta 1 of SDE
    assert cells[5] == {"ER-SDE preset": "flat", "ER-SDE order": "2"}
    assert cells[0] == {"ER-SDE eta": "0", "ER-SDE order": "2"}
    assert not hasattr(first, "ersde_axes")


def test_a_plot_with_a_wrong_value_does_not_start(host):
    found = axes(host)
    for label, good, bad in (("eta", [0.0, 2.0], -1.0), ("noise scale", ["ode"], "sde_9"), ("order", [1, 5], 6),
                             ("preset", ["flat"], "gone")):
        axis = found[f"[ER-SDE] {label}"]
        axis.confirm(None, good)
        with pytest.raises(RuntimeError, match=f"ER-SDE: {label} must be.*{bad}"):
            axis.confirm(None, [*good, bad])


def test_a_refiner_drops_the_history(host):
    """The switch is inside a model call, where the host wraps the new model anew."""
    first = types.SimpleNamespace(sigmas=torch.linspace(0.03, 14.6, 1000))
    second = types.SimpleNamespace(sigmas=first.sigmas)

    class Refined(FakeModel):
        def __call__(self, x, sigma, cond=None):
            if self.calls == 3:
                self.inner_model = second
            mean = 0.0 if self.inner_model is first else 5.0
            return mean + (super().__call__(x, sigma, cond) - mean / (1 + sigma.reshape(-1, 1, 1, 1) ** 2))

    for sampler in ("sde_5", "ode", "comfyui"):
        p = Processing()
        out, _ = run(host, sampler_name(PRESETS[sampler]), p, model=Refined(inner=first))
        p, model = Processing(), Refined(inner=first)
        sigmas = torch.cat([torch.logspace(1.16, -1.5, 6), torch.zeros(1)])
        settings = dict(disable=True, process="ve", noise_sampler=lambda a, b: p.rng.next(), extra_args={"cond": "prompt"})
        x = sample_preset(model, p.rng.next() * sigmas[0], sigmas[:4], sampler, **settings)
        torch.testing.assert_close(out, sample_preset(model, x, sigmas[3:], sampler, **settings), rtol=1e-5, atol=1e-5)


def test_a_refiner_that_only_exchanges_the_weights(host):
    common, model = host["modules.sd_samplers_common"], FakeModel()
    changed = webui.model_watch(model)
    assert [changed(), changed()] == [False, False]
    common.ORIGINAL_CHECKPOINT = "base.safetensors"
    assert [changed(), changed()] == [True, False]
    model.inner_model = types.SimpleNamespace()
    assert [changed(), changed()] == [True, False]


@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize("kind", ["ve", "flow", "flow from sigma 1"])
def test_comfyui_compatible_is_comfyuis_latent_for_the_same_noise(host, kind, steps):
    """Through the host's caller and its generators, against the published formulas with ComfyUI's sums of 200 points.

    ComfyUI starts a flow model that begins at 1 where 0.01 % of its schedule are over, since lambda is infinite at 1.
    """
    process = kind.split()[0]
    inner = types.SimpleNamespace(predictor=types.SimpleNamespace(prediction_type="const")) if process == "flow" else None
    first = {"ve": 14.5, "flow": 0.98, "flow from sigma 1": 1.0}[kind]
    sigmas = torch.cat([torch.linspace(first ** 0.5, 0.03 ** 0.5, steps) ** 2, torch.zeros(1)])
    p = Processing()
    sampler = host["modules.sd_samplers"].create_sampler(sampler_name(PRESETS["comfyui"]), FakeModel(inner=inner))
    out = sampler.sample(p, p.rng.next(), sigmas)
    p = Processing()
    x = p.rng.next() * sigmas[0]
    sigmas[0] = sigmas[0].clamp(max=1 - 1e-4) if process == "flow" else sigmas[0]
    want = published(partial(FakeModel(), cond="prompt"), x, sigmas, [p.rng.next() for _ in range(steps)],
                     lambda lam: lam * (torch.exp(lam ** 0.3) + 10.0), process, 200)
    assert (out - want).norm() <= 1e-5 * want.norm()


def test_the_same_noise_is_the_same_latent_by_another_name(host):
    out, _ = run(host, ODE, Processing())
    p = Processing()
    x, sigmas = p.rng.next(), torch.cat([torch.logspace(1.16, -1.5, 6), torch.zeros(1)])
    want = sample_er_sde(FakeModel(), x * sigmas[0], sigmas, {"cond": "prompt"}, disable=True, eta=0.0, process="ve")
    torch.testing.assert_close(out, want, rtol=0, atol=1e-6)


def test_reload_ui_twice_keeps_one_of_everything(host):
    for _ in range(2):
        host["modules.script_callbacks"].before_ui.clear()      # the host clears the callbacks before it loads scripts
        host["modules.script_callbacks"].pasted.clear()
        host["script"] = load_as_host()
        assert len(host["modules.script_callbacks"].before_ui) == len(host["modules.script_callbacks"].pasted) == 1
        assert len(scripts_of(host["script"])) == 1 and len(axes(host)) == 1 + len(SETTINGS)
        assert run(host, SDE, Processing(), arguments(eta="0.3"))[1].count("ER-SDE eta: 0.3") == 1


def test_importing_the_page_imports_no_host():
    assert not {"gradio", "modules"} & set(sys.modules)
