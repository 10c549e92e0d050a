"""The pages for readers: their links lead somewhere, and the result files that they name are there."""
import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"


def anchors(page: Path):
    """The names that GitHub gives a page's headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES[:1] + [ROOT / "docs" / "measured.md"], ids=lambda page: page.name)
def test_named_results_are_there(page):
    named = set(re.findall(r"benchmarks/results/([\w./]*\w)", page.read_text(encoding="utf-8")))
    assert named and not [name for name in named if not (RESULTS / name).exists()]


def test_every_row_of_what_was_reached_names_a_file_of_its_own():
    rows = [line for line in (RESULTS / "README.md").read_text(encoding="utf-8").splitlines()
            if line.startswith("|") and not line.startswith(("|---", "| aim"))]
    assert len(rows) > 20
    for row in rows:
        named, whole = re.findall(r"`([^`]+)`", row.split("|")[3]), ""
        assert named, row
        for name in named:      # `_50_` stands for the name before it with that part
            whole = name if name.endswith(".md") and not name.startswith("_") else whole
            assert (RESULTS / whole).exists(), f"{whole} of {row}"


def test_the_notes_of_what_was_reached_are_all_there():
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    notes = [int(n) for n in re.findall(r"^(\d+)\. ", text, re.M)]
    assert notes == list(range(1, len(notes) + 1))
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    used = {int(n) for n in re.findall(r"\((\d+)\)", table)} | {int(n) for n in re.findall(r"\((\d+), `", text)}
    assert used <= set(notes), used - set(notes)


README = ROOT.joinpath("README.md").read_text(encoding="utf-8")


def stored(name: str):
    """A result file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_the_error_at_64_steps_is_the_measured_one():
    found = stored("convergence.json")["mixture"]["exact"]
    said = re.search(r"At 64 steps .*?is ([\d.]+) of ComfyUI's formulas' \(`ve`\) and ([\d.]+) \(`flow`\)", README, re.S)
    assert said.groups() == tuple(f"{found[process]['over_comfyui']:.3f}" for process in ("ve", "flow"))


@pytest.mark.parametrize("row, name, held", [
    ("Gaussian data of four scales, exactly, 6 to 50 steps", "members_ode.json", lambda scale: True),
    ("Gaussian data of four scales, exactly, no guidance, 6 to 50 steps", "members_default.json", lambda scale: scale == 1),
    ("the same with guidance 4 and 7.5, told what it adds", "members_told.json", lambda scale: True)])
def test_the_rows_on_gaussian_data_are_the_measured_ones(row, name, held):
    ratio = np.array([next(value for rule, value in cell["ratio"].items() if rule != "comfyui")
                      for cell in stored(name)["cells"]
                      if cell["steps"] >= 5 and cell["guidance"] <= 7.5 and held(cell["guidance"])])
    mean, worse = np.exp(np.log(ratio).mean()), int((ratio > 1.05).sum())
    assert f"| {row} | {len(ratio)} | {mean:.2f} | {ratio.max():.2f} | **{worse}** |" in README


def test_where_no_rule_is_as_near_is_the_measured_one():
    page = (RESULTS / "sign_changes.md").read_text(encoding="utf-8")
    parts = {name: (int(changed), float(share)) for name, changed, share in
             re.findall(r"^\| ([\w, ]+) \(\d+\) \| (\d+) \| \d+ \| ([\d.]+)% \|$", page, re.M)}
    whole = re.search(r"further off than ComfyUI's formulas in ([\d.]+)% of all", page)[1]
    said = re.search(r"somewhere in (\d+) of 64 cells with 50 steps, (\d+) with 20, (\d+) with 10 and none with 6, and there no\s+"
                     r"other rule is as near\. Ours is further off in ([\d.]+) % of all .*?in ([\d.]+) %", README, re.S)
    both = (parts["ve, karras"][1] + parts["ve, exponential"][1]) / 2
    assert said.groups() == (*(str(parts[f"{n} steps"][0]) for n in (50, 20, 10)), whole, f"{both:.1f}")
    assert parts["6 steps"][0] == 0 and "; 0 of the 80 rules are within 5 %" in page
