"""The evaluation of the trained network's pictures: its noise, its metrics on known answers, its processes and files."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("k_diffusion")

from benchmarks import evaluate, quality  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FEW = ["--calls", "3", "4", "--guidance", "1", "4", "--process", "ve", "--filter", "^ours sde_5$|euler_ancestral$"]


@pytest.fixture(scope="module")
def reference():
    return evaluate.load_reference()


def cell(name, process="ve", guidance=1.0, calls=5):
    found, = evaluate.plan([process], [guidance], [calls], f"^{name}$")
    return found


# --- the noise ----------------------------------------------------------------


def path_of(name, process="ve", count=40000, seeds=range(2)):
    one = cell(name, process)
    x = torch.zeros(len(seeds), count, dtype=torch.float64)
    return evaluate.SeedNoise(x, seeds, one.clock, one.nodes()), one


@pytest.mark.parametrize("name, process", [("ours sde_5", "ve"), ("ours sde", "flow"), ("k-diffusion dpmpp_sde", "ve")])
def test_noise_is_a_brownian_path_in_the_member_s_clock(name, process):
    noise, one = path_of(name, process)
    sigmas = [3.0, 1.1, 0.4] if process == "ve" else [1.0, 0.7, 0.3]
    half, whole = noise(sigmas[0], sigmas[1]), noise(sigmas[0], sigmas[2])
    after = noise(sigmas[1], sigmas[2])
    times = [one.clock(sigma) for sigma in sigmas]
    assert half.std() == pytest.approx(1, abs=0.01) and whole.std() == pytest.approx(1, abs=0.01)
    assert (half * after).mean() == pytest.approx(0, abs=0.02)
    assert (half * whole).mean() == pytest.approx(((times[1] - times[0]) / (times[2] - times[0])) ** 0.5, abs=0.02)


def test_more_calls_follow_the_same_path():
    one, _ = path_of("ours sde_5")
    other, _ = path_of("ours sde_5")
    whole = one(80.0, 0.5)
    for low in (20.0, 4.0, 0.9):            # this run asks for more points first
        other.at(low)
    # Points of its own between two nodes are another draw there: the nodes are what they share.
    assert (whole * other(80.0, 0.5)).mean() > 0.95
    nodes = cell("ours sde_5").nodes()
    assert torch.equal(one(nodes[0], nodes[5]), other(nodes[0], nodes[5]))


def test_a_seed_s_noise_does_not_depend_on_the_other_seeds():
    both, _ = path_of("ours sde_5", count=64, seeds=range(3, 5))
    alone, _ = path_of("ours sde_5", count=64, seeds=range(4, 5))
    assert torch.equal(both(9.0, 1.0)[1:], alone(9.0, 1.0))
    assert (both(9.0, 1.0)[0] - both(9.0, 1.0)[1]).abs().max() > 0.1


def test_a_picture_depends_on_its_seed_alone():
    one = cell("ours sde_5", guidance=4.0)
    whole, part = one.pictures(range(2, 5)), one.pictures(range(3, 4))
    assert torch.allclose(whole[1:2], part, atol=2e-3)          # to what a matrix product rounds in another batch
    assert (whole[0] - whole[1]).abs().max() > 0.1


@pytest.mark.parametrize("process", ["ve", "flow"])
def test_every_sampler_shown_makes_its_calls(process):
    found = evaluate.plan([process], [1.0], [3], evaluate.SHOWN)
    assert any(one.method.name == "ours sde_5" for one in found)
    assert all(one.method.flow for one in found) or process == "ve"
    for one in found:
        assert torch.isfinite(one.pictures(range(1))).all(), one.name      # raises where the calls are not made


# --- the metrics --------------------------------------------------------------


def test_reference_pictures_are_at_no_distance_and_others_are(reference):
    draws = reference.draws[:500]
    kernel = evaluate.kernel_distance(draws, reference)
    assert abs(kernel.item()) < 1e-3
    assert quality.frechet(draws, reference).item() == pytest.approx(reference.floor(500)[0], rel=0.5)
    moved = draws + 0.5
    assert evaluate.kernel_distance(moved, reference) > 10 * abs(kernel)
    shift = 2 * 0.5 * (draws.mean(0) - reference.mean).sum().item() + 128 * 0.25
    expected = quality.frechet(draws, reference).item() + shift
    assert quality.frechet(moved, reference).item() == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_of_a_resample_is_that_of_its_rows_without_pairs_of_a_row_with_itself(reference):
    x = reference.draws[:40] + 0.3
    weights = torch.ones(2, 40, dtype=torch.float64)
    weights[1, 3], weights[1, 13] = 2, 0                        # the same class
    plain, changed = evaluate.kernel_distance(x, reference, weights)
    assert plain == pytest.approx(evaluate.kernel_distance(x, reference).item(), rel=1e-12)
    # By hand: each class with each class alike.
    kernel = (x @ x.T / x.shape[1] + 1) ** 3
    label, total = torch.arange(40) % 10, 0.0
    for k in range(10):
        for j in range(10):
            pairs = [(a, b) for a in range(40) for b in range(40) if label[a] == k and label[b] == j and a != b]
            counts = [weights[1, a] * weights[1, b] for a, b in pairs]
            norm = sum(counts) if k != j else weights[1][label == k].sum() ** 2 - (weights[1][label == k] ** 2).sum()
            total += sum(n * kernel[a, b] for n, (a, b) in zip(counts, pairs)) / norm / 100
    cross = (x @ reference.draws.T / x.shape[1] + 1) ** 3
    expected = total + reference.within - 2 * (weights[1] @ cross.mean(1)) / 40
    assert changed == pytest.approx(expected.item(), rel=1e-9)


def test_precision_and_recall_at_their_ends(reference):
    precise, recalled = evaluate.precision_recall(reference.real.clone(), reference)
    assert precise.mean() == 1 and recalled.mean() == 1
    precise, recalled = evaluate.precision_recall(reference.real + 100, reference)
    assert precise.mean() == 0 and recalled.mean() == 0
    one = reference.real[:1].expand(20, -1) + 1e-9 * torch.arange(20)[:, None]     # one picture over and over
    precise, recalled = evaluate.precision_recall(one, reference)
    assert precise.mean() == 1 and recalled.mean() < 0.05


def test_resamples_stay_within_a_class():
    rows = evaluate.resamples(47)
    assert ((rows % 10) == torch.arange(47) % 10).all() and rows.max() == 46 and rows.min() == 0


def test_a_comparison_is_paired_and_free_of_the_resamples_bias():
    base = np.random.default_rng(0).normal(size=200)
    a = {"frechet": {"value": 2.0}, "resampled": {"frechet": (2.5 + base).tolist()}}
    b = {"frechet": {"value": 1.0}, "resampled": {"frechet": (1.5 + base).tolist()}}
    found = evaluate.paired(a, b, "frechet", np.subtract)
    assert found["value"] == 1 and found["interval"] == pytest.approx([1, 1])
    assert evaluate.paired(a, b, "frechet", np.divide)["value"] == 2


# --- processes and files ------------------------------------------------------


def lines(folder):
    text = "".join(path.read_text() for path in sorted(folder.glob("evaluate_rank*.jsonl")))
    return {row["key"]: row for row in map(json.loads, text.splitlines())}


def test_one_process_and_two_make_the_same_set(tmp_path):
    command = ["-m", "benchmarks.evaluate", *FEW, "--count", "6", "--block", "3", "--sample", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    evaluate.main([*command[2:], str(tmp_path / "one")])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # torch's gloo aborts now and then while a process ends, its work done: a second start has nothing left to do.
    for _ in range(2):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr",
                               "127.0.0.1", "--master_port", str(port), *command, str(tmp_path / "two")], cwd=ROOT,
                              env=environment, capture_output=True, text=True, timeout=300)
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == 2 * 2 * 2 * 2 and one == two             # features and the digests of the pictures' bytes
    shares = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "two").glob("evaluate_rank*.jsonl"))]
    assert len(shares) == 2 and min(shares) == 8


def test_a_run_takes_up_where_it_stopped(tmp_path):
    found = evaluate.plan(["ve"], [1.0], [3], "^ours (sde_5|ode)$")
    items = [(one, seeds) for seeds in evaluate.blocks(5, 2) for one in found]
    assert [list(seeds) for seeds in evaluate.blocks(5, 2)] == [[0, 1], [2, 3], [4]]
    rows, made = evaluate.sample(items[:4], tmp_path, quiet=True)
    assert made == 4
    path = tmp_path / "evaluate_rank0.jsonl"
    path.write_text(path.read_text()[:-40])                     # killed while it wrote the last line
    path.rename(tmp_path / "evaluate_rank3.jsonl")              # by another process
    again, made = evaluate.sample(items, tmp_path, quiet=True)
    assert made == 3 and len(again) == 6
    assert all(again[key] == row for key, row in rows.items())
    assert evaluate.sample(items, tmp_path, quiet=True) == (again, 0)


def test_several_threads_measure_the_same(tmp_path):
    """At every N that a comparison can be made at, and nothing twice."""
    one, two = evaluate.plan(["ve"], [1.0], [3], "^ours (sde_5|ode)$")
    seeds = evaluate.blocks(20, 10)
    rows, _ = evaluate.sample([(one, seeds[0]), (one, seeds[1]), (two, seeds[0])], tmp_path, quiet=True)
    alone, several = (evaluate.Results([one, two], seeds, rows, tmp_path / name) for name in ("alone", "several"))
    several.measure_all(2)
    assert len(several.done) == 3
    held = dict(several.done)
    for results in (alone, several):
        results.of(one), results.of(one, 10), results.of(two)
    assert several.done == held == alone.done
    again = evaluate.Results([one, two], seeds, rows, tmp_path / "several")
    assert json.loads(json.dumps(again.done)) == json.loads(json.dumps(held))


def test_the_command_reports_what_is_there(tmp_path, capsys):
    arguments = ["--calls", "6", "9", "--guidance", "1", "--process", "ve", "--filter",
                 "^(ours|comfyui) sde_5$|^ours few|2m$", "--block", "20", "--out", str(tmp_path)]
    assert evaluate.main([*arguments, "--count", "20"]) == 0
    text = (tmp_path / "evaluate.md").read_text()
    assert "with fewer calls" in text and "2 cells" in text and "best deterministic peer" in text
    found = json.loads((tmp_path / "evaluate.json").read_text())
    assert len(found["cells"]) == 8 and all(one["count"] == 20 for one in found["cells"])
    pairs = found["questions"]["fewer calls"]
    assert [(pair["ours"], pair["calls"], pair["peer_calls"], pair["count"]) for pair in pairs] == [
        ("ours sde_5", 6, 9, 20), ("ours few_steps", 6, 9, 20)]
    for one in found["cells"]:
        for name in ("frechet", "kernel", "precision", "recall", "class"):
            low, high = one[name]["interval"]
            assert low <= one[name]["value"] <= high
    assert len(list(tmp_path.glob("*.png"))) == 2
    first = capsys.readouterr().out
    assert evaluate.main([*arguments, "--count", "40", "--report"]) == 0        # of the 20 that there are
    assert capsys.readouterr().out.splitlines()[0] == first.splitlines()[0]
    with pytest.raises(SystemExit):
        evaluate.main([*arguments, "--report", "--calls", "5"])
    assert "no block" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main([*FEW, "--device", "cuda", "--out", str(tmp_path)])
    assert end.value.code == 2 and "torch sees no GPU" in capsys.readouterr().err
    # What was sampled on one elsewhere is reported without it.
    with pytest.raises(SystemExit):
        evaluate.main([*FEW, "--device", "cuda", "--report", "--out", str(tmp_path)])
    assert "no block of these cells" in capsys.readouterr().err


def test_a_report_of_cells_that_were_made_on_two_devices(tmp_path, capsys):
    """A cell is of the first device named that has it, and the report says which are not of the first."""
    seeds = evaluate.blocks(20, 20)
    ours, theirs = (cell(name, calls=3) for name in ("ours sde_5", "comfyui sde_5"))
    with quality.appending(tmp_path / "evaluate_rank0.jsonl") as file:
        for one, device in ((ours, "cpu"), (theirs, "cpu"), (theirs, "cuda")):
            row = evaluate.block_row(one, seeds[0])
            file.write(json.dumps({**row, "key": evaluate.key_of(one, seeds[0], device)}) + "\n")
    results = evaluate.Results([ours, theirs], seeds, evaluate.held(tmp_path), tmp_path, ["cuda", "cpu"])
    assert results.where == "cuda, but on cpu ve, 3 calls: ours sde_5"
    assert evaluate.Results([ours, theirs], seeds, evaluate.held(tmp_path), tmp_path).where == "cpu"
    few = ["--calls", "3", "--guidance", "1", "--process", "ve", "--filter", " sde_5$", "--block", "20", "--count", "20",
           "--out", str(tmp_path)]
    assert evaluate.main([*few, "--report", "--device", "cuda", "cpu"]) == 0
    assert f"Sampled on {results.where}, in blocks of 20" in (tmp_path / "evaluate.md").read_text()
    with pytest.raises(SystemExit):
        evaluate.main([*few, "--device", "cuda", "cpu"])
    assert "sampling takes one" in capsys.readouterr().err
