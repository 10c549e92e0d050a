"""A person's file of presets, whatever is in it: the good ones or a line that says what is wrong; never lost, never half."""
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ersde
from ersde import presets
from ersde.presets import FIELDS, PRESETS, Preset, load_presets, save_preset, to_dict

ROOT = Path(__file__).resolve().parents[1]
fuzz = settings(max_examples=300, deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

MINE = {"mine": {"noise_scale": "sde", "eta": 0.3, "description": "soft"}, "柔らかい": {"s_noise": 0.9, "order": 2}}
TEXT = json.dumps(MINE, ensure_ascii=False, indent=2)

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(
        [10 ** 400, -10 ** 400, 1e308, "\ud800", "a\nb", "\x00", "x" * 5000, "sde", "exact"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8)
FIELD = st.one_of(st.sampled_from([*FIELDS, "name"]), st.text(max_size=10))
NAME = st.one_of(st.sampled_from(["mine", "ode", "", "..", "../x", "a/b", "C:\\x", "nul", "x" * 65]), st.text(max_size=10))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "presets.json"


def load(path):
    """`load_presets` with its promises checked: the file is as it was, every preset is one, every problem is a line."""
    before = path.read_bytes()
    good, problems = load_presets(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    for name, preset in good.items():
        assert isinstance(preset, Preset) and preset.name == name and name not in PRESETS
        assert Preset(name, **to_dict(preset)) == preset
        json.dumps(to_dict(preset), allow_nan=False).encode()
        f"{preset.label}{preset.description}".encode()
    for line in problems:
        assert line.startswith(str(path)) and "\n" not in line and len(line) < 1000
        line.encode()               # so that a log can hold it
    return good, problems


@fuzz
@given(st.binary(max_size=200))
def test_any_bytes(path, data):
    path.write_bytes(data)
    load(path)


@pytest.mark.parametrize("cut", range(len(TEXT.encode())))
def test_truncated_anywhere(path, cut):
    path.write_bytes(TEXT.encode()[:cut])
    good, problems = load(path)
    assert not good and len(problems) == 1


@fuzz
@given(st.integers(0, len(TEXT.encode()) - 1), st.binary(max_size=3), st.integers(0, 3))
def test_damaged_anywhere(path, at, new, gone):
    data = TEXT.encode()
    path.write_bytes(data[:at] + new + data[at + gone:])
    load(path)


@fuzz
@given(st.dictionaries(NAME, st.one_of(VALUES, st.dictionaries(FIELD, VALUES, max_size=4)), max_size=4), st.booleans())
def test_wrong_types_anywhere(path, content, escaped):
    text = json.dumps(content, ensure_ascii=escaped)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    good, problems = load(path)
    whole_file = not good and len(problems) == 1
    assert whole_file or len(good) + len(problems) >= len(content)


@pytest.mark.parametrize("encoding", [
    "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift-jis"])
def test_encodings(path, encoding):
    content = {"Grün": {"eta": 0.2}} if encoding in ("latin-1", "cp1252") else MINE
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    good, problems = load(path)
    assert bool(good) == (encoding in ("utf-8", "utf-8-sig")) and bool(problems) != bool(good)


@pytest.mark.parametrize("text", [
    "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, '{"a": {"eta": ' + "9" * 5000 + "}}",
    '{"a": {"eta": 1e999}}', '{"a": {"eta": -1e999}}', '{"a": {"order": 1e5000}}', '{"' + "n" * 5000 + '": {}}',
    '{"a": {"label": "' + "x" * 900_000 + '"}}',
    '{"a": {"eta": ' + "[" * 900 + "]" * 900 + "}}", '{"a": {"label": "\\ud800"}}', '{"a": {"description": "\\udfff"}}',
    '{"a": {"label": "two\\nlines"}}', '{"a": {"label": "\\u0000"}}', '{"\\ud800": {}}', '{"a": {}, "a": {}}',
    '{"a": {"eta": 1, "eta": 1}}', '{"a": {"' + "k" * 5000 + '": 1}}', '{"a": Infinity}', '{"a": {"eta": 1}} x'])
def test_huge_deep_doubled_and_strange(path, text):
    path.write_text(text, encoding="utf-8")
    good, problems = load(path)
    assert not good and problems


def test_thousands_of_presets_are_read(path):
    path.write_text(json.dumps({f"mine {i}": {"eta": i / 5000} for i in range(5000)}), encoding="utf-8")
    assert len(load(path)[0]) == 5000


# Saving.

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=30)
PRESET = st.builds(
    Preset, st.from_regex(r"[A-Za-z0-9][\w .()+-]{0,20}", fullmatch=True).filter(lambda name: name not in PRESETS),
    st.sampled_from(sorted(ersde.NOISE_SCALES)), st.floats(0, 1000), st.floats(0, 1e300), st.integers(1, 3), st.booleans(),
    st.sampled_from(["exact", "paper", "comfyui"]), st.floats(0, 0.5), st.floats(0.5, 1), TEXTS, TEXTS)


@fuzz
@given(st.lists(PRESET, min_size=1, max_size=4))
def test_what_is_saved_is_read_again(path, saved):
    path.unlink(missing_ok=True)
    for preset in saved:
        save_preset(path, preset)
    good, problems = load(path)
    assert not problems and good == {preset.name: preset for preset in saved}


CALLS = ("json.dumps", "secrets.token_hex", "os.fsync", "shutil.copymode", "os.replace")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("call", CALLS)
def test_a_failure_at_every_call_loses_nothing(path, monkeypatch, call, error):
    save_preset(path, Preset("mine"))
    before = path.read_bytes()

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(f"ersde.presets.{call}", fail)
    with pytest.raises(type(error)):
        save_preset(path, Preset("other"))
    monkeypatch.undo()
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    save_preset(path, Preset("other"))
    assert len(load(path)[0]) == 2


@pytest.mark.parametrize("call", [*CALLS, "half a file"])
def test_a_kill_at_every_call_loses_nothing(path, call):
    """The process is gone at once, no `finally` runs: the file is the old one, whole, and can be saved to again."""
    save_preset(path, Preset("mine"))
    before = path.read_bytes()
    code = f"""
import io, os
from ersde import presets
def gone(*args, **kw):
    os._exit(9)
class Half(io.FileIO):
    def write(self, data):
        super().write(data[:len(data) // 2])
        os._exit(9)
if {call!r} == "half a file":
    presets.open = lambda file, mode: Half(file, mode) if "x" in mode else open(file, mode)
else:
    module, name = {call!r}.split(".")
    setattr(getattr(presets, module), name, gone)
presets.save_preset({str(path)!r}, presets.Preset("other"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120)
    assert done.returncode == 9
    assert path.read_bytes() == before and load_presets(path)[0] == {"mine": Preset("mine")}
    save_preset(path, Preset("other"))
    assert len(load_presets(path)[0]) == 2


def test_threads_that_save_at_once_leave_a_whole_file(path):
    threads = [threading.Thread(target=save_preset, args=(path, Preset(f"mine {i}"))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(load(path)[0]) == 8 and not load(path)[1]


@pytest.mark.skipif(os.name == "nt", reason="POSIX file modes")
def test_the_files_mode_and_link_are_kept(path):
    save_preset(path, Preset("mine"))
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    path.chmod(0o640)
    link = path.with_name("link.json")
    link.symlink_to(path.name)
    save_preset(link, Preset("other"))
    assert link.is_symlink() and len(load_presets(path)[0]) == 2 and stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_file_never_grows_beyond_what_can_be_read(path):
    path.write_text(json.dumps({f"mine {i}": {"description": "x" * 1000} for i in range(1000)}), encoding="utf-8")
    before = path.read_bytes()
    assert len(before) <= presets._FILE_LIMIT
    with pytest.raises(ValueError, match="larger than .* nothing was written"):
        for i in range(50):
            before = path.read_bytes()
            save_preset(path, Preset(f"other {i}", description="y" * 1000))
    assert path.read_bytes() == before and load(path)[0]


def test_what_cannot_be_saved_is_named(path, tmp_path):
    with pytest.raises(TypeError, match="preset must be a Preset, got 'ode'"):
        save_preset(path, "ode")
    with pytest.raises(OSError, match="nowhere"):
        save_preset(tmp_path / "nowhere" / "presets.json", Preset("mine"))
    with pytest.raises(OSError):
        save_preset(tmp_path, Preset("mine"))
    assert list(tmp_path.iterdir()) == []


# Names and paths.

@pytest.mark.parametrize("name", ["..", "../mine", "a/b", "a\\b", "/etc/passwd", "C:mine", "~", "$HOME", "%x", "a\0",
                                  ".hidden", "-rf", "a;b", "a`b", "{x}", "<b>", "a\u202eb", "a\nb", "", " ", "\ud800"])
def test_a_name_is_no_path(name):
    with pytest.raises(ValueError, match="^name must be 1 to 64 letters"):
        Preset(name)


def test_names_do_not_decide_where_a_file_is(path, monkeypatch):
    """Every preset is an entry of the one file: whatever names allow, nothing else is written or read."""
    monkeypatch.setenv("ERSDE_PRESETS", str(path))
    opened = []
    real = open
    monkeypatch.setattr("builtins.open", lambda file, *a, **kw: (opened.append(file), real(file, *a, **kw))[1])
    for name in ("a..b", "con", "nul.txt", "COM1", "x.json", "a" * 64):
        save_preset(presets.user_presets_path(), Preset(name))
        assert name in ersde.all_presets()[0]
    assert {Path(file).parent for file in opened} == {path.parent} and list(path.parent.iterdir()) == [path]
