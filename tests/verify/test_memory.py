"""Each memory fault planted in a kernel is found and named rightly; correct kernels raise no alarm.

Over 500 lines, since each fault is a kernel of its own.
"""

import dataclasses
import json
import textwrap

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from gradkernels.verify import InterpreterChangedError, MemoryFaultError, memory_check  # noqa: E402
from gradkernels.verify.memory import interpreter as hooks  # noqa: E402
from gradkernels.verify.memory.regions import Region  # noqa: E402
from triton.runtime import interpreter as triton_interpreter  # noqa: E402

from ..helpers import python  # noqa: E402

pytestmark = [
    pytest.mark.unwatched,
    pytest.mark.skipif(
        isinstance(tl.sum, triton.runtime.JITFunction),
        reason="needs Triton's interpreter (TRITON_INTERPRET=1)",
    ),
]


@triton.jit
def copy_kernel(x_ptr, y_ptr, n_load, n_store, shift, stride, BLOCK: tl.constexpr):
    """y[i] = x[i * stride + shift], loads up to n_load, stores up to n_store."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride + shift, mask=offs < n_load, other=0)
    tl.store(y_ptr + offs, x, mask=offs < n_store)


def copy(x, y, n, *, n_load=None, n_store=None, shift=0, stride=1, block=32, grid=None):
    n_load, n_store = n if n_load is None else n_load, n if n_store is None else n_store
    copy_kernel[(grid or triton.cdiv(n, block),)](x, y, n_load, n_store, shift, stride, BLOCK=block)


def found(report):
    """The single fault of a report that must have one."""
    assert len(report.faults) == 1, str(report)
    return report.faults[0]


def assert_found(report, kind, tensor, cells):
    """The single fault is of this kind, in this tensor, and of so many cells."""
    fault = found(report)
    assert (fault.kind, fault.tensor, fault.cells) == (kind, tensor, cells)
    return fault


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8], ids=str
)
def test_a_correct_kernel_raises_no_alarm(dtype):
    x = torch.arange(100).to(dtype)
    with memory_check() as report:
        y = torch.empty(100, dtype=dtype)
        copy(x, y, 100)
    assert torch.equal(x, y)
    assert report
    itemsize = x.element_size()
    assert (report.launches, report.loaded, report.stored, report.reread) == (
        1,
        100 * itemsize,
        100 * itemsize,
        0,
    )


def test_load_past_the_end_is_named_and_does_not_happen():
    x, y = torch.ones(100), torch.zeros(128)
    with memory_check(raise_exception=False) as report:
        copy(x, y, 128)
    fault = assert_found(report, "out-of-bounds load", "x_ptr", 28)
    assert fault.program == (3, 0, 0)
    assert fault.offset == "right behind its last element"
    assert fault.address == x.data_ptr() + 400
    assert fault.line.startswith("test_memory.py:")
    assert "tl.load(x_ptr" in fault.line
    assert (y[100:] == 0).all()


def test_store_past_the_end_does_not_touch_what_lies_there():
    memory = torch.full((128,), 7.0)
    with memory_check(raise_exception=False) as report:
        copy(torch.ones(128), memory[:100], 128)
    fault = assert_found(report, "out-of-bounds store", "y_ptr", 28)
    assert "tl.store(y_ptr" in fault.line
    assert (memory[100:] == 7).all()


def test_load_before_the_start():
    with memory_check(raise_exception=False) as report:
        copy(torch.ones(64), torch.zeros(64), 64, shift=-3)
    assert found(report).offset == "3 elements before its start"


def test_another_argument_is_still_out_of_bounds():
    """x and y are two halves of one buffer: past the end of x lies y, a legal address of the wrong tensor."""
    buffer = torch.ones(128)
    with memory_check(raise_exception=False) as report:
        copy(buffer[:64], buffer[64:], 64, shift=1)
    kinds = {fault.kind for fault in report.faults}
    assert "out-of-bounds load" in kinds
    assert report.faults[0].tensor == "x_ptr"


@triton.jit
def rows_kernel(x_ptr, y_ptr, stride, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(y_ptr + tl.program_id(0), tl.load(x_ptr + row * stride))


def test_int32_offset_that_wraps():
    """Row 3 of a view with rows 2^30 apart, in int32: -2^30. The memory is virtual, three cells are touched."""
    x = torch.from_numpy(np.zeros(3 * 2**30 + 64, np.float16))
    x[:: 2**30] = 1
    rows, y = x[: 3 * 2**30 + 1 : 2**30], torch.zeros(4, dtype=torch.float16)
    with memory_check(raise_exception=False) as report:
        rows_kernel[(4,)](rows, y, 2**30, WIDE=False)
    assert any(f.kind == "out-of-bounds load" and "before its start" in f.offset for f in report.faults)
    with memory_check() as report:
        rows_kernel[(4,)](rows, y, 2**30, WIDE=True)
    assert y.tolist() == [1, 1, 1, 1]
    assert any("too large" in note for note in report.notes)


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [((2, 2, 3), (20, 5, 1)), ((3,), (1,)), ((3, 2), (1, 4)), ((2, 3, 1), (0, 2, 9)), ((4, 2), (3, 4))],
    ids=str,
)
def test_legal_addresses_of_a_view(sizes, strides):
    """Those of its elements: not of what lies around it, between its matrices, rows or columns."""
    view = torch.zeros(60).as_strided(sizes, strides, 4)
    elements = {int(np.dot(index, strides)) for index in np.ndindex(*sizes)}
    places = np.arange(-4, 50)
    addresses = (np.int64(view.data_ptr()) + 4 * places).astype(np.uint64)
    legal = Region.of("x", view).legal(addresses, 4)
    assert legal is not None
    assert legal.tolist() == [place in elements for place in places]


@pytest.mark.parametrize("layout", ["every other", "columns", "overlapping"])
def test_gaps_of_a_strided_view(layout):
    base = torch.ones(128)
    view = {
        "every other": base[::2],
        "columns": base.view(16, 8)[:, :5],
        "overlapping": base.as_strided((40, 2), (3, 4)),
    }
    view = view[layout]
    with memory_check(raise_exception=False) as report:
        copy(view, torch.zeros(32), 32)
    assert found(report).kind == "out-of-bounds load"
    assert "in a gap of the view" in found(report).offset


def test_legal_addresses_of_views():
    base = torch.arange(128.0)
    for view, stride in ((base[::4], 4), (base.view(16, 8)[:, 0], 8), (base.as_strided((40, 2), (3, 4)), 3)):
        n = 16
        with memory_check():
            y = torch.empty(n)
            copy(view, y, n, stride=stride)
        assert torch.equal(y, base[: n * stride : stride])
    with memory_check():
        y = torch.empty(16)
        copy(torch.ones(1).expand(16), y, 16, stride=0)


@pytest.mark.parametrize(
    "create",
    [
        lambda: torch.empty(64),
        lambda: torch.empty_like(torch.ones(64)),
        lambda: torch.empty_strided((64,), (1,)),
        lambda: torch.empty_permuted((64,), (0,)),
        lambda: torch.ones(1).new_empty(64),
        lambda: torch.ones(1).new_empty_strided((64,), (1,)),
    ],
    ids=["empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"],
)
def test_read_of_unwritten_memory(create):
    with memory_check(raise_exception=False) as report:
        x, y = create(), torch.empty(64)
        x[:60] = 1
        copy(x, y, 64)
    assert assert_found(report, "read of unwritten memory", "x_ptr", 4).program == (1, 0, 0)
    with memory_check():
        x, y = create(), torch.empty(64)
        x.fill_(1)
        copy(x, y, 64)


@pytest.mark.parametrize(
    ("made", "seen"),
    [
        (torch.float32, torch.int32),
        (torch.uint32, torch.uint32),
        (torch.uint64, torch.float64),
        (torch.uint8, torch.float32),
        (torch.int8, torch.float64),
        (torch.float16, torch.int64),
    ],
    ids=str,
)
def test_unwritten_memory_under_another_dtype(made, seen):
    """As a workspace of bytes, or a kernel that copies words."""
    with memory_check(raise_exception=False) as report:
        x = torch.empty(512, dtype=made).view(seen)
        copy(torch.ones(60).to(seen), x, 60)
        copy(x, torch.zeros(64, dtype=seen), 64)
    assert_found(report, "read of unwritten memory", "x_ptr", 4)


def test_output_that_no_program_wrote():
    with memory_check(raise_exception=False) as report:
        y = torch.empty(10, 10)
        copy(torch.ones(100), y, 100, n_store=93)
    assert "the first at [9, 3]" in assert_found(report, "unwritten output", "y_ptr", 7).text


def test_scratch_may_be_larger_than_what_is_used():
    with memory_check():
        scratch, y = torch.empty(100), torch.empty(50)
        copy(torch.ones(50), scratch, 50)
        copy(scratch, y, 50)


def test_outputs_made_before_the_block():
    y = torch.zeros(100)
    with memory_check(outputs={"y": y}, raise_exception=False) as report:
        copy(torch.ones(100), y, 100, grid=3)
    assert (found(report).kind, found(report).cells) == ("unwritten output", 4)
    with memory_check(outputs=[y], raise_exception=False) as report:
        pass
    assert "of outputs[0] " in found(report).text
    with pytest.raises(TypeError, match=r"got torch\.int8"), memory_check(outputs=[y.to(torch.int8)]):
        pass


@triton.jit
def copy_half_kernel(x_ptr, y_ptr):
    offs = tl.arange(0, 32)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def last_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """y[0] = the sum of the program's block: every program writes the same address."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < n, other=0.0)))


def test_two_programs_write_one_address():
    with memory_check(raise_exception=False) as report:
        last_kernel[(3,)](torch.ones(96), torch.zeros(1), 96, BLOCK=32)
    fault = found(report)
    assert (fault.kind, fault.tensor, fault.program) == ("race", "y_ptr", (1, 0, 0))
    assert "which program (0, 0, 0) wrote in the same launch" in fault.text
    with memory_check():
        last_kernel[(1,)](torch.ones(32), torch.zeros(1), 32, BLOCK=32)
        last_kernel[(1,)](torch.ones(32), torch.zeros(1), 32, BLOCK=32)


@pytest.mark.parametrize(
    ("shift", "did"), [(-1, "wrote"), (1, "read")], ids=["read after write", "write after read"]
)
def test_one_program_reads_what_another_writes(shift, did):
    """y[i] = y[i + shift] in place: neighbours meet at the edges of the blocks."""
    y = torch.zeros(66)
    with memory_check(raise_exception=False) as report:
        copy(y[1:], y[1:], 64, shift=shift)
    races = [fault for fault in report.faults if fault.kind == "race"]
    assert len(races) == 1
    assert f"{did} in the same launch" in races[0].text
    with memory_check():
        copy(y[1:], y[1:], 65)


@triton.jit
def last_program_kernel(
    x_ptr, partial_ptr, count_ptr, y_ptr, SEM: tl.constexpr, SCOPE: tl.constexpr, P: tl.constexpr
):
    """The last program to finish adds what all have written."""
    pid = tl.program_id(0)
    tl.store(partial_ptr + pid, tl.load(x_ptr + pid))
    tl.debug_barrier()
    if tl.atomic_add(count_ptr, 1, sem=SEM, scope=SCOPE) == P - 1:
        tl.store(y_ptr, tl.sum(tl.load(partial_ptr + tl.arange(0, P))))


@pytest.mark.parametrize(
    ("sem", "scope", "races"),
    [
        ("acq_rel", "gpu", 0),
        ("acq_rel", "sys", 0),
        ("relaxed", "gpu", 1),
        ("acquire", "gpu", 1),
        ("acq_rel", "cta", 1),
    ],
)
def test_atomics_order_programs_if_they_acquire_and_release(sem, scope, races):
    with memory_check(raise_exception=False) as report:
        partial, y = torch.empty(8), torch.empty(1)
        last_program_kernel[(8,)](
            torch.ones(8), partial, torch.zeros(1, dtype=torch.int32), y, sem, scope, P=8
        )
    assert y.item() == 8
    assert len(report.faults) == races
    assert report.kinds == ("race",) * races


@triton.jit
def scatter_kernel(i_ptr, x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    place = tl.load(i_ptr + offs, offs < n, other=0)
    tl.store(y_ptr + place, tl.load(x_ptr + offs, offs < n, other=0), offs < n)


def test_two_lanes_store_to_one_address():
    x, places = torch.tensor([1.0, 2, 3, 4, 2]), torch.tensor([0, 2, 1, 3, 2])
    with memory_check():
        scatter_kernel[(1,)](places, x, torch.zeros(4), 5, BLOCK=8)
    x[4] = 5
    with memory_check(raise_exception=False) as report:
        scatter_kernel[(1,)](places, x, torch.zeros(4), 5, BLOCK=8)
    fault = assert_found(report, "race", "y_ptr", 1)
    assert "two lanes of program (0, 0, 0) store different numbers to y_ptr" in fault.text
    assert ", 2 elements from its start" in fault.text


@triton.jit
def words_kernel(x_ptr, y_ptr, shift):
    """Copies four words from byte ``shift`` on."""
    offs = tl.arange(0, 4)
    tl.store(y_ptr + offs, tl.load((x_ptr + shift).to(tl.pointer_type(tl.int32)) + offs))


def test_misaligned_words():
    x, y = torch.zeros(32, dtype=torch.int8), torch.zeros(4, dtype=torch.int32)
    with memory_check():
        words_kernel[(1,)](x, y, 4)
    with memory_check(raise_exception=False) as report:
        words_kernel[(1,)](x, y, 2)
    assert_found(report, "misaligned load", "x_ptr", 4)


@triton.jit
def late_store_kernel(x_ptr, partial_ptr, count_ptr, y_ptr, P: tl.constexpr):
    """As above, but the partial is written after the atomic that should publish it."""
    pid = tl.program_id(0)
    done = tl.atomic_add(count_ptr, 1)
    tl.store(partial_ptr + pid, tl.load(x_ptr + pid))
    if done == P - 1:
        tl.store(y_ptr, tl.sum(tl.load(partial_ptr + tl.arange(0, P))))


def test_a_store_after_the_release_is_not_ordered_by_it():
    with memory_check(raise_exception=False) as report:
        partial, y = torch.empty(8), torch.empty(1)
        late_store_kernel[(8,)](torch.ones(8), partial, torch.zeros(1, dtype=torch.int32), y, P=8)
    assert_found(report, "race", "partial_ptr", 7)


@triton.jit
def histogram_kernel(x_ptr, y_ptr, PLAIN: tl.constexpr):
    i = tl.load(x_ptr + tl.program_id(0))
    if PLAIN:
        tl.store(y_ptr + i, tl.load(y_ptr + i) + 1)
    else:
        tl.atomic_add(y_ptr + i, 1, sem="relaxed")


def test_atomics_do_not_race_with_one_another():
    x, y = torch.tensor([0, 1, 1, 0], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with memory_check() as report:
        histogram_kernel[(4,)](x, y, PLAIN=False)
    assert y.tolist() == [2, 2]
    assert report.traffic[0].atomics == 16
    with memory_check(raise_exception=False) as report:
        histogram_kernel[(4,)](x, y, PLAIN=True)
    assert set(report.kinds) == {"race"}


@triton.jit
def mixed_kernel(x_ptr):
    if tl.program_id(0) == 0:
        tl.atomic_add(x_ptr, 1)
    else:
        tl.store(x_ptr, 0)


def test_an_atomic_races_with_a_plain_store():
    with memory_check(raise_exception=False) as report:
        mixed_kernel[(2,)](torch.zeros(1, dtype=torch.int32))
    assert found(report).kind == "race"


@pytest.mark.skipif(not hasattr(tl, "atomic_load"), reason="tl.atomic_load is new in triton 3.9")
@pytest.mark.parametrize(("sem", "races"), [("acquire", 0), ("relaxed", 1)])
def test_atomic_loads_and_stores_order_too(sem, races):
    @triton.jit
    def message_kernel(x_ptr, flag_ptr, y_ptr, SEM: tl.constexpr, BACK: tl.constexpr):
        if tl.program_id(0) == 0:
            tl.store(x_ptr, 5.0)
            tl.atomic_store(flag_ptr, 1, sem=BACK)
        else:
            if tl.atomic_load(flag_ptr, sem=SEM) == 1:
                tl.store(y_ptr, tl.load(x_ptr))

    x, flag, y = torch.zeros(1), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    with memory_check(raise_exception=False) as report:
        message_kernel[(2,)](x, flag, y, SEM=sem, BACK="release" if sem == "acquire" else sem)
    assert y.item() == 5
    assert len(report.faults) == races


@pytest.mark.skipif(not hasattr(tl, "atomic_load"), reason="tl.atomic_load is new in triton 3.9")
def test_a_plain_load_after_an_atomic_one_races_with_an_atomic_store():
    @triton.jit
    def kernel(x_ptr, y_ptr):
        if tl.program_id(0) == 0:
            tl.store(y_ptr, tl.atomic_load(x_ptr, sem="relaxed"))
        elif tl.program_id(0) == 1:
            tl.store(y_ptr + 1, tl.load(x_ptr))
        else:
            tl.atomic_store(x_ptr, 1.0, sem="relaxed")

    with memory_check(raise_exception=False) as report:
        kernel[(3,)](torch.zeros(1), torch.zeros(2))
    assert (found(report).kind, "program (1, 0, 0) read" in found(report).text) == ("race", True)


@triton.jit
def table_kernel(table_ptr, n, BLOCK: tl.constexpr):
    """Doubles n elements of the tensor whose address is table[program]."""
    pointer = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    offs = tl.arange(0, BLOCK)
    tl.store(pointer + offs, 2 * tl.load(pointer + offs, mask=offs < n), mask=offs < n)


def test_tables_of_pointers():
    tensors = [torch.ones(20), torch.ones(30), torch.ones(25)]
    table = torch.tensor([tensor.data_ptr() for tensor in tensors])
    with memory_check(tensors) as report:
        table_kernel[(3,)](table, 20, BLOCK=32)
    assert [tensor.sum().item() for tensor in tensors] == [40, 50, 45]
    with memory_check({"a": tensors[0], "b": tensors[1], "c": tensors[2]}, raise_exception=False) as report:
        table_kernel[(3,)](table, 22, BLOCK=32)
    assert {(fault.tensor, fault.offset) for fault in report.faults} == {
        ("a", "right behind its last element")
    }
    assert {fault.kind for fault in report.faults} == {"out-of-bounds load", "out-of-bounds store"}
    with memory_check(raise_exception=False) as report:
        table_kernel[(3,)](table, 20, BLOCK=32)
    assert all("belongs to no tensor known here" in fault.text for fault in report.faults)
    assert len(report.faults) == 2
    with memory_check():  # whoever asks for an address in the block may put it into a table
        table_kernel[(3,)](torch.tensor([tensor.data_ptr() for tensor in tensors]), 20, BLOCK=32)
    with memory_check([*tensors[:2], tensors[0]], raise_exception=False) as report:
        table_kernel[(2,)](torch.tensor([tensors[0].data_ptr()] * 2), 20, BLOCK=32)
    assert set(report.kinds) == {"race"}


@triton.jit
def descriptor_kernel(x_desc, y_desc, BLOCK: tl.constexpr):
    y_desc.store([0, tl.program_id(0) * BLOCK], x_desc.load([0, tl.program_id(0) * BLOCK]))


@pytest.mark.parametrize(("columns", "fault"), [(40, None), (44, "out-of-bounds load")])
def test_descriptors(columns, fault):
    """A descriptor that claims more columns than the tensor has."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, y = torch.ones(4, 40)[:, :], torch.ones(4, 40)
    x_desc = TensorDescriptor(x, [4 if fault is None else 5, 40], [40, 1], [8, 8])
    y_desc = TensorDescriptor(y, [4, 40], [40, 1], [8, 8])
    with memory_check(raise_exception=False) as report:
        descriptor_kernel[(columns // 8,)](x_desc, y_desc, BLOCK=8)
    assert report.kinds == (() if fault is None else (fault,))
    if fault:
        assert found(report).tensor == "x_desc"


@triton.jit
def helper(x_ptr, offs):
    return tl.load(x_ptr + offs)


@triton.jit
def tuple_kernel(pointers, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, helper(pointers[0], offs) + helper(pointers[1], offs))


def test_tuples_and_device_functions():
    with memory_check(raise_exception=False) as report:
        y = torch.empty(16)
        tuple_kernel[(1,)]((torch.ones(16), torch.ones(15)), y, BLOCK=16)
    assert found(report).tensor == "pointers[1]"
    assert "return tl.load(x_ptr + offs)" in found(report).line


def test_traffic_counts_each_instruction_once_per_address():
    x = torch.ones(64)
    with memory_check() as report:
        y = torch.empty(64)
        copy(x, y, 64, stride=0)
    assert (report.loaded, report.reread, report.stored) == (2 * 4, 4, 64 * 4)
    assert report.traffic[0].programs == 2
    with memory_check() as report:
        y = torch.empty(64)
        copy(x, y, 64)
        copy(x, y, 64)
    assert (report.launches, report.loaded, report.reread) == (2, 2 * 256, 0)


def test_a_fault_raises_with_the_report_and_as_json():
    with pytest.raises(MemoryFaultError, match="out-of-bounds load in copy_kernel") as caught, memory_check():
        copy(torch.ones(100), torch.zeros(128), 128)
    data = json.loads(caught.value.report.to_json())
    assert data["faults"][0]["tensor"] == "x_ptr"
    assert data["traffic"][0]["loaded"] == 400


def test_everything_is_put_back_also_after_an_error():
    def hooked():
        interpreter = triton_interpreter._interpreter, triton_interpreter._implicit_cvt
        return torch.empty, torch.Tensor.new_empty, *interpreter, triton_interpreter.GridExecutor.__call__

    before = hooked()
    with pytest.raises(ZeroDivisionError), memory_check():
        copy(torch.ones(100), torch.zeros(128), 128, block=1 // 0)
    assert hooked() == before
    assert "new_empty" not in torch.Tensor.__dict__
    with pytest.raises(RuntimeError, match="do not nest"), memory_check(), memory_check():
        pass


@triton.jit
def sums_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * BLOCK + tl.arange(0, BLOCK))
    tl.store(y_ptr + row, tl.sum(x) + tl.max(x))


def test_the_language_is_prepared_once_a_launch(monkeypatch):
    """tl.sum and tl.max are device functions; their calls need no preparation of their own."""
    prepared = []
    prepare = triton_interpreter._patch_lang_tensor
    monkeypatch.setattr(
        triton_interpreter, "_patch_lang_tensor", lambda *args: (prepared.append(1), prepare(*args))
    )
    x, y = torch.arange(64.0), torch.empty(8)
    with memory_check():
        for launches in (1, 2):
            sums_kernel[(8,)](x, y, 8)
            assert 1 <= len(prepared) / launches <= 4  # the language and its core, as modules name them
    assert torch.equal(y, x.view(8, 8).sum(1) + x.view(8, 8).amax(1))
    assert isinstance(tl.sum, type(tl.max))
    assert "lambda" not in tl.load.__qualname__  # and put back after the launch


@triton.jit
def twice_kernel(y_ptr):
    offs = tl.arange(0, 8)
    tl.store(y_ptr + offs, offs + offs)


@pytest.mark.parametrize("debug", [False, True])
def test_an_overflow_is_looked_for_only_where_it_is_told(monkeypatch, debug):
    builder = triton_interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=True, debug=debug)
    monkeypatch.setattr(builder, "options", options)
    additions, add = [], type(builder).create_add
    monkeypatch.setattr(type(builder), "create_add", lambda *args: (additions.append(1), add(*args))[1])
    y = torch.empty(8, dtype=torch.int32)
    with memory_check():
        twice_kernel[(1,)](y)
    assert len(additions) == (2 if debug else 1)  # the one in 64 bits is what the assertion looks at
    assert torch.equal(y, 2 * torch.arange(8, dtype=torch.int32))
    assert builder.options is options


def test_types_are_made_once(monkeypatch):
    made, init = [], tl.block_type.__init__
    x, y = torch.arange(64.0), torch.empty(64)
    with memory_check():
        copy(x, y, 64)
        monkeypatch.setattr(tl.block_type, "__init__", lambda *args: (made.append(1), init(*args))[1])
        copy(x, y, 64)
    assert len(made) <= 4  # by 2 programs; the interpreter alone makes 46
    assert torch.equal(x, y)


def test_a_changed_interpreter_is_an_error(monkeypatch):
    monkeypatch.setattr(hooks, "_sound", False)
    with monkeypatch.context() as patch:
        patch.setattr(triton_interpreter, "_implicit_cvt", lambda arg, extra=None: arg)
        with pytest.raises(InterpreterChangedError, match="_implicit_cvt takes"), memory_check():
            pass
    with monkeypatch.context() as patch:
        patch.delattr(triton_interpreter.InterpreterBuilder, "create_atomic_cas")
        with pytest.raises(InterpreterChangedError, match="create_atomic_cas takes None"), memory_check():
            pass
    original = triton_interpreter._interpreter
    with monkeypatch.context() as patch:  # a store that goes another way: only the canary can tell

        def create_masked_store(self, ptrs, value, mask, *rest):
            return original.store(ptrs.data & hooks.ADDRESS, value.data, mask.data)

        patch.setattr(triton_interpreter.InterpreterBuilder, "create_masked_store", create_masked_store)
        with pytest.raises(InterpreterChangedError, match="canary"), memory_check():
            pass
    with memory_check():
        copy(torch.ones(8), torch.zeros(8), 8)


def test_what_is_compiled_inside_the_block_traces_as_ever():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def fn(x):
        made = torch.empty_like(x).copy_(x) + x.new_empty(3).fill_(1)
        return (
            made + x.new_empty((3,), dtype=torch.float64).fill_(1) + x.new_empty_strided((3,), (1,)).fill_(1)
        )

    with memory_check():
        assert fn(torch.ones(3)).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    "imported", ["", "import torch._dynamo; torch._dynamo.trace_rules.clear_lru_cache()"]
)
def test_what_was_first_compiled_inside_a_block_leaves_no_trace(imported):
    """The compiler's tables of torch's functions are made at its first use."""
    program = f"""
        import os
        os.environ["TRITON_INTERPRET"] = "1"
        import torch
        from gradkernels.verify import memory_check
        {imported}
        def fn(x):
            return torch.empty_like(x).copy_(x) + x.new_empty(3).fill_(1)
        for block in (memory_check(), memory_check()):
            with block:
                assert torch.compile(fn, fullgraph=True, backend="aot_eager")(torch.ones(3)).tolist() == [2, 2, 2]
            torch._dynamo.reset()
        assert torch.compile(fn, fullgraph=True, backend="aot_eager")(torch.ones(3)).tolist() == [2, 2, 2]
        """
    python("-W", "error::UserWarning", "-c", textwrap.dedent(program))


def test_tensors_without_memory_of_their_own_pass_through():
    """Wrappers of torch.func, and sparse tensors, have no storage to mark; what a wrapper stands around has."""

    def fn(x):
        made = torch.empty_like(x)
        assert made.shape == x.shape
        return (made.copy_(x) * x + x.new_empty(x.shape).fill_(1) + torch.empty(3).fill_(1)).sum()

    x = torch.ones(4, 3)
    with memory_check():
        assert torch.func.grad(fn)(x[0]).tolist() == [2, 2, 2]
        assert torch.func.vmap(fn)(x).tolist() == [9, 9, 9, 9]
        assert torch.func.vmap(torch.func.grad(fn))(x).sum() == 24
        assert torch.func.hessian(fn)(x[0]).trace() == 6
        torch.empty(3, 4, layout=torch.sparse_coo)
    made = []

    def unwritten(x):
        made.append(torch._C._functorch.get_unwrapped(torch.empty_like(x)))
        return x

    with memory_check(raise_exception=False) as report:
        torch.func.vmap(unwritten)(x)
        copy(made[0], torch.zeros(12), 12)
    assert found(report).kind == "read of unwritten memory"


@pytest.mark.parametrize(
    "grid", [[4], (4,), lambda args: [4], lambda args: (4,)], ids=["list", "tuple", "f[]", "f()"]
)
def test_grids_as_lists_and_as_functions(grid):
    x, y = torch.arange(100.0), torch.zeros(100)
    with memory_check() as report:
        copy_kernel[grid](x, y, 100, 100, 0, 1, BLOCK=32)
    assert torch.equal(x, y)
    assert report.traffic[0].programs == 4


def tuned(configurations, **options):
    @triton.autotune([triton.Config(c, num_warps=4) for c in configurations], key=["n"], **options)
    @triton.jit
    def add_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, LIMIT: tl.constexpr, ADD: tl.constexpr = True):
        """y = x, or y += x, for the first n + LIMIT elements."""
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < n + LIMIT
        value = tl.load(x_ptr + offs, mask)
        if ADD:
            value += tl.load(y_ptr + offs, mask)
        tl.store(y_ptr + offs, value, mask)

    return add_kernel


def test_each_configuration_of_an_autotuned_kernel_by_itself():
    blocks = [{"BLOCK": 32, "LIMIT": 0}, {"BLOCK": 64, "LIMIT": 0}, {"BLOCK": 16, "LIMIT": 0}]
    x, y = torch.ones(100), torch.ones(100)
    with memory_check() as report:
        tuned(blocks)[lambda args: (triton.cdiv(args["n"], args["BLOCK"]),)](x, y, 100)
    assert (y == 2).all(), "added once, not once for each configuration"
    assert report.notes == [
        "add_kernel is autotuned: each of its 3 configurations was checked by itself; results and traffic are "
        "those of the first"
    ]
    assert [(entry.kernel, entry.programs, entry.stored) for entry in report.traffic] == [
        ("add_kernel", 4, 400)
    ]
    with memory_check() as report:
        tuned(blocks[:1])[(4,)](x, y, 100)
    assert (y == 3).all()
    assert report.notes == []


def test_a_fault_of_one_configuration_names_it_and_leaves_nothing():
    faulty = tuned([{"BLOCK": 32, "LIMIT": 0}, {"BLOCK": 64, "LIMIT": 7}])
    x, y = torch.ones(200)[:100], torch.ones(200)[:100]
    with memory_check(raise_exception=False) as report:
        faulty[lambda args: (triton.cdiv(args["n"] + 7, args["BLOCK"]),)](x, y, 100)
    assert {(fault.kernel, fault.cells) for fault in report.faults} == {
        ("add_kernel (BLOCK=64, LIMIT=7, num_warps=4)", 7)
    }
    assert (y == 2).all()
    # What only the second configuration writes, nothing has written at the end.
    partial = tuned([{"BLOCK": 32, "LIMIT": -7}, {"BLOCK": 64, "LIMIT": 0}], reset_to_zero=["x_ptr"])
    with memory_check(raise_exception=False) as report:
        y = torch.empty(100)
        partial[(4,)](x, y, 100, ADD=False)
    assert (found(report).kind, found(report).cells) == ("unwritten output", 7)
    assert (x == 0).all(), "its hooks ran"


def test_a_launch_after_the_one_that_tunes_resets_nothing():
    kernel = tuned([{"BLOCK": 32, "LIMIT": 0}, {"BLOCK": 64, "LIMIT": 0}], reset_to_zero=["y_ptr"])
    x, y = torch.ones(100), torch.empty(100)
    for total in (1, 2):
        with memory_check():
            kernel[(4,)](x, y, 100)
        assert (y == total).all()


@triton.jit
def small_kernel(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.static_assert(BLOCK <= 32, "too large")
    tl.store(x_ptr + offs, x + 1)


@pytest.mark.parametrize("configuration", [None, 0, 1])
def test_configurations_that_would_not_compile_are_left_out(configuration):
    def kernel(*blocks):
        return triton.autotune([triton.Config({"BLOCK": block}) for block in blocks], key=[])(small_kernel)

    x = torch.zeros(32)  # what is read before the assertion fails was never launched
    with memory_check(configuration=configuration) as report:
        kernel(64, 32)[(1,)](x)
        kernel(16, 64)[(1,)](x)
    assert [entry.stored for entry in report.traffic] == [128, 64]
    assert x.sum() == 48
    with pytest.raises(triton.runtime.errors.InterpreterError), memory_check(configuration=configuration):
        kernel(64, 128)[(1,)](x)


@triton.jit
def onto_kernel(y_ptr, EXCHANGE: tl.constexpr):
    if EXCHANGE:
        tl.atomic_xchg(y_ptr, 1)
    else:
        tl.atomic_add(y_ptr, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32], ids=str)
def test_an_atomic_reads_what_it_adds_to(dtype):
    with memory_check(raise_exception=False) as report:
        onto_kernel[(2,)](torch.empty(1, dtype=dtype), EXCHANGE=False)
    assert found(report).kind == "read of unwritten memory"
    with memory_check():
        onto_kernel[(2,)](torch.zeros(1, dtype=dtype), EXCHANGE=False)
        if dtype == torch.int32:
            onto_kernel[(2,)](torch.empty(1, dtype=dtype), EXCHANGE=True)


def test_tensors_that_triton_takes_for_another_dtype():
    x, y = torch.arange(8, dtype=torch.int8), torch.zeros(7, dtype=torch.int8)
    with memory_check(raise_exception=False) as report:
        copy(triton.reinterpret(x, tl.uint8), triton.reinterpret(y, tl.uint8), 8)
    assert y.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert (found(report).kind, found(report).tensor) == ("out-of-bounds store", "y_ptr")
