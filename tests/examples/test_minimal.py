"""examples/minimal.py: as short as it says, and as good as least squares."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.datasets import load_diabetes

from ..helpers import EXAMPLES, example


def test_the_loss_is_that_of_least_squares(capsys: pytest.CaptureFixture[str]) -> None:
    assert len((EXAMPLES / "minimal.py").read_text().splitlines()) <= 40
    module = example("minimal")
    loss = module.main()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"epoch 60: train loss {loss:.4f}, validation loss ")

    x, y = load_diabetes(return_X_y=True, scaled=False)
    rows = module.torch.randperm(len(x), generator=module.torch.Generator().manual_seed(0))[88:].numpy()
    design = np.column_stack([x[rows], np.ones(len(rows))])
    residual = y[rows] - design @ np.linalg.lstsq(design, y[rows], rcond=None)[0]
    best = (residual**2).mean() / y[rows].var(ddof=1)
    assert best <= loss <= 1.01 * best
