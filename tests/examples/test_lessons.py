"""The figures that the lessons print, asserted on the reference, the fallback and the Triton kernels.

A figure written as a number is exact and must hold to nine digits; one written as text was rounded when it
was printed and must hold to half a unit in its last place.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from itertools import pairwise

import numpy as np
import pytest
import torch
from gradkernels import use_backend
from gradkernels.reference import linear_mse

from ..conftest import DEVICES
from ..helpers import EXAMPLES, assert_matches, example, python, to_numpy

SCRIPT = str(EXAMPLES / "lessons.py")
lessons = example("lessons")
LESSONS = lessons.LESSONS

PRINTED = {
    "A1": {
        "prediction": 6.0,
        "loss": 1.0,
        "nudged prediction": 6.002,
        "nudged loss": 1.004004,
        "one-sided slope": 4.004,
        "analytic gradient": 4.0,
        "centered difference": [pytest.approx(4.0, rel=0, abs=1e-6)],
    },
    "A2": {
        "w, prediction, loss, gradient": [
            [3.0, 6.0, 1.0, 4.0],
            [2.6, 5.2, 0.04, 0.8],
            [2.52, 5.04, 0.0016, 0.16],
            [2.504, 5.008, 6.4e-05, 0.032],
            [2.5008, 5.0016, "3e-06", 0.0064],
        ]
    },
    "A3": {"lr 0.1: w, loss": [2.6, 0.04], "lr 1.0: w, loss": [-1.0, 49.0]},
    "A4": {"prediction": 6.0, "gradient": [4.0, 2.0], "weights": [1.6, 1.8], "new loss": 0.0},
    "A5": {"path contributions": [4.0, 2.0], "gradient": 6.0},
    "A6": {
        "step 0: loss, weights": [43.375, [0.0, 0.0]],
        "step 1: loss, weights": ["9.852759", [1.08, 0.4425]],
        "step 10: loss, weights": ["0.003643", ["2.0574", "0.8557"]],
        "step 100: loss, weights": ["0.000709", ["2.0259", "0.9364"]],
        "learned weights": ["2.0257", "0.9370"],
        "predictions": ["2.494", "4.988", "6.546", "9.977"],
    },
    "A7": {
        "loss": 3.26875,
        "backward": [-9.9, -3.925],
        "one pass, without autograd": [-9.9, -3.925],
        "centered difference": [pytest.approx(-9.9, rel=0, abs=1e-6), pytest.approx(-3.925, rel=0, abs=1e-6)],
    },
    "A8": {"backward twice": [-19.8, -7.85], "after clearing": [-9.9, -3.925]},
    "B1": {
        "prediction": 2.0,
        "loss": 8.0,
        "dL/dprediction": -4.0,
        "dL/dprediction, without autograd": -4.0,
        "dL/dw": -8.0,
        "dL/db": -4.0,
        "w, b": [1.8, 0.4],
        "new prediction": 4.0,
        "new loss": 2.0,
    },
    "B2": {
        "prediction, loss before; w, b after": [
            [2.0, 8.0, 1.8, 0.4],
            [4.0, 2.0, 2.2, 0.6],
            [5.0, 0.5, 2.4, 0.7],
            [5.5, 0.125, 2.5, 0.75],
            [5.75, "0.031", 2.55, 0.775],
        ]
    },
    "B3": {
        "losses at lr 0.01": [8.0, "7.220", "6.516", "5.881", "5.307"],
        "losses at lr 0.1": [8.0, 2.0, 0.5, 0.125, "0.031"],
        "losses at lr 0.5": [8.0, 18.0, 40.5, 91.125, "205.031"],
    },
    "B4": {
        "dL/dw": [pytest.approx(-8.0, rel=0, abs=1e-8)],
        "dL/db": [pytest.approx(-4.0, rel=0, abs=1e-8)],
    },
    "B5": {"loss": 8.0, "dL/dw": -8.0, "dL/db": -4.0, "a*a": 9.0, "d(a*a)/da": 6.0},
    "B6": {
        "step 0: loss before; w, b after": ["13.8333", "0.907", "0.400"],
        "step 1: loss before; w, b after": ["4.2812", "1.411", "0.623"],
        "step 19: loss before; w, b after": ["0.0005", "2.037", "0.917"],
    },
    "B7": {
        "train, validation, w": [
            ["7.672", "0.081", "2.187"],
            ["6.307", "0.296", "2.356"],
            ["5.185", "0.605", "2.509"],
            ["4.262", "0.981", "2.648"],
        ]
    },
    "B8": {"before": "13.833", "weight gradient": "-11.333", "bias gradient": "-5.000", "after": "4.281"},
    "B9": {"gradients": [-8.0, -16.0, -8.0]},
    "C1": {
        "prediction, loss, gradient, weights after": [
            [8.0, 9.0, [12.0, 18.0], [0.4, 1.1]],
            [4.1, 0.81, [-3.6, -5.4], [0.58, 1.37]],
        ]
    },
    "C2": {
        "losses at lr 0.05": [
            *("0.7288", "0.5650", "0.5116", "0.4833", "0.4613", "0.4415"),
            *("0.4228", "0.4050", "0.3881", "0.3719", "0.3565", "0.3418"),
        ],
        "12th loss at lr 0.001": "0.6371",
        "2nd loss at lr 1.5": "333.8",
    },
}


@pytest.fixture(params=["reference", "fallback", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param), torch.device(DEVICES[request.param]):
        yield request.param


def run(number: str) -> dict[str, object]:
    return LESSONS[number][1]()


def assert_printed(figure: object, printed: object, where: str) -> None:
    if isinstance(printed, dict):
        assert set(figure) == set(printed), where
        for name in printed:
            assert_printed(figure[name], printed[name], f"{where}, {name}")
    elif isinstance(printed, list):
        assert len(figure) == len(printed), where
        for i, (part, expected) in enumerate(zip(figure, printed, strict=True)):
            assert_printed(part, expected, f"{where}[{i}]")
    elif isinstance(printed, str):
        half_unit = 0.5 * 10.0 ** Decimal(printed).as_tuple().exponent
        assert abs(figure - float(printed)) <= half_unit, f"{where}: {figure}, printed {printed}"
    else:
        expected = pytest.approx(printed, rel=1e-9, abs=1e-9) if isinstance(printed, float) else printed
        assert figure == expected, f"{where}: {figure}, exactly {printed}"


@pytest.mark.parametrize("number", PRINTED)
def test_printed_figures(backend: str, number: str) -> None:
    assert_printed(run(number), PRINTED[number], number)


def assert_as_torch(ours: list, theirs: list, exact: object, dtype: torch.dtype = torch.float64) -> None:
    ours, theirs = (torch.tensor(values, dtype=dtype, device="cpu") for values in (ours, theirs))
    assert_matches(ours, theirs, np.asarray(exact))


def test_a9_guard_stops_before_the_weights_are_touched(backend: str) -> None:
    figures = run("A9")
    cases = [f"{kind} {where}" for kind in ("NaN", "infinite") for where in ("feature", "target")]
    assert set(figures) == {f"{case}: {what}" for case in cases for what in ("error", "weights")}
    for case in cases:
        assert figures[f"{case}: weights"] == [1.3, 1.1]
        assert re.search("finite", figures[f"{case}: error"])


def test_c3_adam_follows_torch_at_every_step(backend: str) -> None:
    _, exact = lessons.deliveries(lambda p: torch.optim.Adam(p, lr=0.05, foreach=False), 20, torch.float64)
    figures = run("C3")
    assert len(figures["weights"]) == 20
    assert_as_torch(figures["weights"], figures["torch's"], exact, torch.float32)


def test_c4_schedules_drive_the_optimizer(backend: str) -> None:
    figures = run("C4")
    for name in ("plateau", "cosine"):
        rates, weights = figures[f"{name}: rates, weights, ours"]
        torch_rates, torch_weights = figures[f"{name}: rates, weights, torch's"]
        assert rates == torch_rates
        assert_as_torch(weights, torch_weights, torch_weights)
    rates, _ = figures["plateau: rates, weights, ours"]
    assert rates == pytest.approx([0.05] * 4 + [0.005] * 3 + [0.0005], rel=1e-12)
    rates, _ = figures["cosine: rates, weights, ours"]
    cosine = [1e-4 + (0.05 - 1e-4) * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(11)]
    assert rates == pytest.approx(cosine, rel=1e-9)


def test_c5_a_weight_without_a_signal_is_named(backend: str) -> None:
    figures = run("C5")
    assert figures["loss"] > 10
    assert figures["gradient"][0] != 0
    assert figures["gradient"][1] == 0
    [diagnosis] = figures["gradient check"]
    assert diagnosis.startswith("no signal: [1]")


def test_d1_bowl(backend: str) -> None:
    figures = run("D1")
    assert_printed(figures["gradient"], [8.0, 18.0], "D1 gradient")
    assert_printed(figures["one step"], [3.2, 1.2], "D1 one step")
    losses = figures["losses at lr 0.4"]
    assert all(later > earlier for earlier, later in pairwise(losses))
    exact = [[4 * 0.8**step, 3 * 0.4**step] for step in range(1, 21)]
    assert_as_torch(figures["20 steps, ours"], figures["20 steps, torch's"], exact)


def test_d2_matrix_form(backend: str) -> None:
    figures = run("D2")
    assert figures["shape"] == [5]
    x, w, y = lessons.hundred_samples()
    torch.nn.functional.mse_loss(x @ w, y).backward()
    _, exact, *_ = linear_mse.backward(1.0, *(to_numpy(tensor) for tensor in (x, w, y)))
    for name in ("backward", "(2/n) X^T (X w - y)"):
        assert_as_torch(figures[name], w.grad.tolist(), exact)


def test_d3_clipping_is_torchs(backend: str) -> None:
    figures = run("D3")
    for max_norm in (1.0, 1000.0):
        ours, theirs = (figures[f"max_norm {max_norm}: norm, weights{name}"] for name in ("", ", torch's"))
        assert_as_torch(ours, theirs, theirs)


def test_d4_uphill_step_is_seen_at_once(backend: str) -> None:
    figures = run("D4")
    assert figures["first step that made the loss rise, downhill"] == "none"
    assert figures["first step that made the loss rise, sign flipped"] == 1


def test_d5_mismatched_shapes_are_refused(backend: str) -> None:
    for name, message in run("D5").items():
        assert isinstance(message, str), f"{name} broadcast to {message}"
        assert "(4, 1)" in message
        assert "(4,)" in message


def test_every_lesson_is_asserted() -> None:
    others = {name.split("_")[1].upper() for name in globals() if re.match(r"test_[a-d]\d_", name)}
    assert set(LESSONS) == set(PRINTED) | others


def test_every_lesson_says_what_its_figures_show() -> None:
    said = [function.__doc__ or "" for _, function in LESSONS.values()]
    assert min(len(doc.split()) for doc in said) >= 15
    assert len(set(said)) == len(said)


def test_the_script_prints_what_it_is_asked_for() -> None:
    output = python(SCRIPT, "--backend", "reference", "A2", "A5")
    assert "[2.5008, 5.0016, 2.56e-06, 0.0064]" in output
    assert "gradient: 6" in output
    assert "the sum over the two paths to the loss: 4 + 2 = 6." in output
    assert "A1" not in output


def test_the_script_refuses_an_unknown_lesson() -> None:
    result = subprocess.run([sys.executable, SCRIPT, "Z9"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "no lesson Z9" in result.stderr


@pytest.mark.parametrize("given", [["--device", "foo"], ["--backend", "triton"]], ids=" ".join)
def test_the_script_refuses_a_device_that_is_not_there(given: list[str]) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, *given, *([] if "--device" in given else ["--device", "cpu"]), "A1"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert " ".join(given) in result.stderr
    assert "Traceback" not in result.stderr
