"""The choice of a kernel and its tile, a pure function: no GPU, no tensors."""

import itertools
import json

import pytest
import torch

pytest.importorskip("triton")

from gradkernels.triton import config
from gradkernels.triton.config import MatmulConfig, Operands, Target, matmul_plan

H100, A100, B200, MI300 = Target("cuda", 90), Target("cuda", 80), Target("cuda", 100), Target("hip", "gfx942")
RTX5090 = Target("cuda", 120)  # 99 KiB of shared memory for a program
ALIGNED = Operands(aligned=True, descriptors=True, columns=False)
ODD = Operands(aligned=False, descriptors=False, columns=False)
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("arch", [90, 100, 103, 110, 120])
def test_float64_has_one_tile_on_nvidia(arch):
    """Triton 3.6 fails on sm_100 where a product of float64 asks for tf32, which no kernel does."""
    target = Target("cuda", arch)
    assert config.matmul(FP64, 256, 256, 256, target) == config.matmul(FP64, 256, 256, 256, A100)
    assert config.models_shared(64, 32, FP64, target) == config.models_shared(64, 32, FP64, A100)
    assert config.dot_precision(FP64, target, "tf32") == "ieee"


@pytest.mark.parametrize("dtype", [torch.float16, BF16, FP32, FP64], ids=str)
def test_targets_and_weights_of_shared_rows_fit_beside_the_errors(dtype):
    """Of each at most 32 elements a thread: with 64 a float32 target and its weights spilt 344 words on sm_90."""
    for D in (1, 16, 17, 64):
        chosen = config.models_shared(1000, D, dtype, H100)
        assert isinstance(chosen, str) or 32 * 32 * chosen.num_warps >= chosen.ROWS * chosen.OUTPUTS


@pytest.mark.parametrize("sizes", [(64, 64, 1), (64, 64, 8), (4096, 4096, 4096)])
def test_a_sum_over_matrices_is_a_gemm(sizes):
    assert matmul_plan(FP32, sizes, 1, 100, ALIGNED, H100).name == "gemm"


@pytest.mark.parametrize(("target", "size"), [(H100, 32), (MI300, 64), (Target("hip", "gfx1100"), 32)])
def test_the_size_of_a_warp(target, size):
    assert config.warp_size(target) == size
    assert config.warps(target) * size == 128


def test_tiles_are_legal_everywhere():
    """Powers of two, at least 16 wide for a dot product, at most 64 accumulators of a thread and a warp limit."""
    sizes = (1, 15, 16, 17, 64, 65, 1000, 65536)
    for target, dtype, operands in itertools.product(
        (H100, A100, B200, MI300, RTX5090), (BF16, FP32, FP64), (ALIGNED, ODD)
    ):
        for shape in itertools.product(sizes, repeat=3):
            plan, tile = matmul_plan(dtype, shape, 1, 1, operands, target)[:2]
            assert all(block & (block - 1) == 0 for block in tile[:3])
            threads = tile.num_warps * (64 if target is MI300 else 32)
            if plan in ("gemm", "gemm_tma"):
                assert min(tile[:3]) >= 16
                assert 128 * threads >= tile.BLOCK_M * tile.BLOCK_N
            if target is RTX5090:
                staged = (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * dtype.itemsize * tile.num_stages
                assert staged <= 99 << 10
            if plan == "gemv":
                assert tile.BLOCK_N == 1
                assert tile.BLOCK_M * tile.BLOCK_K == 4096
            if plan == "outer":
                assert tile.BLOCK_K == 1


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("target", [H100, A100, B200, MI300], ids=lambda target: str(target.arch))
def test_tiles_and_warps_of_linear_models_are_powers_of_two(target, dtype):
    """Triton takes no others."""
    acc = FP64 if dtype == FP64 else FP32
    counts = {"CHUNKS", "STAGES", "num_stages", "maxnreg"}
    rows, inputs = (1, 5, 10, 31, 1000), (1, 17, 100, 129, 257, 513, 1025, 5000)
    for K, D, N in itertools.product((*range(1, 18), 40), inputs, rows):
        for chosen in (
            config.linear_mse_chunks(K, D, dtype.itemsize, acc, target),
            config.linear_mse_dot(K, D, dtype, target),
            config.linear_mse_product(dtype, N, K, D, True, True, True, target)[0],
            config.models_chunks(K, D, dtype.itemsize, acc, N, target),
            config.models_shared(K, D, dtype, target),
            config.models_tile(dtype, N, K, D, True, target),
            config.linear_mse_fit(N, K, D, dtype, target).tile,
        ):
            if chosen is None or isinstance(chosen, str):
                continue
            options = dict(chosen if isinstance(chosen, dict) else chosen._asdict())
            options |= options.pop("compiled", {})
            assert all(n & (n - 1) == 0 < n for key, n in options.items() if key not in counts), (
                K,
                D,
                N,
                chosen,
            )


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_large_products_keep_the_chip_busy(dtype):
    """Whatever has a tile of 128 by 128 for each of 132 SMs launches 112 programs at least."""
    sizes = (*range(128, 4097, 128), 8192, 16384, 65536)
    fewest = 132
    for M, N in itertools.product(sizes, repeat=2):
        if M // 128 * (N // 128) >= 132:
            tile = matmul_plan(dtype, (M, N, 512), 1, 1, ALIGNED, H100).tile
            product, _ = config.linear_mse_product(dtype, M, N, 512, False, True, True, H100)
            for chosen in (tile, product):
                programs = -(-M // chosen.BLOCK_M) * -(-N // chosen.BLOCK_N)
                fewest = min(fewest, programs)
    assert fewest >= 112


@pytest.mark.parametrize(
    ("sizes", "block_n"),
    [
        ((8192, 8192, 8192), 256),
        ((4096, 4096, 4096), 256),
        ((3072, 3072, 3072), 128),  # 288 wide tiles are three waves, the last of 24
        ((4096, 512, 512), 128),
        ((2048, 1024, 1024), 128),
        ((8192, 256, 4096), 128),
        ((1024, 2048, 4096), 128),
    ],
)
def test_columns_of_a_large_tile(sizes, block_n):
    assert block_n == matmul_plan(BF16, sizes, 1, 1, ALIGNED, H100).tile.BLOCK_N


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_a_step_loads_16_bytes_a_thread(itemsize):
    """Elements, and with them random numbers and sums, lie the same on every chip; registers are NVIDIA's option."""
    for target in (H100, A100, B200, MI300):
        chosen = config.optimizer(itemsize, target)
        assert chosen["BLOCK"] * itemsize == 16 * config.warp_size(target) * chosen["num_warps"] == 2048
        assert ("maxnreg" in chosen) == (target.backend == "cuda" and itemsize != 4)


def test_registers_of_the_fused_loss():
    """Two programs of eight warps, or four of four warps, on an SM where the gradients a thread holds allow it."""
    for K, D, most in ((1, 4096, 128), (1, 8192, 128), (1, 16384, 255), (1, 256, 128), (4, 1024, 255)):
        chunks = config.linear_mse_chunks(K, D, 2, FP32, A100)
        assert chunks.compiled["maxnreg"] == most
        assert chunks.compiled["maxnreg"] * chunks.compiled["num_warps"] * 32 <= 65536
    assert "maxnreg" not in config.linear_mse_chunks(1, 4096, 2, FP32, MI300).compiled


@pytest.mark.parametrize("acc", [FP32, torch.float64])
def test_a_row_of_one_warp_keeps_its_registers(acc):
    """A row, its weights and their gradient, three words of D / 32 a thread, and what else a loop needs."""
    for D in (256, 512, 1024, 1280, 2048):
        models = config.models_chunks(1, D, 4, acc, 1000, A100)
        for chunks in (config.linear_mse_chunks(1, D, 4, acc, A100), models):
            if chunks.compiled["num_warps"] <= 4:
                held = 3 * chunks.CHUNK * chunks.CHUNKS // 32 * acc.itemsize // 4
                assert held + 32 <= chunks.compiled["maxnreg"], D
                assert held > 96 or chunks.compiled["maxnreg"] < 255, (
                    D
                )  # more than one program of eight an SM


def test_splits_depend_on_the_shape_alone():
    assert config.splits(tiles=1, steps=1000, plan="gemm") == 125
    assert config.splits(tiles=1, steps=100_000, plan="gemm") == config.FULL_GRID
    assert config.splits(tiles=config.FULL_GRID, steps=100_000, plan="gemm") == 1
    assert config.splits(tiles=10, steps=7, plan="gemm") == 1
    assert config.splits(tiles=1, steps=0, plan="gemv") == 1


def test_tuned_tiles_are_read_by_device_name(tmp_path, monkeypatch):
    from gradkernels.triton import matmul

    monkeypatch.setattr(config, "TUNED", tmp_path)
    monkeypatch.setattr(config, "name_of", lambda device: "Some GPU 80/GB")
    monkeypatch.setattr(matmul, "_plans", {})
    monkeypatch.setattr(matmul, "launch", lambda *args, **options: launches.append(options))
    config.tuned.cache_clear()
    key = config.matmul_key(FP32, (100, 65, 40), "gemm")
    assert key == "float32 128 128 64 gemm"
    file = tmp_path / config.file_name("Some GPU 80/GB")
    assert file.name == "Some_GPU_80_GB.json"
    file.write_text(json.dumps({"device": "Some GPU 80/GB", "matmul": {key: [32, 32, 16, 2, 1]}}))
    launches: list[dict] = []
    for M in (100, 300):
        matmul.matmul_forward(torch.ones(M, 40), torch.ones(40, 65), None, [], FP32)
    config.tuned.cache_clear()
    assert [launch["BLOCK_M"] for launch in launches] == [32, 64]
    assert config.tuned("a GPU that nobody tuned") == {}
    assert MatmulConfig(32, 32, 16, 2, 1)._asdict().items() <= launches[0].items()


def test_the_tuner_keeps_what_is_faster_and_as_exact(monkeypatch):
    """By a clock of its own: the second tile is fastest, and the third faster still but wrong."""
    from gradkernels.triton import matmul

    from bench.reports import tune

    times = iter([1.0, 0.99, 0.5, 0.1])
    tiles = [(32, 32, 32, 4, 1), (16, 16, 32, 4, 1), (16, 32, 32, 4, 1)]
    monkeypatch.setattr(tune, "TILES", tiles)
    monkeypatch.setattr(tune, "_median", lambda call: next(times))
    real = matmul.matmul_forward
    calls = []

    def forward(*arguments):
        calls.append(arguments)
        return real(*arguments) + (1.0 if len(calls) == 4 else 0.0)

    monkeypatch.setattr(matmul, "matmul_forward", forward)
    key, tile = tune.tune_product((40, 40, 40), torch.float32, torch.device("cpu"))
    assert key == "float32 64 64 64 gemm"
    assert tile == MatmulConfig(16, 16, 16, 4, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_the_tuner_says_that_it_needs_a_gpu(capsys):
    from bench.__main__ import main

    assert main(["tune"]) == 2
    assert "needs a CUDA or ROCm GPU" in capsys.readouterr().err
