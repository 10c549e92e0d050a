"""Presets: the built-in ones, and a user's file."""
import dataclasses
import json

import pytest

import ersde
from ersde.presets import FIELDS, PRESETS, Preset, get_preset, load_presets, save_preset, to_dict


def test_built_in():
    assert set(PRESETS) == {"ode", "sde", "sde_1", "sde_2", "sde_3", "sde_4", "sde_5", "comfyui", "few_steps", "flat",
                            "texture"}
    for name, preset in PRESETS.items():
        assert preset.name == name and name.isidentifier()
        assert preset.description.endswith(".") and preset.label
        assert len(preset.description.partition(":")[0]) < 50 and len(preset.description.partition(":")[2]) > 20
        assert f"sample_er_sde_{name}" in ersde.__all__
    assert PRESETS["comfyui"].method == "comfyui"
    assert len({p.label for p in PRESETS.values()}) == len(PRESETS)


def test_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["ode"].eta = 1.0
    with pytest.raises(TypeError):
        PRESETS["mine"] = PRESETS["ode"]


def test_get_preset():
    assert get_preset("ode") is PRESETS["ode"] is get_preset(PRESETS["ode"])
    with pytest.raises(ValueError, match="preset must be one of sde_5, .*texture.*got 'txture'.*did you mean 'texture'"):
        get_preset("txture")
    with pytest.raises(TypeError, match="preset"):
        get_preset(3)


def test_replace_is_checked():
    assert PRESETS["sde"].replace(eta=0.5).eta == 0.5
    for change, words in (({"eta": -1}, "eta"), ({"order": 9}, "order"), ({"noise_scale": "x"}, "noise_scale"),
                          ({"start": 0.9, "end": 0.1}, "start"), ({"end": 1.5}, "end"), ({"method": "y"}, "method")):
        with pytest.raises(ValueError, match=words):
            PRESETS["sde"].replace(**change)
    with pytest.raises(ValueError, match="order must be between 1 and 3"):
        PRESETS["comfyui"].replace(order=4)
    with pytest.raises(TypeError, match="unknown field 'speed'"):
        PRESETS["sde"].replace(speed=2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "presets.json"


def test_load(path):
    path.write_text(json.dumps({"my look": {"noise_scale": "sde", "eta": 0.3, "description": "soft"}, "plain": {}}))
    good, problems = load_presets(path)
    assert not problems and list(good) == ["my look", "plain"]
    assert good["my look"] == Preset("my look", "sde", 0.3, description="soft")
    assert good["plain"].noise_scale == "sde_5"


@pytest.mark.parametrize("fields, words", [
    ({"eta": -1}, ["eta", "-1", "at least 0"]),
    ({"eta": "1"}, ["eta", "'1'", "number"]),
    ({"eta": True}, ["eta", "True", "number"]),
    ({"order": 1.5}, ["order", "1.5", "whole"]),
    ({"order": 9}, ["order", "9", "between 1 and 5"]),
    ({"corrector": "yes"}, ["corrector", "'yes'"]),
    ({"noise_scale": "sde_9"}, ["noise_scale", "sde_9", "sde_5"]),
    ({"method": None}, ["method", "None"]),
    ({"start": 2}, ["start", "2", "between 0 and 1"]),
    ({"label": 5}, ["label", "5"]),
    ({"speed": 5}, ["speed", "noise_scale"]),
    ({"name": "x"}, ["name"]),
    ([1], ["object", "[1]"]),
])
def test_a_broken_preset_is_reported_and_skipped(path, fields, words):
    text = json.dumps({"good": {"eta": 0.1}, "bad": fields, "also good": {}})
    path.write_text(text)
    good, problems = load_presets(path)
    assert list(good) == ["good", "also good"] and len(problems) == 1
    for word in [str(path), "'bad'", *words]:
        assert word in problems[0]
    assert path.read_text() == text


def test_every_bad_field_is_named(path):
    path.write_text(json.dumps({"bad": {"eta": -1, "order": 9, "label": 3, "s_noise": 1},
                                "both": {"order": 4, "method": "paper"}}))
    problems = load_presets(path)[1]
    assert len(problems) == 4 and all(str(path) in line for line in problems)
    for line, word in zip(problems, ("eta", "order", "label", "order must be between 1 and 3")):
        assert word in line


@pytest.mark.parametrize("name", ["ode", "", "a/b", "..", "x" * 80, "a\nb", " x"])
def test_names_that_a_file_may_not_have(path, name):
    path.write_text(json.dumps({name: {}}))
    good, problems = load_presets(path)
    assert not good and len(problems) == 1 and str(path) in problems[0]


@pytest.mark.parametrize("data, word", [
    (b"", "Expecting value"), (b"{", "Expecting"), (b"[]", "object"), (b"3", "object"), (b'{"a": {"eta": NaN}}', "NaN"),
    (b'{"a": {}, "a": {}}', "twice"), (b'{"a": {"eta": 1, "eta": 2}}', "twice"), (b"\xff\xfe{}", "UTF-8"),
    (b"[" * 100_000, "deep"), (b" " * (2 << 20), "larger"), (b'{"a": {}', "Expecting"),
])
def test_a_broken_file_gives_no_presets_and_is_left_alone(path, data, word):
    path.write_bytes(data)
    good, problems = load_presets(path)
    assert not good and len(problems) == 1 and str(path) in problems[0] and word in problems[0]
    with pytest.raises(ValueError, match="nothing was written"):
        save_preset(path, Preset("mine"))
    assert path.read_bytes() == data and list(path.parent.iterdir()) == [path]


def test_byte_order_mark_and_other_letters(path):
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"柔らかい": {}}, ensure_ascii=False).encode())
    good, problems = load_presets(path)
    assert list(good) == ["柔らかい"] and not problems


def test_missing_or_unreadable(path, tmp_path):
    assert load_presets(path) == ({}, [])
    good, problems = load_presets(tmp_path)
    assert not good and str(tmp_path) in problems[0]


def test_save_and_load(path):
    mine = Preset("mine", "sde_2", 0.4, 1.1, 2, False, "exact", 0.1, 0.9, "Mine", "for me", "karras")
    save_preset(path, mine)
    save_preset(path, Preset("other"))
    good, problems = load_presets(path)
    assert not problems and good == {"mine": mine, "other": Preset("other")}
    assert set(to_dict(mine)) == set(FIELDS)
    save_preset(path, mine.replace(eta=0.9))
    assert load_presets(path)[0]["mine"].eta == 0.9 and len(load_presets(path)[0]) == 2
    with pytest.raises(ValueError, match="built-in"):
        save_preset(path, PRESETS["ode"])


def test_save_keeps_what_it_does_not_understand(path):
    """A preset of a newer version is skipped on reading, but not lost on writing."""
    path.write_text(json.dumps({"newer": {"future": 1}}))
    save_preset(path, Preset("mine"))
    assert json.loads(path.read_text())["newer"] == {"future": 1}


def test_a_crash_while_saving_loses_nothing(path, monkeypatch):
    save_preset(path, Preset("mine"))
    before = path.read_bytes()

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr("ersde.presets.os.replace", crash)
    with pytest.raises(OSError):
        save_preset(path, Preset("other"))
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_persons_own_presets_come_behind_the_built_in_ones(path, monkeypatch):
    monkeypatch.setenv("ERSDE_PRESETS", str(path))
    assert dict(ersde.all_presets()[0]) == dict(PRESETS) and ersde.all_presets()[1] == []
    path.write_text(json.dumps({"mine": {"eta": 0.2}, "bad": {"eta": -1}, "ode": {}}))
    presets, problems = ersde.all_presets()
    assert list(presets) == [*PRESETS, "mine"] and presets["mine"].eta == 0.2
    assert len(problems) == 2 and presets["ode"] is PRESETS["ode"]
