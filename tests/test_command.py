"""The command line `python -m ersde`: what it draws, and one clear line for whatever is wrong."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

import torch  # noqa: E402

from ersde.demo import command, pictures, trained  # noqa: E402
from ersde.demo.network import Denoiser, Network, load_model, save_model  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_presets(tmp_path, monkeypatch):
    """A person's presets in a file of the test's own."""
    path = tmp_path / "presets.json"
    path.write_text(json.dumps({"my look": {"noise_scale": "sde", "eta": 0.3}}))
    monkeypatch.setenv("ERSDE_PRESETS", str(path))


def run(capsys, *arguments):
    """Exit code, standard output, and the lines of the error output that are no progress bar."""
    try:
        code = command.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line and "call/s" not in line and "?call" not in line]


def about(path):
    with Image.open(path) as image:
        image.load()
        return json.loads(image.text["ersde"]), image.convert("RGB")


def test_sample_draws_the_library_s_pictures_and_says_how(tmp_path, capsys):
    out = tmp_path / "a.png"
    code, said, wrong = run(capsys, "sample", "--preset", "sde", "--eta", 0.5, "--steps", 4, "--batch", 2, "--seed", 9,
                            "--cfg", 2, "--label", "flag", "--out", out)
    assert (code, said.strip(), wrong) == (0, str(out), [])
    settings, image = about(out)
    assert settings["samplers"][0]["eta"] == 0.5 and settings["samplers"][0]["noise_scale"] == "sde"
    assert (settings["seed"], settings["labels"], settings["cfg"]) == (9, ["flag", "flag"], 2.0)
    import ersde
    expected = trained.sample(load_model("ve"), ersde.PRESETS["sde"].replace(eta=0.5), 4, [9, 10], ["flag"] * 2, cfg=2.0)
    assert image.tobytes() == pictures.cell(expected, 2, 4).convert("RGB").tobytes()
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == ["a.png"]


def test_the_same_command_makes_the_same_file_and_another_seed_another(tmp_path, capsys):
    made = []
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        assert run(capsys, "sample", "--steps", 3, "--batch", 1, "--seed", seed, "--out", tmp_path / name)[0] == 0
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1] != made[2]


def test_compare_has_a_row_for_each_preset_and_a_column_for_each_number_of_steps(tmp_path, capsys):
    sizes = []
    for presets, steps in ((["sde_5"], [2]), (["sde_5", "my look"], [2]), (["sde_5"], [2, 3])):
        out = tmp_path / "c.png"
        assert run(capsys, "compare", "--preset", *presets, "--steps", *steps, "--batch", 1, "--out", out)[0] == 0
        settings, image = about(out)
        assert [one["name"] for one in settings["samplers"]] == presets and settings["steps"] == steps
        sizes.append(image.size)
    assert sizes[1][1] > sizes[0][1] and sizes[2][0] > sizes[0][0]


def test_compare_takes_k_diffusion_s_samplers(tmp_path, capsys):
    if trained.k_diffusion() is None:
        pytest.skip("no k-diffusion")
    out = tmp_path / "c.png"
    assert run(capsys, "compare", "--preset", "ode", "dpmpp_2m_sde", "--steps", 2, "--batch", 1, "--out", out)[0] == 0
    assert about(out)[0]["samplers"][1] == "dpmpp_2m_sde"


@pytest.mark.parametrize("preset, model", [("flat", "ve"), ("comfyui", "flow"), ("my look", "flow")])
def test_plot(tmp_path, capsys, preset, model):
    out = tmp_path / "p.png"
    assert run(capsys, "plot", "--preset", preset, "--model", model, "--steps", 6, "--out", out)[0] == 0
    settings, image = about(out)
    assert settings["process"] == model and image.size[0] > 1000


def test_a_file_of_one_s_own(tmp_path, capsys):
    torch.manual_seed(0)
    save_model(Denoiser("flow", Network((16, 32, 32))), tmp_path / "mine.safetensors")
    out = tmp_path / "a.png"
    assert run(capsys, "sample", "--model", tmp_path / "mine.safetensors", "--steps", 2, "--batch", 1, "--out", out)[0] == 0
    assert about(out)[0]["process"] == "flow"


@pytest.mark.parametrize("arguments, words", [
    ([], "required"), (["draw"], "invalid choice"), (["sample", "--preset", "sde5"], "did you mean 'sde_5'"),
    (["sample", "--preset", "euler"], "--preset must be one of"), (["sample", "--eta", "much"], "--eta: must be a finite"),
    (["sample", "--eta", "-1"], "eta must be"), (["sample", "--eta", "nan"], "finite"),
    (["sample", "--cfg", "inf"], "finite"),
    (["sample", "--order", "9"], "--order: must be between 1 and 5"), (["sample", "--steps", "0"], "--steps: must be"),
    (["sample", "--steps", "2", "3"], "unrecognized arguments: 3"), (["sample", "--batch", "0"], "--batch"),
    (["sample", "--seed", "1.5"], "--seed"), (["sample", "--label", "cat"], "label must be one of"),
    (["sample", "--noise-scale", "sde_9"], "noise_scale must be one of"), (["sample", "--model", "sdxl"], "no file sdxl"),
    (["compare", "--preset", "sde_5", "comfyui", "--order", "4"], "--preset comfyui: order"),
    (["compare", "--model", "flow", "--preset", "euler_ancestral"], "--preset must be one of"),
    (["plot", "--cfg", "3"], "unrecognized"), (["sample", "--out", "a.jpg"], "must be a .png file"),
    (["sample", "--out", "nowhere/a.png"], "no folder nowhere")])
def test_what_is_wrong_is_one_line_and_code_2_and_nothing_is_written(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, wrong = run(capsys, *arguments)
    assert code == 2 and out == "" and len(wrong) == 1 and words in wrong[0], wrong
    assert wrong[0].startswith("python -m ersde")
    assert [path.name for path in tmp_path.iterdir()] == ["presets.json"]


def test_a_file_that_is_no_model_is_named(tmp_path, capsys):
    (tmp_path / "lora.safetensors").write_bytes(b"\x00" * 64)
    code, _, wrong = run(capsys, "sample", "--model", tmp_path / "lora.safetensors", "--out", tmp_path / "a.png")
    assert code == 2 and len(wrong) == 1 and "lora.safetensors" in wrong[0]


def test_a_picture_that_is_there_stays_until_the_new_one_is_whole(tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.png"
    out.write_bytes(b"mine")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    code, _, wrong = run(capsys, "sample", "--steps", 1, "--batch", 1, "--out", out)
    assert code == 2 and "No space left" in wrong[0] and out.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "presets.json"]


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    code, _, wrong = run(capsys, "sample", "--out", tmp_path / "a.png")
    assert code == 2 and len(wrong) == 1 and "tqdm" in wrong[0] and "install.py demo" in wrong[0]


def test_as_a_person_starts_it(tmp_path):
    done = subprocess.run([sys.executable, "-m", "ersde", "sample", "--steps", "2", "--batch", "1", "--out",
                           str(tmp_path / "a.png")], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "a.png")
