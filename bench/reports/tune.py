"""Time the tiles of large matrix products on this GPU and keep the best: ``python -m bench tune``.

Writes ``kernels/triton/tuned/<device name>.json``, which the package reads from then on. A tile is kept only if
its result is as exact as the default's and it is at least 3 % faster than it in the median. The files say with
what they were measured; a sum's order, and so its last bits, may depend on the tile.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192), (8192, 1024, 4096), (65536, 1024, 1024), (4096, 4096, 512))
# BLOCK_M, BLOCK_N, BLOCK_K (of 16-bit operands; half of it for float32), warps, stages
TILES = (
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 4, 4),
    (128, 128, 128, 8, 3),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
)
MARGIN = 0.97


def _median(call: Any) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=50, rep=200, return_mode="median")


def tune_product(sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[str, Any]:
    """Return the key of a class of products and the best tile for it; None if the default is best."""
    from gradkernels.triton import config
    from gradkernels.triton import matmul as module

    M, N, K = sizes
    left = torch.randn(M, K, device=device, dtype=dtype)
    right = torch.randn(K, N, device=device, dtype=dtype)
    choose, chosen = config.matmul_plan, []

    def product() -> torch.Tensor:
        return module.matmul_forward(left, right, None, [], dtype)

    def timed(tile: Any) -> tuple[float, float]:
        def plan(*arguments: Any) -> Any:
            default = choose(*arguments)
            chosen.append(default)
            return default if tile is None else default._replace(tile=tile)

        config.matmul_plan = plan
        module._plans.clear()
        try:
            error = (product().double() - left.double() @ right.double()).abs().max().item()
            return _median(product), error
        finally:
            config.matmul_plan = choose
            module._plans.clear()

    limit, allowed = timed(None)
    name, best = chosen[0].name, None
    for BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages in TILES:
        block_k = BLOCK_K if dtype.itemsize == 2 else BLOCK_K // 2
        tile = config.MatmulConfig(BLOCK_M, BLOCK_N, block_k, num_warps, num_stages)
        try:
            milliseconds, error = timed(tile)
        except Exception as problem:  # too much shared memory, or a tile this compiler refuses
            print(f"  {tuple(tile)}: {type(problem).__name__}")
            continue
        print(f"  {tuple(tile)}: {milliseconds:.4f} ms")
        if error <= 2 * allowed and milliseconds < MARGIN * limit:
            limit, best = milliseconds / MARGIN, tile
    return config.matmul_key(dtype, sizes, name), best


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    parser.add_argument("--dtype", action="append", help="default: bfloat16 and float32")
    parser.add_argument("--out", type=Path, help="the folder (default: the package's own)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("python -m bench tune: needs a CUDA or ROCm GPU", file=sys.stderr)
        return 2
    import triton
    from gradkernels.triton import config

    device = torch.device("cuda", torch.cuda.current_device())
    name = config.name_of(device)
    folder = options.out or config.TUNED
    path = folder / config.file_name(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    config.TUNED = Path()  # the default to beat is the untuned one
    config.tuned.cache_clear()
    found = {}
    for dtype in (getattr(torch, each) for each in options.dtype or ("bfloat16", "float32")):
        for sizes in SHAPES:
            print(f"{name}, {dtype}, M, N, K = {sizes}")
            key, tile = tune_product(sizes, dtype, device)
            if tile is not None:
                found[key] = list(tile)
    record = {"device": name, "torch": torch.__version__, "triton": triton.__version__, "matmul": found}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(found)} tiles in {path}")
    return 0
