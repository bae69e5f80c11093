"""The benchmark as it runs on a GPU, over the stand-ins of ``cuda_build.py``: no line of it runs there first."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as cli
from bench.throughput import results
from bench.throughput.case import OURS, Case

from .worker import ROOT

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or "GRADKERNELS_CUDA_LOG" not in os.environ,
    reason="needs torch's CUDA build over the stand-ins: make test-host",
)


# What the stand-ins keep a rival from: a solver's workspace and status and the lengths of ragged rows have no right
# value there.
UNSERVED = re.compile(r"no stand-in for|^out of memory|expects split_sizes|linalg\.lstsq: .* full rank")


def rehearse(folder: Path, *arguments: str, **environment: str) -> tuple[int, str, dict[str, Any]]:
    """The exit status, what was printed, and the results."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.host.rehearsal", *arguments, "--device=cuda", f"--out={folder}"],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (folder / "bench.json").exists(), run.stdout
    return run.returncode, run.stdout, json.loads((folder / "bench.json").read_text())


def names(cases: Sequence[Case]) -> list[str]:
    return [case.name for case in cases]


@pytest.mark.parametrize("name", cli.OPS)
def test_every_part_is_timed_or_says_why_not(name: str, tmp_path: Path) -> None:
    status, said, found = rehearse(tmp_path, name, "--quick", "--scale")
    assert status == 0, said
    assert not re.search(r"^(Traceback|lost: |not timed: )", said, re.MULTILINE), said
    (op,) = cli.declared([name])
    assert [results.case_name(record) for record in found["cases"]] == names(list(op.cases("cuda", True)))
    for record in found["cases"]:
        if "skipped" in record:
            assert "GiB on cuda" in record["skipped"], record
            continue
        for who, row in record["contenders"].items():
            where = (results.case_name(record), who, row)
            assert row["status"] in ("ok", "absent", "left out") or UNSERVED.search(row["note"]), where
            assert row["status"] != "ok" or {"call", "device"} <= row.keys(), where
        assert [row["status"] for row in record["contenders"].values()][:2] == ["ok", "ok"]
    assert [sweep["axis"] for sweep in found["scale"]] == [sweep.axis for sweep in op.sweep("cuda")]
    for sweep in found["scale"]:
        assert len(sweep["points"]) >= 4, sweep
        assert not sweep["stopped"] or "GiB on cuda" in sweep["stopped"]
    assert {"bench.csv", "report.html"} <= {path.name for path in tmp_path.iterdir()}


def test_a_kernel_that_spoils_the_context_costs_its_own_rows(tmp_path: Path) -> None:
    """Each later call in that process would fail: another one goes on."""
    fault = {"GRADKERNELS_CUDA_FAULT": "_mse_backward_kernel"}
    status, said, found = rehearse(tmp_path, "mse", "--shape=1000", **fault)
    assert status == 1
    rows = {record["variant"]: results.outcome(record) for record in found["cases"]}
    for variant, row in rows.items():
        if "backward" in variant:
            assert row["status"] == "failed", (variant, row)
            assert "an illegal memory access was encountered" in row["note"]
        else:
            assert row["status"] == "ok", (variant, row)
    assert all("call" in record["contenders"]["eager"] for record in found["cases"])
    assert said.count(f"lost: mse forward + backward 1000 float32 {OURS}: ") == 1
