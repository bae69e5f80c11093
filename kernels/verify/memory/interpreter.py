"""The only file that depends on the internals of Triton's interpreter: it reports launches and memory accesses.

Every load and store of an interpreted kernel, descriptors included, ends in one of four functions of the
module-level name ``_interpreter`` in ``triton.runtime.interpreter``: ``load``, ``store``, ``atomic_rmw`` and
``atomic_cas``. ``watch`` puts a proxy under that name. Tensor arguments become pointers in ``_implicit_cvt``; each
gets a tag there, in the 16 upper bits that no address uses, so that whatever a kernel computes from a pointer still
tells which argument it came from. ``watch`` raises ``InterpreterChangedError`` where the interpreter is not as
expected, and ``check_canary`` runs a kernel once per process to see that no access escapes.

Over 500 lines, since no other file may know of those internals.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

TAG_SHIFT = np.uint64(48)
ADDRESS = np.uint64((1 << 48) - 1)


class InterpreterChangedError(RuntimeError):
    """The memory checker does not know this version of Triton's interpreter."""


class Observer:
    """An observer receives what ``watch`` reports; this one allows every access and keeps nothing."""

    def launch(self, kernel: str, arguments: list[tuple[str, torch.Tensor]]) -> None:
        """Receive the start of a launch. The tag of an argument is its place in the list, counted from 1."""

    def launched(self) -> None:
        """Receive the end of the launch."""

    def dropped(self) -> None:
        """Receive that the launch would not have compiled, so that there was none."""

    def autotuned(self, kernel: str, configurations: int) -> None:
        """Receive the number of configurations of an autotuned kernel that is about to be launched."""

    def trial(self, kernel: str, configurations: int) -> AbstractContextManager[None]:
        """Receive the launch of an autotuned kernel in a configuration that is not its last.

        It is launched inside the block; at the end of the block the observer puts back what the kernel wrote.
        """
        return nullcontext()

    def access(
        self, kind: str, order: tuple[str, str], pointers: np.ndarray, mask: np.ndarray, itemsize: int
    ) -> np.ndarray:
        """Receive a load, store or atomic before it happens.

        Args:
            kind: ``"load"``, ``"store"``, ``"atomic"`` (read and written), ``"atomic load"``, ``"atomic
                store"``.
            order: memory semantics and scope of an atomic, in Triton's capitals; empty strings else.
            pointers: tagged addresses, uint64.
            mask: the active ones among them, of the same shape.
            itemsize: bytes per address.

        Returns:
            The mask of the addresses that may be touched.
        """
        return mask

    def loaded(self, values: np.ndarray) -> None:
        """Receive the values of the load announced last, or what an atomic announced last found."""

    def storing(self, values: np.ndarray) -> None:
        """Receive the values of the store announced last, before it happens."""


def interpreted() -> bool:
    """Return whether Triton's kernels are interpreted in this process."""
    import triton

    return not isinstance(triton.language.sum, triton.runtime.JITFunction)


def require_interpreter() -> None:
    """Raise RuntimeError unless Triton's kernels are interpreted in this process."""
    try:
        found = interpreted()
    except ImportError as error:
        raise RuntimeError("the memory checker needs the triton package (pip install triton)") from error
    if not found:
        raise RuntimeError(
            "the memory checker watches Triton's interpreter: set the environment variable TRITON_INTERPRET=1 "
            "before triton is first imported"
        )


def current_program() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the index of the running program, and the grid."""
    from triton.runtime.interpreter import interpreter_builder

    return interpreter_builder.grid_idx, interpreter_builder.grid_dim


_OWN = str(Path(__file__).parent)


def source_site() -> tuple[str, int]:
    """Return the file and line of the kernel that is making an access now."""
    import triton

    skipped = (str(Path(triton.__file__).parent), _OWN)
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(skipped):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _tensors(name: str, argument: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in a launch argument: itself, the base of a descriptor, the items of a tuple."""
    if isinstance(argument, tuple):
        for i, item in enumerate(argument):
            yield from _tensors(f"{name}[{i}]", item)
    elif hasattr(argument, "block_shape") and hasattr(argument, "base"):
        yield from _tensors(name, argument.base)
    elif hasattr(argument, "data_ptr"):
        yield name, argument


def _unwrapped(argument: Any) -> torch.Tensor:
    """Return the tensor inside ``triton.reinterpret``'s wrapper."""
    return argument if isinstance(argument, torch.Tensor) else argument.base


class _Proxy:
    """A proxy for ``_interpreter``: it reports the four memory functions and passes the rest through."""

    def __init__(self, original: Any, observer: Observer) -> None:
        self._original, self._observer = original, observer
        self.order = ("", "")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def _announce(
        self, kind: str, pointers: np.ndarray, mask: np.ndarray | None, itemsize: int
    ) -> tuple[np.ndarray, np.ndarray]:
        full = np.ones(pointers.shape, bool) if mask is None else np.broadcast_to(mask, pointers.shape)
        if self.order[0] and kind != "atomic":
            kind = f"atomic {kind}"
        allowed = self._observer.access(kind, self.order, pointers, full, itemsize)
        return pointers & ADDRESS, np.ascontiguousarray(allowed)

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        addresses, allowed = self._announce("load", pointers, mask, np.dtype(dtype).itemsize)
        values = self._original.load(addresses, allowed, other, dtype)
        self._observer.loaded(values)
        return values

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        addresses, allowed = self._announce("store", pointers, mask, value.dtype.itemsize)
        self._observer.storing(value)
        return self._original.store(addresses, value, allowed)

    def atomic_rmw(self, op: Any, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, sem: Any) -> Any:
        addresses, allowed = self._announce("atomic", pointers, mask, value.dtype.itemsize)
        values = self._original.atomic_rmw(op, addresses, value, allowed, sem)
        if op != self._original.RMW_OP.XCHG:  # a store, as far as it goes
            self._observer.loaded(values)
        return values

    def atomic_cas(self, pointers: np.ndarray, compare: np.ndarray, value: np.ndarray, sem: Any) -> Any:
        addresses, allowed = self._announce("atomic", pointers, None, value.dtype.itemsize)
        if not allowed.all():  # it takes no mask, and one lane out of bounds would fault
            return np.zeros_like(value)
        values = self._original.atomic_cas(addresses, compare, value, sem)
        self._observer.loaded(values)
        return values


ATOMICS = tuple(f"create_atomic_{kind}" for kind in ("rmw", "cas", "load", "store", "poll"))


def _parameters(target: Any) -> tuple[str, ...] | None:
    return tuple(inspect.signature(target).parameters) if callable(target) else None


def _guard(interpreter: Any) -> None:
    """Raise InterpreterChangedError unless everything that ``watch`` replaces is there and takes what it took."""
    from triton.runtime.autotuner import Autotuner

    expected: dict[tuple[str, ...], tuple[str, ...]] = {
        ("GridExecutor", "__call__"): ("self", "args_dev", "kwargs"),
        ("GridExecutor", "_init_args_hst"): ("self", "args_dev", "kwargs"),
        ("_implicit_cvt",): ("arg",),
        ("InterpreterBuilder", "create_atomic_rmw"): ("self", "rmwOp", "ptr", "val", "mask", "sem", "scope"),
        ("InterpreterBuilder", "create_atomic_cas"): ("self", "ptr", "cmp", "val", "sem", "scope"),
    }
    for path, parameters in expected.items():
        target: Any = interpreter
        for name in path:
            target = getattr(target, name, None)
        if (found := _parameters(target)) != parameters:
            raise InterpreterChangedError(
                f"triton.runtime.interpreter.{'.'.join(path)} takes {found}, expected {parameters}: the memory "
                f"checker knows triton 3.6 to 3.9"
            )
    for name in ("run", "prune_configs"):
        if not callable(getattr(Autotuner, name, None)):
            raise InterpreterChangedError(f"triton.runtime.autotuner.Autotuner.{name} is gone")
    for name in ("load", "store", "atomic_rmw", "atomic_cas"):
        if not callable(getattr(getattr(interpreter, "_interpreter", None), name, None)):
            raise InterpreterChangedError(f"triton.runtime.interpreter._interpreter.{name} is gone")
    if not hasattr(interpreter, "interpreter_builder"):
        raise InterpreterChangedError("triton.runtime.interpreter.interpreter_builder is gone")


@contextmanager
def _replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    original = target.__dict__[name]
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, original)


@contextmanager
def without_waste() -> Iterator[None]:
    """Leave out work of the interpreter that changes no result, inside the block: more than half of a kernel's time."""
    require_interpreter()
    with _language_prepared_once(), _no_dropped_checks(), _types_looked_up():
        yield


@contextmanager
def _no_dropped_checks() -> Iterator[None]:
    """Leave out additions of integers in 64 bits for a check that is dropped again, unless ``debug`` is set."""
    import triton.runtime.interpreter as interpreter

    builder = interpreter.interpreter_builder
    options: Any = getattr(builder, "options", None)
    if not getattr(options, "sanitize_overflow", False) or getattr(options, "debug", True):
        yield
        return
    with _replaced(builder, "options", dataclasses.replace(options, sanitize_overflow=False)):
        yield


@contextmanager
def _types_looked_up() -> Iterator[None]:
    """Make the types of blocks, and NumPy's for an element, once and not for every operation."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    block, builder = tl.core.block_type, interpreter.InterpreterBuilder
    original: Any = getattr(interpreter, "_get_np_dtype", None)
    expected = {
        original: ("tt_dtype",),
        block.with_element_ty: ("self", "scalar_ty"),
        builder.get_block_ty: ("self", "dtype", "shape"),
    }
    if any(_parameters(function) != names for function, names in expected.items()):
        yield  # another version's, or already inside such a block
        return
    dtypes: dict[str, np.dtype] = {}
    blocks: dict[tuple[Any, ...], Any] = {}

    def numpy_dtype(of: Any) -> np.dtype:
        name = of.scalar.name
        if name not in dtypes:
            dtypes[name] = original(of)
        return dtypes[name]

    def with_element(self: Any, element: Any) -> Any:
        key = (self.name, element.name)
        if key not in blocks:
            blocks[key] = block(element, self.shape)
        return blocks[key]

    def block_of(self: Any, element: Any, shape: Any) -> Any:
        key = (element.name, *shape)
        if key not in blocks:
            blocks[key] = block(element, shape)
        return blocks[key]

    with (
        _replaced(interpreter, "_get_np_dtype", numpy_dtype),
        _replaced(block, "with_element_ty", with_element),
        _replaced(builder, "get_block_ty", block_of),
    ):
        yield


@contextmanager
def _language_prepared_once() -> Iterator[None]:
    """Prepare ``triton.language`` once a launch.

    When a kernel is launched, and again at each call of a device function, the interpreter searches the language's
    modules for the functions to replace by its own. What the launch has put there still stands when a device
    function is called, and a module's functions have the same names each time. An interpreter that does this in
    another way is left as it is.
    """
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    prepare_anew: Any = getattr(interpreter, "_patch_lang", None)
    expected = {
        "_patch_lang": ("fn",),
        "_patch_builtin": ("pkg", "builder", "scope"),
        "_patch_attr": ("obj", "name", "member", "builder", "scope"),
    }
    if any(_parameters(getattr(interpreter, name, None)) != names for name, names in expected.items()):
        yield  # another version's, or already inside such a block
        return
    run, languages, prepared = interpreter.GridExecutor.__call__, {id(tl), id(tl.core)}, set[int]()

    @lru_cache(None)
    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def replace(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins(package):
            if tl.core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    def prepare(function: Any) -> Any:
        named = languages.intersection(map(id, function.__globals__.values()))
        if named and named <= prepared:
            return None  # the call of a device function does nothing with it
        prepared.update(named)
        return prepare_anew(function)

    def launch(self: Any, *args_dev: Any, **kwargs: Any) -> Any:
        prepared.clear()
        try:
            return run(self, *args_dev, **kwargs)
        finally:
            prepared.clear()

    with (
        _replaced(interpreter, "_patch_builtin", replace),
        _replaced(interpreter, "_patch_lang", prepare),
        _replaced(interpreter.GridExecutor, "__call__", launch),
    ):
        yield


@contextmanager
def watch(observer: Observer, configuration: int | None = None) -> Iterator[None]:
    """Report every launch and access of interpreted kernels to ``observer`` inside the block.

    An autotuned kernel is launched in each of its configurations; with a number, in that one alone, counted in a
    circle.
    """
    require_interpreter()
    import triton.runtime.interpreter as interpreter

    if isinstance(interpreter._interpreter, _Proxy):
        raise RuntimeError("a memory check is already active: they do not nest")
    _guard(interpreter)
    with without_waste(), _observed(observer, configuration):
        yield


def _would_not_compile(error: BaseException) -> bool:
    """Return whether a kernel ended at a ``tl.static_assert``, which the compiler refuses."""
    while error.__cause__ is not None:
        error = error.__cause__
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_name == "_new_static_assert"


_tuned: WeakKeyDictionary[Any, set[tuple[Any, ...]]] = (
    WeakKeyDictionary()
)  # by autotuner: the keys it has met


@contextmanager
def _observed(observer: Observer, configuration: int | None) -> Iterator[None]:
    """Replace what launches, converts, loads and stores inside the block by what reports it too."""
    import triton.runtime.interpreter as interpreter
    from triton.runtime.autotuner import Autotuner

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    original_call, original_copy = executor.__call__, executor._init_args_hst
    original_convert = interpreter._implicit_cvt
    proxy = _Proxy(interpreter._interpreter, observer)
    tags: dict[int, int] = {}
    running = ["?"]

    chosen = [""]

    def call(self: Any, *args_dev: Any, **kwargs: Any) -> Any:
        running[0] = self.fn.__name__ + chosen[0]
        grid = self.grid  # a tuple for the interpreter; the compiler takes lists too
        self.grid = (lambda arguments: tuple(grid(arguments))) if callable(grid) else tuple(grid)
        try:
            return original_call(self, *args_dev, **kwargs)
        except Exception as error:
            if _would_not_compile(error):
                observer.dropped()
            raise
        finally:
            tags.clear()
            observer.launched()

    def autotuned(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Launch an autotuned kernel in each of its configurations, the first one last, and time none.

        As on a GPU, those in which a ``tl.static_assert`` fails are left out, and ``reset_to_zero`` is for the launch
        that tunes, and resets nothing in those after it.
        """
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configurations = list(self.prune_configs(kwargs)) if len(self.configs) > 1 else self.configs
        observer.autotuned(self.base_fn.__name__, len(configurations))
        given = {name: value for name, value in {**self.nargs, **kwargs}.items() if name in self.arg_names}
        key = tuple(given[name] for name in self.keys if name in given)
        key += tuple(str(value.dtype) for value in given.values() if hasattr(value, "dtype"))
        tunes = len(configurations) > 1 and key not in _tuned.setdefault(self, set())

        def run(config: Any) -> Any:
            options = config.all_kwargs()
            named = {**self.nargs, **kwargs, **options}
            shown = {**config.kwargs, "num_warps": config.num_warps}
            chosen[0] = f" ({', '.join(f'{key}={value}' for key, value in shown.items())})"
            try:
                if tunes:
                    self.pre_hook(named, reset_only=True)
                if config.pre_hook is not None:
                    config.pre_hook(named)
                return self.fn.run(*args, **kwargs, **options)
            finally:
                chosen[0] = ""

        start = (configuration or 0) % len(configurations)
        order = [*configurations[start:], *configurations[:start]]
        trials = order[:0:-1] if configuration is None else []
        for config in trials:
            with observer.trial(self.base_fn.__name__, len(configurations)):
                try:
                    run(config)
                except Exception as error:
                    if not _would_not_compile(error):
                        raise
        result = None
        for config in order:
            try:
                result = run(config)
                break
            except Exception as error:
                if config is order[-1] or not _would_not_compile(error):
                    raise
        if tunes:
            _tuned[self].add(key)
        self.best_config, self.nargs = config, None
        return result

    def copy(self: Any, args_dev: Any, kwargs: Any) -> Any:
        args_hst, kwargs_hst = original_copy(self, args_dev, kwargs)
        named = [*zip(self.arg_names, args_hst, strict=False), *kwargs_hst.items()]
        found = [pair for name, argument in named for pair in _tensors(name, argument)]
        tags.update((id(tensor), place) for place, (_, tensor) in enumerate(found, 1))
        observer.launch(running[0], [(name, _unwrapped(tensor)) for name, tensor in found])
        return args_hst, kwargs_hst

    def convert(argument: Any) -> Any:
        result = original_convert(argument)
        if (tag := tags.get(id(argument))) is not None:
            result.handle.data = result.handle.data | (np.uint64(tag) << TAG_SHIFT)
        return result

    def ordered(original: Callable[..., Any]) -> Callable[..., Any]:
        def atomic(self: Any, *args: Any) -> Any:
            sem, scope = args[-2:]
            proxy.order = (sem.name, scope.name)
            try:
                return original(self, *args)
            finally:
                proxy.order = ("", "")

        return atomic

    with ExitStack() as stack:
        stack.enter_context(_replaced(executor, "__call__", call))
        stack.enter_context(_replaced(Autotuner, "run", autotuned))
        stack.enter_context(_replaced(executor, "_init_args_hst", copy))
        stack.enter_context(_replaced(interpreter, "_implicit_cvt", convert))
        stack.enter_context(_replaced(interpreter, "_interpreter", proxy))
        for name in ATOMICS:
            if name in builder.__dict__:
                stack.enter_context(_replaced(builder, name, ordered(builder.__dict__[name])))
        yield


class _Witness(Observer):
    """A witness is an observer that only records what it saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def launch(self, kernel: str, arguments: list[tuple[str, torch.Tensor]]) -> None:
        self.seen.append((kernel, len(arguments)))

    def access(
        self, kind: str, order: tuple[str, str], pointers: np.ndarray, mask: np.ndarray, itemsize: int
    ) -> np.ndarray:
        self.seen.append((kind, int(pointers.ravel()[0] >> TAG_SHIFT)))
        return mask


_sound = False


def check_canary() -> None:
    """Run the canary kernel, once per process: raise InterpreterChangedError if an access of it went unseen."""
    global _sound
    if _sound:
        return
    require_interpreter()
    from .canary import canary_kernel

    witness = _Witness()
    x, y = torch.tensor([7], dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    with watch(witness):
        canary_kernel[(1,)](x, y)
    expected = [("canary_kernel", 2), ("load", 1), ("store", 2), ("atomic", 2), ("atomic", 2)]
    if witness.seen != expected or y.tolist() != [7, 1, 1]:
        raise InterpreterChangedError(
            f"of the canary kernel's accesses {expected} the memory checker saw {witness.seen} (result "
            f"{y.tolist()}): this version of Triton's interpreter makes accesses it does not know"
        )
    _sound = True
