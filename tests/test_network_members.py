"""The benchmark of the members with noise on the trained network: its figures, a run that goes on, what it shows."""
import json

import pytest
import torch

from benchmarks import evaluate, network_members, quality
from benchmarks.network_members import FINE, cells, compared, kernel_distance, main, measure, methods


def test_the_runs_are_of_one_law():
    made = methods("sde_4")
    assert {quality.law_of(method.preset) for method in made.values()} == {"sde_4 eta 1 s_noise 1 0 to 1"}
    assert [(m.preset.method, m.preset.order, m.preset.corrector) for m in made.values()] == [
        ("exact", 3, True), ("comfyui", 3, False), ("paper", 2, False)]
    assert [cell.calls for cell in cells(["ve"], [1.0], [6, 8], ["sde_4"])] == [FINE, 6, 6, 8, 8]
    assert [cell.calls for cell in cells(["ve"], [1.0], [6], ["sde_4"], 20)] == [20, 6, 6]


def test_the_figures_are_paired():
    fine = torch.randn(200, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near, far = fine + 0.1, fine + 0.3
    found = measure(near, far, fine)
    assert found["ours"] == pytest.approx(128 * 0.01, rel=1e-6) and found["ratio"] == pytest.approx(1 / 9, rel=1e-6)
    low, high = found["interval"]
    assert low <= found["ratio"] <= high and high - low < 0.5
    assert measure(far, far, fine)["interval"] == pytest.approx((1.0, 1.0))


def test_the_kernel_decides():
    fine = torch.randn(200, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near, far = fine + 0.1, fine + 0.3
    found, back = measure(near, far, fine), measure(far, near, fine)
    assert found["kernel"] == pytest.approx(back["kernel"][::-1]) and 0 < 4 * found["kernel"][0] < found["kernel"][1]
    difference, (low, high) = found["difference"]
    assert difference == pytest.approx(found["kernel"][0] - found["kernel"][1]) and low <= difference <= high < 0
    assert back["difference"][1][0] > 0 and found["over"][1][1] < 0 < back["over"][1][0]
    over = measure(far, far, fine)["over"]         # of itself it is 5 % too near
    assert over[0] == pytest.approx(-0.05 * found["kernel"][1]) and over[1][1] < 0


def test_the_kernel_distance_of_one_law_is_0_in_the_mean_where_the_frechet_distance_is_not():
    """Pictures of the same seeds that share half of their variance: of one law, but not the same."""
    generator, one = torch.Generator().manual_seed(1), torch.ones(1, 60, dtype=torch.float64)
    normal = lambda: torch.randn(60, 128, generator=generator, dtype=torch.float64)
    kernels, frechets = [], []
    for _ in range(60):
        common = normal()
        x, fine = ((common + normal()) * 0.5 ** 0.5 for _ in range(2))
        kernels.append(kernel_distance(x, fine, one).item())
        frechets.append(quality.frechet(x, network_members.Law.of(fine)).item())
    kernels = torch.tensor(kernels)
    assert abs(kernels.mean()) < 3 * kernels.std() / 60 ** 0.5 and min(frechets) > 10
    other = torch.stack([kernel_distance(normal() + 0.3, normal(), one)[0] for _ in range(20)])
    assert other.mean() > 10 * kernels.std() / 60 ** 0.5


def test_a_seeds_own_pictures_are_no_pair_however_often_it_is_in_a_resample():
    generator = torch.Generator().manual_seed(2)
    x, fine = (torch.randn(30, 128, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.ones(2, 30, dtype=torch.float64)
    weights[1, 4], weights[1, 14] = 2, 0                # the same class
    k = lambda a, b: (float(a @ b) / 128 + 1) ** 3
    for given, found in zip(weights, kernel_distance(x, fine, weights)):
        expected = 0.0
        for one in range(10):
            for other in range(10):
                pairs = [(i, j) for i in range(one, 30, 10) for j in range(other, 30, 10) if i != j]
                norm = sum(float(given[i] * given[j]) for i, j in pairs)
                expected += sum(float(given[i] * given[j]) * (
                    k(x[i], x[j]) + k(fine[i], fine[j]) - k(x[i], fine[j]) - k(x[j], fine[i])) for i, j in pairs) / norm
        assert found.item() == pytest.approx(10 * expected, rel=1e-9)       # 1000 / 100 pairs of classes


def test_a_run_goes_on_where_it_stopped(tmp_path, capsys):
    options = ["--process", "flow", "--guidance", "1", "--count", "32", "--fine", "5", "--out", str(tmp_path), "--calls"]
    main([*options, "2"])
    file = tmp_path / "network_members" / "evaluate_rank0.jsonl"
    first = file.read_text()
    main([*options, "2", "3"])
    text = (tmp_path / "network_members.md").read_text()
    assert file.read_text().startswith(first) and text in capsys.readouterr().out
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 5
    assert "--calls 2 3 --guidance 1 --process flow --count 32 --fine 5\n" in text
    assert text.count("| flow | 1 | sde_5 |") == 2 and "to 5 steps" in text


def test_at_high_guidance_the_default_is_not_further_from_its_law_than_comfyui():
    """Bending long steps although D does not change where it had changed to had made it 1.4 times as far."""
    plan = cells(["ve"], [7.5], [10], ["sde_5"], 60)
    blocks = evaluate.blocks(64, 64)
    held = {evaluate.key_of(cell, seeds): evaluate.block_row(cell, seeds) for cell in plan for seeds in blocks}
    [(_, _, found)] = compared(plan, blocks, held)
    assert found["ratio"] < 1.0
