"""The bytes that the kernels move, against the minimum traffic: the limits are the jobs' own."""

import json
import os
from dataclasses import replace

import pytest
import torch

from bench.reports import traffic

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.unwatched,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="counts under the interpreter, on a machine without a GPU"
    ),
]
JOBS = list(traffic.jobs())


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_no_job_moves_more_than_its_limits(job):
    count = traffic.count(job)
    assert count.passed, count
    if job.name.startswith("linear_mse") and "x1 " in job.name:
        assert count.eager / count.moved >= 1.8
    if job.name.startswith("adam step"):
        assert count.eager / count.moved >= 2.5


def test_a_count_over_any_limit_fails():
    job = traffic.Job("x", str, str, 100, 1.05, 1.0, 2)
    count = traffic.Count(job, 2, 105, 100, 300)
    assert count.passed
    for worse in ({"moved": 106}, {"distinct": 101}, {"launches": 3}):
        assert not replace(count, **worse).passed
    assert replace(count, moved=300, job=replace(job, limit=None)).passed
    assert json.loads(json.dumps(count.record()))["launch_limit"] == 2


def test_a_wasteful_job_is_seen():
    import gradkernels

    job = next(job for job in JOBS if job.name.startswith("mse_loss_and_grad"))
    a, b = torch.randn(2, 1 << 17).unbind()
    twice = replace(job, ours=lambda: [gradkernels.mse_loss_and_grad(a, b) for _ in range(2)])
    assert not traffic.count(twice).passed


def test_eager_traffic_counts_inputs_and_outputs_once_and_no_views():
    a, b = torch.randn(100), torch.randn(1)
    with traffic.EagerTraffic() as eager:
        c = a + b.expand(100)
    assert eager.moved == 4 * (100 + 1 + 100)
    with traffic.EagerTraffic() as eager:
        c.view(10, 10).t().mul_(2)
    assert eager.moved == 4 * 200


@pytest.mark.parametrize(("launches", "status"), [(3, 0), (2, 1)])
def test_the_command_counts_under_the_interpreter(launches, status, monkeypatch, tmp_path):
    """Whatever the environment says; its status tells whether a limit is exceeded."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(traffic, "jobs", lambda: [replace(JOBS[0], launches=launches)])
    count = traffic.Count(replace(JOBS[0], launches=launches), 3, JOBS[0].minimum, JOBS[0].minimum, 1)
    monkeypatch.setattr(traffic, "count", lambda job: count)
    assert traffic.main(["--json", str(tmp_path / "x.json")]) == status
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert json.loads((tmp_path / "x.json").read_text())[0]["launches"] == 3
