"""What a kernel does to its process costs its own row: the benchmark goes on in another process."""

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from bench.throughput import results
from bench.throughput.case import OURS

PLANTED = Path(__file__).with_name("planted.py")


def test_each_part_is_measured_whatever_others_do_to_their_process(tmp_path: Path) -> None:
    """One crashes, one is killed, one hangs, one spoils the device for all calls after it."""
    found = subprocess.run([sys.executable, PLANTED, tmp_path], capture_output=True, text=True)
    assert found.returncode == 1, found.stdout + found.stderr
    document = json.loads((tmp_path / "bench.json").read_text())
    cases = {record["variant"]: record for record in document["cases"]}
    status = {
        name: {row: found["status"] for row, found in record.get("contenders", {}).items()}
        for name, record in cases.items()
    }
    right = dict.fromkeys((OURS, "eager", "rival"), "ok")
    assert status == {
        "none": right,
        "ours crashes": right | {OURS: "failed"},
        "rival is killed": right | {"rival": "failed"},
        "rival hangs": right | {"rival": "failed"},
        "eager spoils": {},
        "inputs spoil": {OURS: "failed"},
        "no fault": right,
    }
    notes = {name: results.outcome(cases[name], who)["note"] for name, who in (
        ("ours crashes", OURS), ("rival is killed", "rival"), ("rival hangs", "rival"), ("eager spoils", OURS),
        ("inputs spoil", OURS),
    )}  # fmt: skip
    assert notes == {
        "ours crashes": "RuntimeError: its process ended with status -11",
        "rival is killed": "RuntimeError: its process ended with status -9",
        "rival hangs": "RuntimeError: hung for 15 s",
        "eager spoils": "plain torch has no result: RuntimeError: "
        "CUDA error: an illegal memory access was encountered",
        "inputs spoil": "CUDA error: an illegal memory access was encountered",
    }
    calls = Counter((tmp_path / "calls").read_text().splitlines())
    assert calls["ours crashes: gradkernels"] == calls["eager spoils: eager"] == 1  # none is tried again
    assert [record["variant"] for record in document["cases"]] == list(status)  # in the order of declaration
    assert "not timed" not in found.stdout
    assert "ours crashes" in found.stdout
    assert found.stdout.count("measured limits") == 1


def test_a_run_that_is_ended_prints_what_it_has(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, PLANTED, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said = []
    for line in run.stderr:
        said.append(line)
        if "rival hangs" in line and line.startswith("["):
            run.send_signal(signal.SIGTERM)
            break
    shown, errors = run.communicate()
    assert run.returncode == 130, "".join(said) + errors
    last = shown.splitlines()[-1]
    assert re.match(r"not timed: 4 of 7, it was interrupted: planted rival hangs", last)
    assert len(json.loads((tmp_path / "bench.json").read_text())["cases"]) == 3
