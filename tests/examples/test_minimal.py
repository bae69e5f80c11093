"""examples/minimal.py: as short as it says, and as good as least squares."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.datasets import load_diabetes

SCRIPT = Path(__file__).parents[2] / "examples" / "minimal.py"


def test_the_loss_is_that_of_least_squares(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 40
    spec = importlib.util.spec_from_file_location("minimal_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = module.main()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"epoch 60: train loss {loss:.4f}, validation loss ")

    x, y = load_diabetes(return_X_y=True, scaled=False)
    rows = module.torch.randperm(len(x), generator=module.torch.Generator().manual_seed(0))[88:].numpy()
    design = np.column_stack([x[rows], np.ones(len(rows))])
    residual = y[rows] - design @ np.linalg.lstsq(design, y[rows], rcond=None)[0]
    best = (residual**2).mean() / y[rows].var(ddof=1)
    assert best <= loss <= 1.01 * best
