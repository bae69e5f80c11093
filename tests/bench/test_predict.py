"""What is predicted of a GPU that is not there: the formula by hand, and the table in bench/README.md."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import gradkernels

from bench.reports import aot
from bench.reports.aot import Row
from bench.reports.predict import H200, HEADER, Predicted, Prediction

from ..helpers import is_pinned

README = (Path(__file__).parents[2] / "bench" / "README.md").read_text()
# 100 registers are 3328 a warp with what is rounded up: 4 warps in each quarter of an SM, so 4 programs of 4 warps.
KERNEL = Row("mse", "", "", "", "k", registers=100, warps=4, shared=1024, loads={"128": 2, "32": 9})
LAUNCH = Predicted(KERNEL, programs=1000, bytes=10**9)


def test_programs_of_an_sm_by_each_limit():
    assert LAUNCH.resident(H200) == 4
    for change, expected in (
        ({"registers": 16}, 16),  # 2048 threads
        ({"registers": 16, "warps": 1}, 32),  # programs
        ({"shared": 100 << 10}, 2),  # 228 KB, of which each program takes one more
        ({"registers": 255, "warps": 8}, 1),
    ):
        assert Predicted(replace(KERNEL, **change), 1, 1).resident(H200) == expected


def test_bytes_in_flight():
    assert LAUNCH.in_flight() == 2 * 16 * 128  # its widest loads alone
    tiles = replace(KERNEL, loads={"tensor": 3, "32": 1}, shared=96 << 10)
    assert Predicted(tiles, 1, 1).in_flight() == 96 << 10
    greedy = replace(KERNEL, loads={"128": 1000})  # no more than registers and shared memory hold
    assert Predicted(greedy, 1, 1).in_flight() == 100 * 128 * 4 + 1024
    assert Predicted(replace(KERNEL, loads={}), 1, 1).in_flight() == 0


def test_seconds_by_hand():
    # 528 programs are resident: 528 x 4096 bytes in 0.8 us are 2.70 TB/s, less than the copy rate.
    assert LAUNCH.waves(H200) == 2
    assert LAUNCH.seconds(H200) == pytest.approx(1e9 / (528 * 4096 / 0.8e-6))
    assert LAUNCH.is_bound_by_latency(H200)
    wide = Predicted(replace(KERNEL, loads={"128": 8}), 1000, 10**9)  # four times that: the copy rate
    assert wide.seconds(H200) == pytest.approx(1e9 / 4.3e12)
    assert not wide.is_bound_by_latency(H200)
    assert Predicted(KERNEL, 1000, 8).seconds(H200) == pytest.approx(2 * 0.8e-6)  # a latency for each wave
    assert Predicted(KERNEL, 10, 10**6).seconds(H200) == pytest.approx(1e6 / (10 * 4096 / 0.8e-6))
    # Two more passes from the cache, 528 x 4096 bytes in 0.15 us being more than its rate.
    again = LAUNCH.seconds(H200) + 2 * 1e9 / (132 * 40e9)
    assert LAUNCH.seconds(H200, passes=3) == pytest.approx(again)


def test_a_case_takes_its_launches_or_its_arithmetic():
    prediction = Prediction("x", 10**9, 67 * 10**9, 4, 1, [LAUNCH, LAUNCH])
    assert prediction.memory(H200) == pytest.approx(2 * LAUNCH.seconds(H200))
    assert prediction.arithmetic(H200) == pytest.approx(1e-3)
    cells = dict(zip(HEADER, prediction.cells(H200), strict=True))
    assert cells["*predicted* us"] == "1e+03"
    assert cells["bound by"] == "arithmetic"
    assert cells["KB in flight an SM"] == "16.0"
    assert cells["programs / of an SM / waves"] == "1000 / 4 / 2"
    matrix = replace(LAUNCH, kernel=replace(KERNEL, matrix={"HGMMA": 1}))
    assert replace(prediction, launches=[matrix]).arithmetic(H200) == pytest.approx(67 / 165 * 1e-3)


@pytest.mark.skipif(not is_pinned("triton"), reason="the table is of the pinned Triton's machine code")
def test_the_command_prints_lines_of_the_readme(capfd):
    """One small op anew; all lines of the table have its columns and an op of the package."""
    assert aot.main(["--predict", "--op", "sgd", "--shape", "1x1e7"]) == 0
    head, rule, *lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in (head, rule, *lines):
        assert line in README.splitlines()
    table = README[README.index(head) :].split("\n\n")[0].splitlines()[2:]
    assert {line.count("|") for line in table} == {len(HEADER) + 1}
    found = {re.match(r"\| (\w+) ", line)[1] for line in table}
    assert found == set(gradkernels.ops.OPS)
