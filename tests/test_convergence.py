"""The benchmark of the deterministic error: what its table of peers counts."""
import numpy as np
import pytest

from benchmarks import convergence
from tests import problems


def test_the_table_of_peers(monkeypatch, capsys):
    """Every noise-free sampler with a call a step; ComfyUI's row is the unit, and the worst points' share is theirs."""
    monkeypatch.setattr(convergence, "digits", lambda process: problems.separated(process))
    pytest.importorskip("k_diffusion")
    errors = convergence.peers_table(9, 12)
    names = {name.removeprefix("k-diffusion ") for name in errors}
    assert {"exact, order 3", "paper", "comfyui", "euler", "lms", "dpmpp_2m"} <= names
    assert not names & {"heun", "dpm_2", "euler_ancestral", "dpmpp_2m_sde"}
    means = [(e ** 2).mean() for e in errors.values()]
    assert means == sorted(means) and all(e.shape == (12,) for e in errors.values())
    convergence.main(["--peers", "9", "--count", "12"])
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
            for cells in (line.split("|") for line in capsys.readouterr().out.splitlines()) if len(cells) == 9}
    assert rows["comfyui"] == ["1.00 (1.00 to 1.00)", "1.00", rows["comfyui"][2], "1.00", "1.00", rows["comfyui"][5]]
    one, base = (np.sort(errors[name]) for name in ("exact, order 3", "comfyui"))
    worst = 1           # a hundredth of 12, but one at least
    low, high = convergence.interval(errors["exact, order 3"], errors["comfyui"])
    assert rows["exact, order 3"] == [
        f"{((one ** 2).mean() / (base ** 2).mean()) ** 0.5:.2f} ({low:.2f} to {high:.2f})",
        f"{((one[:-worst] ** 2).mean() / (base[:-worst] ** 2).mean()) ** 0.5:.2f}",
        f"{(one[-worst:] ** 2).sum() / (one ** 2).sum():.0%}",
        f"{one.mean() / base.mean():.2f}", f"{np.median(one) / np.median(base):.2f}", f"{(one > 0.1).sum()}"]
