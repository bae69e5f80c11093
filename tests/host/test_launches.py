"""Every kernel through Triton's own compiler and launcher, down to what the driver is handed.

The interpreter judges values; this judges all that is around them: that the first launch of a kernel works,
which variant it takes, its grid, device, stream, and the value of each parameter.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

import pytest

pytest.importorskip("triton")

from bench.reports.aot import AOT_CASES, every_case

from ..cases import each_kind_once
from .calls import ALL_CASES, DTYPES, LAYOUTS, OPTIMIZERS, WARMUPS
from .standin import compiler
from .worker import Worker

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C compiler (gcc, clang or $CC)")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    made = Worker(tmp_path_factory.mktemp("standin") / "log")
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One whose launches go through ``kernel[grid]``."""
    made = Worker(tmp_path_factory.mktemp("standin") / "log", GRADKERNELS_PLAIN_LAUNCH="1")
    yield made
    made.close()


def sampled(
    cells: Iterable[tuple[Any, ...]], kinds: Callable[..., Iterable[Any]], name: Callable[..., str]
) -> list[Any]:
    """All cells; a seeded sample that has each of ``kinds(*cell)`` at least once, and the rest marked full."""
    return [
        pytest.param(*cell, marks=() if new else pytest.mark.full, id=name(*cell))
        for cell, new in each_kind_once(cells, kinds)
    ]


@pytest.mark.parametrize(
    ("number", "dtype", "layout"),
    sampled(
        product(range(len(ALL_CASES)), DTYPES, LAYOUTS),
        lambda number, dtype, layout: [
            number,
            (ALL_CASES[number].op, dtype),
            (ALL_CASES[number].op, layout),
        ],
        lambda number, dtype, layout: f"{ALL_CASES[number]} {dtype} {layout}",
    ),
)
def test_an_op_and_its_derivatives(worker: Worker, number: int, dtype: str, layout: str) -> None:
    """Forward, backward and double backward, at the first call and at the second."""
    assert worker.call("op", number, dtype, layout)


@pytest.mark.parametrize(
    ("number", "dtype"),
    sampled(
        product(range(len(ALL_CASES)), DTYPES),
        lambda number, dtype: [ALL_CASES[number].op, dtype],
        lambda number, dtype: f"{ALL_CASES[number]} {dtype}",
    ),
)
def test_a_repeated_call(worker: Worker, number: int, dtype: str) -> None:
    """Replays launch what the launchers would, with the tensors of the call at hand, in every layout in turn."""
    assert sum(worker.call("repeated", number, dtype))


@pytest.mark.parametrize(
    ("kind", "found"), [("no leaf", True), ("leaf", True), ("inference", True), ("expanded leaf", False)]
)
def test_a_call_that_repeats_skips_its_checks(worker: Worker, kind: str, found: bool) -> None:
    """In inference mode too; not where a weight and its transpose look the same: their gradients do not."""
    assert worker.call("shortcuts", kind) == [found]


@pytest.mark.parametrize(("rows", "batch_size"), [(1, None), (5, 1), (5, 2)])
def test_rounds_of_training(worker: Worker, rows: int, batch_size: int | None) -> None:
    """Of one row too: Triton makes constants of arguments that are 1, which the interpreter does not."""
    for models in (1, 2):
        assert worker.call("fit", rows, batch_size, models) == ["_linear_mse_fit_kernel"] * 2


def test_what_is_kept_of_many_shapes_is_bounded(worker: Worker) -> None:
    assert max(worker.call("many_shapes", 1200)) <= 512 + 20


@pytest.mark.parametrize(
    ("number", "dtype"),
    sampled(
        every_case(),
        lambda number, dtype: [number, (AOT_CASES[number].op, dtype)],
        lambda number, dtype: f"{AOT_CASES[number].op} {AOT_CASES[number].shapes} {dtype}",
    ),
)
def test_a_class_of_shapes(worker: Worker, number: int, dtype: str) -> None:
    """The large shapes of the compile report, where kernels take tensor maps and split sums."""
    assert worker.call("aot_case", number, dtype)


@pytest.mark.parametrize(
    ("key", "dtype"),
    sampled(
        (
            (key, dtype)
            for key, dtype in product(OPTIMIZERS, DTYPES)
            if ("stochastic" not in key or dtype == "bfloat16")
            and ("masters" not in key or dtype in ("float16", "bfloat16"))
        ),
        lambda key, dtype: [key, (key.split()[0], dtype)],
        lambda key, dtype: f"{key} {dtype}",
    ),
)
def test_an_optimizer(worker: Worker, key: str, dtype: str) -> None:
    """Steps whose kernel is handed the present addresses of gradients and states, the replays among them too."""
    assert worker.call("optimizer", key, dtype)


def test_steps_under_guards_of_several_forms(worker: Worker) -> None:
    """A replay serves the guard it was recorded for, down to the alignment of each of its tensors."""
    assert worker.call("guarded_steps") == [1] * 5


@pytest.mark.parametrize("op", WARMUPS)
def test_after_warmup_nothing_is_loaded(worker: Worker, op: str) -> None:
    assert worker.call("warmup", op)


def test_every_kind_of_argument(worker: Worker) -> None:
    """Where Triton specialises on a value or an address and where not: each launch takes the variant it would."""
    assert len(worker.call("arguments")) == 64


@pytest.mark.parametrize(
    "call",
    [
        ("op", 0, "float32", "contiguous"),  # there a stride of 1 in a record is a constant
        ("op", len(ALL_CASES) - 1, "float32", "contiguous"),
        ("aot_case", 0, "bfloat16"),
        ("optimizer", "AdamW masters guard", "bfloat16"),
        ("arguments",),
        ("devices_and_streams",),
    ],
    ids=lambda call: call[0],
)
def test_plain_launches_are_the_same(worker: Worker, plain_worker: Worker, call: tuple[Any, ...]) -> None:
    """With GRADKERNELS_PLAIN_LAUNCH=1: kernels, grids, devices; the recorder compares parameters and streams."""
    columns = 1 if call[0] == "devices_and_streams" else 5  # a stream is an address in one process
    ours, plain = ([launch[:columns] for launch in each.call(*call)] for each in (worker, plain_worker))
    assert ours == plain


def test_tensor_maps(worker: Worker) -> None:
    assert len(worker.call("tensor_map")) == 3


def test_devices_and_streams(worker: Worker) -> None:
    """Each device's launches go to its stream of the time, whichever device is current."""
    launches = worker.call("devices_and_streams")
    assert [device for device, _ in launches] == [0, 0, 1, 1, 1, 1, 0, 0]
    own = [stream for _, stream in launches]
    assert own == [own[0], own[1], own[2], own[3], own[3], own[5], own[1], own[7]]
    assert len(set(own)) == 6


def test_what_a_driver_refuses(worker: Worker) -> None:
    """The stand-in accepts no launch that a driver would not."""
    none, unknown, stream, *grids_and_maps = worker.call("refused")
    assert "None" in none
    assert unknown == "launch of an unknown function 0x4d2"
    assert stream.endswith("no stream of device 0")
    assert [said.removeprefix("launch of probe over a ").split(" at 0x")[0] for said in grids_and_maps] == [
        "grid of 1, 65536, 1",
        "grid of 1, 1, 65536",
        "tensor map: address",
        "tensor map: stride of 244 bytes",
        "tensor map: stride of 128 bytes over 64 elements",
        "tensor map: size 0",
        "tensor map: box of 512",
        "tensor map: box of 256 bytes at swizzle 3",
    ]
