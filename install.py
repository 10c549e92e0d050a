"""Set up the ER-SDE sampler pack.

    python install.py demo [arguments]     make .venv beside this file, run the demo
    python install.py test [arguments]     make .venv beside this file, run the tests
    python install.py comfyui DIR          put the pack into a ComfyUI folder
    python install.py webui DIR            put the pack into a Stable Diffusion WebUI folder
    python install.py                      what a host runs: installs nothing, reports

Only the standard library is used. A host runs this file with its own
interpreter and any working directory, so without arguments it changes nothing.
"""
# No annotations and no newer syntax here: an old Python has to get as far as
# reading this file to be told in one line that it is too old.
import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "requirements"
CONSTRAINTS = "constraints.txt"

MIN_PYTHON = (3, 10)
# First and last Python that each set of pins installs on, see requirements/.
PIN_PYTHON = {"demo": ((3, 11), (3, 14)), "test": ((3, 11), (3, 12))}
# torch for Linux brings its CUDA libraries: the full set takes about 6 GB.
DISK_NEEDED = 8 * 10**9

STAMP = ".install-stamp.json"
BUILDING = ".install-stamp.building"

PACK = "er-sde-samplers"
MARKER = ".ersde-pack"

# (module, distribution, what it is for)
HOST_REQUIRED = (
    ("torch", "torch", "all of the sampling"),
    ("numpy", "numpy", "the solver's coefficients"),
    ("safetensors", "safetensors", "reading model files"),
)
HOST_OPTIONAL = (
    ("matplotlib", "matplotlib", "plots"),
    ("tqdm", "tqdm", "progress bars"),
    ("PIL", "pillow", "saving pictures"),
)

# A name as a key of this table is what the user types.
HOSTS = {
    "comfyui": {
        "title": "ComfyUI",
        "folder": "custom_nodes",
        "name": "comfyui-er-sde",
        # each entry: one of these names has to be there
        "expects": (("main.py",), ("nodes.py",), ("comfy/",), ("custom_nodes/",)),
    },
    "webui": {
        "title": "Stable Diffusion WebUI",
        "folder": "extensions",
        "name": "sd-webui-er-sde",
        "expects": (("launch.py", "webui.py"), ("modules/",), ("extensions/",)),
    },
}

# Left out of a copy: what git ignores, and what only a checkout needs.
NOT_COPIED = {
    ".git", ".venv", ".venv.old", "venv", "__pycache__", ".pytest_cache", ".hypothesis", ".ruff_cache",
    ".mypy_cache", ".ipynb_checkpoints", ".DS_Store", "build", "dist", "out", "demo_out", MARKER,
}
NOT_COPIED_ENDS = (".pyc", ".pyo", ".pyd", ".egg-info")


class InstallError(Exception):
    """Something the user has to put right; its text is one line."""

    def __init__(self, text, code=2):
        super().__init__(text)
        self.code = code


def say(text):
    """Print one line at once, so that it keeps its place among pip's lines."""
    print(text, flush=True)


# --- the private environment ------------------------------------------------


def venv_python(venv=None):
    """The path of the environment's interpreter, whether or not it is there."""
    venv = VENV if venv is None else venv
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def private_env():
    """The environment variables for the private interpreter, without what would mix in other packages."""
    env = dict(os.environ)
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "__PYVENV_LAUNCHER__"):
        env.pop(name, None)
    env["PYTHONNOUSERSITE"] = "1"
    env["PIP_USER"] = "0"  # a configured --user would make pip refuse a venv
    return env


def requirement_files(command):
    """The requirement files of a command, included ones too, constraints last."""
    found, queue = [], [command + ".txt"]
    while queue:
        name = queue.pop(0)
        if name in found:
            continue
        found.append(name)
        for line in (REQUIREMENTS / name).read_text(encoding="utf-8").splitlines():
            match = re.match(r"-[rc]\s+(\S+)", line.strip())
            if match:
                queue.append(match.group(1))
    return found


def pins_hash(command, version):
    """A hash of everything that decides what ends up in .venv for a command."""
    digest = hashlib.sha256("python {}.{}\n".format(*version).encode())
    for name in requirement_files(command):
        # splitlines, because git may check the files out with other line ends
        lines = (REQUIREMENTS / name).read_text(encoding="utf-8").splitlines()
        digest.update("\n".join([name] + lines + [""]).encode())
    return digest.hexdigest()


def read_stamp():
    """The hashes of what is completely installed in .venv, by command; empty when unknown."""
    try:
        stamp = json.loads((VENV / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(stamp):
    """Write the stamp in one step: half a stamp must not pass for one."""
    part = VENV / (STAMP + ".part")
    part.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    os.replace(part, VENV / STAMP)


def is_installed(command, version):
    """Whether .venv holds a command's pins as they are now."""
    return read_stamp().get(command) == pins_hash(command, version)


def pins_fit(command, version):
    """Whether a command's pins install on this version of Python."""
    first, last = PIN_PYTHON[command]
    return first <= tuple(version) <= last


def probe(python, code="import sys"):
    """(major, minor) and path of an interpreter, or None when it does not run or the code fails in it."""
    code += "; import sys; print(sys.version_info[0], sys.version_info[1], sys.executable)"
    try:
        done = subprocess.run(list(python) + ["-c", code], env=private_env(), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
        major, minor, path = done.stdout.decode().strip().split(" ", 2)
        return ((int(major), int(minor)), path) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def find_python(command):
    """An interpreter that the command's pins install on: this one, else one from PATH."""
    if pins_fit(command, sys.version_info[:2]):
        return sys.executable
    first, last = PIN_PYTHON[command]
    for minor in range(last[1], first[1] - 1, -1):
        candidates = [[f"python3.{minor}"]]
        if os.name == "nt":
            candidates.insert(0, ["py", f"-3.{minor}"])
        for candidate in candidates:
            if shutil.which(candidate[0]):
                found = probe(candidate, "import venv")
                if found and pins_fit(command, found[0]):
                    say(f"This is Python {sys.version_info[0]}.{sys.version_info[1]}; using {found[1]} instead.")
                    return found[1]
    raise InstallError("`{}` needs Python {}.{} to {}.{} for its pinned packages; this is Python {}.{} and no such "
                       "Python was found on PATH.".format(command, *first, *last, *sys.version_info[:2]))


def discard_venv(why):
    """Take an unusable .venv away. Anything that was not made by `venv` is left alone."""
    ours = (VENV / "pyvenv.cfg").is_file() or (VENV / BUILDING).is_file()
    if is_link(VENV) or not VENV.is_dir() or not (ours or not any(VENV.iterdir())):
        raise InstallError(f"{VENV} cannot be used ({why}) and is not a plain virtual environment: move it away and "
                           "run this again.")
    say(f"Removing .venv: {why}.")
    # Renamed first: an interrupted removal must not look like an environment.
    old = VENV.with_name(".venv.old")
    if old.exists():
        shutil.rmtree(old)
    os.rename(VENV, old)
    shutil.rmtree(old)


def create_venv(python):
    """Make an empty .venv with pip in it."""
    say("Creating .venv ...")
    VENV.mkdir()
    (VENV / BUILDING).touch()  # until this is gone, the next run starts over
    with_pip = subprocess.call([python, "-c", "import ensurepip"], env=private_env(), stderr=subprocess.DEVNULL) == 0
    command = [python, "-m", "venv", str(VENV)]
    code = subprocess.call(command if with_pip else command + ["--without-pip"], env=private_env())
    if code == 0 and not with_pip:
        # Some distributions ship venv without its bundled pip; their own pip can fill in.
        code = subprocess.call([python, "-m", "pip", "--python", str(venv_python()), "install",
                                "--disable-pip-version-check", "pip"], env=private_env())
    if code != 0:
        raise InstallError(f"could not make a virtual environment with {python}; on Debian and Ubuntu, `apt install "
                           "python3-venv` brings what is missing.", 1)
    (VENV / BUILDING).unlink()


# Run inside .venv: lists the installed packages whose files are not all there.
FIND_BROKEN = """
import importlib.metadata as m
for d in m.distributions():
    files = d.files
    if files is None or any(f.suffix != '.pyc' and not f.locate().exists() for f in files):
        print(d._path)
"""


def forget_broken(python):
    """Make pip install half-written packages again; False if pip itself is one of them.

    A pip that was killed can leave a package's metadata without all of its
    files, and would then take the package for installed.
    """
    done = subprocess.run([str(python), "-I", "-c", FIND_BROKEN], env=private_env(), stdout=subprocess.PIPE)
    for line in done.stdout.decode().splitlines():
        path = Path(line.strip())
        if path.suffix != ".dist-info" or VENV.resolve() not in path.resolve().parents:
            continue
        if path.name.startswith("pip-"):
            return False
        say(f"Not completely installed: {path.stem}; pip does it again.")
        shutil.rmtree(path)
    return done.returncode == 0


def run_pip(python, command):
    """Install a command's pins into .venv, with pip's own progress on the terminal."""
    return subprocess.call([str(python), "-m", "pip", "install", "--disable-pip-version-check", "--retries", "8",
                            "--timeout", "60", "-r", str(REQUIREMENTS / (command + ".txt"))],
                           env=private_env(), cwd=str(ROOT))


def warn_disk():
    """Say so when the disk is probably too small; a CPU build of torch would still fit."""
    free = shutil.disk_usage(str(ROOT)).free
    if free < DISK_NEEDED:
        say(f"Warning: {free / 1e9:.1f} GB free on the disk of {ROOT}; .venv can take {DISK_NEEDED / 1e9:.0f} GB.")


def prepare(command):
    """Bring .venv to a command's pins, doing only what is missing; returns its interpreter."""
    python = venv_python()
    building = (VENV / BUILDING).exists()
    found = None if building else probe([str(python)], "import pip")
    if found and pins_fit(command, found[0]) and is_installed(command, found[0]):
        say("Using .venv: its packages are the pinned ones.")
        return python

    if not found and building:
        why = "making it was interrupted"
    elif not found:
        why = "its Python or pip does not run"
    elif not pins_fit(command, found[0]):
        why = "it has Python {}.{}".format(*found[0])
    elif not forget_broken(python):
        why = "its pip is not complete"
    else:
        why = None
    if why or not os.path.lexists(str(VENV)):
        base = find_python(command)  # before anything is removed
        if os.path.lexists(str(VENV)):
            discard_venv(why)
        warn_disk()
        create_venv(base)
        found = probe([str(python)], "import pip")
        if not found:
            raise InstallError(f"{VENV} was made but its Python does not run.", 1)
    else:
        warn_disk()

    try:
        (VENV / STAMP).unlink()  # from here until pip is through, nothing is vouched for
    except FileNotFoundError:
        pass
    say(f"Installing the packages of requirements/{command}.txt into .venv; the first time, this downloads up to 3 GB "
        "...")
    code = run_pip(python, command)
    if code != 0:
        raise InstallError(f"pip did not finish (exit code {code}), see above; the same command goes on from "
                           "here.", 1)
    done = ("demo", "test") if command == "test" else (command,)  # the test set includes the demo's
    write_stamp({name: pins_hash(name, found[0]) for name in done})
    say("Done: .venv is ready.")
    return python


def run_in_venv(command, arguments):
    """`demo` and `test`: prepare .venv and run the module in it; returns the exit code."""
    python = prepare(command)
    env = private_env()
    if command == "demo":
        # In the caller's folder, so that `--out DIR` means what was typed; the
        # pack is then found through PYTHONPATH and the folder's files are not.
        call, cwd = [str(python), "-m", "ersde.demo"], None
        env["PYTHONPATH"], env["PYTHONSAFEPATH"] = str(ROOT), "1"
    else:
        call, cwd = [str(python), "-m", "pytest"], str(ROOT)
    say("Running {} ...".format(" ".join(call[1:] + list(arguments))))
    code = subprocess.call(call + list(arguments), env=env, cwd=cwd)
    return code if code >= 0 else 128 - code


# --- what a host runs -------------------------------------------------------


def has_module(name):
    """Whether a top-level module can be imported, without importing it (torch takes seconds)."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def version_of(distribution):
    """The installed version, or an empty string."""
    from importlib import metadata  # not at the top: Pythons too old for the pack do not have it

    try:
        return metadata.version(distribution) or ""
    except metadata.PackageNotFoundError:
        return ""


def host_report():
    """Say what the pack finds in the host's Python. Installs nothing."""
    say("ER-SDE sampler pack: nothing to install, it runs on the packages of its host.")
    found = [(name + " " + version_of(name)).strip() for module, name, _ in HOST_REQUIRED + HOST_OPTIONAL
             if has_module(module)]
    if found:
        say("  found: " + ", ".join(found))
    missing = [(name, use) for module, name, use in HOST_REQUIRED if not has_module(module)]
    if missing:
        say("  MISSING: " + "; ".join("{} ({})".format(*item) for item in missing)
            + ". The host brings these: repair its own installation.")
    optional = [(name, use) for module, name, use in HOST_OPTIONAL if not has_module(module)]
    if optional:
        say("  not there, and only needed for some extras: " + "; ".join("{} ({})".format(*item) for item in optional))
    say("  other commands of this file: python install.py --help")


# --- putting the pack into a host's folder ----------------------------------


def is_link(path):
    """Whether a path is a symbolic link or, on Windows, a directory junction."""
    if os.path.islink(str(path)):
        return True
    try:
        tag = getattr(os.lstat(str(path)), "st_reparse_tag", 0)
    except OSError:
        return False
    return bool(tag) and tag == getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", -1)


def same_path(one, other):
    """Whether two paths are the same place once links are followed."""
    return os.path.normcase(os.path.realpath(str(one))) == os.path.normcase(os.path.realpath(str(other)))


def inside(path, folder):
    """Whether a path lies in a folder (or is it) once links are followed."""
    path, folder = (Path(os.path.normcase(os.path.realpath(str(p)))) for p in (path, folder))
    return folder == path or folder in path.parents


def pack_version():
    """The version in pyproject.toml."""
    try:
        match = re.search(r'(?m)^version\s*=\s*"([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    except OSError:
        match = None
    return match.group(1) if match else "unknown"


def pack_files(folder):
    """The files of a pack that a copy holds, relative to the folder and sorted."""
    found = []
    for parent, folders, files in os.walk(str(folder)):
        folders[:] = [n for n in folders if n not in NOT_COPIED and not n.endswith(NOT_COPIED_ENDS)]
        for name in files:
            if name in NOT_COPIED or name.endswith(NOT_COPIED_ENDS) or name.startswith(".install-stamp"):
                continue
            path = Path(parent, name)
            if path.is_file():
                found.append(path.relative_to(folder))
    return sorted(found, key=lambda path: path.as_posix())


def pack_digest(folder):
    """A hash over the names and contents of a pack's files."""
    digest = hashlib.sha256()
    for path in pack_files(folder):
        data = (Path(folder) / path).read_bytes()
        digest.update(f"{path.as_posix()}\n{len(data)}\n".encode("utf-8", "surrogateescape"))
        digest.update(data)
    return digest.hexdigest()


def read_marker(folder):
    """What was noted when a copy was made, or None when the folder is not one of our copies."""
    try:
        marker = json.loads((Path(folder) / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and marker.get("pack") == PACK else None


def discard_copy(folder):
    """Remove one of our copies, its marker last: what an interruption leaves is still known as ours."""
    for entry in list(Path(folder).iterdir()):
        if entry.name == MARKER:
            continue
        if entry.is_dir() and not is_link(entry):
            shutil.rmtree(str(entry))
        else:
            entry.unlink()
    (Path(folder) / MARKER).unlink()
    Path(folder).rmdir()


def sibling(target, what):
    """A name beside the target for work in progress; ComfyUI does not load folders that end like this."""
    return target.with_name(f".{target.name}.{what}.disabled")


def clear_leftovers(target):
    """Remove what an interrupted run left beside the target."""
    for what in ("partial", "old"):
        path = sibling(target, what)
        if not os.path.lexists(str(path)):
            continue
        if is_link(path) or not path.is_dir() or read_marker(path) is None:
            raise InstallError(f"{path} is in the way and was not made by this installer: move it away.")
        discard_copy(path)


def make_copy(target):
    """Copy the pack beside the target and rename it into place; replaces a link or copy of ours."""
    clear_leftovers(target)
    partial, old = sibling(target, "partial"), sibling(target, "old")
    partial.mkdir()
    try:
        marker = {"pack": PACK, "version": pack_version(), "source": str(ROOT), "digest": pack_digest(ROOT)}
        (partial / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
        for path in pack_files(ROOT):
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(str(ROOT / path), str(partial / path))
        if is_link(target):
            os.unlink(str(target))
        elif target.exists():
            os.rename(str(target), str(old))
        os.rename(str(partial), str(target))
    except BaseException:
        if old.exists() and not os.path.lexists(str(target)):
            os.rename(str(old), str(target))
        shutil.rmtree(str(partial), ignore_errors=True)
        raise
    if old.exists():
        discard_copy(old)


def make_link(target):
    """Link the target to this folder; False where the system does not let us."""
    try:
        os.symlink(str(ROOT), str(target), target_is_directory=True)
        return True
    except (OSError, NotImplementedError):
        pass
    if os.name == "nt":
        try:
            import _winapi  # a junction needs no special right, a symbolic link does

            _winapi.CreateJunction(str(ROOT), str(target))
            return True
        except (ImportError, AttributeError, OSError):
            pass
    return False


def host_target(kind, folder):
    """Check that a folder is the host it should be; returns where the pack goes in it."""
    host, folder = HOSTS[kind], Path(os.path.abspath(os.path.expanduser(str(folder))))
    if not folder.is_dir():
        raise InstallError(f"{folder}: no such folder; expected the folder of a {host['title']}.")
    missing = []
    for names in host["expects"]:
        if not any((folder / n).is_dir() if n.endswith("/") else (folder / n).is_file() for n in names):
            missing.append(" or ".join(names))
    if missing:
        raise InstallError("{} is not a {} folder: expected {} there.".format(folder, host["title"],
                                                                               ", ".join(missing)))
    return folder / host["folder"] / host["name"]


def refuse_foreign(target):
    """Raise unless the target is free, a link to this folder or a copy made by this installer."""
    if is_link(target):
        if not same_path(target, ROOT):
            raise InstallError(f"{target} is a link to another place ({os.readlink(str(target))}): left alone.")
    elif os.path.lexists(str(target)) and not (target.is_dir() and read_marker(target)):
        raise InstallError(f"{target} is there already and was not made by this installer: left alone.")


def add_to_host(kind, folder, copy=False):
    """Link or copy the pack into a host's folder; what is already right is left as it is."""
    target = host_target(kind, folder)
    title = HOSTS[kind]["title"]
    if inside(ROOT, target.parent):
        say(f"The pack already lies in {target.parent}: nothing to do.")
        return
    if inside(target.parent, ROOT):
        raise InstallError(f"{target.parent} lies inside the pack's own folder: put the pack elsewhere first.")
    refuse_foreign(target)
    clear_leftovers(target)
    restart = f"Restart {title} to load it."
    if is_link(target) and not copy:
        say(f"Already there: {target} is a link to {ROOT}.")
    elif is_link(target) or not os.path.lexists(str(target)):
        if not copy and make_link(target):
            say(f"Linked {target} to {ROOT}. {restart}")
        else:
            make_copy(target)
            say(f"Copied the pack to {target}. {restart}")
    else:
        noted, now = read_marker(target).get("digest"), pack_digest(ROOT)
        if pack_digest(target) != noted:
            raise InstallError(f"{target} is a copy that was changed since: run this with --remove to drop it "
                               "first.")
        if noted == now:
            say(f"Already there: {target} is an up-to-date copy.")
        else:
            make_copy(target)
            say(f"Brought the copy {target} up to date. {restart}")


def remove_from_host(kind, folder):
    """Undo add_to_host: takes away our link or our copy, never anything else."""
    target = host_target(kind, folder)
    if not os.path.lexists(str(target)):
        clear_leftovers(target)
        say(f"Nothing to remove: {target} is not there.")
        return
    if not is_link(target) and same_path(target, ROOT) and not read_marker(target):
        say(f"{target} is the pack itself, not a link or copy: delete the folder by hand if you mean to.")
        return
    refuse_foreign(target)
    clear_leftovers(target)
    if is_link(target):
        os.unlink(str(target))  # the link alone, never what it points to
        say(f"Removed the link {target}.")
    else:
        os.rename(str(target), str(sibling(target, "old")))
        discard_copy(sibling(target, "old"))
        say(f"Removed the copy {target}.")


# --- the command line -------------------------------------------------------


def build_parser():
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        prog="install.py",
        description="Set up the ER-SDE sampler pack. Without a command, as a host runs it, nothing is installed: "
                    "it reports which of the host's packages are there.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="make .venv beside this file with the pinned packages, and run the demo in it",
        usage="install.py demo [--] [ARGUMENTS]",
        description="Makes .venv beside this file (or brings it up to date), then runs `python -m ersde.demo`. All "
                    "arguments are passed on, such as --out DIR; `demo -- --help` shows the demo's own options.")
    test = commands.add_parser(
        "test", help="make .venv beside this file with the pinned packages, and run the test suite in it",
        usage="install.py test [--] [ARGUMENTS]",
        description="Makes .venv beside this file (or brings it up to date), then runs `python -m pytest` in the "
                    "pack's folder: the whole suite, or what the arguments select, such as -k NAME or "
                    "tests/test_install.py.")
    for sub in (demo, test):
        sub.add_argument("arguments", nargs="*", metavar="ARGUMENTS", help="passed on as they are")
    for kind, host in HOSTS.items():
        where = f"{host['folder']}/{host['name']}"
        sub = commands.add_parser(
            kind, help=f"put the pack into a {host['title']} folder, or take it out",
            description=f"Makes DIR/{where} a link to this folder, or a copy where links are not possible. Nothing "
                        "that this command did not make is overwritten or removed.")
        sub.add_argument("dir", metavar="DIR", help=f"the folder of the {host['title']}")
        what = sub.add_mutually_exclusive_group()
        what.add_argument("--copy", action="store_true", help="copy instead of linking")
        what.add_argument("--remove", action="store_true", help="remove the link or copy that this command made")
    return parser


def run(argv):
    """Carry out a command line with at least one argument; returns the exit code."""
    # Everything after demo or test is for the program they start, so argparse
    # sees it only to show help.
    if argv[0] in PIN_PYTHON and not {"-h", "--help"} & set(argv[1:2]):
        arguments = argv[1:]
        return run_in_venv(argv[0], arguments[1:] if arguments[:1] == ["--"] else arguments)
    options = build_parser().parse_args(argv)
    if options.remove:
        remove_from_host(options.command, options.dir)
    else:
        add_to_host(options.command, options.dir, options.copy)
    return 0


def main(argv=None):
    """Entry point; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if sys.version_info < MIN_PYTHON:
        sys.stderr.write("install.py: the ER-SDE sampler pack needs Python {}.{} or newer; this is {}.{}.\n".format(
            *MIN_PYTHON, *sys.version_info[:2]))
        return 2 if argv else 0
    if not argv:
        try:
            host_report()
        except Exception as error:  # a report must never stop a host from starting
            say(f"ER-SDE sampler pack: could not look at the host's packages ({error}).")
        return 0
    try:
        return run(argv)
    except InstallError as error:
        sys.stderr.write(f"install.py: {error}\n")
        return error.code
    except OSError as error:
        sys.stderr.write(f"install.py: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("install.py: stopped; the same command goes on from here.\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
