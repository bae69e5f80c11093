"""The launch cache, compiling for a chip that is not there: the driver only notes what it is given.

Each script runs in a process of its own, without Triton's interpreter.
"""

import json
import os
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ..helpers import python

ROOT = Path(__file__).parents[2]

PREAMBLE = """
import json, torch, triton, triton.language as tl
from bench.reports.aot import null_driver
from gradkernels.triton import launch as module
from gradkernels.triton.launch import launch

calls = []
driver = null_driver("sm_90", [])
driver.launcher_cls = lambda source, metadata: lambda *args: calls.append((metadata.hash, args))
triton.runtime.driver.set_active(driver)
CPU = torch.device("cpu")

@triton.jit(do_not_specialize=["m"])
def kernel(x_ptr, out_ptr, n, m, scale, sizes, BLOCK: tl.constexpr, TWICE: tl.constexpr = False):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n + m, other=0.0) * scale
    for dim in tl.static_range(len(sizes)):
        x += sizes[dim]
    tl.store(out_ptr + i, x, mask=i < n + m)
"""


def run(script: str, path: Path, cache: bool = True):
    """What the script prints as JSON in its last line."""
    file = path / "script.py"  # Triton reads the source of a kernel from its file
    file.write_text(textwrap.dedent(PREAMBLE) + textwrap.dedent(script))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return json.loads(python(file, env=environment, cwd=ROOT).splitlines()[-1])


def test_offsets_of_32_bits_serve_no_tensor_of_2_gib(tmp_path):
    """On AMD Triton compiles a kernel whose offsets have 32 bits where the tensor's memory allows it."""
    compiled = run(
        """
        driver = null_driver("gfx942", [])
        driver.launcher_cls = lambda source, metadata: lambda *args: calls.append((metadata.hash, args))
        triton.runtime.driver.set_active(driver)
        x, small, large = (torch.empty(size, device="meta") for size in (64, 2**29 - 1, 2**29))
        for given in (x, small, large, large[:64], x):
            launch(kernel, (4,), given, x, 5, 5, 0.5, (), device=CPU, BLOCK=16)
        narrow = [found.asm["ttir"].count("tt.pointer_range = 32") for found, _ in module._compiled.values()]
        hashes = [key for key, _ in calls]
        print(json.dumps([[hashes.index(key) for key in hashes], narrow]))
        """,
        tmp_path,
    )
    assert compiled == [[0, 0, 2, 2, 0], [2, 1]]  # x is small


def test_a_record_counts_as_its_fields(tmp_path):
    """A NamedTuple's tensors and integers are specialised as if passed alone, but not those of tuples inside it;
    under do_not_specialize none of its integers is."""
    cached, fresh, loads = run(
        """
        from typing import NamedTuple
        class Operand(NamedTuple):
            ptr: torch.Tensor
            strides: tuple
            column: int
        class Sizes(NamedTuple):
            rows: int
            columns: int
        @triton.jit(do_not_specialize=["sizes"])
        def records(x, out_ptr, sizes, more, BLOCK: tl.constexpr):
            i = tl.arange(0, BLOCK)
            y = tl.load(x.ptr + x.strides[0] // 16 * 16 + i * x.column)
            tl.store(out_ptr + i, y + sizes.columns + more[0].rows)
        x, out = torch.zeros(4096), torch.zeros(1024)
        def counts(fresh):
            calls.clear()
            def compiled(x, column=1, stride=5, columns=7, more=9):
                if fresh:
                    module._compiled.clear()
                args = (Operand(x, (stride,), column), out, Sizes(3, columns), (Sizes(more, 1),))
                launch(records, (1,), *args, device=CPU, BLOCK=1024)
                return len({key for key, _ in calls})
            return {
                "first": compiled(x),
                "stride inside": compiled(x, stride=1) + compiled(x, stride=16),
                "unspecialised": compiled(x, columns=1) + compiled(x, columns=16),
                "tuple of records": compiled(x, more=1) + compiled(x, more=16),
                "misaligned": compiled(x[1:]),
                "dtype": compiled(x.half()),
                "other column": compiled(x, column=3),
                "column of sixteen": compiled(x, column=32),
                "64 bits unspecialised": compiled(x, columns=2**40),
                "64 bits in a tuple of records": compiled(x, more=2**40),
                "again": compiled(x, column=5),
            }
        cached = counts(fresh=False)
        from bench.reports.aot import Row, _nvidia
        row = Row("", "", "", "", "")
        module._compiled.clear()
        launch(records, (1,), Operand(x, (5,), 1), out, Sizes(3, 7), (Sizes(9, 1),), device=CPU, BLOCK=1024)
        _nvidia(next(iter(module._compiled.values()))[0], row)
        print(json.dumps([cached, counts(fresh=True), row.loads]))
        """,
        tmp_path,
    )
    assert list(cached.values()) == [1, 2, 2, 2, 2, 3, 4, 5, 6, 7, 7], cached
    assert fresh == cached
    assert loads == {"128": 2}, "a pointer inside a record has lost its alignment"


def test_profilers_see_each_launch(tmp_path):
    seen = run(
        """
        names = []
        triton.knobs.runtime.launch_enter_hook.add(lambda metadata: names.append(metadata.get()["name"]))
        driver.launcher_cls = lambda source, metadata: lambda *args: args[7](args[6])
        x = torch.zeros(64)
        for _ in range(3):
            launch(kernel, (1,), x, x, 5, 6, 0.5, (), device=CPU, BLOCK=16)
        print(json.dumps(names))
        """,
        tmp_path,
    )
    assert seen == ["kernel"] * 3


def test_other_devices_and_empty_grids(tmp_path):
    """The tensors' device is made current if it is not; an empty grid reaches no driver."""
    events = run(
        """
        from contextlib import contextmanager
        events = []
        driver.get_current_device = lambda: 0
        driver.launcher_cls = lambda source, metadata: lambda *args: events.append("run")
        @contextmanager
        def guard(device):
            events.append(f"enter {device.index}")
            yield
            events.append("leave")
        torch.cuda.device = guard
        x = torch.zeros(64)
        for device, grid in (("cuda:0", (1,)), ("cuda:1", (1,)), ("cuda:1", (3, 0))):
            launch(kernel, grid, x, x, 5, 6, 0.5, (), device=torch.device(device), BLOCK=16)
        print(json.dumps(events))
        """,
        tmp_path,
    )
    assert events == ["run", "enter 1", "run", "leave"]


def test_misuse_is_named(tmp_path):
    messages = run(
        """
        messages = []
        x = torch.zeros(64)
        for args in ((x, x, 5, 6, 0.5, (), 16), (x, x, "5", 6, 0.5, ())):
            try:
                launch(kernel, (1,), *args, device=CPU)
            except TypeError as error:
                messages.append(str(error))
        print(json.dumps(messages))
        """,
        tmp_path,
    )
    assert messages == [
        "kernel: constexpr parameter BLOCK was passed by position",
        "kernel: parameter n is a str",
    ]


PRODUCT = """
    M, K, N = (random.choice([random.randint(1, 20), random.randint(1, 5000)]) for _ in range(3))
    matmul.matmul_forward(meta(M, K), meta(K, N), meta(N), [], torch.float32)
"""
LOSS = """
    x, y = meta(random.randint(1, 2000), random.randint(1, 2000)), None
    y = torch.empty_like(x)
    mse.mse_forward(x, y, None, "mean", 0, torch.float32)
    mse.mse_backward(meta(), x, y, None, "mean", 0, [True, False, False])
"""
FUSED = """
    N, D, K = random.randint(1, 100000), random.randint(1, 3000), random.choice([1, 1, random.randint(1, 40)])
    linear_mse.linear_mse_forward(
        meta(N, D), meta(K, D), meta(N, K), meta(K), None, "mean", [False, True, True], torch.float32
    )
"""


@pytest.mark.parametrize(
    ("call", "after_200", "after_2000"),
    [
        pytest.param(PRODUCT, 40, 50, id="matmul"),
        pytest.param(LOSS, 10, 10, id="mse"),
        pytest.param(FUSED, 110, 230, id="linear_mse"),
    ],
)
def test_variants_stay_bounded_over_200_shapes(call: str, after_200: int, after_2000: int, tmp_path) -> None:
    """Jobs of all sizes share few compiled kernels: sizes and strides are run-time values.

    (Those of the fused loss hold a row in registers: one kernel for each number of chunks, K <= 8, and alignment.)
    """
    variants = run(
        f"""
import random
from gradkernels.triton import linear_mse, matmul, mse
class Compiled:
    function = packed_metadata = None
    def run(self, *args): pass
module._compile = lambda kernel, args, options: (Compiled(), ())
def meta(*shape): return torch.empty(shape, device="meta")
random.seed(0)
counts = []
for shape in range(2000):
{call}
    counts.append(len(module._compiled))
print(json.dumps([counts[199], counts[1999]]))
""",
        tmp_path,
    )
    assert variants[0] <= after_200
    assert variants[1] <= after_2000, "still growing"


@pytest.mark.gpu
def test_a_tensor_on_another_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    from gradkernels.triton.matmul import matmul_forward

    x = torch.randn(33, 17, device="cuda:1")
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(matmul_forward(x, x.t(), None, [], torch.float32), x @ x.t())


def test_a_capture_meets_no_kernel_that_is_not_loaded(tmp_path):
    """It is refused before anything is compiled, by an error that says what to do; what is loaded is launched."""
    outcomes = run(
        """
        torch.cuda.is_initialized = lambda: True
        x = torch.zeros(64)
        def call(x, captured):
            torch.cuda.is_current_stream_capturing = lambda: captured
            try:
                launch(kernel, (4,), x, x, 5, 5, 0.5, (), device=CPU, BLOCK=16)
            except RuntimeError as error:
                return str(error)
            return len(calls)
        print(json.dumps([
            call(x, True), len(module._compiled), call(x, False), call(x, True), call(x[1:], True), len(calls),
            call(x[1:], False), call(x[1:], True),
        ]))
        """,
        tmp_path,
    )
    refused, compiled, *launched = outcomes
    assert "kernel is not loaded for arguments like these" in refused
    assert "Make the same call once before the capture" in refused
    assert compiled == 0
    assert launched == [1, 2, refused, 2, 3, 4]
