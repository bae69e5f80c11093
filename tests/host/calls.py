"""The calls that go through the genuine launcher: every op, dtype and class of shapes, every optimizer.

Each function runs in a worker (``worker.py``), given plain arguments; what it returns goes back as JSON.
Kernels are recorded, not run: no value means anything.
"""

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import gradkernels
import torch
import triton
import triton.language as tl
from gradkernels import use_backend
from gradkernels.operator import LAUNCHES
from gradkernels.ops import FUNCTIONS
from gradkernels.triton import multi_tensor, replay
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.reports import cases
from bench.reports.aot import AOT_CASES

from ..cases import CASES, Case
from .launches import Record, Recorder
from .standin import Launch, StandIn

DTYPES = ("float64", "float32", "float16", "bfloat16")
LAYOUTS = ("contiguous", "misaligned", "transposed", "strided")
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("FusedSGD", {}),
    "SGD momentum": ("FusedSGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD guard": ("FusedSGD", {"momentum": 0.9, "max_norm": 1.0, "on_nonfinite": "skip"}),
    "SGD masters": ("FusedSGD", {"momentum": 0.9, "master_weights": True}),
    "SGD stochastic rounding": ("FusedSGD", {"momentum": 0.9, "stochastic_rounding": True}),
    "Adam": ("FusedAdam", {}),
    "Adam amsgrad": ("FusedAdam", {"amsgrad": True, "weight_decay": 0.1}),
    "Adam guard": ("FusedAdam", {"max_norm": 1.0, "on_nonfinite": "skip"}),
    "AdamW": ("FusedAdamW", {}),
    "AdamW masters": ("FusedAdamW", {"master_weights": True}),
    "AdamW masters guard": ("FusedAdamW", {"master_weights": True, "max_norm": 1.0, "on_nonfinite": "skip"}),
    "AdamW stochastic rounding": ("FusedAdamW", {"stochastic_rounding": True}),
}


def shape_classes() -> list[Case]:
    """The classes of shapes that the kernel check has: one element, odd sizes, a long row, several blocks."""
    return [
        Case(op.function().__name__, op.problem(sizes)) for op in FUNCTIONS.values() for sizes in op.samples
    ]


ALL_CASES = [*CASES, *shape_classes()]
WARMUPS: dict[str, tuple[list[tuple[int, ...]], Callable[..., Any]]] = {
    "matmul": (
        [(70, 40), (40, 30), (30,)],
        lambda *t: gradkernels.matmul(*t).backward(torch.ones(70, 30, device=t[0].device)),
    ),
    "mse": ([(33, 7), (33, 7)], lambda x, y: gradkernels.mse_loss(x, y.detach()).backward()),
    "linear_mse": (
        [(300, 24), (1, 24), (300, 1), (1,)],
        lambda x, w, y, b: gradkernels.linear_mse_loss(x.detach(), w, y.detach(), b).backward(),
    ),
    "linear_mse_models": (
        [(3, 300, 24), (3, 1, 24), (3, 300, 1), (3, 1)],
        lambda x, w, y, b: gradkernels.linear_mse_loss(x.detach(), w, y.detach(), b).sum().backward(),
    ),
    "sgd": ([(5, 3), (7,)], lambda *t: gradkernels.FusedSGD(t, momentum=0.5).step()),
    "adam": ([(5, 3), (7,)], lambda *t: gradkernels.FusedAdamW(t).step()),
}


@triton.jit(do_not_specialize=["m"])
def probe(x_ptr, out_ptr, n, m, scale, sizes, BLOCK: tl.constexpr, TWICE: tl.constexpr = False):
    """A kernel with each kind of argument."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n + m, other=0.0) * scale
    for dim in tl.static_range(len(sizes)):
        x += sizes[dim]
    tl.store(out_ptr + i, x, mask=i < n + m)


@triton.jit
def optional(bias_ptr, weight_ptr, out_ptr):
    """A kernel with pointers that may be None."""
    x = 1.0
    if bias_ptr is not None:
        x += tl.load(bias_ptr)
    if weight_ptr is not None:
        x *= tl.load(weight_ptr)
    tl.store(out_ptr, x)


@triton.jit
def copy_tile(source, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A kernel with a tensor map."""
    tile = source.load([0, 0])
    i = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + i, tile)


class Calls:
    """The calls, over one stand-in; each of its devices has a current stream of its own."""

    def __init__(self, standin: StandIn) -> None:
        self._standin = standin
        self._device = standin.tensors
        for device in range(standin.device_count()):
            standin.use_new_stream(device)
        self._recorder = Recorder(standin, plain=os.environ.get("GRADKERNELS_PLAIN_LAUNCH") == "1")
        # Tensors of a compile report's calls have no memory; here they have, though nobody touches it.
        cases.device = self._device

    def op(self, number: int, dtype: str, layout: str) -> list[Any]:
        """Forward, backward and double backward of a case."""
        case = ALL_CASES[number]
        torch.manual_seed(number)
        tensors = [
            lay_out(tensor, layout).requires_grad_()
            for tensor in case.arguments(getattr(torch, dtype), self._device)
        ]

        def run() -> None:
            result = case.ours(*tensors)
            upstream = torch.randn_like(result).requires_grad_()
            gradients = torch.autograd.grad(result, tensors, upstream, create_graph=True)
            curved = [gradient for gradient in gradients if gradient.requires_grad]
            directions = [torch.randn_like(gradient) for gradient in curved]
            torch.autograd.grad(curved, [*tensors, upstream], directions, allow_unused=True)

        return self._twice(run)

    def repeated(self, number: int, dtype: str) -> list[Any]:
        """Calls of a case that are replays launch what they would launch otherwise, whatever came between.

        Forward alone, and forward and backward, by all tensors and by one, of each layout in turn. An address is
        compared by the tensor it lies in; of temporary memory, by where it came up first.
        """
        case = ALL_CASES[number]
        calls = {}
        for layout in LAYOUTS:
            torch.manual_seed(number)
            arguments = case.arguments(getattr(torch, dtype), self._device)
            tensors = [lay_out(tensor, layout).requires_grad_() for tensor in arguments]
            upstream = torch.randn_like(case.ours(*tensors).detach())

            def forward(tensors: list[Tensor] = tensors) -> list[Tensor]:
                with torch.no_grad():
                    return [*tensors, case.ours(*tensors)]

            def both(
                some: slice, tensors: list[Tensor] = tensors, upstream: Tensor = upstream
            ) -> list[Tensor]:
                leaves = tensors[some]
                given = [x if any(x is leaf for leaf in leaves) else x.detach() for x in tensors]
                result = case.ours(*given)
                return [*tensors, upstream, result, *torch.autograd.grad(result, leaves, upstream)]

            calls[f"{layout}, forward"] = forward
            calls[f"{layout}, backward"] = partial(both, slice(None))
            calls[f"{layout}, backward of the second"] = partial(both, slice(1, 2))

        def launched(call: Callable[[], list[Tensor]]) -> tuple[Record, list[Any]]:
            with use_backend("triton"), self._recorder.recording() as record:
                tensors = call()
            return record, [seen(launch, tensors, others) for others in [[]] for launch in record.launches]

        forget()
        with mock.patch.object(replay, "run", lambda replays, key_of, call, args: call(*args)):
            ordinary = {name: launched(call)[1] for name, call in calls.items()}
        for _ in range(4):
            rounds = {name: launched(call) for name, call in calls.items()}
        for name, (_, launches) in rounds.items():
            assert launches == ordinary[name], f"{name}: {launches} for {ordinary[name]}"
        return [record.replayed for record, _ in rounds.values()]

    def many_shapes(self, count: int) -> list[int]:
        """What is kept after calls of so many different shapes, each made three times."""
        kept = []
        for size in range(1, count):
            x = torch.empty(size, device=self._device)
            with use_backend("triton"), torch.no_grad():
                for _ in range(3):
                    gradkernels.mse_loss(x, x.clone())
            kept.append(sum(len(launches._replays) for launches in LAUNCHES))
            kept.append(len(gradkernels.mse_loss.shortcuts))
        return [max(kept), *kept[-2:]]

    def shortcuts(self, kind: str) -> list[bool]:
        """Which keys of a repeated ``linear`` have a shortcut."""
        forget()
        input, weight = (torch.ones(8, 8, device=self._device) for _ in range(2))
        if kind == "expanded leaf":
            weight = torch.ones((), device=self._device).expand(8, 8)
        mode = torch.inference_mode() if kind == "inference" else nullcontext()
        weight.requires_grad_("leaf" in kind)
        with use_backend("triton"), mode, self._recorder.recording() as record:
            for _ in range(5):
                gradkernels.linear(input, weight)
        assert len(record.launches) == 5
        return list(map(bool, gradkernels.linear.shortcuts.values()))

    def fit(self, rows: int, batch_size: int | None, models: int) -> list[Any]:
        """Rounds of training."""
        x, y = (torch.ones(rows, columns, device=self._device) for columns in (3, 1))
        weight = torch.zeros(models, 1, 3, device=self._device, requires_grad=True)
        optimizer = gradkernels.FusedSGD([weight], lr=0.1)
        fit = partial(gradkernels.linear_mse_fit, x, weight, y, optimizer=optimizer, batch_size=batch_size)
        return [launch[0] for steps in (1, 2) for launch in self._twice(partial(fit, steps=steps))]

    def aot_case(self, number: int, dtype: str) -> list[Any]:
        """A call of the compile report."""
        case = AOT_CASES[number]
        module = importlib.import_module(f"gradkernels.triton.{case.op}")
        with self._device:  # of tensors that are made without a word where
            return self._twice(lambda: case.call(module, getattr(torch, dtype)))

    def optimizer(self, key: str, dtype: str) -> list[Any]:
        """Steps, each with gradients that lie elsewhere; the kernel reads the addresses of these tensors.

        The last of them are replays, which launch what the first one does.
        """
        name, options = OPTIMIZERS[key]
        params = [
            torch.nn.Parameter(torch.ones(n, dtype=getattr(torch, dtype), device=self._device))
            for n in (5000, 33, 0)
        ]
        optimizer = getattr(gradkernels, name)(params, lr=0.1, **options)
        guarded = "max_norm" in options
        launched, kept, launches = [], [], []
        for _ in range(4):
            for param in params:
                param.grad = torch.ones_like(param)
                kept.append(param.grad)  # so that no address comes twice
            if guarded:  # as GradScaler does
                optimizer.grad_scale = torch.ones((), device=self._device)
                optimizer.found_inf = torch.zeros((), device=self._device)
            with use_backend("triton"), self._recorder.recording() as record:
                optimizer.step()
            assert [launch.kernel.split("_")[1] for launch in record.launches] == [
                *(["grad"] if guarded else []),
                name.removeprefix("Fused").lower().removesuffix("w"),
            ]
            launched.append(record)
            given = [tensor for _, args in launched[0].asked for tensor in tensors_in(args)]
            for _, args in launched[0].asked:
                check_addresses(args, optimizer, params)
            # The tables of the first step serve all; the guard's tensors come anew with each.
            guard = [getattr(optimizer, name, None) for name in ("grad_scale", "found_inf", "_norms")]
            tensors = [*(tensor for tensor in guard if tensor is not None), *given]
            launches.append([seen(launch, tensors, []) for launch in record.launches])
        assert all(step == launches[0] for step in launches[1:]), launches
        assert launched[-1].replayed == len(launched[-1].launches) or self._recorder.plain
        assert not any(record.loaded for record in launched[1:]), "a later step loaded a module"
        return _summary(launched[0])

    def guarded_steps(self) -> list[Any]:
        """Steps under one guard and another in turn launch what each of them launches by itself."""
        params = [torch.nn.Parameter(torch.ones(33, device=self._device))]
        params[0].grad = torch.ones_like(params[0])
        optimizer = gradkernels.FusedAdamW(params)
        scale, found = torch.ones(8, device=self._device), torch.zeros(8, device=self._device)
        guards = [
            (None, None),
            (scale[0], found[0]),
            (scale[1], found[0]),
            (scale[0], found[1]),
            (None, found[0]),
        ]

        def launched(guard: tuple[Any, Any]) -> tuple[int, list[Any]]:
            optimizer.grad_scale, optimizer.found_inf = guard
            with use_backend("triton"), self._recorder.recording() as record:
                optimizer.step()
            return record.replayed, [seen(launch, [scale, found], []) for launch in record.launches]

        with mock.patch.object(replay, "run", lambda replays, key_of, call, args: call(*args)):
            ordinary = [launched(guard) for guard in guards]
        for _ in range(3):
            steps = [launched(guard) for guard in guards]
        assert [launches for _, launches in steps] == [launches for _, launches in ordinary]
        return [replayed for replayed, _ in steps]

    def warmup(self, op: str) -> list[Any]:
        """After warmup the call itself loads nothing."""
        shapes, call = WARMUPS[op]
        with use_backend("triton"), self._recorder.recording():
            gradkernels.warmup(op, shapes, torch.float32, self._device)
        tensors = [torch.ones(shape, device=self._device, requires_grad=True) for shape in shapes]
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        with use_backend("triton"), self._recorder.recording() as record:
            call(*tensors)
        assert not record.loaded, "the call loaded a module"
        return _summary(record)

    def arguments(self) -> list[Any]:
        """Every kind of argument, at values on which Triton specialises and at others, in both orders."""
        x = torch.zeros(80, device=self._device)
        values = [
            (x, x, 5, 6, 0.5, ()),
            (x, x, 16, 6, 0.5, ()),
            (x, x, 2**31 + 1, 6, 0.5, ()),
            (x, x, 5, 2**31, 0.5, ()),  # as wide, in another place
            (x[1:], x, 5, 6, 0.5, ()),
            (x, x[1:], 5, 6, 0.5, ()),
            (x, x, 1, 1, 1.0, (1,)),
            (x, x, 16, 16, 0.25, (16, 3)),
            (x, x, 2**31 + 1, 2**40, -1.5, (2**40, 7, 1)),
            (x.double(), x, 6, 5, 0.5, ()),
        ]
        with self._recorder.recording() as record:
            for args in values + values[::-1]:
                for options in ({"BLOCK": 16}, {"BLOCK": 32}, {"BLOCK": 32, "TWICE": True, "num_warps": 2}):
                    self._recorder.launch(probe, (4, 2), *args, device=self._device, **options)
            for given in ((x, None), (None, x), (None, None), (x, x)):
                self._recorder.launch(optional, (1,), *given, x, device=self._device)
        return _summary(record)

    def devices_and_streams(self) -> list[Any]:
        """A launch goes to the device of its tensors, and to the stream that is current there at the time."""
        x = torch.zeros(64, device=self._device)
        with self._recorder.recording() as record:
            for device in (0, 1, 1, 0):
                self._standin.set_device(0)
                place = torch.device("cuda", device)
                self._recorder.launch(probe, (1,), x, x, 5, 6, 0.5, (), device=place, BLOCK=16)
                assert self._standin.current_device() == 0
                self._standin.use_new_stream(device)
                self._recorder.launch(probe, (1,), x, x, 5, 6, 0.5, (), device=place, BLOCK=16)
        return [[launch.device, launch.stream] for launch in record.launches]

    def refused(self) -> list[str]:
        """What is said of launches that no driver accepts."""
        x = torch.zeros(64, 64, device=self._device)
        compiled = probe.warmup(x, x, 5, 6, 0.5, (), BLOCK=16, grid=(1,))
        run, packed = compiled.run, compiled.packed_metadata

        def direct(function: Any, stream: int, grid: tuple[int, int, int] = (1, 1, 1)) -> None:
            run(*grid, stream, function, packed, None, None, None, x, x, 5, 6, 0.5, (), 16, False)

        elsewhere = self._standin.stream(1)
        attempts: list[Callable[[], None]] = [
            lambda: direct(None, 0),
            lambda: direct(1234, 0),
            lambda: direct(compiled.function, elsewhere),
            lambda: direct(compiled.function, 0, (1, 65536, 1)),
            lambda: direct(compiled.function, 0, (1, 1, 65536)),
            lambda: self._standin.tensor_map(x.data_ptr() + 4, (64, 64), 256, (32, 32)),
            lambda: self._standin.tensor_map(x.data_ptr(), (61, 60), 244, (32, 32)),
            lambda: self._standin.tensor_map(x.data_ptr(), (64, 64), 128, (32, 32)),
            lambda: self._standin.tensor_map(x.data_ptr(), (64, 0), 256, (32, 32)),
            lambda: self._standin.tensor_map(x.data_ptr(), (64, 64), 256, (32, 512)),
            lambda: self._standin.tensor_map(x.data_ptr(), (64, 64), 256, (64, 32)),
        ]
        said = []
        for attempt in attempts:
            try:
                attempt()
            except (RuntimeError, TypeError) as error:
                said.append(str(error).removeprefix("Triton Error [CUDA]: "))
            else:
                said.append("accepted")
        self._standin.events()
        return said

    def tensor_map(self) -> list[Any]:
        """A tensor map with its base, sizes, strides and box."""
        x, out = torch.zeros(2, 64, 128, device=self._device)
        with self._recorder.recording() as record:
            for base in (x, x[1:, 64:], out):
                descriptor = TensorDescriptor(base, list(base.shape), list(base.stride()), [16, 32])
                self._recorder.launch(
                    copy_tile, (1,), descriptor, out, device=self._device, ROWS=16, COLUMNS=32
                )
        return _summary(record)

    def _twice(self, run: Callable[[], Any]) -> list[Any]:
        """The launches of a call; a second one makes the same, of what the first one loaded."""
        records = []
        for _ in range(2):
            with use_backend("triton"), self._recorder.recording() as record:
                run()
            records.append(record)
        first, second = map(_summary, records)
        assert first, "nothing was launched"
        assert first == second, f"{first} at first, then {second}"
        assert not records[1].loaded, "the second call loaded a module"
        return first


def _summary(record: Record) -> list[Any]:
    return [
        [launch.kernel, launch.grid, launch.threads, launch.shared, launch.device]
        for launch in record.launches
    ]


def forget() -> None:
    """No call has been made before."""
    for launches in LAUNCHES:
        launches._replays.clear()
    for op in FUNCTIONS.values():
        for name in op.public:
            getattr(op.function(name), "shortcuts", {}).clear()


def seen(launch: Launch, tensors: Sequence[Tensor], others: list[int]) -> list[Any]:
    """A launch with each address as a place in one of the tensors, or among ``others``."""

    def place(param: bytes) -> Any:
        value = int.from_bytes(param, "little")
        for number, tensor in enumerate(tensors):
            storage = tensor.untyped_storage()
            if tensor.data_ptr() <= value < storage.data_ptr() + storage.nbytes():
                return f"{number} + {value - tensor.data_ptr()}"
        if len(param) < 8 or value < 2**40:
            return param.hex()
        if value not in others:
            others.append(value)
        return f"other {others.index(value)}"

    values = [place(param) if len(param) <= 8 else "a tensor map" for param in launch.params]
    return [launch.function, launch.device, launch.stream, launch.grid, launch.threads, launch.shared, values]


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """A leaf with the same values, lying otherwise in memory."""
    tensor = tensor.detach()
    if layout == "misaligned":
        return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "strided" and tensor.dim():
        return tensor.repeat_interleave(2, -1)[..., ::2]
    return tensor.clone()


def tensors_in(args: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors among a kernel's arguments and in its records."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from tensors_in(arg)


def check_addresses(
    args: tuple[Any, ...], optimizer: torch.optim.Optimizer, params: Sequence[Tensor]
) -> None:
    """The table that a kernel is given holds the present addresses of its parameters, gradients and states."""
    rows = next(tensor for tensor in tensors_in(args) if tensor.shape[1:] == (multi_tensor.WIDTH.value,))
    assert len(rows) == len(params)
    for param, row in zip(params, rows.tolist(), strict=True):
        state = optimizer.state[param]
        others = {"master_param": multi_tensor.MASTER, "step": multi_tensor.STEP}
        moments = [state[key] for key in state if key not in others]
        wanted = {
            multi_tensor.PARAM: param,
            multi_tensor.GRAD: param.grad,
            **{column: state[key] for key, column in others.items() if key in state},
            **{multi_tensor.STATES.value + i: moment for i, moment in enumerate(moments)},
        }
        for column, tensor in wanted.items():
            index = getattr(column, "value", column)
            assert row[index] == tensor.data_ptr(), f"column {index}: {row[index]} for {tensor.data_ptr()}"
