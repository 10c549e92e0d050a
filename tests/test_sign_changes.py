"""The data on which ComfyUI's formulas are exact by chance (benchmarks/sign_changes.py)."""
import numpy as np
import pytest

from benchmarks import sign_changes
from benchmarks.members import Cell
from benchmarks.sign_changes import RULES, errors, measure
from benchmarks.variables import COMFYUI, DEFAULT, Row

CHANGING = Cell("ve", 1.0, "sde_3", 1.0, "align your steps", 10)
DEVIATIONS = [0.05, 0.3, 0.8]


@pytest.mark.parametrize("process, schedule", [("ve", "karras"), ("flow", "shift 3")])
def test_first_order_without_noise_is_its_product(process, schedule):
    """y becomes D + (lambda_t / lambda_s) (y - D) in each step."""
    cell = Cell(process, 1.0, "ode", 0.0, schedule, 8)
    lam = sign_changes.get_process(process).lam(cell.sigmas().numpy())
    want = []
    for s in DEVIATIONS:
        # At lambda = infinity, sigma = 1 of a flow, y / lambda is a standard normal and D is 0.
        y = np.hypot(s, lam[0]) if np.isfinite(lam[0]) else None
        for high, low in zip(lam[:-1], lam[1:]):
            y = low if y is None else y * (s ** 2 + low * high) / (s ** 2 + high ** 2)
        want.append(y / np.hypot(s, lam[-1]) - 1)
    np.testing.assert_allclose(errors(Row("lambda", 1, False, False), cell, DEVIATIONS), want, rtol=1e-9)


@pytest.mark.parametrize("row", [COMFYUI, DEFAULT], ids=lambda row: row.name)
@pytest.mark.parametrize("process, schedule", [("ve", "karras"), ("flow", "shift 3")])
@pytest.mark.parametrize("member, eta", [("ode", 0.0), ("sde", 1.0)])
def test_many_steps_reach_the_law(row, process, schedule, member, eta):
    """A flow's schedules have long steps below sigma = 0.1 however many there are, which 0.8 has no part in."""
    few, many = (abs(errors(row, Cell(process, 1.0, member, eta, schedule, n), [0.8]))[0] for n in (6, 200))
    assert many < min(few, 2e-3)


@pytest.mark.parametrize("member", ["sde", "sde_3", "sde_4"])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("steps", [50, 70])
def test_many_steps_with_much_noise_go_by_the_variance(schedule, steps, member):
    """Polynomials through evaluations that fresh noise has made rough were at 0.4 to 1.5 of ComfyUI's error."""
    cell = Cell("ve", 1.0, member, 1.0, schedule, steps)
    ours, comfyui = (np.linalg.norm(errors(row, cell, np.geomspace(0.02, 1.0, 9))) for row in (DEFAULT, COMFYUI))
    assert ours < 0.25 * comfyui


def test_all_deviations_at_once_are_each_alone():
    for row in (COMFYUI, DEFAULT):
        alone = [errors(row, CHANGING, [s])[0] for s in DEVIATIONS]
        np.testing.assert_allclose(errors(row, CHANGING, DEVIATIONS), alone, rtol=1e-9, atol=1e-12)


def test_where_the_error_of_comfyui_is_zero_no_rule_is_as_near():
    found = measure(CHANGING, np.geomspace(0.2, 0.8, 7))
    assert len(found.at) == 1 and found.there.shape == (1, 1 + len(RULES))
    low, high = errors(COMFYUI, CHANGING, [found.at[0] * 0.99, found.at[0] * 1.01])
    assert low * high < 0
    assert found.there[0, 0] < 1e-12 < 1e-5 < found.there[0, 1:].min()
    np.testing.assert_allclose(found.there[0, 1 + RULES.index(DEFAULT)],
                               abs(errors(DEFAULT, CHANGING, found.at)[0]), rtol=1e-12)


def test_the_page_counts_what_was_found(tmp_path, monkeypatch):
    cells = [CHANGING, Cell("flow", 1.0, "ode", 0.0, "shift 1", 6)]
    monkeypatch.setattr(sign_changes.members, "cells", lambda *args: cells)
    monkeypatch.setattr(sign_changes, "SWEEP", np.geomspace(0.2, 0.8, 7))
    monkeypatch.setattr(sign_changes, "measure", lambda cell: measure(cell, sign_changes.SWEEP))
    sign_changes.main(["--steps", "6", "10", "--out", str(tmp_path)])
    text = (tmp_path / "sign_changes.md").read_text()
    assert "    python -m benchmarks.sign_changes --steps 6 10\n" in text
    assert "changes its sign in 1 of 2 cells, at 1 s in all. There it is" in text
    assert "0 of the 80 rules are within 5 %" in text
    assert "somewhere in 1 of the cells, 1 of them cells with a change of sign." in text
    assert "| 10 steps (1) | 1 | 1 | " in text and "| 6 steps (1) | 0 | 0 | 0.0% |" in text
    assert "| ve, align your steps, sde_3, 10 steps | 0.38" in text


def test_the_page_without_a_change_of_sign():
    cells = [Cell("flow", 1.0, "ode", 0.0, "shift 1", 6)]
    text = sign_changes.report(cells, [measure(cell, np.geomspace(0.2, 0.8, 4)) for cell in cells], "command")
    assert "changes its sign in 0 of 1 cells, at 0 s in all.\n" in text
