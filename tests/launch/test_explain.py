"""``python -m gradkernels explain``: a shape for each plan, the reasons, and what is compiled."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from gradkernels.__main__ import main
from gradkernels.explain import plan_of
from gradkernels.triton import config, matmul

A100, H100, B200, RTX5090 = (config.Target("cuda", arch) for arch in (80, 90, 100, 120))
MI300 = config.Target("hip", "gfx942")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture
def explained(monkeypatch):
    """The plan of a call on a chip that is not there."""

    def plan(op, sizes, dtype=FP32, target=H100):
        monkeypatch.setattr(config, "target_of", lambda device: target)
        monkeypatch.setattr(matmul, "_plans", {})
        return plan_of(op, sizes, dtype, target)

    return plan


# op, sizes, dtype, target, the plan, a plan that is not taken, and a part of the reason why
PLANS = [
    ("matmul", (40960, 2, 2), FP32, H100, "elementwise", None, None),
    ("matmul", (500_000, 8, 8, 8), FP32, H100, "elementwise", None, None),
    ("matmul", (1, 1 << 20, 1), FP32, H100, "gemv", None, None),
    ("matmul", (40960, 32, 32), FP32, H100, "gemm", "gemm_tma", "min(M, N) = 32 is at most 64"),
    ("matmul", (4096, 4096, 4096), FP32, B200, "gemm_tma", None, None),
    ("matmul", (4096, 4096, 4096), BF16, A100, "gemm", "gemm_tma", "TMA"),
    ("matmul", (4096, 4096, 4096), BF16, RTX5090, "gemm", "gemm_tma", "too little shared memory"),
    (
        "matmul",
        (4096, 4096, 1),
        FP32,
        H100,
        "gemv",
        "elementwise",
        "K = 4096 is more than ELEMENTWISE_MAX_K = 32",
    ),
    (
        "matmul",
        (4096, 1, 4096),
        FP32,
        H100,
        "outer",
        "elementwise",
        "K * min(M, N) = 4096 is more than ELEMENTWISE_MAX_AREA = 256",
    ),
    ("matmul", (4096, 4096, 4096), BF16, H100, "gemm_tma", "outer", "K = 4096 is more than OUTER_MAX_K = 4"),
    ("matmul", (4096, 4096, 4096), BF16, MI300, "gemm", "gemm_tma", "hip gfx942 has no TMA"),
    ("matmul", (4096, 4096, 4096), FP64, H100, "gemm", "gemm_tma", "float64"),
    ("matmul", (1001, 333, 777), BF16, H100, "gemm", "gemm_tma", "16 bytes"),
    ("matmul", (256, 256, 256), BF16, H100, "gemm", "gemm_tma", "fewer than LARGE_TILES = 66"),
    ("matmul", (8, 1024, 64, 1024), BF16, H100, "gemm", "gemm_tma", "single matrices"),
    ("linear_mse", (8192, 512, 1), BF16, H100, "chunks", "dot", "K = 1 is less than DOT_MIN_OUTPUTS = 5"),
    ("linear_mse", (8192, 512, 1), FP32, H100, "chunks", "dot", "more than 16 bits"),
    ("linear_mse", (8192, 512, 6), BF16, H100, "dot", "chunks", "K = 6 is at least DOT_MIN_OUTPUTS = 5"),
    ("linear_mse", (8192, 512, 16), BF16, H100, "dot", "chunks", "more than CHUNKS_MAX_OUTPUTS = 8 outputs"),
    ("linear_mse", (8192, 512, 1000), BF16, H100, "tiles", "dot", "more than 64 outputs"),
    ("linear_mse", (8192, 4096, 8), FP32, H100, "tiles", "chunks", "do not fit registers"),
    ("linear_mse_fit", (1000, 100, 8, 1), FP32, H100, "one launch", None, None),
    ("linear_mse_fit", (1, 100, 65, 9), FP32, H100, "loop", "one launch", "2048 weights, padded"),
    ("linear_mse_fit", (1, 100000, 8, 1), FP32, H100, "loop", "one launch", "a round reads 3600000 bytes"),
    ("linear_mse_models", (1000, 100, 8, 1), FP32, H100, "chunks", None, None),
    (
        "linear_mse_models",
        (10, 1000, 64, 32),
        BF16,
        H100,
        "tiles",
        "chunks",
        "more than CHUNKS_MAX_OUTPUTS = 8 outputs",
    ),
    ("mse", (1000, 1000), FP32, H100, "flat", None, None),
    ("adam", (1000, 1000), FP32, H100, "chunks", None, None),
    ("sgd", (1000, 1000), BF16, MI300, "chunks", None, None),
]


@pytest.mark.parametrize(("op", "sizes", "dtype", "target", "name", "other", "why"), PLANS)
def test_each_plan_has_its_shape_and_reasons(explained, op, sizes, dtype, target, name, other, why):
    found = explained(op, sizes, dtype, target)
    assert found.plan == name
    if other is not None:
        assert why in found.refused[other]
    assert name not in found.refused
    assert all(found.refused.values())
    plans = {
        "matmul": config.MATMUL_PLANS,
        "linear_mse": config.LINEAR_MSE_PLANS,
        "linear_mse_fit": config.LINEAR_MSE_FIT_PLANS,
        "linear_mse_models": config.LINEAR_MSE_MODELS_PLANS,
        "mse": config.MSE_PLANS,
    }
    assert {name, *found.refused, *found.rest} == set(plans.get(op, config.STEP_PLANS))
    text = "\n".join(found.lines())
    assert f"plan {name}: " in text
    assert all(f"{key} {value}" in text for key, value in found.config.items())


def test_every_plan_is_shown_above():
    assert {plan for op, *_, plan, _, _ in PLANS if op == "matmul"} == set(config.MATMUL_PLANS)
    assert {plan for op, *_, plan, _, _ in PLANS if op == "linear_mse"} == set(config.LINEAR_MSE_PLANS)


@pytest.mark.parametrize(
    ("constant", "value", "op", "sizes", "plan"),
    [
        ("ELEMENTWISE_MAX_K", 1, "matmul", (40960, 2, 2), "outer"),
        ("LARGE_TILES", 2000, "matmul", (4096, 4096, 4096), "gemm"),
        ("DOT_MIN_OUTPUTS", 1, "linear_mse", (8192, 512, 1), "dot"),
        ("MSE_BLOCK", 512, "mse", (1000, 1000), "flat"),
        ("CHUNK", 512, "adam", (1000, 1000), "chunks"),
    ],
)
def test_a_constant_of_config_is_what_explain_shows(explained, monkeypatch, constant, value, op, sizes, plan):
    before = list(explained(op, sizes, BF16).lines())
    monkeypatch.setattr(config, constant, value)
    after = explained(op, sizes, BF16)
    assert list(after.lines()) != before
    assert after.plan == plan


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # the command compiles all the same
    command = [sys.executable, "-m", "gradkernels", "explain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_command_compiles_what_a_call_launches():
    done = run("linear_mse", "8192x512x1", "--dtype", "bfloat16", "--target", "sm_90", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first, second = found["launches"]["loss, gradients of weight and bias"]
    acc = torch.float32
    assert found["plan"] == "chunks"
    assert first["kernel"] == "_linear_mse_chunks_kernel"
    assert first["programs"] == config.linear_mse_programs(8192, 512, 1, 2, acc) == 132
    assert first["constants"]["CHUNK"] == str(found["config"]["CHUNK"])
    assert 32 < first["registers"] <= 255
    assert first["spills"] == 0
    # X, W, Y and the bias in 16 bits, and the partial sums in float32, which the second kernel reads.
    partials = 132 * (512 + 2) * 4
    assert first["bytes"] == 2 * (8192 * 512 + 512 + 8192 + 1) + partials
    assert second["bytes"] == partials + 4 * (512 + 1) + 2


def test_wrong_sizes_are_refused(capsys):
    done = run("linear", "64x64")  # a function of matmul
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m gradkernels explain [-h]")
    assert "explain: error: matmul takes sizes [B x] M x K x N, got 64x64" in done.stderr
    assert "explain: error: mse: no size may be 0, got 64x0" in run("mse", "64x0").stderr


def test_without_triton_it_says_so(monkeypatch, capsys):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["explain", "mse", "100"]) == 2
    assert "needs the triton package" in capsys.readouterr().out
