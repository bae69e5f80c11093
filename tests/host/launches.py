"""What the host asks of a launch, compared with what reaches the driver.

The other side is Triton's own: for each call of ``launch`` its own binder says which compiled kernel serves
the arguments, and which of them become parameters, in which order and of which type.
"""

import functools
import importlib
import pkgutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gradkernels.triton
import torch
import triton
from gradkernels.triton import launch as launching
from gradkernels.triton import replay
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .standin import Launch, StandIn, launches_in

FLOATS = {"fp16": "<e", "fp32": "<f", "fp64": "<d"}
# As the stand-in fills a tensor map: address, type, rank, sizes, strides, box, swizzle; innermost first.
TENSOR_MAP = struct.Struct("<QII5Q4Q5HB")


@dataclass
class Record:
    """What one call launched.

    Attributes:
        launches: as the driver accepted them. asked: the arguments of ``launch``, in the same order.
        loaded: how many modules were loaded. replayed: how many calls of operators were replays,
        whose tensors are ``kept``.
    """

    launches: list[Launch] = field(default_factory=list)
    asked: list[tuple[Any, tuple[Any, ...]]] = field(default_factory=list)
    loaded: int = 0
    replayed: int = 0
    kept: list[Tensor] = field(default_factory=list)

    def keep(self, tensor: Tensor) -> Tensor:
        self.kept.append(tensor)
        return tensor


class Recorder:
    """Stands between the ops and ``launch``, and compares each launch as it happens."""

    def __init__(self, standin: StandIn, plain: bool = False) -> None:
        """plain: whether launches go through ``kernel[grid]``, which specialises integers in tuples too."""
        self._standin = standin
        self.plain = plain
        self._record = Record()
        self._launch = launching.launch
        self._run, replay.run = replay.run, self._run_watched
        driver = triton.runtime.driver.active
        driver.launcher_cls = _checked(driver.launcher_cls)
        for info in pkgutil.iter_modules(gradkernels.triton.__path__):
            module: Any = importlib.import_module(f"gradkernels.triton.{info.name}")
            if getattr(module, "launch", None) is self._launch:
                module.launch = self.launch

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """The launches of the block; each is what was asked for, and nothing was refused."""
        self._take(())
        self._record = record = Record()
        yield record
        self._take(())

    def launch(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **options: Any
    ) -> None:
        """``launch``, and the comparison."""
        self._take(())
        self._launch(kernel, grid, *args, device=device, **options)
        index = self._standin.current_device() if device.index is None else device.index
        with self._standin.device(index):
            expected = () if 0 in grid else (self._expected(kernel, grid, index, args, options),)
        self._take(expected)
        self._record.asked.append((kernel, args))

    def _run_watched(
        self,
        replays: dict[Any, Any],
        key_of: Callable[..., Any],
        call: Callable[..., Any],
        args: tuple[Any, ...],
    ) -> Any:
        """``replay.run``, and the launches of each replay it makes are taken for expected: see ``Calls.repeated``."""
        result = self._run(replays, key_of, call, args)
        made = replays.get(key_of(*args))
        if made and not hasattr(made, "__wrapped__"):
            allocate = made.__globals__["empty_strided"]
            # As ``asked`` keeps the memory of other calls: no address comes twice.
            made.__globals__["empty_strided"] = lambda *args: self._record.keep(allocate(*args))

            @functools.wraps(made)
            def watched(*args: Any) -> Any:
                self._take(())
                self._record.kept += [arg for arg in args if isinstance(arg, Tensor)]
                result = made(*args)
                self._take(None)
                self._record.replayed += 1
                return result

            replays[key_of(*args)] = watched
        return result

    def _take(self, expected: Sequence[Callable[[Launch], None]] | None) -> None:
        """Read the record; it holds the expected launches and no others (None: any)."""
        events = self._standin.events()
        refused = [event for event in events if event.startswith("refused")]
        assert not refused, refused
        # Comparing loads what Triton would launch: that was loaded already, unless it is another kernel.
        launches = launches_in(events)
        if expected is not None:
            assert len(launches) == len(expected), f"{len(expected)} launches expected, recorded: {events}"
            for launch, compare in zip(launches, expected, strict=True):
                compare(launch)
        self._record.launches += launches
        self._record.loaded += sum(event.startswith("module") for event in events)

    def _expected(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: int,
        args: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Callable[[Launch], None]:
        bound = args
        if not self.plain:
            params = zip(kernel.params, args, strict=False)
            bound = tuple(_neutral(arg, not param.do_not_specialize) for param, arg in params)
        compiled = kernel.warmup(*bound, grid=(1,), enable_fp_fusion=True, **options)
        _ = compiled.run  # loads it, if it is not the one that was launched
        stream = self._standin.stream(device)

        def compare(launch: Launch) -> None:
            name = compiled.metadata.name
            assert launch.kernel == name
            assert launch.function == compiled.function, f"{name}: not the variant that Triton takes"
            assert launch.device == device, f"{name}: device"
            assert launch.stream == stream, f"{name}: stream"
            assert launch.grid == (*grid, 1, 1)[:3], f"{name}: grid"
            assert launch.threads == 32 * compiled.metadata.num_warps, f"{name}: threads"
            assert launch.shared == compiled.metadata.shared, f"{name}: shared memory"
            types = list(compiled.src.signature.items())
            maps = iter(compiled.metadata.tensordesc_meta or ())
            wanted = [
                item
                for (what, ty), arg in zip(types, args, strict=False)
                for item in _params(what, ty, arg, maps)
            ]
            # Two pointers to scratch memory come last.
            assert len(launch.params) == len(wanted) + 2, f"{name}: {len(launch.params)} parameters"
            for (what, check), value in zip(wanted, launch.params[:-2], strict=True):
                problem = check(value)
                assert problem is None, f"{name}: {what}: {problem}"
            assert not any(map(any, launch.params[-2:])), f"{name}: scratch memory"

        return compare


def _checked(launcher_cls: type) -> type:
    """Triton's launcher, which skips over constexpr arguments without a look, with a look at them."""

    class Launcher(launcher_cls):  # type: ignore[misc]
        def __init__(self, source: Any, metadata: Any) -> None:
            super().__init__(source, metadata)
            self._source = source

        def __call__(self, *args: Any) -> None:
            values = args[9:]  # after grid, stream, function, metadata and hooks
            names = self._source.fn.arg_names
            assert len(values) == len(names), f"{len(values)} arguments for {', '.join(names)}"
            for path, compiled in self._source.constants.items():
                given: Any = values
                for index in path:
                    given = given[index]
                assert given == compiled, f"{names[path[0]]}: {given} given, compiled for {compiled}"
            super().__call__(*args)

    return Launcher


def _neutral(arg: Any, specialise: bool, inside: bool = False) -> Any:
    """An argument without what Triton would specialise on and ``launch`` does not: integers in plain tuples, and in
    a NamedTuple that is not to be specialised, count by their width alone."""
    if isinstance(arg, tuple):
        record = hasattr(arg, "_fields")
        items = [_neutral(item, specialise and record, True) for item in arg]
        return type(arg)(*items) if record else tuple(items)
    if specialise or not inside or type(arg) is not int:
        return arg
    return 3 if -(2**31) <= arg < 2**31 else 2**32 + 1 if arg < 2**63 else 2**64 - 1


def _params(
    what: str, ty: Any, arg: Any, maps: Iterator[Any]
) -> Iterator[tuple[str, Callable[[bytes], Any]]]:
    """A check for each parameter that an argument of this type becomes; it says what is wrong, or None."""
    if isinstance(ty, tuple):
        for number, (item_type, item) in enumerate(zip(ty, arg, strict=True)):
            yield from _params(f"{what}[{number}]", item_type, item, maps)
    elif isinstance(arg, TensorDescriptor):
        meta = next(maps)
        yield what, lambda value: _map_problem(value, arg, meta)
        for number in (*arg.shape, *arg.strides):
            yield what, _equals(number)
    elif ty == "constexpr":
        return
    elif ty in FLOATS:
        yield what, lambda value: None if value == struct.pack(FLOATS[ty], arg) else f"{value!r} for {arg}"
    else:
        yield what, _equals(arg.data_ptr() if isinstance(arg, Tensor) else int(arg))


def _equals(wanted: int) -> Callable[[bytes], Any]:
    def check(value: bytes) -> str | None:
        number = int.from_bytes(value, "little")
        return None if number == wanted % 256 ** len(value) else f"{number} for {wanted}"

    return check


def _map_problem(value: bytes, descriptor: TensorDescriptor, meta: Any) -> str | None:
    address, _, rank, *numbers, _ = TENSOR_MAP.unpack_from(value)
    sizes, strides, box = numbers[:rank], numbers[5 : 4 + rank], numbers[9 : 9 + rank]
    width = descriptor.base.element_size()
    found = (address, sizes, strides, box)
    wanted = (
        descriptor.base.data_ptr(),
        list(reversed(descriptor.shape)),
        [stride * width for stride in reversed(descriptor.strides[:-1])],
        list(reversed(meta["block_size"])),
    )
    return None if found == wanted else f"tensor map of {found} for {wanted}"
