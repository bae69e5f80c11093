"""examples/splats.py: only the Gaussians in sight take a step, each counts its own, and the picture gets better."""

from pathlib import Path

import pytest
import torch
from gradkernels import FusedAdam

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from matplotlib import image

from ..helpers import example

splats = example("splats")


def test_a_row_takes_the_steps_that_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    visible = splats.visible
    monkeypatch.setattr(splats, "visible", lambda *tile: seen.append(visible(*tile)) or seen[-1])
    gaussians, optimizer, _ = splats.fit(splats.photograph(), 16, 6, FusedAdam, stacked=True)
    counts = torch.stack(seen).sum(0)
    assert len(counts.unique()) > 2
    start = splats.grid(16)
    for name, values in gaussians.items():
        assert torch.equal(optimizer.state[values]["step"], counts.float()), name
        moved = (values != start[name]).any(1)
        assert not moved[counts == 0].any(), name
        if name == "colour":
            assert moved[counts > 0].all()


def test_the_picture_gets_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, rows_in_sight, _ = splats.main(
        ["--side", "12", "--steps", "60", "--output", str(tmp_path)]
    ).values()
    assert rows_in_sight > before + 4
    assert f"FusedAdam, the rows in sight: {rows_in_sight:.2f} dB" in capsys.readouterr().out
    picture = image.imread(tmp_path / "splats.png")
    assert picture.shape[:2] == (380, 1400)


@pytest.mark.parametrize("wrong", [["--side", "0"], ["--side", "-1"], ["--steps", "0"]], ids=" ".join)
def test_bad_usage(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        splats.main(wrong)
    assert "--side and --steps take at least 1" in capsys.readouterr().err
