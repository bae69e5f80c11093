"""Paint a photograph with 2-D Gaussians, and leave alone those that a step does not see.

    python examples/splats.py                     a flower, 1,024 Gaussians, 600 steps; writes splats.png
    python examples/splats.py --steps 200 --output /tmp

A step renders one tile of the picture, so most Gaussians have no part in it. Adam moves them all the same, along
their old momentum, and ages their moments. With ``stacked=True`` the rows of the parameters are B models of their
own: ``optimizer.active`` tells which of them take the step, and each row counts its own steps, as the optimizers of
Gaussian splatting do.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import torch
from gradkernels import FusedAdam, mse_loss
from matplotlib import pyplot
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn import functional

SIZE, TILE = 96, 24  # pixels along a side
RATES = {"centre": 0.3, "log_scale": 0.03, "angle": 0.03, "colour": 0.03}

Gaussians = dict[str, Tensor]  # centre (B, 2), log_scale (B, 2), angle (B, 1), colour (B, 3)


def photograph() -> Tensor:
    """Return (SIZE, SIZE, 3), between 0 and 1."""
    pixels = torch.tensor(load_sample_image("flower.jpg"), dtype=torch.float32)[:384, 150:534] / 255
    return functional.adaptive_avg_pool2d(pixels.permute(2, 0, 1), SIZE).permute(1, 2, 0).contiguous()


def grid(side: int) -> Gaussians:
    """Return side x side grey Gaussians."""
    spacing = SIZE / side
    places = (torch.arange(side) + 0.5) * spacing
    start = {
        "centre": torch.cartesian_prod(places, places),
        "log_scale": torch.full((side**2, 2), math.log(spacing / 2)),
        "angle": torch.zeros(side**2, 1),
        "colour": torch.full((side**2, 3), 0.5),
    }
    return {name: values.requires_grad_() for name, values in start.items()}


def render(gaussians: Gaussians, rows: Tensor, pixels: Tensor) -> Tensor:
    """Return the colours (P, 3) at pixels (P, 2): the mean of the Gaussians' colours, weighted by their heights."""
    centre, log_scale, angle, colour = (values[rows] for values in gaussians.values())
    down, right = (pixels[:, None] - centre).unbind(-1)
    cos, sin = angle.cos().T, angle.sin().T
    along, across = (
        torch.stack([cos * down + sin * right, cos * right - sin * down]) / log_scale.exp().T[:, None]
    )
    height = torch.exp(-0.5 * (along.square() + across.square()))
    return height @ colour / (height.sum(1, keepdim=True) + 1e-3)


@torch.no_grad()
def visible(gaussians: Gaussians, corner: Tensor) -> Tensor:
    """Return which Gaussians reach into a tile (B,), within three standard deviations."""
    reach = 3 * gaussians["log_scale"].amax(1, keepdim=True).exp()
    centre = gaussians["centre"]
    return ((centre > corner - reach) & (centre < corner + TILE + reach)).all(1)


def tile_pixels(corner: Tensor) -> Tensor:
    return corner + torch.cartesian_prod(torch.arange(TILE), torch.arange(TILE))


@torch.no_grad()
def whole(gaussians: Gaussians) -> Tensor:
    """Return the picture, tile by tile."""
    picture = torch.empty(SIZE, SIZE, 3)
    for corner in torch.cartesian_prod(*[torch.arange(0, SIZE, TILE)] * 2):
        rows = visible(gaussians, corner).nonzero()[:, 0]
        i, j = corner.tolist()
        colours = render(gaussians, rows, tile_pixels(corner) + 0.5)
        picture[i : i + TILE, j : j + TILE] = colours.reshape(TILE, TILE, 3)
    return picture


def psnr(picture: Tensor, target: Tensor) -> float:
    """Return the peak signal to noise ratio, in dB."""
    return -10 * math.log10((picture - target).square().mean().item())


def fit(
    target: Tensor,
    side: int,
    steps: int,
    optimizer_class: Callable[..., torch.optim.Optimizer],
    **options: object,
) -> tuple[Gaussians, torch.optim.Optimizer, float]:
    """Return the Gaussians after training, their optimizer, and the seconds of its steps."""
    gaussians = grid(side)
    groups = [{"params": [values], "lr": RATES[name]} for name, values in gaussians.items()]
    optimizer = optimizer_class(groups, **options)
    generator = torch.Generator().manual_seed(0)
    seconds = 0.0
    for _ in range(steps):
        # Places beyond the border move back to it: the corners are seen as often as the middle.
        corner = torch.randint(-TILE // 2, SIZE - TILE // 2, (2,), generator=generator).clamp(0, SIZE - TILE)
        active = visible(gaussians, corner)
        i, j = corner.tolist()
        wanted = target[i : i + TILE, j : j + TILE].reshape(-1, 3)
        optimizer.zero_grad()
        mse_loss(render(gaussians, active.nonzero()[:, 0], tile_pixels(corner) + 0.5), wanted).backward()
        started = time.perf_counter()
        if options.get("stacked"):
            optimizer.active = active
        optimizer.step()
        seconds += time.perf_counter() - started
    return gaussians, optimizer, seconds


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=32, help="Gaussians along a side (%(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of splats.png")
    given = parser.parse_args(arguments)
    if given.side < 1 or given.steps < 1:
        parser.error("--side and --steps take at least 1")

    target = photograph()
    pictures = {"photograph": target, "before": whole(grid(given.side))}
    ratios = {"before": psnr(pictures["before"], target)}
    for name, how in (
        ("FusedAdam, the rows in sight", {"optimizer_class": FusedAdam, "stacked": True}),
        ("torch.optim.Adam, all rows", {"optimizer_class": torch.optim.Adam}),
    ):
        gaussians, optimizer, seconds = fit(target, given.side, given.steps, **how)
        pictures[name] = whole(gaussians)
        ratios[name] = psnr(pictures[name], target)
        print(f"{name}: {ratios[name]:.2f} dB, {seconds:.2f} s in {given.steps} optimizer steps")
        if "stacked" in how:
            counts = optimizer.state[gaussians["centre"]]["step"]
            print(f"  a row took part in {counts.min():.0f} to {counts.max():.0f} of them")

    figure, axes = pyplot.subplots(1, 4, figsize=(14, 3.8), layout="constrained")
    for place, (name, picture) in zip(axes, pictures.items(), strict=True):
        place.imshow(picture.clamp(0, 1).numpy(), interpolation="nearest")
        place.set_title(f"{name}: {ratios[name]:.1f} dB" if name in ratios else name, fontsize=10)
        place.axis("off")
    given.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.output / "splats.png", dpi=100)
    pyplot.close(figure)
    return ratios


if __name__ == "__main__":
    main()
