"""examples/sweep.py: rates diverge where theory says, resamples and groups end at the closed form; over processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gradkernels.verify.tolerance import compare

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from ..helpers import EXAMPLES, example

sweep = example("sweep")


@pytest.mark.unwatched
def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--models", "40", "--steps", "300", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "sweep.json").read_text())
    spacing = 10 ** (4 / 39)
    for name in ("SGD", "SGD, momentum 0.9"):
        edge = record["edges"][name]
        assert edge["theory"] <= edge["measured"] * (1 + 1e-6)
        assert edge["measured"] < edge["theory"] * spacing
    assert record["bootstrap_difference"] < 5e-3
    assert record["groups_difference"] < 5e-3
    ways = record["ways"]
    assert ways["SGDRegressor"]["updates"] == ways["SGDRegressor"]["passes"] * 442
    assert all(way["seconds"] > 0 for way in ways.values())
    assert (tmp_path / "sweep.png").stat().st_size > 30_000
    assert "Where 40 learning rates diverge" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--models", "1"], ["--steps", "0"], ["--device", "nowhere"]])
def test_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.main(arguments)


@pytest.mark.parametrize("models", [1, 3, 8, 11])
def test_each_model_has_one_process(models: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep.own_share(models) == slice(0, models)
    found, sizes = [], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        own = list(range(models))[sweep.own_share(models)]
        found += own
        sizes.append(len(own))
    assert found == list(range(models))
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.unwatched
@pytest.mark.parametrize(("world", "models"), [(2, 7), pytest.param(4, 3, marks=pytest.mark.full)])
def test_processes_find_what_one_finds(world: int, models: int, tmp_path: Path) -> None:
    """Uneven shares, and of three models one of four processes has none.

    The CPU's products round a model by how many are computed at once: the same to the policy's tolerance, with the
    one process as the baseline.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    result = subprocess.run(
        [*launcher, str(EXAMPLES / "sweep.py"), f"--models={models}", "--steps=20", f"--output={tmp_path}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert result.stdout.count("written:") == 1, "one process reports"
    shared = dict(np.load(tmp_path / "sweep.npz"))
    alone, expected = (in_one_process(models, dtype) for dtype in (torch.float32, torch.float64))
    assert np.array_equal(shared.pop("rates"), torch.logspace(-3, 1, models).numpy())
    converged = expected["losses"] <= 1.5  # a divergence multiplies each error in each round
    for results in (shared, alone, expected):
        assert np.array_equal(results["losses"] <= 1.5, converged)
        results["losses"] = results["losses"][converged]
    for key, value in shared.items():
        comparison = compare(torch.from_numpy(value), torch.from_numpy(alone[key]), expected[key])
        assert comparison.passed, f"{key}: {comparison}"


def in_one_process(models: int, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """The results of 20 rounds, by the names of sweep.npz."""
    data = sweep.load()
    data.x, data.y = data.x.to(dtype), data.y.to(dtype)
    trainer = sweep.Trainer(sweep.Progress(disable=True))
    torch.set_default_dtype(dtype)
    try:
        sweeps = sweep.sweep_rates(data, trainer, models, 20)
        resamples = sweep.bootstrap(data, trainer, models, 20)
        groups = sweep.by_group(data, trainer, 40)
    finally:
        torch.set_default_dtype(torch.float32)
    return {
        "losses": np.stack([each.final.numpy() for each in sweeps]),
        "resamples": resamples.trained,
        "groups": np.stack([group.trained for group in groups]),
    }
