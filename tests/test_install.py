"""install.py: what it leaves behind, what it refuses, and that a host's bare run does nothing."""
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "install.py"

LAYOUT = {
    "comfyui": (["main.py", "nodes.py"], ["comfy", "custom_nodes"]),
    "webui": (["launch.py"], ["modules", "extensions"]),
}
TARGET = {"comfyui": "custom_nodes/comfyui-er-sde", "webui": "extensions/sd-webui-er-sde"}
KINDS = sorted(LAYOUT)


def load(path=SCRIPT):
    """install.py as a module of its own, so that a test can change its constants."""
    spec = importlib.util.spec_from_file_location("install_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path):
    """A small pack with things in it that a copy leaves out."""
    pack = tmp_path / "pack"
    (pack / "ersde").mkdir(parents=True)
    shutil.copy2(SCRIPT, pack / "install.py")
    shutil.copytree(ROOT / "requirements", pack / "requirements")
    (pack / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1.2.3"\n')
    (pack / "__init__.py").write_text("NODES = 1\n")
    (pack / "ersde" / "__init__.py").write_text("A = 1\n")
    for junk in (".git/config", ".venv/pyvenv.cfg", "ersde/__pycache__/a.cpython-311.pyc", "tests/out/plot.png",
                 ".pytest_cache/x", "b.pyc"):
        (pack / junk).parent.mkdir(parents=True, exist_ok=True)
        (pack / junk).write_text("junk")
    return pack


@pytest.fixture
def install(source):
    """install.py of the small pack, as a module."""
    return load(source / "install.py")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def make_host(folder, kind):
    files, folders = LAYOUT[kind]
    for name in folders:
        (folder / name).mkdir(parents=True)
    for name in files:
        (folder / name).write_text("")
    return folder


@pytest.fixture
def host(tmp_path, kind):
    return make_host(tmp_path / "host", kind)


@pytest.fixture
def target(host, kind):
    return host / TARGET[kind]


def tree(folder):
    """Every file below a folder with its content's hash, and every link with its destination."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(parent, name)
            key = path.relative_to(folder).as_posix()
            if path.is_symlink():
                found[key] = "-> " + os.readlink(path)
            elif path.is_file():
                found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[key] = "folder"
    return found


needs_links = pytest.mark.skipif(os.name == "nt", reason="symbolic links need a right on Windows")


# --- into a host and out again ---


@needs_links
def test_link_is_made_kept_and_removed(install, source, host, target, kind, capsys):
    before_host, before_pack = tree(host), tree(source)
    assert install.main([kind, str(host)]) == 0
    assert target.is_symlink() and target.resolve() == source.resolve()
    assert (target / "__init__.py").read_text() == "NODES = 1\n"
    with_link = tree(host)

    capsys.readouterr()
    assert install.main([kind, str(host)]) == 0
    assert "Already there" in capsys.readouterr().out
    assert tree(host) == with_link

    assert install.main([kind, str(host), "--remove"]) == 0
    assert tree(host) == before_host
    assert tree(source) == before_pack

    capsys.readouterr()
    assert install.main([kind, str(host), "--remove"]) == 0
    assert "Nothing to remove" in capsys.readouterr().out
    assert tree(host) == before_host


def test_copy_holds_the_pack_and_no_more(install, source, host, target, kind, capsys):
    before_host, before_pack = tree(host), tree(source)
    assert install.main([kind, str(host), "--copy"]) == 0
    assert not target.is_symlink()
    copied = {key for key, value in tree(target).items() if value != "folder"}
    requirements = {"requirements/" + path.name for path in (ROOT / "requirements").iterdir()}
    assert copied == {"install.py", "pyproject.toml", "__init__.py", "ersde/__init__.py", ".ersde-pack"} | requirements
    note = json.loads((target / ".ersde-pack").read_text())
    assert note["source"] == str(source.resolve()) and note["version"] == "1.2.3"
    assert os.listdir(target.parent) == [target.name]  # no work in progress is left

    with_copy = tree(host)
    capsys.readouterr()
    for again in ([], ["--copy"]):
        assert install.main([kind, str(host)] + again) == 0
        assert "Already there" in capsys.readouterr().out
        assert tree(host) == with_copy

    (target / "ersde" / "__pycache__").mkdir()
    (target / "ersde" / "__pycache__" / "a.pyc").write_text("")
    assert install.main([kind, str(host), "--remove"]) == 0
    assert tree(host) == before_host
    assert tree(source) == before_pack


def test_copy_where_links_fail(install, host, target, kind, monkeypatch):
    def no_links(*args, **kwargs):
        raise OSError("links are not allowed here")

    monkeypatch.setattr(install.os, "symlink", no_links)
    assert install.main([kind, str(host)]) == 0
    assert not target.is_symlink() and (target / ".ersde-pack").is_file()


def test_copy_follows_the_pack(install, source, host, target, kind, capsys):
    install.main([kind, str(host), "--copy"])
    (source / "ersde" / "__init__.py").write_text("A = 2\n")
    (source / "__init__.py").unlink()
    assert install.main([kind, str(host)]) == 0
    assert "up to date" in capsys.readouterr().out
    assert (target / "ersde" / "__init__.py").read_text() == "A = 2\n"
    assert not (target / "__init__.py").exists()
    assert os.listdir(target.parent) == [target.name]


def test_changed_copy_is_not_overwritten(install, source, host, target, kind, capsys):
    install.main([kind, str(host), "--copy"])
    (target / "ersde" / "__init__.py").write_text("mine = True\n")
    (source / "ersde" / "__init__.py").write_text("A = 2\n")
    assert install.main([kind, str(host)]) == 2
    assert str(target) in capsys.readouterr().err
    assert (target / "ersde" / "__init__.py").read_text() == "mine = True\n"


@needs_links
def test_copy_replaces_our_own_link(install, source, host, target, kind):
    install.main([kind, str(host)])
    before = tree(source)
    assert install.main([kind, str(host), "--copy"]) == 0
    assert not target.is_symlink() and (target / ".ersde-pack").is_file()
    assert tree(source) == before


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_copy_leaves_nothing(install, host, target, kind, monkeypatch, error):
    calls, copy2 = [], shutil.copy2

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return copy2(*args, **kwargs)

    monkeypatch.setattr(install.shutil, "copy2", fails)
    before = tree(host)
    assert install.main([kind, str(host), "--copy"]) == (2 if isinstance(error, OSError) else 130)
    assert len(calls) == 3
    assert tree(host) == before


def test_failed_update_keeps_the_old_copy(install, source, host, target, kind, monkeypatch):
    install.main([kind, str(host), "--copy"])
    before = tree(host)
    (source / "ersde" / "__init__.py").write_text("A = 2\n")
    rename = os.rename

    def fails(old, new):
        if str(new) == str(target) and "partial" in str(old):
            raise OSError("busy")
        rename(old, new)

    monkeypatch.setattr(install.os, "rename", fails)
    assert install.main([kind, str(host)]) == 2
    assert tree(host) == before


def test_leftover_of_a_killed_copy_is_cleared(install, host, target, kind):
    left = target.with_name("." + target.name + ".partial.disabled")
    left.mkdir()
    (left / ".ersde-pack").write_text(json.dumps({"pack": install.PACK}))
    (left / "half.py").write_text("")
    assert install.main([kind, str(host), "--copy"]) == 0
    assert os.listdir(target.parent) == [target.name]


# --- refusals ---


def refused(install, capsys, arguments, *words):
    """The command ends with 2 and one line on stderr that holds the words."""
    capsys.readouterr()
    assert install.main([str(a) for a in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1 and said.err.endswith("\n")
    for word in words:
        assert str(word) in said.err


@needs_links
@pytest.mark.parametrize("option", [[], ["--copy"], ["--remove"]])
def test_foreign_things_are_left_alone(install, source, host, target, kind, capsys, tmp_path, option):
    other = tmp_path / "other"
    other.mkdir()
    (other / "keep.txt").write_text("keep")

    target.symlink_to(other, target_is_directory=True)
    refused(install, capsys, [kind, host] + option, target, other)
    assert os.readlink(target) == str(other) and (other / "keep.txt").read_text() == "keep"

    target.unlink()
    target.symlink_to(tmp_path / "gone", target_is_directory=True)
    refused(install, capsys, [kind, host] + option, target, tmp_path / "gone")
    assert target.is_symlink()

    target.unlink()
    target.mkdir()
    (target / "keep.txt").write_text("keep")
    refused(install, capsys, [kind, host] + option, target)
    (target / ".ersde-pack").write_text(json.dumps({"pack": "another pack"}))
    refused(install, capsys, [kind, host] + option, target)
    assert (target / "keep.txt").read_text() == "keep"

    shutil.rmtree(target)
    target.write_text("a file")
    refused(install, capsys, [kind, host] + option, target)
    assert target.read_text() == "a file"


@pytest.mark.parametrize("option", [[], ["--copy"], ["--remove"]])
def test_wrong_folder_is_named(install, kind, capsys, tmp_path, option):
    refused(install, capsys, [kind, tmp_path / "no where"] + option, tmp_path / "no where", "no such folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    files, folders = LAYOUT[kind]
    refused(install, capsys, [kind, empty] + option, empty, *(files + [name + "/" for name in folders]))
    assert tree(empty) == {}


@pytest.mark.parametrize("kind, missing", [(k, n) for k in KINDS for n in LAYOUT[k][0] + LAYOUT[k][1]])
def test_every_part_of_a_host_is_asked_for(install, host, kind, missing, capsys):
    path = host / missing
    path.rmdir() if path.is_dir() else path.unlink()
    refused(install, capsys, [kind, host], host, missing)


def test_one_host_is_not_taken_for_the_other(install, tmp_path, capsys):
    for kind in KINDS:
        make_host(tmp_path / kind, kind)
    refused(install, capsys, ["webui", tmp_path / "comfyui"], tmp_path / "comfyui")
    refused(install, capsys, ["comfyui", tmp_path / "webui"], tmp_path / "webui")


def test_webui_py_will_do(install, tmp_path):
    host = make_host(tmp_path / "host", "webui")
    (host / "launch.py").rename(host / "webui.py")
    assert install.main(["webui", str(host)]) == 0
    assert os.path.lexists(host / TARGET["webui"])


def test_host_inside_the_pack_is_refused(install, source, kind, capsys):
    host = make_host(source / "host", kind)
    before = tree(host)
    for option in ([], ["--copy"]):
        refused(install, capsys, [kind, host] + option, host)
    assert tree(host) == before


@pytest.mark.parametrize("name", ["er-sde-clone", None])
def test_pack_that_already_lies_in_the_host(source, host, target, kind, name, capsys):
    place = target.parent / (name or target.name)
    shutil.copytree(source, place)
    install = load(place / "install.py")
    sys.modules.pop("install_under_test", None)
    before = tree(host)
    for option in ([], ["--copy"], ["--remove"]):
        capsys.readouterr()
        assert install.main([kind, str(host)] + option) == 0
        said = capsys.readouterr()
        assert said.out.count("\n") == 1 and said.err == ""
        assert tree(host) == before


def test_paths_with_blanks_and_relative_paths(install, tmp_path, monkeypatch):
    make_host(tmp_path / "my host", "comfyui")
    monkeypatch.chdir(tmp_path)
    assert install.main(["comfyui", "my host"]) == 0
    assert os.path.lexists(tmp_path / "my host" / TARGET["comfyui"])


def test_unknown_command_and_clashing_options(install, host, kind):
    for arguments in (["instal"], [kind], [kind, str(host), "--copy", "--remove"]):
        with pytest.raises(SystemExit) as stop:
            install.main(arguments)
        assert stop.value.code == 2


# --- a host's bare run ---


def bare_run(tmp_path, blockers=""):
    """Run install.py with no arguments in a Python without site packages; `blockers` is put on its path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    if blockers:
        env["PYTHONPATH"] = str(blockers)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-S", str(SCRIPT)], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=60)
    return done, time.perf_counter() - start


def test_bare_run_without_torch_reports_and_returns_0(tmp_path):
    done, _ = bare_run(tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    missing = next(line for line in done.stdout.splitlines() if "MISSING" in line)
    assert all(name in missing for name in ("torch (", "numpy (", "safetensors ("))
    assert "matplotlib" in done.stdout and len(done.stdout.splitlines()) <= 6
    assert list(tmp_path.iterdir()) == []


def test_bare_run_finds_packages_without_importing_them(tmp_path):
    for name in ("torch", "numpy", "safetensors", "matplotlib", "tqdm", "PIL"):
        package = tmp_path / "site" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    work = tmp_path / "work"
    work.mkdir()
    done, _ = bare_run(work, tmp_path / "site")
    assert done.returncode == 0 and done.stderr == ""
    assert "MISSING" not in done.stdout and "torch" in done.stdout and "imported" not in done.stdout


def test_bare_run_is_quick(tmp_path):
    # the best of three: the machine may be busy with other tests
    assert min(bare_run(tmp_path)[1] for _ in range(3)) < 1.0


def test_bare_run_never_fails(install, monkeypatch, capsys):
    def broken(name):
        raise RuntimeError("metadata is damaged")

    monkeypatch.setattr(install, "has_module", broken)
    assert install.main([]) == 0
    assert "metadata is damaged" in capsys.readouterr().out


def test_old_python_gets_one_line(install, monkeypatch, capsys):
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 1, "final", 0))
    assert install.main(["demo"]) == 2
    assert install.main([]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "3.10" in said[0] and "3.9" in said[0]


# --- the private environment, with a stand-in for venv and pip ---


class Fake:
    """Stands in for the calls that make an environment, and keeps a record of them."""

    def __init__(self, install, monkeypatch):
        self.install, self.calls, self.pip_code, self.version = install, [], 0, (3, 11)
        self.during_pip = None
        monkeypatch.setattr(install, "find_python", lambda command: sys.executable)
        monkeypatch.setattr(install, "probe", self.probe)
        monkeypatch.setattr(install, "create_venv", self.create)
        monkeypatch.setattr(install, "forget_broken", lambda python: True)
        monkeypatch.setattr(install, "run_pip", self.pip)
        shutil.rmtree(install.VENV)

    def probe(self, python, code=""):
        return (self.version, str(python[0])) if Path(python[0]).is_file() else None

    def create(self, python):
        self.calls.append("venv")
        self.install.venv_python().parent.mkdir(parents=True)
        self.install.venv_python().write_text("")
        (self.install.VENV / "pyvenv.cfg").write_text("")

    def pip(self, python, command):
        self.calls.append("pip " + command)
        if self.during_pip:
            self.during_pip()
        return self.pip_code

    def prepare(self, command):
        """What one run did."""
        self.calls = []
        assert self.install.prepare(command) == self.install.venv_python()
        return self.calls


@pytest.fixture
def fake(install, monkeypatch):
    return Fake(install, monkeypatch)


def test_second_run_skips_pip(fake):
    assert fake.prepare("demo") == ["venv", "pip demo"]
    assert fake.prepare("demo") == []


def test_test_adds_to_demo_and_demo_adds_nothing_to_test(fake):
    fake.prepare("demo")
    assert fake.prepare("test") == ["pip test"]
    assert fake.prepare("demo") == []
    assert fake.prepare("test") == []


def test_environment_made_by_hand_is_adopted(fake):
    fake.create(None)
    (fake.install.VENV / "keep").write_text("")
    assert fake.prepare("test") == ["pip test"]
    assert (fake.install.VENV / "keep").exists()
    assert fake.prepare("test") == []


@pytest.mark.parametrize("name, demo, test", [
    ("demo.txt", ["pip demo"], ["pip test"]),
    ("constraints.txt", ["pip demo"], ["pip test"]),
    ("test.txt", [], ["pip test"]),
])
def test_changed_pins_are_installed(fake, source, name, demo, test):
    fake.prepare("test")
    path = source / "requirements" / name
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert fake.prepare("test") == []  # line ends are not pins
    path.write_text(path.read_text() + "\nsomething==1.0\n")
    stamp = (fake.install.VENV / fake.install.STAMP).read_text()
    assert fake.prepare("demo") == demo
    (fake.install.VENV / fake.install.STAMP).write_text(stamp)
    assert fake.prepare("test") == test


def test_failed_or_stopped_pip_is_done_again(fake):
    fake.prepare("demo")
    fake.pip_code = 1
    with pytest.raises(fake.install.InstallError):
        fake.prepare("test")
    fake.pip_code = 0

    def stop():
        assert not (fake.install.VENV / fake.install.STAMP).exists()
        raise KeyboardInterrupt

    fake.during_pip = stop
    with pytest.raises(KeyboardInterrupt):
        fake.prepare("test")
    fake.during_pip = None
    # the failed run may have changed the demo's packages, so they are looked at again
    assert fake.prepare("demo") == ["pip demo"]
    assert fake.prepare("test") == ["pip test"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"demo": 1, "test": null}'])
def test_damaged_stamp_counts_as_none(fake, text):
    fake.prepare("test")
    (fake.install.VENV / fake.install.STAMP).write_text(text)
    assert fake.prepare("test") == ["pip test"]


def test_unusable_environment_is_made_anew(fake):
    fake.prepare("demo")
    fake.install.venv_python().unlink()
    assert fake.prepare("demo") == ["venv", "pip demo"]

    (fake.install.VENV / fake.install.BUILDING).touch()
    assert fake.prepare("demo") == ["venv", "pip demo"]

    # 3.13 is fine for the demo's pins and too new for the tests'
    fake.version = (3, 13)
    assert fake.prepare("demo") == ["pip demo"]
    stale = fake.install.VENV / "stale"
    stale.write_text("")
    assert fake.install.venv_python().exists()

    def right_version(python):
        fake.version = (3, 12)
        Fake.create(fake, python)

    fake.install.create_venv = right_version
    assert fake.prepare("test") == ["venv", "pip test"]
    assert not stale.exists() and not fake.install.VENV.with_name(".venv.old").exists()
    assert fake.prepare("demo") == []


def test_folder_that_is_no_environment_is_not_removed(fake):
    fake.install.VENV.mkdir()
    (fake.install.VENV / "thesis.txt").write_text("keep")
    with pytest.raises(fake.install.InstallError, match="move it away"):
        fake.prepare("demo")
    assert (fake.install.VENV / "thesis.txt").read_text() == "keep"


def test_no_fitting_python_is_said_before_anything_is_removed(fake, install, monkeypatch, source):
    fake.prepare("demo")
    fake.install.venv_python().unlink()
    before = tree(install.VENV)
    monkeypatch.setattr(install, "find_python", load(source / "install.py").find_python)
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    monkeypatch.setattr(install.sys, "version_info", (3, 10, 0, "final", 0))
    with pytest.raises(Exception, match=r"3\.11 to 3\.14.*3\.10"):
        fake.prepare("demo")
    assert tree(install.VENV) == before


def test_another_python_from_path_is_used(install, monkeypatch, capsys):
    monkeypatch.setattr(install.sys, "version_info", (3, 15, 0, "final", 0))
    monkeypatch.setattr(install.os, "name", "posix")
    monkeypatch.setattr(install.shutil, "which", lambda name: name)
    # 3.12 is on PATH but does not start, as with a version manager's stubs
    monkeypatch.setattr(install, "probe", lambda python, code: ((3, 11), "/x/py") if "3.11" in python[0] else None)
    assert install.find_python("test") == "/x/py"
    assert "/x/py" in capsys.readouterr().out


def test_small_disk_is_warned_of_once_pip_is_due(fake, monkeypatch, capsys):
    monkeypatch.setattr(fake.install.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 10**9))
    fake.prepare("demo")
    assert capsys.readouterr().out.count("Warning: 1.0 GB free") == 1
    fake.prepare("demo")
    assert "Warning" not in capsys.readouterr().out


@pytest.mark.parametrize("command, arguments, passed", [
    ("demo", [], []),
    ("demo", ["--out", "my dir", "x"], ["--out", "my dir", "x"]),
    ("demo", ["--", "--help"], ["--help"]),
    ("test", ["-k", "a or b", "--", "tests/x.py"], ["-k", "a or b", "--", "tests/x.py"]),
])
@pytest.mark.parametrize("code, result", [(0, 0), (3, 3), (-9, 137)])
def test_arguments_and_exit_code_are_passed_on(install, monkeypatch, command, arguments, passed, code, result):
    seen = []
    monkeypatch.setattr(install, "prepare", lambda command: "python")
    monkeypatch.setattr(install.subprocess, "call", lambda call, env, cwd: seen.append((call, env, cwd)) or code)
    monkeypatch.setenv("PYTHONPATH", "/the/host")
    assert install.main([command] + arguments) == result
    (call, env, cwd), = seen
    assert call == ["python", "-m", {"demo": "ersde.demo", "test": "pytest"}[command]] + passed
    if command == "demo":  # relative paths are the caller's
        assert cwd is None and env["PYTHONPATH"] == str(install.ROOT)
    else:
        assert cwd == str(install.ROOT) and "PYTHONPATH" not in env


def test_help_makes_nothing(install, monkeypatch, capsys):
    monkeypatch.setattr(install, "prepare", lambda command: pytest.fail("made an environment"))
    for arguments in (["--help"], ["demo", "--help"], ["test", "-h"], ["comfyui", "-h"]):
        with pytest.raises(SystemExit) as stop:
            install.main(arguments)
        assert stop.value.code == 0
    assert "--out" in capsys.readouterr().out


def test_half_written_packages_are_found(install):
    """A package without RECORD, and one with a file gone, lose their metadata; a whole one does not."""
    shutil.rmtree(install.VENV)
    site = install.VENV / "site"
    for name, record in (("whole", "whole.py,,\nwhole-1.dist-info/RECORD,,\ngone.pyc,,\n"), ("gap", "gap.py,,\n"),
                         ("cut", None)):
        info = site / (name + "-1.dist-info")
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        if record:
            (info / "RECORD").write_text(record)
    (site / "whole.py").write_text("")
    other = install.ROOT / "other" / "cut-1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: cut\nVersion: 1\n")

    places = [str(site), str(other.parent)]
    look = f"import sys; sys.path = [p for p in sys.path if 'site-packages' not in p] + {places!r}\n"
    install.FIND_BROKEN = look + install.FIND_BROKEN
    assert install.forget_broken(sys.executable) is True
    assert sorted(path.name for path in site.iterdir()) == ["whole-1.dist-info", "whole.py"]
    assert other.is_dir()  # outside .venv: not ours

    (site / "pip-1.dist-info").mkdir()
    (site / "pip-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: pip\nVersion: 1\n")
    assert install.forget_broken(sys.executable) is False


# --- the pins ---


def pin_lines(name):
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def test_every_pin_is_exact_and_agrees():
    pinned = {}
    for name in ("demo.txt", "test.txt", "constraints.txt"):
        for line in pin_lines(name):
            if line.startswith("-"):
                continue
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)(?:\s*;\s*(.+))?", line)
            assert match, line
            key = (re.sub(r"[-_.]+", "-", match[1]).lower(), match[3])
            assert pinned.setdefault(key, match[2]) == match[2], line
    assert ("torch", None) in pinned
    assert not [name for name, _ in pinned if re.match(r"nvidia-|cuda-|triton", name)]


def test_requirement_files_belong_together(install):
    assert install.requirement_files("demo") == ["demo.txt", "constraints.txt"]
    assert install.requirement_files("test") == ["test.txt", "demo.txt", "constraints.txt"]
    assert len({install.pins_hash(c, v) for c in ("demo", "test") for v in ((3, 11), (3, 12))}) == 4


def test_no_host_would_install_the_pins():
    # ComfyUI-Manager and the WebUI install what these files name over the host's packages
    assert not (ROOT / "requirements.txt").exists()
    assert re.search(r"(?m)^dependencies = \[\]$", (ROOT / "pyproject.toml").read_text())
