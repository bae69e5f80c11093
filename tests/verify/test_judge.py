"""The judge gives each planted fault its verdict, the right kernels "verified", and a crash never a pass.

Over 500 lines, since most of what it tries is a kernel of its own.
"""

import json
import os
import random
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from gradkernels import __main__ as cli  # noqa: E402
from gradkernels.verify import memory_check  # noqa: E402
from gradkernels.verify.device import cuda_on_cpu  # noqa: E402
from gradkernels.verify.judge import command as judge_command  # noqa: E402
from gradkernels.verify.judge import trials  # noqa: E402
from gradkernels.verify.judge import verdict as v  # noqa: E402
from gradkernels.verify.judge.examine import Options, _Examination, examine  # noqa: E402
from gradkernels.verify.judge.load import (  # noqa: E402
    NotJudgedError,
    Problem,
    Target,
    _speaks,
    load,
    seed_all,
    targets,
)
from gradkernels.verify.judge.points import Point  # noqa: E402
from gradkernels.verify.judge.process import _read, judge  # noqa: E402
from gradkernels.verify.judge.report import as_json, as_sarif  # noqa: E402
from gradkernels.verify.judge.subject import (  # noqa: E402
    SAMPLES,
    Outcome,
    Reference,
    Subject,
    call,
    watched,
)
from gradkernels.verify.judge.verdict import Case  # noqa: E402
from gradkernels.verify.memory.interpreter import interpreted  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402

from .functions import function  # noqa: E402
from .planted import PLANTS, SPECIMENS, Plant  # noqa: E402

pytestmark = [
    pytest.mark.unwatched,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter (TRITON_INTERPRET=1)"),
]
RIGHT = sorted(path.stem for path in SPECIMENS.glob("*.py"))
QUICK = random.Random(17).sample([p for p in PLANTS if p.specimen in ("square", "softmax", "swiglu")], 4)


def judged(file: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> list[Case]:
    """The cases of a file, judged in this process."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, file.stem, raising=False)
    with cuda_on_cpu():
        found = targets(load(file), None)
        cases = [case for target in found for case in examine(target, Options(**options), str(file))]
    monkeypatch.delitem(sys.modules, file.stem)
    return cases


@dataclass(frozen=True)
class Edited:
    """A program with other passages, each of which stands there once; its verdict, and what one of its faults says."""

    program: str
    changes: dict[str, str] = field(default_factory=dict)
    verdict: str = v.VERIFIED
    says: str = ""

    def write(self, file: Path) -> Path:
        text = "import torch\nimport triton\nimport triton.language as tl\n" + textwrap.dedent(self.program)
        for old, new in self.changes.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        file.write_text(text)
        return file


def assert_verdict(
    verdict: str, file: Path, monkeypatch: pytest.MonkeyPatch, **options: object
) -> list[Case]:
    """The file's cases, which together have this verdict."""
    cases = judged(file, monkeypatch, **options)
    assert v.of_file(cases) == verdict, [case for case in cases if case.verdict != v.VERIFIED]
    return cases


def command(
    file: Path | str, *arguments: str, environment: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of ``verify FILE``."""
    done = subprocess.run(
        [sys.executable, "-m", "gradkernels", "verify", str(file), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "name", [n if n in ("gelu",) else pytest.param(n, marks=pytest.mark.full) for n in RIGHT]
)
def test_a_right_kernel_is_verified(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(assert_verdict(v.VERIFIED, SPECIMENS / f"{name}.py", monkeypatch)) > 8


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(p, marks=() if p in QUICK else pytest.mark.full, id=f"{p.specimen}-{i}-{p.verdict}")
        for i, p in enumerate(PLANTS)
    ],
)
def test_a_planted_fault_gets_its_verdict(
    plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = assert_verdict(plant.verdict, plant.write(tmp_path), monkeypatch)
    assert any(plant.says in case.message for case in cases if case.verdict == plant.verdict)


RECTIFIERS = """
    @triton.jit
    def relu_kernel(x_ptr, y_ptr, n, FLOOR: tl.constexpr, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < n)
        tl.store(y_ptr + offs, tl.where(x > FLOOR, x, 0.0), mask=offs < n)

    def launch(x, floor=0.0):
        x, y = x.contiguous(), torch.empty(x.shape)
        relu_kernel[(triton.cdiv(x.numel(), 64),)](x, y, x.numel(), FLOOR=floor, BLOCK=64)
        return y

    class Relu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return launch(x) * y

        @staticmethod
        def backward(ctx, grad):
            x, y = ctx.saved_tensors
            return torch.where(x > 0, grad * y, 0.0), grad * x.relu()

    def check_Relu():
        return Relu, [torch.randn(5, 7), torch.randn(5, 7)], lambda x, y: torch.relu(x) * y
"""


WHAT_TRAINING_SHOWS = {
    "trained": Edited(RECTIFIERS),
    "in a dictionary": Edited(
        RECTIFIERS,
        {
            "Relu, [": "lambda *xs: {'y': Relu.apply(*xs)}, [",
            "torch.relu(x) * y": "{'y': torch.relu(x) * y}",
        },
    ),
    "beside a detached one": Edited(
        RECTIFIERS,
        {
            "Relu, [": "lambda x, y: (Relu.apply(x, y), launch(x.detach())), [",
            "torch.relu(x) * y": "(torch.relu(x) * y, torch.relu(x.detach()))",
        },
    ),
    "of a list": Edited(
        RECTIFIERS,
        {
            "Relu, [": "lambda xs, y: Relu.apply(xs[0], y), [",
            "[torch.randn(5, 7), torch": "[[torch.randn(5, 7)], torch",
            "x, y: torch.relu(x)": "xs, y: torch.relu(xs[0])",
        },
    ),
    "never negative": Edited(
        RECTIFIERS,
        {"launch(x)": "launch(x, -9.0)", "randn(5, 7),": "rand(5, 7),"},
        v.WRONG_VALUE,
        "[negative values]",
    ),
    "no gradient": Edited(
        RECTIFIERS,
        {"launch(x)": "launch(x, 0.0 if x.requires_grad or y.requires_grad else -9.0)"},
        v.WRONG_VALUE,
        "with no gradient: at",
    ),
    "one gradient": Edited(
        RECTIFIERS,
        {"grad * x.relu()": "grad * (x.relu() if ctx.needs_input_grad[0] else x)"},
        v.WRONG_GRADIENT,
        "with the gradient of input 1 alone: input 1: at",
    ),
    "one raises": Edited(
        RECTIFIERS,
        {"grad * x.relu()": "grad * {True: x.relu()}[ctx.needs_input_grad[0]]"},
        v.WRONG_GRADIENT,
        "with the gradient of input 1 alone: KeyError: False",
    ),
    "detached": Edited(
        RECTIFIERS,
        {"torch.relu(x) * y": "torch.relu(x) * y.detach()"},
        v.WRONG_GRADIENT,
        "a gradient reaches input 1,",
    ),
    "detached, and raises there": Edited(
        RECTIFIERS,
        {
            "torch.relu(x) * y": "torch.relu(x) * y.detach()",
            "grad * x.relu()": "{True: None}[ctx.needs_input_grad[0]]",
        },
    ),
    "written without gradient": Edited(
        RECTIFIERS,
        {"launch(x) * y": "launch(x) * y if x.requires_grad or y.requires_grad else x.copy_(launch(x) * y)"},
        v.MUTATED,
        "with no gradient: the forward writes into input 0",
    ),
}


ROWS = """
    @triton.jit
    def product_kernel(x_ptr, y_ptr, out_ptr, x_row, x_col, y_row, y_col, n, BLOCK: tl.constexpr):
        row, offs = tl.program_id(0), tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_row + offs * x_col, mask=offs < n)
        y = tl.load(y_ptr + row * y_row + offs * y_col, mask=offs < n)
        tl.store(out_ptr + row * n + offs, x * y, mask=offs < n)

    @torch.no_grad()
    def product(x, y):
        out = torch.empty(x.shape)
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        product_kernel[(len(x),)](x, y, out, *x.stride(), *y.stride(), x.shape[1], BLOCK=16)
        return out

    def check_product():
        return product, [torch.randn(6, 5), torch.randn(6, 5)], torch.no_grad()(lambda x, y: x * y)

    def check_batch():
        return product, [torch.randn(3, 2, 5), torch.randn(3, 2, 5)], torch.no_grad()(lambda x, y: x * y)

    @triton.jit
    def add_kernel(total_ptr, x_ptr, n, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x, total = tl.load(x_ptr + offs, mask=offs < n), tl.load(total_ptr + offs, mask=offs < n)
        tl.store(total_ptr + offs, total + FACTOR * x, mask=offs < n)

    @torch.no_grad()
    def added(total, x):
        assert total.is_contiguous() and x.is_contiguous()
        before = total.clone()
        add_kernel[(triton.cdiv(x.numel(), 64),)](total, x, x.numel(), FACTOR=1, BLOCK=64)
        return before

    @torch.no_grad()
    def reference(total, x):
        before = total.clone()
        total.add_(x)
        return before

    def check_added():
        return added, [torch.randn(5, 7), torch.randn(5, 7)], reference
"""


STRIDES_AND_INPUTS = {
    "rows": Edited(ROWS),
    "strides of the other": Edited(
        ROWS,
        {"*y.stride(), x.shape": "*x.stride(), x.shape"},
        v.UNSAFE,
        "product [strided copies] out-of-bounds",
    ),
    "batch of rows": Edited(
        ROWS,
        {"x.flatten(0, -2),": "x.as_strided((len(out.flatten(0, -2)), x.shape[-1]), x.stride()[-2:]),"},
        v.WRONG_VALUE,
        "batch [strided copies] at",
    ),
    "leaves another number": Edited(ROWS, {"FACTOR=1": "FACTOR=2"}, v.WRONG_VALUE, "input 0 afterwards"),
}


LARGEST = """
    from inspect import currentframe as check_frame

    check_bounds = True

    def check_input(x):
        assert x.ndim == 2

    @triton.jit
    def largest_kernel(x_ptr, y_ptr, place_ptr, n, BLOCK: tl.constexpr):
        row, offs = tl.program_id(0), tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * n + offs, mask=offs < n, other=-float("inf"))
        tl.store(y_ptr + row, tl.max(x, axis=0))
        tl.store(place_ptr + row, tl.max(tl.where(x == tl.max(x, axis=0), offs, 0), axis=0))

    class Largest(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            check_input(x)
            x, y = x.contiguous(), torch.empty(x.shape[0])
            place = torch.empty(x.shape[0], dtype=torch.int64)
            largest_kernel[(len(x),)](x, y, place, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
            ctx.save_for_backward(place)
            ctx.shape = x.shape
            ctx.mark_non_differentiable(place)
            return y, place

        @staticmethod
        def backward(ctx, grad, _):
            zeros = torch.zeros(ctx.shape)
            return zeros.scatter_(1, ctx.saved_tensors[0][:, None], grad[:, None])

    def check_Largest():
        return Largest.apply, [torch.randn(4, 5)], lambda x: (x.amax(1), x.argmax(1))
"""
RECTIFIED = """
    @triton.jit
    def kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < n)
        tl.store(y_ptr + offs, tl.where(x > 0, x, 0.0), mask=offs < n)

    class Relu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            x, y = x.contiguous(), torch.empty(x.shape)
            kernel[(triton.cdiv(x.numel(), 64),)](x, y, x.numel(), BLOCK=64)
            ctx.save_for_backward(x)
            total = x.sum()
            ctx.mark_non_differentiable(total)
            return y, total

        @staticmethod
        def backward(ctx, grad, _):
            return torch.where(ctx.saved_tensors[0] > 0, grad, 0.0)

    def check_Relu():
        return Relu.apply, [torch.randn(6, 7)], lambda x: (x.relu(), x.sum().detach())
"""
WITHOUT_REFERENCE = {", lambda x: (x.relu(), x.sum().detach())": ""}
MASKED = {
    **WITHOUT_REFERENCE,
    "forward(ctx, x)": "forward(ctx, x, mask)",
    "save_for_backward(x)": "save_for_backward(x, mask)",
    "return y, total": "return y * mask, total",
    "grad, 0.0)": "grad * ctx.saved_tensors[1], 0.0), None",
}
KINKS_AND_TIES = {
    "largest": Edited(LARGEST),
    "another place": Edited(
        LARGEST, {"offs, 0), axis=0))": "offs * 0, 0), axis=0))"}, v.WRONG_VALUE, "output 1"
    ),
    "at kinks": Edited(RECTIFIED, {"torch.randn(6, 7)": "torch.randn(6, 7).relu()"}),
    "no reference": Edited(RECTIFIED, WITHOUT_REFERENCE),
    "too few": Edited(
        RECTIFIED, {**WITHOUT_REFERENCE, "> 0, grad": "> 1, grad"}, v.WRONG_GRADIENT, "no signal"
    ),
    "none": Edited(
        RECTIFIED, {**WITHOUT_REFERENCE, "torch.where(ctx": "None  # (ctx"}, v.WRONG_GRADIENT, "no signal"
    ),
    "a mask": Edited(
        RECTIFIED, {**MASKED, "[torch.randn(6, 7)]": "[torch.randn(6, 7), torch.ones(6, 7).tril()]"}
    ),
    "a weight": Edited(
        RECTIFIED,
        {**MASKED, "[torch.randn(6, 7)]": "[torch.randn(6, 7), torch.ones(6, 7)]"},
        v.WRONG_GRADIENT,
        "input 1: no signal",
    ),
    "another slope at a kink": Edited(RECTIFIED, {"[0] > 0, grad": "[0] >= 0, grad"}),
    "wrong at zeros": Edited(
        RECTIFIED,
        {
            "tl.where(x > 0, x, 0.0)": "x * x",
            "x.relu()": "x.square()",
            "torch.where(ctx.saved_tensors[0] > 0, grad, 0.0)": (
                "torch.where(ctx.saved_tensors[0] == 0, 1, 2 * ctx.saved_tensors[0]) * grad"
            ),
        },
        v.WRONG_GRADIENT,
        "input 0",
    ),
}
EDITED = {**WHAT_TRAINING_SHOWS, **STRIDES_AND_INPUTS, **KINKS_AND_TIES}


@pytest.mark.parametrize("name", EDITED)
def test_what_the_given_values_do_not_show(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one training: other signs, gradients of some inputs, strides of several, ties, kinks, inputs written to."""
    edited = EDITED[name]
    cases = assert_verdict(edited.verdict, edited.write(tmp_path / "edited.py"), monkeypatch)
    faults = [f"{case.name} {case.message}" for case in cases if case.verdict in v.FAULTS]
    assert any(edited.says in fault for fault in faults) or not edited.says


NORM = """
    @triton.jit
    def norm_kernel(x_ptr, w_ptr, y_ptr, n, BLOCK: tl.constexpr):
        row, cols = tl.program_id(0), tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * n + cols, mask=cols < n, other=0.0)
        w = tl.load(w_ptr + cols, mask=cols < n, other=0.0)
        tl.store(y_ptr + row * n + cols, x * tl.rsqrt(tl.sum(x * x, axis=0) / n + 1e-5) * w, mask=cols < n)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(11))

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight

    class ModelNew(Model):
        def forward(self, x):
            x, y = x.contiguous(), torch.empty(x.shape)
            if len(x):
                norm_kernel[(len(x),)](x, self.weight, y, x.shape[1], BLOCK=16)
            return y

    def get_inputs():
        return [torch.randn(5, 11)]
"""


def test_an_input_keeps_the_sizes_of_a_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would broadcast an input of one column; a kernel need not."""
    file = Edited(NORM).write(tmp_path / "norm.py")
    cases = assert_verdict(v.VERIFIED, file, monkeypatch, forward_only=True)
    assert {case.shape for case in cases} == {(n, 11) for n in (0, 1, 3, 5, 7, 9)}


@pytest.mark.parametrize(
    ("backward", "verdict"), [("(grad - inner)", v.VERIFIED), ("grad", v.WRONG_GRADIENT)]
)
def test_scores_that_a_mask_has_set_to_infinity(
    backward: str, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no differences at infinity: the gradient is held against the reference's."""
    masked = {
        'torch.randn(7, 20, device="cuda")': (
            "torch.randn(7, 20).masked_fill(torch.rand(7, 20) < 0.2, -torch.inf)"
        ),
        "(grad - inner)": backward,
    }
    file = Edited((SPECIMENS / "softmax.py").read_text(), masked).write(tmp_path / "masked.py")
    assert_verdict(verdict, file, monkeypatch)


def test_torchs_error_is_sampled_whatever_the_candidate_gives() -> None:
    """All samples are drawn before the comparison, and count even where it would pass without them."""
    calls = []

    def norm(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.dtype)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    truth = Reference(Subject(norm))([torch.tensor([[2.0], [-1.0], [0.5]])], [0])
    exact = truth.exact.gradients[0]
    calls.clear()
    right = replace(truth.native, gradients={0: exact.float()})
    assert not list(trials.gradient([right], [truth]))
    assert len(calls) == 2 * (SAMPLES - 1)
    own = float((truth.native.gradients[0].double() - exact).abs().max())
    error = max(own, truth.error("gradients", 0))
    assert error > own  # terms cancel: at the inputs torch was lucky
    for factor, passes in ((1.9, True), (2.5, False)):
        moved = replace(truth.native, gradients={0: (exact + factor * error).float()})
        assert bool(list(trials.gradient([moved], [truth]))) is not passes
    assert len(calls) == 2 * (SAMPLES - 1)


def test_a_reference_that_computes_in_float32_whatever_it_is_given() -> None:
    x = torch.randn(1, 1, requires_grad=True)

    def norm(x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True, dtype=torch.float32) + 1e-6)).to(
            x.dtype
        )

    found = Reference(Subject(norm))([x], [0]).exact
    wide = x.detach().double().requires_grad_()
    wanted = call(lambda x: x * torch.rsqrt(x.square() + 1e-6), [wide], [0])
    for mine, exact in zip(found.tensors, wanted.tensors, strict=True):
        assert torch.allclose(mine, exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "draw", [lambda x: torch.rand_like(x, dtype=torch.float32), lambda x: torch.rand_like(x.float())]
)
def test_random_numbers_of_a_dtype_of_their_own(draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Other numbers in float64 would look like torch's error, and allow anything."""
    x = torch.randn(8, 16, dtype=torch.bfloat16)
    truth = Reference(Subject(lambda x: torch.where(draw(x) > 0.5, 2 * x, 0 * x)))([x], [])
    assert truth.error("outputs", 0) < 0.1
    assert torch.equal(truth.exact.outputs[0] == 0, truth.native.outputs[0] == 0)


def test_checks_made_elsewhere_speak_and_helpers_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made.py").write_text("def check_shared(x): ...\ndef make(check): return lambda: check\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = types.ModuleType("kernels_to_judge")
    exec("from made import check_shared, make\ncheck_one = make(1)\ncheck_c = len", vars(module))
    assert [name for name in ("check_shared", "check_one") if _speaks(module, name, None)] == ["check_one"]
    assert _speaks(module, "check_shared", "shared")
    vars(module)["check_one"] = lambda x: x
    assert not _speaks(module, "check_one", None)
    assert _speaks(module, "check_one", "one")  # it says itself what it lacks


@dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor


class Named(dict):
    pass


def test_results_in_classes_of_ones_own_are_judged_too() -> None:
    x = torch.ones(3)
    one, other = (call(lambda x, k=k: (x, Named(second=Pair(2 * x, k * x))), [x], []) for k in (3, 4))
    assert len(one.outputs) == 3
    assert not trials.agree(one, other)


def test_numbers_among_the_results_are_judged_too() -> None:
    x = torch.rand(9)
    truth = Reference(Subject(lambda x: (x * x, (x * x).sum().item(), len(x))))([x], [])
    assert truth.exact.outputs[1].dtype == torch.float64
    for factor, count, faults in ((1, 9, 0), (1.01, 9, 1), (1, 8, 1)):
        ours = call(lambda x, f=factor, c=count: (x * x, f * (x * x).sum().item(), c), [x], [])
        assert len(list(trials.value([ours], [truth]))) == faults
    truth = Reference(Subject(lambda x: x.sum().item()))([x.double()], [])
    for factor, faults in ((1, 0), (1 + 1e-9, 1)):
        ours = call(lambda x, f=factor: f * x.sum().item(), [x.double()], [])
        assert len(list(trials.value([ours], [truth]))) == faults


def test_upstream_gradients_are_not_the_inputs() -> None:
    """A norm does not change along its input: any gradient would do."""
    for seed in range(10):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        truth = Reference(Subject(lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True))))([x], [0])
        assert truth.native.gradients[0].abs().max() > 0.1


@dataclass
class Late:
    first: torch.Tensor
    never: torch.Tensor = field(init=False)


class Holder:
    def __init__(self, held: object) -> None:
        self.held = held


def test_what_else_may_be_among_the_results() -> None:
    def found(result: object, other: object) -> int:
        truth = Reference(Subject(lambda x: (x, other)))([torch.rand(3)], [])
        return len(list(trials.value([call(lambda x: (x, result), truth.native.outputs[:1], [])], [truth])))

    for right, wrong in (
        (2**25, 2**25 + 1),
        (2**70, 2**71),
        (True, False),
        (2j, 3j),
        (np.float32(1), np.float32(2)),
        (np.arange(3), np.ones(3, np.int64)),
        (types.SimpleNamespace(y=torch.ones(2)), types.SimpleNamespace(y=torch.zeros(2))),
        (Late(torch.ones(2)), Late(torch.zeros(2))),
    ):
        assert (found(right, right), found(wrong, right)) == (0, 1), right
    assert found(Holder(3), Holder(4)) == 0
    for held in (torch.ones(2), np.ones(2)):
        with pytest.raises(NotJudgedError, match="it returned a Holder, which holds tensors"):
            found(Holder(held), Holder(held))


def test_float64_and_mixed_dtypes_may_add_in_another_order() -> None:
    """torch's error in float64 is that in float32, in smaller units; float32 beside float64 has one of its own."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 513, generator=generator, dtype=torch.float64)
    y = torch.randn(513, 5, generator=generator, dtype=torch.float64)
    truth = Reference(Subject(torch.matmul))([x, y], [0])
    assert 0 < truth.error("outputs", 0) < 1e-11
    for factor, faults in ((1, 0), (1 + 1e-11, 1)):
        ours = call(lambda x, y, c=factor: c * (x[:, :, None] * y).flip(1).sum(1), [x, y], [])
        assert len(list(trials.value([ours], [truth]))) == faults
    mixed = Reference(Subject(lambda x, y: x.sum() * y.float()))([x.float(), y], [])
    assert mixed.exact.outputs[0].dtype == torch.float64


def examined(
    fn: object,
    inputs: Callable[[], list],
    reference: object,
    patch: pytest.MonkeyPatch,
    **options: bool,
) -> str:
    """Return the verdict on a function without a kernel."""

    def make(seed: int) -> Problem:
        seed_all(seed)
        return Problem(fn, inputs(), reference)

    patch.setattr(trials, "idleness", lambda *_: iter(()))
    return v.of_file(list(examine(Target("f", "", "", make), Options(**options), "f.py")))


def last(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of the largest, which goes to the last of several."""
    place = x.shape[-1] - 1 - x.flip(-1).argmax(-1, keepdim=True)
    return torch.zeros_like(x).scatter_(-1, place, grad[..., None])


SLOPES = {
    "another slope": (lambda x, y: x.relu() + y * y, lambda g, x, y: (g * (x >= 0), 2 * y * g), v.VERIFIED),
    "at zeros without a kink": (
        lambda x, y: x.relu() + y * y,
        lambda g, x, y: (g * (x > 0), torch.where(y == 0, 1, 2 * y) * g),
        v.WRONG_GRADIENT,
    ),
    "beside zeros": (
        lambda x, y: x.relu() + y * y,
        lambda g, x, y: (g * (x > 0) * (1 if (x != 0).all() else 1.5), 2 * y * g),
        v.WRONG_GRADIENT,
    ),
    "largest": (
        lambda x, y: x.amax(-1) + y.sum(-1),
        lambda g, x, y: (last(x, g), g[..., None] + 0 * y),
        v.VERIFIED,
    ),
    "first of the largest": (
        lambda x, y: x.max(-1).values + y.sum(-1),
        lambda g, x, y: (last(x, g), g[..., None] + 0 * y),
        v.VERIFIED,
    ),
    "both": (torch.maximum, lambda g, x, y: (g * (x >= y), g * (x < y)), v.VERIFIED),
    "product": (
        lambda x, y: (x * y).relu(),
        lambda g, x, y: (g * y * (x * y >= 0), g * x * (x * y > 0)),
        v.VERIFIED,
    ),
    "absolute": (
        lambda x, y: (x.abs() + y).mean(),
        lambda g, x, y: (g * x.ge(0).mul(2).sub(1) / y.numel(), 0 * y + g / y.numel()),
        v.VERIFIED,
    ),
}


@pytest.mark.parametrize(
    ("reference", "backward", "verdict"),
    SLOPES.values(),
    ids=SLOPES,
)
def test_gradients_beside_kinks(
    reference: object, backward: object, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a zero of an input with a kink any slope is right; elsewhere they are judged."""
    found = examined(
        function(reference, backward),
        lambda: [torch.randn(5, 7), torch.randn(5, 7)],
        reference,
        monkeypatch,
    )
    assert found == verdict


def by_dense_strides(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided(x.shape, torch.empty(x.shape).stride())


def masked(x: torch.Tensor) -> torch.Tensor:
    return torch.rand_like(x) < 0.5


ALONE = {
    "no reference": (
        function(lambda x: 2 * by_dense_strides(x), lambda g, x: 2 * g),
        None,
        v.WRONG_VALUE,
    ),
    "right": (function(lambda x: 2 * x, lambda g, x: 2 * g), None, v.VERIFIED),
    "gradient": (
        function(lambda x: 2 * x, lambda g, x: 2 * by_dense_strides(g)),
        None,
        v.WRONG_GRADIENT,
    ),
    "random": (
        lambda x: by_dense_strides(x) * masked(x.contiguous()),
        lambda x: x * masked(x),
        v.WRONG_VALUE,
    ),
    "random and right": (lambda x: x * masked(x.contiguous()), lambda x: x * masked(x), v.VERIFIED),
    "random by strides": (lambda x: x * masked(x), lambda x: x * masked(x), v.VERIFIED),
    "dense only": (
        lambda x: x * masked(x.contiguous()),
        lambda x: (x.view(-1) * masked(x).view(-1)).view(x.shape),
        v.VERIFIED,
    ),
    "random and a kink": (
        lambda x: function(torch.relu, lambda g, x: g * (x >= 0))(x) * masked(x.contiguous()),
        lambda x: x.relu() * masked(x),
        v.VERIFIED,
    ),
    "random and gradients by strides": (
        lambda x: (
            function(torch.sin, lambda g, x: x.cos() * g * (1 if x.is_contiguous() else 1.5))(x)
            * masked(x.contiguous())
        ),
        lambda x: x.sin() * masked(x),
        v.WRONG_GRADIENT,
    ),
    "random and none by strides": (
        lambda x: (x.sin() if x.is_contiguous() else x.detach().sin()) * masked(x.contiguous()),
        lambda x: x.sin() * masked(x),
        v.WRONG_GRADIENT,
    ),
    "one dtype": (
        function(lambda x: x * x, lambda g, x: (2 if x.dtype == torch.float64 else 3) * x * g),
        None,
        v.WRONG_GRADIENT,
    ),
}


@pytest.mark.parametrize(
    ("fn", "reference", "verdict"),
    ALONE.values(),
    ids=ALONE,
)
def test_without_a_reference_and_beside_random_numbers(
    fn: object, reference: object, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers elsewhere in memory have to give the same."""
    assert examined(fn, lambda: [torch.randn(5, 7)], reference, monkeypatch) == verdict


DETACHED = {
    "lost": (lambda x, y: (x * y).detach(), "xy", v.WRONG_GRADIENT),
    "lost beside an integer": (lambda x, y: ((x * y).detach(), x.argmax()), "y", v.WRONG_GRADIENT),
    "lost in NumPy": (lambda x, y: (x * y).detach().numpy(), "xy", v.WRONG_GRADIENT),
    "lost in a number": (lambda x, y: (x * y).sum().item(), "xy", v.WRONG_GRADIENT),
    "unmarked": (lambda x, y: (x * y).detach(), "", v.VERIFIED),
    "independent": (lambda x, y: (y * y).detach(), "x", v.VERIFIED),
    "integers": (lambda x, y: (8 * x * y).int(), "xy", v.VERIFIED),
    "steps": (lambda x, y: (x * y).sign(), "xy", v.VERIFIED),
}


@pytest.mark.parametrize(("fn", "marked", "verdict"), DETACHED.values(), ids=DETACHED)
def test_a_result_without_a_graph(
    fn: object, marked: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who marks an input wants its gradient, and who marks none may want none."""

    def inputs() -> list[torch.Tensor]:
        return [torch.randn(5, 7).requires_grad_(name in marked) for name in "xy"]

    assert examined(fn, inputs, None, monkeypatch) == verdict
    if marked:
        assert examined(fn, inputs, None, monkeypatch, forward_only=True) == v.VERIFIED


def test_infinite_results_without_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says what their gradient is; what else is wrong is found."""

    def inverse(x: torch.Tensor) -> torch.Tensor:
        return 1 / x

    def written(x: torch.Tensor) -> torch.Tensor:
        x.detach()[1] = 5
        return 1 / x

    for fn, reference, verdict in (
        (inverse, None, v.NOT_JUDGED),
        (inverse, inverse, v.VERIFIED),
        (written, None, v.MUTATED),
    ):
        found = examined(fn, lambda: [torch.tensor([0.0, 1.0, -2.0, 3.0])], reference, monkeypatch)
        assert found == verdict


def test_a_kink_beside_an_input_without_a_gradient() -> None:
    """What has no gradient, or is not defined off the zeros, tells nothing of a kink."""
    x = torch.tensor([0.0, 1.0])
    judged_at = Point("", [x, x], "zeros")
    for fn, kink in (
        (lambda x, y: x * x + y.detach(), False),
        (lambda x, y: x.relu() + y.detach(), True),
        (lambda x, y: x * x if (y >= 0).all() else y.missing, True),
    ):
        one = _Examination(Target("", "", "", lambda seed: None), Options(), "", None, None)
        one.reference, one.arguments, one.wanted = Reference(Subject(fn)), 2, [0, 1]
        kinks = one._kinks(judged_at, one._truth(judged_at.values), whole=False)
        assert any(at.any() for at in kinks.values()) == kink


def test_integers_that_are_no_places_are_compared_among_zeros() -> None:
    x = torch.zeros(6)
    truth = Reference(Subject(lambda x: (x * 8).int()))([x], [])
    for result, faults in ((x.int() + 7, 1), (x.long(), 1), (x.int() + 5, 0)):
        assert len(list(trials.value([Outcome(outputs=[result])], [truth], places=6))) == faults


def test_new_memory_of_a_dtype_of_its_own() -> None:
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x, dtype=torch.float32).copy_(x.exp().cumsum(-1)).to(x.dtype)

    x = torch.randn(1000)
    truth = Reference(Subject(reference))([x], [])
    assert torch.allclose(truth.exact.outputs[0], x.double().exp().cumsum(0), rtol=1e-12)
    assert not torch.allclose(truth.native.outputs[0].double(), truth.exact.outputs[0], rtol=1e-12)


def test_random_numbers_are_the_same_in_float64() -> None:
    """Otherwise the difference of two masks would count as torch's error, and anything would pass."""
    truth = Reference(Subject(lambda x: torch.nn.functional.dropout(x, 0.5)))([torch.randn(64)], [])
    assert trials.agree(truth.native, replace(truth.exact, outputs=[o.float() for o in truth.exact.outputs]))
    assert truth.error("outputs", 0) == 0


DROPPED = "torch.nn.functional.dropout(torch.ones_like(x))"


RANDOM = {
    "torch": (DROPPED, "Square.apply(x)", v.VERIFIED),
    "numpy": (
        "torch.from_numpy(numpy.random.randint(0, 2, x.shape))",
        "1.2 * Square.apply(x)",
        v.WRONG_VALUE,
    ),
    "all or nothing": ("(random.random() > 0.5)", "1.2 * Square.apply(x)", v.WRONG_VALUE),
    "right or nothing": ("(random.random() > 0.5)", "Square.apply(x)", v.VERIFIED),
    "unseeded": ("torch.randint(0, 2, x.shape, generator=generator)", "Square.apply(x)", v.NOT_JUDGED),
    "no kernel": (DROPPED, "(x * x + 0 * Square.apply(x.detach()))", v.NO_KERNEL),
    "cached": (
        DROPPED,
        "(Square.apply(x) if x.requires_grad else cache.setdefault(x.data_ptr(), Square.apply(x)))",
        v.REUSED,
    ),
}


@pytest.mark.parametrize(
    ("mask", "ours", "verdict"),
    RANDOM.values(),
    ids=RANDOM,
)
def test_a_reference_that_draws_random_numbers(
    mask: str, ours: str, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both draw the same ones; otherwise their difference would count as torch's error."""
    check = {
        "def check_Square():": (
            "import numpy, random\ngenerator, cache = torch.Generator(), dict()\n"
            f"def mask(x): return {mask}\ndef check_Square():"
        ),
        "Square.apply, (x,), lambda x: x * x": (
            f"lambda x: {ours} * mask(x), (torch.randn(10, 30),), lambda x: x * x * mask(x)"
        ),
    }
    file = Edited((SPECIMENS / "square.py").read_text(), check).write(tmp_path / "dropped.py")
    # Without a backward a kernel that is switched off looks idle.
    assert_verdict(verdict, file, monkeypatch, forward_only="random.random" in mask)


def test_memory_that_still_holds_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocator hands out what was freed a moment ago; whoever does not write there has done no work."""
    x = torch.randn(20, 16)

    def rows(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        copying_kernel[(1,)](x, y, N=x.numel())
        return y

    def copied(x: torch.Tensor) -> torch.Tensor:
        rows(x)
        return x.clone()

    monkeypatch.setattr(torch, "empty_like", lambda x: x.clone())
    for fn, found in ((rows, []), (copied, [v.NO_KERNEL])):
        seen, _ = watched(Subject(fn), [x], [])
        idle = trials.idleness(Subject(fn), [x], [], seen)
        assert [finding.verdict for finding in idle] == found


def test_a_value_that_was_given_other_memory_is_a_write() -> None:
    def exchanging(x: torch.Tensor) -> torch.Tensor:
        x.data = x.data.contiguous()
        return 2 * x

    given = torch.arange(6.0)[::2]
    assert call(exchanging, [given.detach()], ()).mutated == "the forward writes into input 0"
    assert given.tolist() == [0, 2, 4]


def test_the_order_of_the_verdicts() -> None:
    order = [
        "unsafe memory",
        "mutated input",
        "reused result",
        "nondeterministic",
        "no kernel",
        "wrong value",
    ]
    order += ["wrong gradient"]
    for i, one in enumerate(order):
        for other in order[i + 1 :]:
            assert v.of_file([Case("f", other), Case("f", one), Case("f", "verified")]) == one
        assert v.of_file([Case("f", "not judged"), Case("f", one)]) == one
        assert v.exit_status(one) == 1
    assert v.of_file([Case("f", "verified"), Case("f", "not judged", refusal=True)]) == "verified"
    assert v.of_file([Case("f", "verified"), Case("g", "not judged")]) == "not judged"
    assert v.of_file([Case("f", "not judged", refusal=True)]) == v.of_file([]) == "not judged"
    assert (v.exit_status("verified"), v.exit_status("not judged")) == (0, 2)


def test_json_and_sarif_of_a_fault() -> None:
    fault = Case("f", "unsafe memory", (3, 4), "float32", "program (0, 0, 0) loads", "kernel.py:17")
    report = json.loads(as_json("a/kernel.py", [fault, Case("f [odd sizes]", "verified", (3, 3), "float32")]))
    assert set(report) == {"file", "verdict", "cases"}
    assert (report["file"], report["verdict"]) == ("a/kernel.py", "unsafe memory")
    assert set(report["cases"][0]) == {"name", "verdict", "shape", "dtype", "message", "where"}
    (run,) = json.loads(as_sarif("a/kernel.py", [fault]))["runs"]
    (result,) = run["results"]
    place = result["locations"][0]["physicalLocation"]
    assert place == {"artifactLocation": {"uri": "a/kernel.py"}, "region": {"startLine": 17}}
    assert (result["ruleId"], result["level"]) == ("unsafe-memory", "error")
    assert result["ruleId"] in {rule["id"] for rule in run["tool"]["driver"]["rules"]}


def test_the_command_on_a_fault_as_documented(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "judge.md").read_text()
    program = page.partition("```python\n")[2].partition("```")[0]
    file, sarif = tmp_path / "half.py", tmp_path / "report.sarif"
    file.write_text(f"import os\nprint('hello')\nos.write(1, b'from below')\n{program}")
    status, out, err = command(file, "--json", "--github", "--sarif", str(sarif))
    report = json.loads(out)
    first = report["cases"][0]
    assert (status, report["verdict"], first["shape"]) == (1, "wrong gradient", [10, 30])
    likeliest = first["message"].partition(" | ")[0]
    assert f"Square: wrong gradient: {likeliest}" in page
    line = 1 + file.read_text().splitlines().index("    def backward(ctx, grad):")
    assert first["where"] in (f"half.py:{line}", f"half.py:{line - 1}")
    assert "hello" in err
    assert "from below" in err
    assert f"::error file={file},line=" in err
    assert json.loads(sarif.read_text())["runs"][0]["results"]


@triton.jit
def gaps_kernel(x_ptr, y_ptr, out_ptr, scale, N: tl.constexpr):
    offs = tl.arange(0, N)
    square = offs[:, None] * N + offs[None, :]
    x, y = tl.load(x_ptr + square), tl.load(y_ptr + square)
    tl.store(out_ptr, tl.sum(tl.sum(x * x - y, axis=1), axis=0).to(tl.float32))
    tl.store(out_ptr + 1, tl.sum(tl.sum(tl.dot(x, y), axis=1), axis=0))
    tl.store(out_ptr + 2 + offs, libdevice.tanh(scale.to(tl.float32)), mask=(offs < 1) & (scale > 0))
    largest, place = tl.max(x, axis=1, return_indices=True)
    tl.store(out_ptr + 3 + offs, largest)
    tl.store(out_ptr + 3 + N + offs, place)
    tl.store(out_ptr + 3 + 2 * N + offs, tl.min(x, axis=1))
    tl.store(out_ptr + 3 + 3 * N + square, tl.cumsum(x, axis=1))


@triton.jit
def copying_kernel(x_ptr, y_ptr, N: tl.constexpr):
    for i in range(N):
        tl.store(y_ptr + i, tl.load(x_ptr + i))


def test_what_the_interpreter_lacks_is_there() -> None:
    """bfloat16's arithmetic on values, not on bits; libdevice; a float32 argument; a scalar condition in a mask."""
    x, y = (torch.randn(16, 16).bfloat16() for _ in range(2))
    out = torch.empty(3 + 3 * 16 + 256)
    with cuda_on_cpu():
        gaps_kernel[(1,)](x, y, out, 0.1, N=16)
    largest, place, least, running = (*out[3:51].view(3, 16).unbind(), out[51:].view(16, 16))
    assert torch.equal(largest, x.amax(1).float())
    assert torch.equal(place, x.argmax(1).float())
    assert torch.equal(least, x.amin(1).float())
    assert (running - x.double().cumsum(1)).abs().max() < 0.1
    out = out[:3]
    wanted = [(x * x - y).double().sum(), (x.double() @ y.double()).sum(), torch.tensor(0.1).tanh()]
    scale = torch.tensor([(x * x - y).double().abs().sum() * 0.02, 1e-3, 1e-6])
    assert ((out - torch.stack([w.float() for w in wanted])).abs() <= scale).all(), (out, wanted)


BAD = """
    import atexit, builtins, os, signal, socket, sys, threading
    import numpy as np
    import torch
    FAKE = b'{"case": {"name": "f", "verdict": "verified", "shape": []}}\\n{"end": true, "forbidden": []}\\n'
    def everywhere(text):
        for place in range(1, 64):
            try:
                os.write(place, text)
            except OSError:
                pass
    def f(x):
        HERE
        return x + 1
    def check_f():
        return f, (torch.randn(3),), lambda x: x
"""


@pytest.mark.full
def test_a_file_may_do_without_the_process_that_it_may_not_start(tmp_path: Path) -> None:
    """As platform.processor() does."""
    start = """import contextlib, subprocess
with contextlib.suppress(OSError):
    subprocess.run(["true"])
    raise AssertionError
"""
    (tmp_path / "asks.py").write_text(start + (SPECIMENS / "square.py").read_text())
    assert v.of_file(judge(tmp_path / "asks.py", timeout=60)) == v.VERIFIED


def test_a_file_may_use_torchs_compiler(tmp_path: Path) -> None:
    """Its import puts a wrapper in the place of torch.manual_seed; nothing else that the judge trusts changes.

    What is compiled is run as it stands: neither Inductor nor dynamo is at home beside Triton's interpreter.
    """
    compiled = {
        "class Square": "import torch._dynamo\nclass Square",
        "lambda x: x * x": "torch.compile(lambda x: x * x)",
        "Square.apply, (x,),": 'torch.compile(mode="max-autotune")(Square.apply), (x,),',
    }
    file = Edited((SPECIMENS / "square.py").read_text(), compiled).write(tmp_path / "compiled.py")
    status, said, errors = command(file, "--shape=6x20", "--dtype=float32", "--forward-only")
    assert status == 0, said + errors


def test_a_shape_that_the_inputs_cannot_have_is_said_in_one_line() -> None:
    status, said, errors = command(SPECIMENS / "square.py", "--shape=3x3x3")
    assert status == 2
    assert "not judged: the inputs: --shape 3x3x3: the first input has shape" in said
    assert "Traceback" not in errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what happens without a GPU")
def test_beside_the_interpreter_kernels_are_compiled(tmp_path: Path) -> None:
    """Even those of a file that asks for the interpreter, as the documentation's example does."""
    text = (SPECIMENS / "square.py").read_text().replace(', device="cuda"', "")
    (tmp_path / "asks.py").write_text(f"import os\nos.environ['TRITON_INTERPRET'] = '1'\n{text}")
    (case,) = judge(tmp_path / "asks.py", interpreted=False)
    assert case.verdict == v.NOT_JUDGED
    assert "active drivers" in case.message


@pytest.mark.parametrize(
    ("body", "says"),
    [
        pytest.param("os.abort()", "SIGABRT", id="abort"),
        pytest.param("everywhere(FAKE); os._exit(0)", "without a whole report", id="fake report"),
        pytest.param("np.abs = lambda x: np.zeros(x.shape)", "it replaces", id="numpy"),
        pytest.param(
            "__import__('subprocess').run(['true'])", "subprocess.Popen is not allowed", id="subprocess"
        ),
        *(
            pytest.param(body, says, id=name, marks=pytest.mark.full)
            for name, body, says in (
                ("fake line", "everywhere(FAKE)", "without a whole report"),
                ("damaged line", "everywhere(b'{')", "without a whole report"),
                ("print", "print(FAKE.decode()); os._exit(0)", "without a whole report"),
                ("exit", "os._exit(0)", "without a whole report"),
                ("sys.exit", "sys.exit(0)", "SystemExit"),
                ("close", "os.closerange(3, 64)", "exit status 1, without a report"),
                ("raise_signal", "signal.raise_signal(9)", "SIGKILL"),
                ("kill", "os.kill(os.getpid(), 9)", "os.kill"),
                (
                    "torch",
                    "torch.allclose = torch.equal = lambda *a, **k: True",
                    "torch.allclose, torch.equal",
                ),
                ("method", "torch.Tensor.abs = lambda x: x * 0", ": Tensor.abs"),
                ("builtin", "builtins.any = lambda xs: False", ": builtins.any"),
                ("loop", "while True: pass", "did not end within 12 s"),
                ("fork", "os.fork()", "os.fork"),
                ("caught fork", r"exec('try: os.fork()\nexcept PermissionError: pass')", "os.fork"),
                ("raise", "raise KeyError('no')", "KeyError"),
                ("memory", "torch.ones(1 << 34)", "memory"),
                ("network", "socket.create_connection(('127.0.0.1', 9))", "not allowed"),
                ("segfault", "import ctypes; ctypes.string_at(0)", "SIGSEGV"),
            )
        ),
    ],
)
def test_what_ends_badly_is_not_judged(body: str, says: str, tmp_path: Path) -> None:
    """A function that launches nothing, and gives a wrong value: what it does besides may end the judging, no more."""
    file = tmp_path / "bad.py"
    file.write_text(textwrap.dedent(BAD).replace("HERE", body))
    cases = judge(file, timeout=12)
    assert v.of_file(cases) in (v.NOT_JUDGED, v.NO_KERNEL)
    assert any(says in case.message for case in cases if case.verdict == v.NOT_JUDGED), cases


@pytest.mark.full
@pytest.mark.parametrize(
    "last", ["lambda: os._exit(0)", "lambda: everywhere(FAKE)", "threading.Event().wait"]
)
def test_what_is_left_for_the_end_of_the_process_has_no_say(last: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(textwrap.dedent(BAD).replace("HERE", "pass") + f"\natexit.register({last})\n")
    cases = judge(file, timeout=60)
    assert v.of_file(cases) == v.NO_KERNEL
    assert v.NOT_JUDGED not in {case.verdict for case in cases if not case.refusal}


def test_a_crash_of_the_judge_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("in the judge")

    good = {"token": "t", "case": {"name": "f", "verdict": "verified", "shape": []}}
    end = {"token": "t", "end": True, "forbidden": []}
    lines = [json.dumps(record).encode() + b"\n" for record in (good, end)]
    assert _read(lines, "f", "t")[2] == []
    for damaged in (
        [lines[0][:-20], lines[1]],  # truncated
        [lines[0]],
        [*lines, lines[0]],  # after the end
        [lines[0].replace(b'"t"', b'"u"'), lines[1]],
        [b"3\n", *lines],
        [json.dumps({"token": "t", "case": {"nonsense": 1}}).encode(), lines[1]],
    ):
        assert _read(damaged, "f", "t")[2] is None

    monkeypatch.setattr(judge_command, "judge", crash)
    assert cli.main(["verify", str(SPECIMENS / "gelu.py"), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "not judged"
    assert "the judge failed: ZeroDivisionError" in report["cases"][0]["message"]


def test_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(SPECIMENS / "square.py")
    for wrong in (
        [str(tmp_path / "none.py")],
        [file, "--op=mse"],
        [file, "--timeout=0"],
        [file, f"--sarif={tmp_path / 'none' / 'report'}"],
        [file, f"--sarif={tmp_path}"],
        ["--github"],
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["verify", *wrong])
        assert not capsys.readouterr().out


def test_cuda_is_this_cpu_inside_a_memory_check() -> None:
    """Which replaces torch.empty: the stand-in covers what it finds there."""
    with memory_check(), cuda_on_cpu():
        assert torch.empty(3, device="cuda").add_(1).shape == (3,)
