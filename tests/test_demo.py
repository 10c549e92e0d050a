"""The demo: its model and fine solution against independent ones, and what it writes."""
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

import problems  # noqa: E402

from ersde.demo import __main__ as demo  # noqa: E402
from ersde.demo import figures, mixture, pictures, trained  # noqa: E402
from ersde.demo.network import CLASSES, load_model  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


class Page(HTMLParser):
    """Every link, image and id of a page, and whether its tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.links, self.ids, self.images, self.open = [], [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if "id" in attrs:
            self.ids.add(attrs["id"])
        if tag == "img":
            self.images.append(attrs)
        self.links += [attrs[name] for name in ("src", "href") if name in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# --- the model ----------------------------------------------------------------


@pytest.mark.parametrize("process", ["ve", "flow"])
@pytest.mark.parametrize("guidance", [None, 4.0])
def test_the_denoiser_is_that_of_the_tests_mixture(process, guidance):
    ours, theirs = mixture.digits(process, guidance=guidance), problems.digits(process, guidance=guidance)
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for sigma in (1.0, 0.7, 0.2, 0.01) + ((14.6,) if process == "ve" else ()):
        at = torch.full((5,), sigma, dtype=torch.float64)
        scale = sigma if process == "ve" else 1.0
        assert torch.allclose(ours(scale * x, at), theirs(scale * x, at), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", ["ve", "flow"])
def test_the_fine_solution_agrees_with_another_integrator(process):
    model = mixture.digits(process)
    high = figures.high(process)
    x = high * torch.randn(2, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    early, late = mixture.fine_solution(model, x, high, [0.3, 0.05], 48)
    assert problems.rms(late, mixture.fine_solution(model, x, high, [0.05], 96)[0]) < 1e-6
    for low, ours in ((0.3, early), (0.05, late)):
        theirs = problems.flow_exact(model, x, torch.tensor([high, low, 0.0], dtype=torch.float64), 600)
        assert problems.rms(ours, theirs) < 1e-5


def test_schedules():
    for steps in (1, 2, 7):
        for sigmas in (mixture.karras(steps), mixture.flow_schedule(steps)):
            assert sigmas.shape == (steps + 1,) and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    assert mixture.flow_schedule(7)[0] == 1
    assert mixture.flow_schedule(7, low=0.01)[-2].item() == pytest.approx(0.01)


def test_exact_samples_lie_one_spread_from_a_picture():
    model = mixture.digits()
    sample = model.data(200, torch.Generator().manual_seed(2))
    assert 0.08 < model.nearest(sample).median().item() <= 0.11
    assert model.nearest(model.means[:3].clone()).max().item() < 1e-5


# --- the pictures -------------------------------------------------------------


def test_ink_is_dark_and_paper_is_light():
    dark, light = (pictures.enlarge(torch.full((8, 8), value), 4) for value in (1.0, -1.0))
    assert dark.size == (32, 32) and dark.getextrema() == (0, 0) and light.getextrema() == (255, 255)
    beyond = pictures.enlarge(torch.full((8, 8), 9.0), 2)
    assert beyond.getextrema() == (0, 0)


def test_a_seed_starts_alike_in_every_figure():
    few, many = figures.start_noise(4, "ve"), figures.start_noise(64, "ve")
    assert torch.equal(few, many[:4])
    assert torch.allclose(few / mixture.SIGMA_MAX, figures.start_noise(4, "flow"))


def test_a_picture_in_colour_keeps_its_colours():
    picture = torch.tensor([1.0, -1.0, 0.0]).reshape(3, 1, 1).expand(3, 4, 4)
    assert pictures.enlarge(picture, 3).size == (12, 12)
    assert pictures.enlarge(picture, 3).getpixel((5, 5)) == (255, 0, 128)
    assert pictures.enlarge(9 * picture, 3).getpixel((5, 5))[:2] == (255, 0)
    row = pictures.cell(torch.stack([picture, -picture]), 2, 3)
    assert row.mode == "RGB" and row.getpixel((1, 1)) == (255, 0, 128) and row.getpixel((20, 1)) == (0, 255, 128)


# --- the trained network ------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    return {process: load_model(process) for process in ("ve", "flow")}


@pytest.mark.parametrize("process", ["ve", "flow"])
@pytest.mark.parametrize("sampler", ["sde_5", "texture", "comfyui", "euler", "dpmpp_2m_sde"])
def test_a_picture_depends_on_its_seed_alone(models, process, sampler):
    if sampler not in trained.samplers(process):
        return
    if sampler in trained.PEERS and trained.k_diffusion() is None:
        pytest.skip("no k-diffusion")
    model, labels = models[process], trained.labels_of(3)
    batch = trained.sample(model, sampler, 4, [7, 8, 9], labels)
    alone = trained.sample(model, sampler, 4, [8], labels[1:2])
    assert batch.shape == (3, 3, 32, 32) and torch.isfinite(batch).all()
    assert torch.allclose(batch[1:2], alone, atol=2e-3)
    assert (batch[0] - batch[1]).abs().max() > 0.1


@pytest.mark.parametrize("process", ["ve", "flow"])
def test_the_pictures_are_those_of_the_library(models, process):
    """The same run, written out with the public functions."""
    import ersde
    from ersde.demo.network import guided

    x, sigmas = trained.start([5], process), trained.schedule(process, 5)
    model = guided(models[process], "flag", 2.0)
    expected = ersde.sample_preset(model, x, sigmas, "few_steps", {"seed": [5]}, disable=True, process=process,
                                   excess=model.excess)
    assert torch.equal(trained.sample(models[process], "few_steps", 5, [5], ["flag"], cfg=2.0), expected)


def test_peers_are_k_diffusion_s_and_converge_to_our_ode(models):
    if trained.k_diffusion() is None:
        pytest.skip("no k-diffusion")
    make = lambda name, steps: trained.sample(models["ve"], name, steps, [1, 2], ["flag", "face"], cfg=1.0)
    ours, theirs = make("ode", 40), make("dpmpp_2m", 40)
    assert (ours - theirs).square().mean().sqrt() < 0.05
    few = make("dpmpp_2m", 4)
    assert (few - theirs).square().mean().sqrt() > 0.05


def test_a_sampler_that_is_wrong_for_flow_is_refused(models):
    with pytest.raises(ValueError, match="sampler must be one of"):
        trained.sample(models["flow"], "euler_ancestral", 4, [1], ["flag"])


def test_labels_go_in_turn():
    assert trained.labels_of(12)[9:] == [CLASSES[9], CLASSES[0], CLASSES[1]]
    assert trained.labels_of(2, "flag") == ["flag", "flag"]


def test_without_k_diffusion_the_page_says_so(monkeypatch):
    monkeypatch.setattr(trained, "k_diffusion", lambda: None)
    work = figures.Trained(figures.QUICK)
    assert work.rows(["ode", "euler"]) == ["ode"]
    shown, _ = work.grid("peers")
    assert "k-diffusion is not installed" in shown.settings


# --- the sentences ------------------------------------------------------------


def test_losses_are_told():
    errors = {"exact, order 3, corrector": [0.5, 0.3, 0.01], "comfyui, order 3": [0.5, 0.2, 0.1]}
    text = " ".join(figures.compare((4, 8, 16), errors))
    assert "gains most on comfyui's formulas at 16 steps: 0.01 against 0.1" in text
    assert "worse than comfyui's formulas at 8 (0.3 against 0.2) steps" in text
    errors["exact, order 3, corrector"][1] = 0.1
    assert "At none of the 3" in " ".join(figures.compare((4, 8, 16), errors))


# --- the whole ----------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One quick run as a user starts it, into a folder that holds a file of the user's."""
    out = tmp_path_factory.mktemp("demo") / "a folder"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    done = subprocess.run([sys.executable, "-m", "ersde.demo", "--quick", "--out", str(out)], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_last_line_names_the_page(run):
    out, done = run
    assert done.stdout.strip().splitlines()[-1] == f"Open {(out / 'index.html').resolve()}"


def test_progress_names_its_parts(run):
    for part in ("samplers, peers", "eta and s_noise", "error, flow", "100%"):
        assert part in run[1].stderr


def test_every_link_leads_somewhere(run):
    out, _ = run
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert len(page.images) == 12
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert "/" not in link and ":" not in link and (out / link).is_file()


def test_pictures_have_their_size_and_alt_text(run):
    out, _ = run
    for attrs in Page((out / "index.html").read_text(encoding="utf-8")).images:
        with Image.open(out / attrs["src"]) as image:
            image.load()
            assert image.size == (int(attrs["width"]), int(attrs["height"]))
            assert image.convert("L").getextrema()[0] < 60          # something is drawn
        assert len(attrs["alt"]) > 40


def test_the_page_says_what_it_owes(run):
    text = (run[0] / "index.html").read_text(encoding="utf-8")
    for words in ("1797", "UCI", "CC&nbsp;BY&nbsp;4.0", "Noto Color Emoji", "Apache License 2.0", "k-diffusion",
                  torch.__version__, "--quick", "seeds", "median"):
        assert words in text
    for words in ("<script", "http://", "https://", "nan", "None"):
        assert words not in text


def test_other_files_stay(run):
    assert (run[0] / "mine.txt").read_text() == "kept"
    assert len(list(run[0].iterdir())) == 14


# --- what can go wrong --------------------------------------------------------


@pytest.mark.parametrize("below", [False, True])
def test_a_file_as_folder_is_one_clear_line(tmp_path, capsys, below):
    file = tmp_path / "file"
    file.write_text("mine")
    assert demo.main(["--out", str(file / "deeper" if below else file)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--out" in err and str(file) in err
    assert file.read_text() == "mine"


def test_an_impossible_folder_is_one_clear_line(tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / ("x" * 4000))]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["sklearn", "tqdm"])
def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert demo.main(["--out", str(tmp_path), "--quick"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and name in err and "install.py demo" in err


def test_an_unknown_argument_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        demo.main(["--fast"])
    assert end.value.code == 2
    assert "--fast" in capsys.readouterr().err


def test_the_planned_number_of_model_calls_is_the_real_one():
    """The progress bar ends at 100 %."""
    size = figures.Size((4,), (1.0,), (1.0,), (2.0,), (2, 2), 2, (4, 5), (4,), 4)
    done = []
    for what, calls, make in figures.Trained(size, done.append).parts() + figures.Work(size, done.append).parts():
        done.clear()
        make()
        assert sum(done) == calls, what
