"""The list of ops says what is there: public callables, README rows, operators, launchers, files."""

from pathlib import Path

import gradkernels
import pytest
from gradkernels import nn
from gradkernels.operator import OPERATORS
from gradkernels.ops import FUNCTIONS, OPS, OPTIMIZERS

from ..helpers import python

ROOT = Path(__file__).parents[2]
OTHERS = {"backend_for", "layers", "nn", "use_backend", "warmup"}


def test_every_public_callable_is_of_one_op() -> None:
    names = [name for op in OPS.values() for name in op.public]
    assert sorted(names) == sorted(set(gradkernels.__all__) - OTHERS)
    for op in OPS.values():
        for name in op.public:
            assert op.function(name) is getattr(gradkernels, name)


def test_the_readme_has_their_rows() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.partition("\n| op | shapes | in torch |\n")[2].partition("\n\n")[0].splitlines()
    modules = ", ".join(
        f"`nn.{name}`" for name in ("Linear", "MSELoss", "LinearMSELoss") if hasattr(nn, name)
    )
    assert table[1:] == [
        *(row for op in OPS.values() for row in op.readme()),
        f"| {modules} | as in `torch.nn` | |",
    ]


def test_every_operator_is_of_one_op() -> None:
    found = [operator for op in FUNCTIONS.values() for operator in op.operators]
    assert sorted(found, key=id) == sorted(OPERATORS, key=id)
    for op in FUNCTIONS.values():
        assert {operator.launcher for operator in op.operators} == set(op.launchers())


@pytest.mark.parametrize("op", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_has_one_launcher(op) -> None:
    assert list(op.launchers()) == [f"{op.name}_step"]


@pytest.mark.parametrize("name", OPS)
def test_same_name_same_place(name: str) -> None:
    places = (
        f"kernels/{name}.py",
        f"kernels/triton/{name}.py",
        f"kernels/fallback/{name}.py",
        f"kernels/reference/{name}.py",
        f"bench/bench_{name}.py",
    )
    assert all((ROOT / place).is_file() for place in places)
    assert list((ROOT / "tests").rglob(f"test_{name}.py"))


@pytest.mark.parametrize("op", FUNCTIONS.values(), ids=FUNCTIONS)
def test_the_names_of_a_record_are_arguments(op) -> None:
    required, optional = op.arguments
    for sizes in op.samples:
        names = tuple(op.problem(sizes))
        assert names == (required + optional)[: len(names)]
    assert set(op.gradients) <= set(required + optional)


@pytest.mark.parametrize(
    ("name", "sizes"), [("matmul", (3, 4)), ("matmul", (2,) * 5), ("linear_mse", (3, 4))]
)
def test_a_number_of_sizes_that_is_not_the_ops(name: str, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"{name} takes sizes .*, got {'x'.join(map(str, sizes))}"):
        FUNCTIONS[name].problem(sizes)


def test_the_list_imports_nothing_heavy() -> None:
    """Nor does the rest of the package load Triton, until a kernel is launched."""
    script = (
        "import sys, gradkernels; print([m for m in sys.modules if m.startswith(('triton', 'gradkernels.'))]);"
        "gradkernels.verify.gradcheck; gradkernels.reference; assert 'triton' not in sys.modules"
    )
    modules = set(eval(python("-c", script)))
    assert "gradkernels.ops" in modules
    heavy = ("triton", "gradkernels.triton", "gradkernels.reference", "gradkernels.verify")
    assert not {name for name in modules if name.startswith(heavy)}
