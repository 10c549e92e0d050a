"""The benchmark of the members with noise on the trained network: its figures, a run that goes on, what it shows."""
import json

import pytest
import torch

from benchmarks import evaluate, network_members, quality
from benchmarks.network_members import FINE, cells, compared, main, measure, methods


def test_the_runs_are_of_one_law():
    made = methods("sde_4")
    assert {quality.law_of(method.preset) for method in made.values()} == {"sde_4 eta 1 s_noise 1 0 to 1"}
    assert [(m.preset.method, m.preset.order, m.preset.corrector) for m in made.values()] == [
        ("exact", 3, True), ("comfyui", 3, False), ("paper", 2, False)]
    assert [cell.calls for cell in cells(["ve"], [1.0], [6, 8], ["sde_4"])] == [FINE, 6, 6, 8, 8]


def test_the_figures_are_paired():
    fine = torch.randn(200, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near, far = fine + 0.1, fine + 0.3
    found = measure(near, far, fine)
    assert found["ours"] == pytest.approx(128 * 0.01, rel=1e-6) and found["ratio"] == pytest.approx(1 / 9, rel=1e-6)
    low, high = found["interval"]
    assert low <= found["ratio"] <= high and high - low < 0.5
    assert measure(far, far, fine)["interval"] == pytest.approx((1.0, 1.0))


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(network_members, "FINE", 5)
    options = ["--process", "flow", "--guidance", "1", "--count", "16", "--out", str(tmp_path), "--calls"]
    main([*options, "2"])
    file = tmp_path / "network_members" / "evaluate_rank0.jsonl"
    first = file.read_text()
    main([*options, "2", "3"])
    text = (tmp_path / "network_members.md").read_text()
    assert file.read_text().startswith(first) and text in capsys.readouterr().out
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 5
    assert "--calls 2 3 --guidance 1 --process flow --count 16\n" in text and text.count("| flow | 1 | sde_5 |") == 2


def test_at_high_guidance_the_default_is_not_further_from_its_law_than_comfyui():
    """Bending long steps although D does not change where it had changed to had made it 1.4 times as far."""
    plan = cells(["ve"], [7.5], [10], ["sde_5"])
    blocks = evaluate.blocks(64, 64)
    held = {evaluate.key_of(cell, seeds): evaluate.block_row(cell, seeds) for cell in plan for seeds in blocks}
    [(_, _, found)] = compared(plan, blocks, held)
    assert found["ratio"] < 1.0
