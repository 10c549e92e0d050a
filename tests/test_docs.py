"""The pages for readers: their links lead somewhere, and the result files that they name are there."""
import re
from pathlib import Path

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
