"""examples/sweep.py: rates diverge where theory says, resamples and groups end at the closed form."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

SCRIPT = Path(__file__).parents[2] / "examples" / "sweep.py"


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.unwatched
def test_it_runs(sweep: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.mark.parametrize("arguments", [["--models", "1"], ["--steps", "0"]])
def test_arguments(sweep: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.main(arguments)
