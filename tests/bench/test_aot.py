"""What the compiler makes of the kernels, for chips that are not here: no spills, wide accesses, tensor cores."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

pytest.importorskip("triton")

from bench.reports import aot
from bench.reports.aot import AOT_CASES, CHIPS, Row, every_case, report

from ..cases import each_kind_once
from ..helpers import is_pinned
from ..launch.test_launch import run

SAMPLE = {  # of every run, in bfloat16: what the tests below look at
    "matmul": (
        "large",
        "linear",
        "gradient of weight",
        "odd sizes",
        "tall data",
        "row by matrix",
        "tall and skinny",
    ),
    "mse": ("forward", "backward, odd size"),
    "linear_mse": ("1 output of 1024", "8 outputs of 256"),
    "linear_mse_fit": ("Adam, 8 features",),
    "sgd": ("momentum, aligned or not",),
    "adam": ("AdamW, aligned or not",),
}
LARGE = ("large", "gradient of weight")
SPLIT = ("large", "odd sizes")
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


def always(target: str, number: int, dtype: str) -> bool:
    """On the chip that matters most SAMPLE, and the float32 products that are split; on each the large products."""
    op, shapes = AOT_CASES[number].op, AOT_CASES[number].shapes
    if target == "sm_90" and dtype == "bfloat16":
        return shapes in SAMPLE.get(op, ())
    return op == "matmul" and (
        (dtype == "bfloat16" and shapes in LARGE)
        or (target == "sm_90" and dtype == "float32" and shapes in SPLIT)
    )


def kinds(target: str, number: int, dtype: str) -> list[Any]:
    """A sample compiles each case somewhere, and each op and each dtype on each chip."""
    op = AOT_CASES[number].op
    found = [number, (target, op), (target, dtype), (op, dtype)]
    return [*found, (target, number, dtype)] if always(target, number, dtype) else found


CELLS = [(target, *case) for target in CHIPS for case in every_case()]
SAMPLED = [cell for cell, chosen in each_kind_once(CELLS, kinds) if chosen]


def sampled_rows(target: str) -> list[Row]:
    return list(report([target], sorted(case for chip, *case in SAMPLED if chip == target)))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """The sample on the chip that matters most."""
    return sampled_rows("sm_90")


# The registers of a thread are chosen for the Triton that is pinned. Another may lack a few, which the L1 holds;
# hundreds would tell of a wrong plan.
SPILLS = 0 if is_pinned("triton") else 32


def narrow(counts: dict[str, int]) -> dict[str, int]:
    return {bits: count for bits, count in counts.items() if bits not in ("128", "tensor")}


def check(rows: list[Row]) -> None:
    """What holds for every kernel on every chip."""
    problems = []
    for row in rows:
        where = f"{row.target} {row.op}: {row.shapes} {row.dtype} {row.kernel}: "
        if row.error:
            problems.append(where + row.error)
            continue
        if row.spills > SPILLS:
            problems.append(where + f"{row.spills} spilt")
        if row.shared > CHIPS[row.target].shared:
            problems.append(where + f"{row.shared} B of shared memory")
        if row.registers > (512 if row.target == "gfx942" else 255):
            problems.append(where + f"{row.registers} registers")
        for what, wide, counts in (
            ("load", row.wide_loads, row.loads),
            ("store", row.wide_stores, row.stores),
        ):
            if wide and not counts.keys() & {"128", "tensor"}:
                problems.append(where + f"no {what} is wide: {counts}")
    assert not problems, "\n".join(problems)


def find(rows: list[Row], shapes: str, dtype: str) -> Row:
    """The first kernel of a matmul case."""
    return next(row for row in rows if (row.op, row.shapes, row.dtype) == ("matmul", shapes, dtype))


def check_products(rows: list[Row], target: str) -> None:
    """What holds for matmul: large bfloat16 products on tensor cores, every access of theirs wide."""
    for shapes in LARGE:
        row = find(rows, shapes, "bfloat16")
        assert any(name.startswith(TENSOR_CORES[target]) for name in row.matrix), row
        assert not narrow(row.loads), row
        assert not narrow(row.stores), row


def test_the_sample(rows):
    check(rows)
    compiled = {(row.op, row.shapes) for row in rows if row.dtype == "bfloat16"}
    assert compiled >= {(op, shapes) for op, each in SAMPLE.items() for shapes in each}


@pytest.mark.parametrize("target", [target for target in CHIPS if target != "sm_90"])
def test_the_sample_on_other_chips(target):
    rows = sampled_rows(target)
    check(rows)
    check_products(rows, target)
    assert {row.op for row in rows} == {case.op for case in AOT_CASES}


def test_the_samples_leave_no_case_out():
    assert {number for _, number, _ in SAMPLED} == set(range(len(AOT_CASES)))
    assert len(SAMPLED) < len(CELLS) / 4


def test_large_products_use_wgmma_and_wide_accesses(rows):
    check_products(rows, "sm_90")
    assert find(rows, "large", "bfloat16").loads == {
        "tensor": find(rows, "large", "bfloat16").loads["tensor"]
    }


def test_float32_products_are_split_in_three(rows):
    """Three tf32 products for each that float32's own accuracy takes: the sequence that the numerics rest on."""
    for shapes in SPLIT:
        products = find(rows, shapes, "float32").matrix
        assert list(products) == ["HGMMA"]
        assert products["HGMMA"] % 3 == 0
        assert products["HGMMA"] >= 6


def test_the_limits_can_fail(rows):
    """Rows of odd length are loaded element by element; a spill, too much memory, a compiler's error."""
    odd = find(rows, "odd sizes", "bfloat16")
    assert narrow(odd.loads)
    for broken in (
        {"wide_loads": True},
        {"wide_stores": True},
        {"spills": SPILLS + 1},
        {"shared": 232449},
        {"error": "no"},
    ):
        with pytest.raises(AssertionError, match="odd sizes"):
            check([replace(odd, **broken)])
    check([odd])


def test_the_report_sees_spills(tmp_path):
    """A sum that needs more values at once than it may have registers."""
    row = run(
        """
        from dataclasses import asdict
        from bench.reports.aot import Row, _nvidia
        @triton.jit
        def cramped(x_ptr, out_ptr, SIZE: tl.constexpr):
            i = tl.arange(0, SIZE)
            x = tl.load(x_ptr + i)
            tl.store(out_ptr + i, x * tl.sum(x))
        x = torch.zeros(1)
        launch(cramped, (1,), x, x, device=CPU, SIZE=2048, num_warps=1, maxnreg=32)
        row = Row("", "", "", "", "")
        _nvidia(next(iter(module._compiled.values()))[0], row)
        print(json.dumps(asdict(row)))
        """,
        tmp_path,
    )
    assert row["registers"] <= 32
    assert row["spills"] > 0


@pytest.mark.full
@pytest.mark.parametrize("target", CHIPS)
def test_every_kernel_on_every_chip(target):
    rows = list(report([target], every_case()))
    check(rows)
    check_products(rows, target)


def test_rows_are_json(tmp_path, monkeypatch):
    """The report's file holds what it prints."""
    row, path = Row("mse", "forward", "float32", "sm_90", "kernel"), tmp_path / "deep" / "aot.json"
    monkeypatch.setattr(aot, "report", lambda *_: iter([row]))
    assert aot.main(["--op", "mse", "--target", "sm_90", "--json", str(path)]) == 0
    assert json.loads(path.read_text()) == [asdict(row)]
