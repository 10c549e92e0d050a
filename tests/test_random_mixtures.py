"""The benchmark on random mixtures: the same mixture for a seed, cells of both processes, a run that goes on."""
import json

import pytest
import torch

from benchmarks import random_mixtures
from benchmarks.random_mixtures import Spectral, drawn, main, mixture, table
from tests.problems import Mixture


def test_a_seed_is_a_mixture():
    first, again, other = drawn(3), drawn(3), drawn(4)
    assert torch.equal(first["means"], again["means"]) and torch.equal(first["std"], again["std"])
    assert first["means"].shape != other["means"].shape or not torch.equal(first["means"], other["means"])
    for seed in range(40):
        parts = drawn(seed)
        assert (parts["label"] is None) == (parts["guidance"] is None)
        assert parts["label"] is None or 0 < parts["label"].sum() < len(parts["means"])


def test_the_table_counts_what_is_worse_with_its_whole_interval():
    cell = {"process": "ve", "schedule": "karras", "steps": 5, "guidance": 1.0, "dim": 2, "parts": 3, "comfyui": 0.1}
    rows = [{**cell, "ratio": 0.5, "low": 0.4, "high": 0.6}, {**cell, "ratio": 2.0, "low": 1.5, "high": 2.5},
            {**cell, "ratio": 1.1, "low": 1.0, "high": 1.2}] + [
            {**cell, "steps": steps, "ratio": 1.0, "low": 1.0, "high": 1.0} for steps in random_mixtures.STEPS[1:]]
    lines = table(rows, 1).splitlines()
    assert "| 5 | 1.03 | 33.3% | 1 of 3 | 2.00 |" in lines
    assert [line for line in lines if "(1.50 to 2.50)" in line] == [
        "| ve / karras / 5 | 1 | 2 | 3 | 0.1 | 2.00 (1.50 to 2.50) |"]
    assert not any("(1.00 to 1.20)" in line for line in lines)


def test_only_guided_mixtures_of_a_dimension(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(random_mixtures, "POINTS", 4)
    monkeypatch.setattr(random_mixtures, "EXACT_STEPS", 40)
    monkeypatch.setattr(random_mixtures, "STEPS", (5,))
    main(["--count", "2", "--seed", "20", "--guided", "2", "--out", str(tmp_path)])
    capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "random_mixtures.jsonl").read_text().splitlines()]
    assert all(cell["dim"] == 2 and cell["guidance"] > 1 for row in rows for cell in row["cells"])
    taken = [int(row["key"].split()[0]) for row in rows]
    assert taken == [s for s in range(20, taken[-1] + 1) if drawn(s)["guidance"] and drawn(s)["means"].shape[1] == 2]
    assert not (tmp_path / "random_mixtures.md").exists()       # the table of all
    text = (tmp_path / "random_mixtures_guided_2.md").read_text()
    assert text.startswith("    python -m benchmarks.random_mixtures --count 2 --seed 20 --guided 2\n")


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(random_mixtures, "POINTS", 4)
    monkeypatch.setattr(random_mixtures, "EXACT_STEPS", 40)
    monkeypatch.setattr(random_mixtures, "STEPS", (5, 8))
    main(["--count", "1", "--out", str(tmp_path)])
    first = capsys.readouterr().out
    file = tmp_path / "random_mixtures.jsonl"
    file.write_text(file.read_text() + '{"key": "cut')
    asked = []
    measure = random_mixtures.measure
    monkeypatch.setattr(random_mixtures, "measure", lambda seed, *how: asked.append(seed) or measure(seed, *how))
    main(["--count", "2", "--out", str(tmp_path)])
    assert asked == [2]
    assert first != capsys.readouterr().out
    good = [json.loads(line) for line in file.read_text().splitlines() if "cut" not in line]
    assert [len(row["cells"]) for row in good] == [6, 6]
    assert "2 random mixtures, 12 cells" in (tmp_path / "random_mixtures.md").read_text()


def test_told_the_default_knows_what_guidance_adds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(random_mixtures, "POINTS", 4)
    monkeypatch.setattr(random_mixtures, "EXACT_STEPS", 40)
    monkeypatch.setattr(random_mixtures, "STEPS", (6,))
    assert [drawn(seed)["guidance"] is None for seed in (3, 4)] == [True, False]
    asked = ["--count", "2", "--seed", "3", "--out", str(tmp_path)]
    for more in ([], ["--told"]):
        main([*asked, *more])
    capsys.readouterr()
    first, plain, told = (json.loads(line)["cells"] for line in (tmp_path / "random_mixtures.jsonl").read_text().splitlines())
    assert {cell["guidance"] for cell in first} == {1.0} and all(cell["guidance"] > 1 for cell in told)
    assert len(told) == len(plain) == 3
    for one, other in zip(plain, told):         # the same peer, another default
        assert one["comfyui"] == other["comfyui"] and one["ratio"] != other["ratio"]
    text = (tmp_path / "random_mixtures_3_told.md").read_text()
    assert text.startswith("    python -m benchmarks.random_mixtures --count 2 --seed 3 --told\n")
    assert "1 random mixtures, 3 cells" in text and "told what guidance adds" in text
    assert "told" not in (tmp_path / "random_mixtures_3.md").read_text()


def test_told_of_nothing_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["--count", "1", "--seed", "3", "--told"])
    assert "--told: none of these mixtures has guidance" in capsys.readouterr().err


@pytest.mark.parametrize("process", ("ve", "flow"))
@pytest.mark.parametrize("guidance", (None, 4.0))
def test_equal_deviations_are_a_plain_mixture(process, guidance):
    """In whatever basis."""
    parts = drawn(4)
    std, label = parts["std"], parts["label"] if guidance else None
    generator = torch.Generator().manual_seed(1)
    dim = parts["means"].shape[1]
    basis = torch.linalg.qr(torch.randn(len(std), dim, dim, generator=generator, dtype=torch.float64))[0]
    plain = Mixture(parts["means"], std, None, process, guidance, label)
    spectral = Spectral(parts["means"], std[:, None].expand(-1, dim), None, process, guidance, label, basis=basis)
    x = torch.randn(5, dim, generator=generator, dtype=torch.float64)
    for sigma in (0.01, 0.3, 1.0):
        at = torch.full((5,), sigma, dtype=torch.float64)
        torch.testing.assert_close(spectral(x, at), plain(x, at), rtol=1e-9, atol=1e-9)


def test_a_part_is_denoised_by_its_covariance():
    """E[x_0 | x] of one part is m + C (C + sigma^2)^-1 (x - m), and its data have that mean and covariance."""
    parts = next(one for one in map(lambda seed: drawn(seed, True), range(40)) if len(one["means"]) == 1)
    model = Spectral(parts["means"], parts["std"], basis=parts["basis"])
    basis, mean = parts["basis"][0], parts["means"][0]
    torch.testing.assert_close(basis.T @ basis, torch.eye(model.dim, dtype=torch.float64), rtol=0, atol=1e-12)
    covariance = basis @ parts["std"][0].square().diag() @ basis.T
    x = torch.randn(3, model.dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = model(x, torch.full((3,), 0.4, dtype=torch.float64))
    wide = covariance + 0.16 * torch.eye(model.dim, dtype=torch.float64)
    wanted = mean + torch.linalg.solve(wide, (x - mean).T).T @ covariance
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    data = model.data(200000, torch.Generator().manual_seed(3))
    torch.testing.assert_close(data.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(data.T.cov(), covariance, rtol=0, atol=0.02)


def test_spectra_fall_by_a_power():
    found = [drawn(seed, True) for seed in range(30)]
    for parts in found:
        std, dim = parts["std"], parts["means"].shape[1]
        assert (std[:, :-1] >= std[:, 1:]).all() and (std >= 0.003).all() and parts["basis"].shape == (len(std), dim, dim)
        assert (parts["label"] is None) == (parts["guidance"] is None)
    assert {one["means"].shape[1] for one in found} == {8, 32, 48}
    shared = [torch.equal(one["basis"][0], one["basis"][-1]) for one in found if len(one["means"]) > 1]
    assert 0 < sum(shared) < len(shared)
    guided = next(seed for seed in range(30) if found[seed]["guidance"])
    model, source = mixture(guided, "flow", True)
    assert source.guidance is None and source.process == model.process == "flow"
    label = found[guided]["label"]
    for name in ("means", "std", "basis"):
        torch.testing.assert_close(getattr(source, name), found[guided][name][label], rtol=0, atol=0)


def test_spectra_have_a_table_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(random_mixtures, "POINTS", 4)
    for name in ("EXACT_STEPS", "SPECTRA_STEPS"):
        monkeypatch.setattr(random_mixtures, name, 40)
    monkeypatch.setattr(random_mixtures, "STEPS", (5,))
    for more in ([], ["--spectra"]):
        main(["--count", "1", "--out", str(tmp_path), *more])
    capsys.readouterr()
    plain, spectra = (json.loads(line)["cells"] for line in (tmp_path / "random_mixtures.jsonl").read_text().splitlines())
    assert plain != spectra and {cell["dim"] for cell in spectra} == {drawn(1, True)["means"].shape[1]}
    text = (tmp_path / "random_mixtures_spectra.md").read_text()
    assert text.startswith("    python -m benchmarks.random_mixtures --count 1 --spectra\n\n1 random mixtures of parts with "
                           "spectra, 3 cells")
    assert "spectra" not in (tmp_path / "random_mixtures.md").read_text()
    with pytest.raises(SystemExit):
        main(["--spectra", "--guided", "2"])
    assert "--spectra: " in capsys.readouterr().err
