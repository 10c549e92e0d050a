"""The WebUI's settings without a WebUI: values, places, infotexts, pasting, the curve."""
import xml.etree.ElementTree as ET

import pytest
import torch

from ersde import NOISE_SCALES, PRESETS, Preset
from ersde.hosts import webui_curve
from ersde.hosts import webui_settings as settings
from ersde.hosts.webui_settings import AS_PRESET, LABELS, SETTINGS, sampler_name

SDE_5, FLAT, COMFYUI = PRESETS["sde_5"], PRESETS["flat"], PRESETS["comfyui"]
MINE = Preset("mine", "sde", eta=0.3, label="my look")
WITH_MINE = {**PRESETS, "mine": MINE}


@pytest.mark.parametrize("field", [setting.field for setting in SETTINGS])
@pytest.mark.parametrize("value", [None, "", "  ", AS_PRESET, f" {AS_PRESET} "])
def test_nothing_is_as_the_preset(field, value):
    assert settings.read(field, value) is None


@pytest.mark.parametrize("field, value, want", [
    ("preset", "flat", "flat"), ("preset", "flat colours", "flat"), ("preset", " texture ", "texture"),
    ("noise_scale", "sde_4", "sde_4"), ("eta", "0.3", 0.3), ("eta", 0, 0.0), ("eta", 1.7, 1.7), ("eta", "1e-1", 0.1),
    ("s_noise", "1.05", 1.05), ("order", "3", 3), ("order", 2, 2), ("order", 4.0, 4), ("corrector", "off", False),
    ("corrector", "On", True), ("corrector", "True", True), ("corrector", False, False),
    ("start", "0.2", 0.2), ("end", 1, 1.0),
])
def test_a_value_is_read(field, value, want):
    found = settings.read(field, value)
    assert found == want and type(found) is type(want)


BAD = [
    ("preset", "nonsense", ["preset", "nonsense", "sde_5"]), ("preset", 3, ["preset", "3"]),
    ("preset", ["flat"], ["preset"]),
    ("noise_scale", "sde_7", ["noise scale", "sde_7", "did you mean"]), ("noise_scale", 5, ["noise scale", "5"]),
    ("eta", -0.1, ["eta", "-0.1", "between 0 and 10"]), ("eta", 10.5, ["eta", "10.5", "between 0 and 10"]),
    ("eta", "abc", ["eta", "number", "'abc'"]),
    ("eta", "0,3", ["eta", "'0,3'"]),
    ("eta", "nan", ["eta", "nan", "between 0 and 10"]), ("eta", True, ["eta", "True"]), ("eta", {}, ["eta", "number"]),
    ("s_noise", "-1", ["s_noise", "-1.0"]), ("order", 0, ["order", "between 1 and 5"]), ("order", "2.5", ["order", "2.5"]),
    ("order", "inf", ["order", "inf"]), ("order", "nan", ["order", "nan"]), ("order", True, ["order", "True"]),
    ("corrector", "perhaps", ["corrector", "perhaps", "on"]), ("corrector", 2, ["corrector", "2"]),
    ("start", 1.5, ["noise start", "between 0 and 1"]), ("end", "-0.5", ["noise end", "between 0 and 1"]),
    ("etta", 1, ["etta", "eta"]),
]


@pytest.mark.parametrize("field, value, words", BAD)
def test_a_bad_value_is_named_with_what_is_allowed_and_its_place(field, value, words):
    with pytest.raises((TypeError, ValueError)) as error:
        settings.apply(SDE_5, {"the page": {}, "the plot": {field: value}}, PRESETS)
    assert all(word in str(error.value) for word in [*words, "(the plot)"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes, words", [
    ({"preset": "comfyui", "order": 5}, ["order", "between 1 and 3"]), ({"start": 0.8, "end": 0.2}, ["start", "above end"])])
def test_values_that_do_not_go_together_are_named(changes, words):
    with pytest.raises(ValueError) as error:
        settings.apply(SDE_5, {"page": changes}, PRESETS)
    assert all(word in str(error.value) for word in words)


def test_later_places_go_before_earlier_ones_and_the_preset_counts_first():
    used = settings.apply(SDE_5, {"page": {"eta": 0.5, "order": "2"}, "box": {"preset": "texture", "eta": AS_PRESET},
                                  "axis": {"order": 4}}, PRESETS)
    assert used == PRESETS["texture"].replace(eta=0.5, order=4)
    assert settings.apply(FLAT, {}, PRESETS) is not None and settings.apply(FLAT, {"page": {}}, PRESETS) == FLAT


def test_the_samplers_own_preset_is_the_one_it_was_listed_with():
    """The file of a person's presets may have changed since, or be gone."""
    assert settings.apply(MINE, {"page": {"preset": "mine", "eta": 1}}, {**PRESETS, "mine": MINE.replace(order=1)}) == \
        MINE.replace(eta=1.0)
    assert settings.apply(MINE, {}, PRESETS) == MINE


def test_arguments_are_in_order_or_one_dict():
    assert settings.from_arguments(["flat", AS_PRESET, "0.3"]) == {"preset": "flat", "noise_scale": AS_PRESET, "eta": "0.3"}
    assert settings.from_arguments([{"eta": 0.3}]) == {"eta": 0.3}
    assert settings.from_arguments([{"eta": 0.3, "preset": "flat"}, "sde", 0.5]) == {
        "preset": "flat", "noise_scale": "sde", "eta": 0.3}
    assert settings.from_arguments([]) == {}
    assert list(settings.from_arguments(range(8))) == [setting.field for setting in SETTINGS]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_the_infotext_says_nothing_that_the_samplers_name_tells(preset):
    assert settings.infotext(preset, preset, PRESETS) == {}
    assert settings.infotext(preset, preset, PRESETS, "flow") == {"ER-SDE process": "flow"}


def test_a_persons_own_preset_is_written_out():
    text = settings.infotext(MINE, MINE.replace(eta=0.4), WITH_MINE)
    assert text == {"ER-SDE eta": "0.4", "ER-SDE own preset": "noise_scale sde, eta 0.3"}
    assert settings.infotext(SDE_5, MINE, WITH_MINE)["ER-SDE preset"] == "mine"


CHANGES = [
    {}, {"eta": 0.3}, {"eta": 0.0}, {"eta": 1 / 3}, {"noise_scale": "sde_4"}, {"s_noise": 1.05}, {"order": 5}, {"order": 1},
    {"corrector": False}, {"corrector": True}, {"start": 0.1, "end": 0.9}, {"preset": "texture"},
    {"preset": "few_steps", "eta": 1.0},
    {"preset": "ode", "noise_scale": "sde", "eta": 1e-5, "s_noise": 0.0, "order": 2, "corrector": False, "start": 0.25,
     "end": 0.75},
]


@pytest.mark.parametrize("sampler", [SDE_5, FLAT, PRESETS["texture"], MINE], ids=lambda preset: preset.name)
@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("defaults", [{}, {"eta": "0.7", "preset": "sde", "corrector": "off", "order": "2", "end": "0.5"}],
                         ids=["plain settings page", "other defaults"])
def test_pasting_an_infotext_restores_the_settings(sampler, changes, defaults):
    """Whatever the settings page says where it is pasted."""
    used = settings.apply(sampler, {"page": changes}, WITH_MINE)
    params = {"Sampler": sampler_name(sampler), "Steps": "20", **settings.infotext(sampler, used, WITH_MINE)}
    texts = settings.pasted(params, defaults, WITH_MINE)
    assert list(texts) == [setting.label for setting in SETTINGS]
    back = {setting.field: texts[setting.label] for setting in SETTINGS}
    assert settings.apply(sampler, {"settings page": defaults, "page": back}, WITH_MINE) == used
    if not defaults:        # nothing is pinned that need not be
        assert sum(text not in ("", AS_PRESET) for text in back.values()) <= len(changes)


def test_a_picture_of_another_sampler_resets_the_controls():
    texts = settings.pasted({"Sampler": "Euler a"}, {"eta": "0.7"}, PRESETS)
    assert set(texts.values()) == {"", AS_PRESET}


def test_the_hires_sampler_counts_where_the_first_pass_is_anothers():
    texts = settings.pasted({"Sampler": "Euler a", "Hires sampler": sampler_name(FLAT)}, {"eta": "0.7"}, PRESETS)
    assert texts["ER-SDE eta"] == "0.5"


def test_a_bad_value_is_pasted_as_it_stands():
    params = {"Sampler": sampler_name(SDE_5), "ER-SDE eta": "-3", "ER-SDE preset": "gone"}
    texts = settings.pasted(params, {"order": "2"}, PRESETS)
    assert texts["ER-SDE eta"] == "-3" and texts["ER-SDE preset"] == "gone" and texts["ER-SDE order"] == "3"


def test_labels_and_keys():
    assert len(set(LABELS)) == len(LABELS) == len(SETTINGS) + 3
    assert all((label.startswith("ER-SDE ") or label == "ENSD") and not set(label) & set(',:"\n') for label in LABELS)
    assert [setting.option for setting in SETTINGS][:2] == ["ersde_preset", "ersde_noise_scale"]


@pytest.mark.parametrize("value", [True, False, 0.0, 1.0, 0.3, 1 / 3, 1e-12, 5, "sde_4"])
def test_a_value_and_its_text(value):
    field = {bool: "corrector", float: "eta", int: "order", str: "noise_scale"}[type(value)]
    assert settings.read(field, settings.text_of(value)) == value


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_the_curve_of_a_power_is_flat_at_its_share(power, eta):
    """g = lambda^q: half the noise level keeps 2^(-2 eta q) of the variance, whatever the level."""
    name = next(name for name, scale in NOISE_SCALES.items() if scale.power == power)
    share = webui_curve.renewed(Preset("x", name, eta=eta))
    torch.testing.assert_close(share, torch.full_like(share, 1 - 2 ** (-2 * eta * power)))


def test_the_curve_is_zero_outside_the_window_and_without_noise():
    share = webui_curve.renewed(Preset("x", "sde", start=0.25, end=0.75))
    assert (share[:40] == 0).all() and (share[40:120] > 0.7).all() and (share[120:] == 0).all()
    assert (webui_curve.renewed(Preset("x", "sde", s_noise=0.0)) == 0).all()


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_the_picture_is_well_formed_and_inside_its_box(preset):
    svg = ET.fromstring(webui_curve.draw(preset, SDE_5))
    width, height = map(float, svg.get("viewBox").split()[2:])
    lines = svg.findall("polyline")
    assert len(lines) == 1 + (not torch.equal(webui_curve.renewed(preset), webui_curve.renewed(SDE_5)))
    for line in lines:
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width and 0 <= y <= height
    assert svg.get("fill") == "currentColor"        # the page's own text colour, light or dark
