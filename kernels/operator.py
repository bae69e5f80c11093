"""How an op becomes a torch operator: schema, launch, autograd, vmap, meta implementation and autocast.

The routes of a call, the shortest first. ``mse_loss`` and the other public functions check their arguments once,
bring them to the launchers' form, and take the first route that serves::

    0  repeatable              a call like earlier ones on Triton's backend, before any check: see repeat.py
         no gradient needed      -> replay: allocations and launches
         else                    -> Function.apply -> replay
    1  torch's own op          use_torch_fast_path: the fallback would call it anyway, and torch's autograd will do
    2  Operator.__call__       nothing but plain reverse-mode autograd is active
         no gradient needed      -> replay, or launcher
         else                    -> Function.apply -> the same; its backward calls other Operators
    3  the dispatcher          for all else; each key sees the call at its own level:
         Autocast                -> the same operator, with cast arguments and autocast off
         functorch, Autograd     -> Function.apply -> the same operator below autograd
         vmap, old and new       -> the vmap rule -> the same or another operator, once for the whole batch
         Fake, Meta              -> the fake implementation
         CPU, CUDA, XPU, MPS     -> launcher

A launcher, ``<op>_<direction>``, is found by name in the module of the backend that serves the call. Its
annotations are the operator's schema: an argument list stands in each implementation and nowhere else.

The Autograd key holds a Python implementation that applies an ``autograd.Function``, whose forward calls the
same operator below autograd; thus each transform meets the operator at its own level. Of the documented ways,
``custom_op.register_autograd`` returns forward-mode tangents that are silently zero, and a plain Function cannot
be traced with one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import backends
from . import torch_private as private
from .checks import DEVICE_TYPES, DTYPES
from .repeat import TENSORS, key_function, note, watched
from .torch_private import any_autocast, below_autograd, is_wrapped, is_zerotensor, needs_dispatcher

_NAMESPACE = __name__.partition(".")[0]
_DEVICE_KEYS = tuple(device_type.upper() for device_type in DEVICE_TYPES)
_AUTOCAST_KEYS = private.autocast_keys(_DEVICE_KEYS)
_OPTIONS = frozenset((type(None), bool, int, float, str, list, torch.dtype))
_STRIDED = torch.strided
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")

# How deep in blocks of torch.autocast arguments have been cast already.
_cast_at: ContextVar[int] = ContextVar("gradkernels_cast_at", default=-1)

OPERATORS: list["Operator"] = []
LAUNCHES: list["Launches"] = []  # the operators, and what repeats beside them


class Launches:
    """Launches that follow from a call's arguments alone, and repeat: see repeat.py.

    Args:
        op: a module of each backend; ``launcher``: a function there.
        types: of the arguments, as in a schema.
        adapt: ``(launcher, *args)`` calls the launcher, once or more, and returns a new tensor or a list of them.
            None: it is called with the arguments.
    """

    def __init__(
        self, op: str, launcher: str, types: Sequence[str], adapt: Callable[..., Any] | None = None
    ) -> None:
        self.op, self.launcher = op, launcher
        self._replays: dict[Any, Any] = {}
        self._key = key_function({f"a{index}": kind for index, kind in enumerate(types)})
        self.launch = self._launch_by_name(types.index("Tensor"), adapt)
        LAUNCHES.append(self)

    def plain(self, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        """Return what launches for these arguments where nothing needs the dispatcher; None if they hold no values."""
        return self._replay(args) or (self.launch if has_values(args) else None)

    def _replay(self, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        """Return what repeats earlier calls like this one; see repeat.py."""
        if not self._replays:
            return None
        try:
            return self._replays.get(self._key(*args))
        except RuntimeError:  # no address: saved inside a transform that has ended
            return None

    def _launch_by_name(self, place: int, adapt: Callable[..., Any] | None) -> Callable[..., Any]:
        """Return what runs on real tensors: the launcher of the backend that serves the argument at ``place``."""
        op, name = self.op, self.launcher

        def launch(*args: Any) -> Any:
            if replay := self._replay(args):
                return replay(*args)
            backend = backends.backend_for(args[place])
            launcher = getattr(backends.module(backend, op), name)
            if adapt is not None:
                launcher = partial(adapt, launcher)
            if backend == "triton":
                return backends.module("triton", "replay").run(self._replays, self._key, launcher, args)
            return launcher(*args)

        return launch


class Operator(Launches):
    """A registered operator: call it with tensors, get tensors, under any transform.

    Args:
        op: the op it belongs to, such as ``"mse"``: a module of each backend.
        direction: its launcher is ``<op>_<direction>``, its own name too, or just ``<op>`` for ``"forward"``.
        fake: the launcher on fake or meta tensors: output shapes, dtypes and strides only. Written by hand, so
            that no size becomes a guard of torch.compile.
        vmap: ``(operator, batch_size, in_dims, *args)`` gives the outputs, the mapped dimension first, by one call
            of the operators for the whole batch.
        derivative: an ``autograd.Function`` with ``setup_context``, ``backward`` and ``jvp``, or a function of the
            same arguments in ops that have derivatives. The forward is provided here; ``backward`` returns, and
            ``jvp`` takes, one value for each tensor argument. These come before all others.
        launch: ``(launcher, *args)`` calls the launcher, where the operator takes more than launchers do.
        prepare: maps the arguments to those to use when a derivative may be asked for, and to the places of the
            outputs that the caller asked for among those they give.
        autocast: maps the arguments to those to use where autocast is on.
    """

    def __init__(
        self,
        op: str,
        direction: str,
        *,
        fake: Callable[..., Any],
        vmap: Callable[..., Any],
        derivative: type[torch.autograd.Function] | Callable[..., Any],
        launch: Callable[..., Any] | None = None,
        prepare: Callable[..., tuple[tuple[Any, ...], list[int]]] | None = None,
        autocast: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        name = f"{op}_{direction}"
        self.name = name.removesuffix("_forward")
        self._vmap = vmap
        self._prepare = prepare
        launcher = getattr(backends.module("fallback", op), name)
        # An int is a number of dimensions or the index of one: it does not vary with the sizes, as a SymInt may.
        schema = torch.library.infer_schema(launcher, mutates_args=()).replace("SymInt", "int")
        _library.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.overload = getattr(getattr(torch.ops, _NAMESPACE), self.name).default
        types = [str(argument.type) for argument in self.overload._schema.arguments]
        self._tensor_count = sum("Tensor" in type for type in types)
        self._no_gradients = (None,) * (len(types) - self._tensor_count)
        super().__init__(op, name, types, launch)
        for key in _DEVICE_KEYS:
            self._implement(self.launch, key)
        qualified = f"{_NAMESPACE}::{self.name}"
        torch.library.register_fake(qualified, fake, lib=_library)
        self._implement(self._batched_by_vmap, "FuncTorchBatched")
        self._implement(self._batched_by_older_vmap, "Batched")
        self._derivative = self._plain_derivative = derivative
        if isinstance(derivative, type):
            self._derivative = private.apply_function(self._bind(derivative, self.below))
            self._plain_derivative = private.apply_function(self._bind_plainly(derivative))
        self._implement(self._autograd, "Autograd")
        if autocast is not None:
            for key in _DEVICE_KEYS:
                self._implement(self._under_autocast(autocast), f"Autocast{key}")
        OPERATORS.append(self)

    def _implement(self, function: Callable[..., Any], key: str) -> None:
        _library.impl(self.name, private.outside_compiler(function), key)

    def __call__(self, *args: Any) -> Any:
        if not needs_dispatcher():  # what the dispatcher would do, without its 20 us
            replay = self._replay(args)
            if replay or has_values(args):
                differentiated = requires_grad(args)
                outputs = self.differentiated(args) if differentiated else (replay or self.launch)(*args)
                if watched:
                    note(self, args, replay, differentiated, outputs)
                return outputs
        if private.single_level is None and private.transforms_active():
            return self._autograd(*args)
        return self.overload(*args)

    def differentiated(self, args: tuple[Any, ...]) -> Any:
        """Return the outputs of a plain call that reverse mode differentiates."""
        return self._differentiated(args, plainly=True)

    def masked(self, *args: Any) -> list[Any]:
        """Call an operator whose last argument is ``output_mask``; None stands for the outputs it leaves out."""
        *others, output_mask = args
        if not any(output_mask):
            return [None] * len(output_mask)
        return in_places(self(*others, list(output_mask)), output_mask)

    def without_autograd(self, *args: Any) -> Any:
        """Call the operator as if nothing required a gradient."""
        if fast_path(args):
            with below_autograd():
                return self.launch(*args)
        with torch.no_grad():
            return self(*args)

    def below(self, *args: Any) -> Any:
        """Call the operator past its Autograd key, as C++ kernels do."""
        if fast_path(args):
            return self.launch(*args)
        with _outer_levels(), below_autograd():
            return self.overload(*args)

    def _under_autocast(self, cast: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        def autocast(*args: Any) -> Any:
            args = args if _cast_at.get() == private.autocast_depth() else cast(*args)
            with without_autocast():
                return self.overload(*args)

        return autocast

    def _autograd(self, *args: Any) -> Any:
        return self._differentiated(args) if needs_derivative(args) else self.below(*args)

    def _differentiated(self, args: tuple[Any, ...], plainly: bool = False) -> Any:
        asked = None
        if self._prepare is not None:
            args, asked = self._prepare(*args)
        if plainly:
            outputs: Any = self._plain_derivative(*args)
        else:
            with _this_level():
                outputs = self._derivative(*args)
        if asked is not None:
            return [outputs[place] for place in asked]
        return list(outputs) if isinstance(outputs, tuple) else outputs

    def _backward_of(self, function: type[torch.autograd.Function]) -> Callable[..., Any]:
        """Return ``function``'s backward, under the forward's backend."""
        no_gradients = self._no_gradients

        def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
            if grad_outputs[0] is None and all(grad is None for grad in grad_outputs):
                return (None,) * len(ctx.needs_input_grad)
            if ctx.backend == backends.current() and not any_autocast():
                return (*function.backward(ctx, *grad_outputs), *no_gradients)
            with backends.use_backend(ctx.backend), without_autocast():
                return (*function.backward(ctx, *grad_outputs), *no_gradients)

        return backward

    def _bind_plainly(self, function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        """Bind ``function`` for reverse mode alone: a forward that has the context itself costs torch less time."""
        launch = self.launch

        def forward(ctx: Any, *args: Any) -> Any:
            outputs = launch(*args)
            if isinstance(outputs, list):
                outputs = tuple(outputs)
            ctx.backend = backends.current()
            ctx.set_materialize_grads(False)
            function.setup_context(ctx, args, outputs)
            return outputs

        # torch looks at the class for a setup_context of its own.
        methods = {"forward": forward, "backward": self._backward_of(function)}
        return private.function_of(function.__name__, methods)

    def _bind(
        self, function: type[torch.autograd.Function], run: Callable[..., Any]
    ) -> type[torch.autograd.Function]:
        """Return ``function`` with ``run`` as its forward, and derivatives under the forward's backend."""
        tensor_count = self._tensor_count

        def forward(*args: Any) -> Any:
            outputs = run(*args)
            return tuple(outputs) if isinstance(outputs, list) else outputs

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.backend = backends.current()
            ctx.set_materialize_grads(False)
            function.setup_context(ctx, inputs, output)

        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            # Function.apply does this by itself.
            outer_levels = nullcontext() if private.single_level is None else _outer_levels()
            with backends.use_backend(ctx.backend), without_autocast(), outer_levels:
                return function.jvp(ctx, *tangents[:tensor_count])

        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            outputs, dims = self._batched(info, in_dims, *args)
            return (tuple(outputs), tuple(dims)) if isinstance(outputs, list) else (outputs, dims)

        methods = {
            "forward": forward,
            "setup_context": setup_context,
            "backward": self._backward_of(function),
            "jvp": jvp,
        }
        if private.single_level is None:
            methods["vmap"] = vmap
        return private.single_level_function(function.__name__, methods)

    def _batched(self, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        outputs = self._vmap(self, info.batch_size, in_dims, *args)
        return outputs, [0] * len(outputs) if isinstance(outputs, list) else 0

    def _batched_by_vmap(self, *args: Any) -> Any:
        """Apply the vmap rule to tensors that have a hidden dimension at the current level."""
        interpreter = private.vmap_interpreter()
        level = interpreter.level()
        pairs = [
            private.unwrap_batched(arg, level) if isinstance(arg, Tensor) else (arg, None) for arg in args
        ]
        in_dims = [dim for _, dim in pairs]
        with private.exclude_keys(private.BELOW_VMAP):
            if not any(dim is not None for dim in in_dims):
                return self.overload(*args)
            outputs = self._vmap(self, interpreter.batch_size(), in_dims, *(value for value, _ in pairs))
        if isinstance(outputs, list):
            return [private.wrap_batched(output, 0, level) for output in outputs]
        return private.wrap_batched(outputs, 0, level)

    def _batched_by_older_vmap(self, *args: Any) -> Any:
        """Apply the vmap rule to tensors that have a hidden dimension."""
        level = private.older_vmap_level()
        shown = [private.remove_batch_dim(arg, level) if isinstance(arg, Tensor) else None for arg in args]
        size = max(tensor.shape[0] for tensor in shown if tensor is not None)
        mapped = [tensor is not None and tensor.shape[0] == size for tensor in shown]
        values = [
            tensor if is_mapped else arg for arg, tensor, is_mapped in zip(args, shown, mapped, strict=True)
        ]
        outputs = self._vmap(self, size, [0 if is_mapped else None for is_mapped in mapped], *values)
        if isinstance(outputs, list):
            return [private.add_batch_dim(output, level) for output in outputs]
        return private.add_batch_dim(outputs, level)


def fast_path(args: Sequence[Any]) -> bool:
    """Return whether the dispatcher can be skipped for a call with these arguments."""
    return not needs_dispatcher() and has_values(args)


def has_values(args: Sequence[Any]) -> bool:
    """Return whether the tensors are torch's own and hold their values.

    Subclasses of Tensor have their own way, a tensor saved inside a transform stays wrapped after it ends, and some
    hold no values of their own.
    """
    tensor = None
    for arg in args:
        kind = type(arg)
        if kind in TENSORS:
            if is_wrapped(arg) or is_zerotensor(arg) or arg.is_neg():
                return False
            tensor = arg
        elif kind not in _OPTIONS:
            return False
    return tensor is not None and (tensor.is_cpu or tensor.device.type in DEVICE_TYPES)


def use_torch_fast_path(
    first: Tensor, *others: Tensor, optional: Tensor | None = None, one_dtype: bool = True
) -> bool:
    """Return whether torch's own ops, under torch's own autograd, serve a call with these arguments.

    So it is on the fallback for torch's own tensors of one device and, unless the caller converts them, ``one_dtype``
    (``checks.tensors`` has nothing to object then), unless something is active that torch's ops do not serve: the
    mse_loss of torch has no forward derivative of its backward, for one. There the registered operators take over.
    """
    if needs_dispatcher() or type(first) not in TENSORS:
        return False
    dtype, on_cpu = first.dtype, first.is_cpu
    for tensor in others if optional is None else (*others, optional):
        if (
            type(tensor) not in TENSORS
            or (tensor.dtype is not dtype and (one_dtype or tensor.dtype not in DTYPES))
            or not (tensor.is_cpu if on_cpu else tensor.device == first.device)
            or tensor.layout is not _STRIDED
        ):
            return False
    if dtype not in DTYPES or first.layout is not _STRIDED:
        return False
    # Asked last: where the backend cannot serve ``first``, devices that differ are still named by the checks.
    return (on_cpu or first.device.type in DEVICE_TYPES) and backends.backend_for(first) == "fallback"


def requires_grad(args: Sequence[Any]) -> bool:
    """Return whether reverse mode has to differentiate a call with these arguments."""
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, Tensor) and arg.requires_grad:
                return True
    return False


def needs_derivative(args: Sequence[Any]) -> bool:
    """Return whether autograd has to differentiate a call with these arguments, in reverse or forward mode."""
    if private.single_level is None and private.transforms_active():
        return True  # Function.apply finds out which of the levels differentiates
    if requires_grad(args):
        return True
    if not private.forward_mode_active():
        return False
    return any(private.has_tangent(arg) for arg in args if isinstance(arg, Tensor))


def in_places(outputs: Sequence[Any], output_mask: Sequence[bool]) -> list[Any]:
    """Return ``outputs`` with None where ``output_mask`` says no; those that it does not speak of come first."""
    first = len(outputs) - sum(output_mask)
    given = iter(outputs[first:])
    places = [next(given) if wanted else None for wanted in output_mask]
    return [*outputs[:first], *places] if first else places


def mapped(size: int, tensor: Any, dim: int | None) -> Any:
    """Return the mapped dimension first; a tensor without one is expanded, which copies nothing; None as it is."""
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Let the operators called inside see their arguments' own dtypes.

    torch.func brings excluded keys back on the way from one of its levels to the next. A block of autocast inside
    counts again: a backward may run a forward, which a checkpoint has put off.
    """
    token = _cast_at.set(private.autocast_depth())
    try:
        with private.exclude_keys(_AUTOCAST_KEYS):
            yield
    finally:
        _cast_at.reset(token)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Return what autocast takes ``tensor`` in: float64 as it is."""
    return tensor.dtype if tensor.dtype == torch.float64 else torch.get_autocast_dtype(tensor.device.type)


def autocast_cast(tensor: Any) -> Any:
    """Return ``tensor`` in the autocast dtype of its device; None as it is."""
    return None if tensor is None else tensor.to(autocast_dtype(tensor))


def uncast(*args: Any) -> tuple[Any, ...]:
    """Return the arguments as they are, for ``autocast``: torch's ops in a launcher do not cast either."""
    return args


def _this_level() -> AbstractContextManager[None]:
    return (
        private.single_level()
        if private.single_level is not None and private.transforms_active()
        else nullcontext()
    )


@contextmanager
def _outer_levels() -> Iterator[None]:
    """Re-enable grad modes, which are off in Function.forward and jvp, so that outer torch.func levels record."""
    if not private.transforms_active():
        yield
        return
    with torch.enable_grad(), private.enable_forward_grad(), below_autograd():
        yield
