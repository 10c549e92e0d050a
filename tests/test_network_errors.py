"""The benchmark of the noise-free samplers on the trained network: told or not, files, a run that goes on."""
import json

import pytest

from benchmarks import network


@pytest.fixture
def rows(tmp_path, monkeypatch, capsys):
    """What a run of few pictures wrote: (options) -> the text, the rows of all runs so far."""
    monkeypatch.setattr(network, "FINE", 12)

    def run(*options):
        network.main(["--calls", "4", "--guidance", "4", "--count", "2", "--filter", "^ours ode$", "--out", str(tmp_path),
                      *options])
        text = (tmp_path / f"network{'_told' * ('--told' in options)}.md").read_text()
        assert text in capsys.readouterr().out
        return text, [json.loads(line) for line in (tmp_path / "network.jsonl").read_text().splitlines()]

    return run


def test_told_what_guidance_adds_our_presets_alone_change(rows):
    text, plain = rows()
    assert text.startswith("    python -m benchmarks.network --calls 4 --guidance 4 --count 2 --filter ^ours ode$\n")
    told_text, both = rows("--told")
    assert "--count 2 --told --filter" in told_text and len(plain) == 3 and len(both) == 6
    for one, other in zip(both[:3], both[3:]):
        assert one["problem"] == other["problem"] and one["errors"]["comfyui ode"] == other["errors"]["comfyui ode"]
        assert one["errors"]["ours ode"] != other["errors"]["ours ode"]
    assert rows("--told") == (told_text, both)          # nothing is run again
