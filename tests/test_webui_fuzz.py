"""The WebUI's settings, whatever is typed, pasted or sent: a person's run goes on and one line says why, the API refuses."""
import json

import pytest
import torch
import webui_standin as standin
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from webui_standin import FakeModel, Processing, read_infotext, scripts_of, write_infotext

from ersde import NOISE_SCALES, PRESETS, Preset
from ersde.hosts import webui_page, webui_settings
from ersde.hosts.webui_settings import AS_PRESET, LABELS, PREFIX, SETTINGS, sampler_name

fuzz = settings(max_examples=300, deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
few = settings(fuzz, max_examples=100)

FIELDS = [setting.field for setting in SETTINGS]
SAMPLERS = [PRESETS[name] for name in ("sde", "ode", "comfyui", "texture")]

# What an infotext, a text box or a list may hold: what is right, what is nearly right, and anything else.
TEXTS = st.one_of(
    st.sampled_from(["", " ", AS_PRESET, *PRESETS, *NOISE_SCALES, *(preset.label for preset in PRESETS.values()),
                     "on", "off", "True", "sde_9", "0", "1", "0.5", "-1", "2.5", "5", "6", "1e400", "-0", "nan", "inf",
                     "1001", "0,3", "1/3", "\ud800", "a\nb", "\x00", "<b>", "9" * 5000, "x" * 5000, "{}", "[0.5]", "None"]),
    st.text(max_size=12), st.integers().map(str), st.floats().map(str))
# What JSON may hold besides.
VALUES = st.one_of(
    TEXTS, st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from([10 ** 400, -10 ** 400, 0.5, 2, 1e308]),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))
SETS = st.dictionaries(st.sampled_from(FIELDS), TEXTS, max_size=4)


def is_a_line(text):
    """It fits a log and a page."""
    text.encode()
    return "\n" not in text and "\r" not in text and len(text) < 1000


def readable(field, value):
    try:
        webui_settings.read(field, value)
    except (TypeError, ValueError):
        return False
    return True


def applied(sampler, given):
    """The settings of a run, or None and that it was refused in one line that names a setting."""
    try:
        used = webui_settings.apply(sampler, {"page": given}, PRESETS)
    except (TypeError, ValueError) as error:
        names = [setting.name for setting in SETTINGS] + FIELDS + ["an ER-SDE setting"]
        assert is_a_line(str(error)) and str(error).startswith(tuple(names)), error
        return None
    assert isinstance(used, Preset)
    return used


@fuzz
@given(st.sampled_from(SAMPLERS),
       st.dictionaries(st.one_of(st.sampled_from(FIELDS), st.text(max_size=5)), VALUES, max_size=4))
@example(SAMPLERS[0], {"eta": "9" * 5000})
@example(SAMPLERS[0], {"eta": "1001"})
def test_a_value_is_taken_or_refused_in_one_line(sampler, given):
    used = applied(sampler, given)
    if used is None:
        return
    text = webui_settings.infotext(sampler, used, PRESETS)
    assert set(text) <= set(LABELS)
    # What was taken comes back from the picture it made, through the host's own quoting.
    params = read_infotext(write_infotext({"Steps": 20, "Sampler": sampler_name(sampler), **text}))
    texts = webui_settings.pasted(params, {}, PRESETS)
    assert applied(sampler, {setting.field: texts[setting.label] for setting in SETTINGS}) == used


@fuzz
@given(st.one_of(st.lists(VALUES, max_size=10), st.tuples(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), VALUES)))
def test_no_argument_is_lost(arguments):
    given = webui_settings.from_arguments(arguments)
    named = arguments[0] if arguments and isinstance(arguments[0], dict) else {}
    for field, value in zip(FIELDS, arguments):
        assert value is named or field in named or given[field] is value
    assert all(given[field] is value for field, value in named.items())


LABEL = st.one_of(st.sampled_from([*LABELS, PREFIX + "solver", PREFIX + "stage", "Sampler", "Hires sampler", "Eta"]),
                  st.text(max_size=8))
INFOTEXTS = st.dictionaries(LABEL, st.one_of(TEXTS, st.sampled_from([sampler_name(preset) for preset in SAMPLERS])),
                            max_size=6)


@fuzz
@given(INFOTEXTS, SETS)
def test_any_infotext_can_be_pasted(params, defaults):
    """One of another version, or of another program: what it has of ours stands in the controls as it was written."""
    texts = webui_settings.pasted(params, defaults, PRESETS)
    assert list(texts) == [setting.label for setting in SETTINGS]
    for setting in SETTINGS:
        assert isinstance(texts[setting.label], str)
        assert texts[setting.label] == params.get(setting.label, texts[setting.label])


@pytest.fixture
def host(monkeypatch, tmp_path):
    return standin.start(monkeypatch, tmp_path)


SIGMAS = torch.tensor([14.0, 3.0, 0.6, 0.0])


def run(host, p, sampler, arguments):
    """A run as the host makes it: the arguments to the script, then the sampler; the latent."""
    page = standin.Runner(scripts_of(host["script"]))
    p.script_args = (0, *arguments)
    page.process(p)
    assert not hasattr(page, "failed"), page.failed
    model = FakeModel()
    out = host["modules.sd_samplers"].create_sampler(sampler_name(sampler), model).sample(p, p.rng.next(), SIGMAS)
    return out, model.calls


def in_order(values):
    return [values.get(field, setting.unset) for field, setting in zip(FIELDS, SETTINGS)]


@few
@given(sampler=st.sampled_from(SAMPLERS), values=SETS, defaults=SETS)
@example(sampler=SAMPLERS[0], values={"eta": "1001"}, defaults={})
@example(sampler=SAMPLERS[0], values={}, defaults={"start": "0.9", "end": "0.1"})
def test_a_persons_run_always_goes_on(host, capsys, sampler, values, defaults):
    options = host["modules.shared"].opts

    def put(defaults):
        for setting in SETTINGS:
            setattr(options, setting.option, defaults.get(setting.field, setting.unset))
        capsys.readouterr()

    put(defaults)
    p = Processing()
    out, _ = run(host, p, sampler, in_order(values))
    html = webui_page.shown(sampler_name(sampler), *in_order(values))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ER-SDE:")]
    merged = {**defaults, **{field: text for field, text in values.items() if text.strip() not in ("", AS_PRESET)}}
    # A wrong default is said though the accordion goes before it.
    used = applied(sampler, merged) if all(map(readable, defaults, defaults.values())) else None
    assert len(lines) == (used is None) and list(p.comments) == lines and all(map(is_a_line, lines))
    assert ("a run goes on with the sampler" in html) == (used is None)         # the accordion says it before the run
    put({})
    if used is None:
        assert torch.equal(out, run(host, Processing(), sampler, in_order({}))[0])
        assert not set(p.extra_generation_params) & set(LABELS)
    else:
        assert out.isfinite().all()
        assert p.extra_generation_params == webui_settings.infotext(sampler, used, PRESETS)


@few
@given(sampler=st.sampled_from(SAMPLERS),
       arguments=st.one_of(st.lists(VALUES, min_size=8, max_size=8), st.dictionaries(
           st.one_of(st.sampled_from(FIELDS), st.text(max_size=4)), VALUES, max_size=3).map(lambda v: [v, *[""] * 7])))
def test_the_api_takes_or_refuses(host, capsys, sampler, arguments):
    json.dumps(arguments)
    used = applied(sampler, webui_settings.from_arguments(arguments))
    p = Processing(is_api=True)
    if used is None:
        with pytest.raises(standin.HTTPException) as error:
            run(host, p, sampler, arguments)
        assert error.value.status_code == 422
        assert error.value.detail.startswith("ER-SDE: ") and is_a_line(error.value.detail)
        assert not p.extra_generation_params and p.rng.draws == 1        # the host's own for the first x: no step was made
    else:
        out, calls = run(host, p, sampler, arguments)
        assert out.isfinite().all() and calls == len(SIGMAS) - 1
        wanted = webui_settings.infotext(sampler, used, PRESETS)
        assert p.extra_generation_params == wanted
    assert "ER-SDE:" not in capsys.readouterr().err         # the answer says it


@few
@given(params=INFOTEXTS)
@example(params={"": "\x1f:"})          # read back as a lone quotation mark
def test_a_run_with_another_versions_infotext(host, capsys, params):
    """Pasted on the page: the run is its sampler's, and at most one line is said."""
    page = standin.Runner(scripts_of(host["script"]))
    page.paste(host, write_infotext({"Steps": 20, **params}))
    capsys.readouterr()
    p, sampler = Processing(), SAMPLERS[0]
    out, _ = run(host, p, sampler, [control.value for control in page.inputs[1:]])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ER-SDE:")]
    assert out.isfinite().all() and list(p.comments) == lines and len(lines) <= 1 and all(map(is_a_line, lines))
