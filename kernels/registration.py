"""How an op becomes a torch.library operator with derivatives, vmap, a meta implementation and autocast.

Every op is registered in one form. Its **Autograd key** holds a Python implementation that applies an
``autograd.Function`` whose forward calls the same operator below autograd. So dispatch below the Function, be
it to functorch, FakeTensor, a tracer or the launcher, is the dispatcher's business, and each transform meets
the operator at its own level. Of the documented ways, ``custom_op.register_autograd`` returns forward-mode
tangents that are silently zero, and a plain Function cannot be traced with one.

This is the only module of the ops that leans on private parts of torch:

* ``torch._C._FunctionBase.apply``: ``Function.apply`` without its Python layer, which would hand functorch the
  whole Function where only the current level is due, and costs 9 us a call.
* ``torch._C._functorch.set_single_level_autograd_function_allowed`` allows that apply at a functorch level.
  Where torch no longer has it, ``Function.apply`` serves instead, and under a transform is called before the
  dispatcher, since it handles all levels itself: right in eager mode and in torch.func, but not traceable with
  a jvp.
* The dispatch key ``Batched``, ``torch._remove_batch_dim`` and ``_add_batch_dim``: the older vmap, by which
  ``autograd.grad(is_grads_batched=True)`` and gradcheck's batched checks work. It has no register_vmap.
* ``torch._C._nn.mse_loss``, ``_AutoDispatchBelowAutograd``, ``_are_functorch_transforms_active``: what C++ kernels use.
* ``is_functorch_wrapped_tensor``, ``Tensor._is_zerotensor``: whether a tensor holds its own values.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .checks import DEVICE_TYPES, DTYPES

_single_level: Callable[[], AbstractContextManager[None]] | None
try:
    from torch._functorch.utils import enable_single_level_autograd_function as _single_level
except ImportError:
    _single_level = None

_NAMESPACE = __name__.partition(".")[0]
_DEVICE_KEYS = tuple(device_type.upper() for device_type in DEVICE_TYPES)
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
_PLAIN_OPTIONS = frozenset((type(None), bool, int, float, str, list, torch.dtype))
_LEGACY_VMAP: Any = torch._C._parse_dispatch_key("VmapMode")
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")
_below_autograd = torch._C._AutoDispatchBelowAutograd
_transforms_active = torch._C._are_functorch_transforms_active
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_compiling = torch.compiler.is_compiling
_tracing = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_key_included = torch._C._dispatch_tls_is_dispatch_key_included
_any_autocast = torch._C._is_any_autocast_enabled
_STRIDED = torch.strided

# torch.nn.functional.mse_loss past its own checks and broadcasting, which took 2 of its 5 us.
torch_mse_loss: Callable[..., Tensor] = torch._C._nn.mse_loss

OPERATORS: list["Operator"] = []


class Operator:
    """A registered operator: call it with tensors, get tensors, under any transform.

    Args:
        schema: the operator's name and signature in torch's schema language.
        launch: what runs below autograd on real tensors.
        fake: the same signature on fake or meta tensors: output shapes, dtypes and strides only.
        vmap: ``(info, in_dims, *args) -> (outputs, out_dims)``: one call of the operators for the whole batch.
        derivative: an ``autograd.Function`` with ``setup_context``, ``backward`` and ``jvp`` (its forward is
            provided here), or a function of the same arguments in ops that have derivatives.
        prepare: maps the arguments to those to use when a derivative may be asked for, and to the places of the
            outputs that the caller asked for among those they give.
        autocast: maps the arguments to those to use where autocast is on.
    """

    def __init__(
        self,
        schema: str,
        *,
        launch: Callable[..., Any],
        fake: Callable[..., Any],
        vmap: Callable[..., Any],
        derivative: type[torch.autograd.Function] | Callable[..., Any],
        prepare: Callable[..., tuple[tuple[Any, ...], list[int]]] | None = None,
        autocast: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        self._prepare = prepare
        self._launch = launch
        self._returns_list = schema.endswith("[]")
        qualified = f"{_NAMESPACE}::{self.name}"
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in _DEVICE_KEYS:
            _library.impl(self.name, launch, key)
        torch.library.register_fake(qualified, fake, lib=_library)
        torch.library.register_vmap(qualified, vmap, lib=_library)
        _library.impl(self.name, _legacy_vmap(vmap), "Batched")
        self.overload = getattr(getattr(torch.ops, _NAMESPACE), self.name).default
        self._derivative = self._plain_derivative = derivative
        if isinstance(derivative, type):
            self._derivative = _apply_of(_bind(derivative, self.below, vmap))
            self._plain_derivative = _apply_of(_bind(derivative, launch, vmap))
        _library.impl(self.name, self._autograd, "Autograd")
        if autocast is not None:
            for key in _DEVICE_KEYS:
                _library.impl(self.name, self._under_autocast(autocast), f"Autocast{key}")
        OPERATORS.append(self)

    def __call__(self, *args: Any) -> Any:
        if plain(args):  # what the dispatcher would do, without its 20 us
            return self._differentiated(args, plainly=True) if requires_grad(args) else self._launch(*args)
        if _single_level is None and _transforms_active():
            return self._autograd(*args)
        return self.overload(*args)

    def _under_autocast(self, cast: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        def autocast(*args: Any) -> Any:
            args = cast(*args)
            with without_autocast():
                return self.overload(*args)

        return autocast

    def without_autograd(self, *args: Any) -> Any:
        """Call the operator as if nothing required a gradient."""
        if plain(args):
            with _below_autograd():  # a third of what no_grad costs
                return self._launch(*args)
        with torch.no_grad():
            return self(*args)

    def below(self, *args: Any) -> Any:
        """Call the operator past autograd's key, as C++ kernels do."""
        if plain(args):
            return self._launch(*args)
        with _outer_levels(), _below_autograd():
            return self.overload(*args)

    def _autograd(self, *args: Any) -> Any:
        return self._differentiated(args) if needs_derivative(args) else self.below(*args)

    def _differentiated(self, args: tuple[Any, ...], plainly: bool = False) -> Any:
        asked = None
        if self._prepare is not None:
            args, asked = self._prepare(*args)
        if plainly:
            outputs: Any = self._plain_derivative(*args)
        else:
            with _level():
                outputs = self._derivative(*args)
        if asked is not None:
            return [outputs[place] for place in asked]
        return list(outputs) if self._returns_list else outputs


def _watched() -> bool:
    """Whether tracing, a transform, forward mode, a dispatch mode or autocast looks on."""
    return (
        _compiling()
        or _tracing() is not None
        or _transforms_active()
        or forward_ad._current_level >= 0
        or _dispatch_modes() > 0
        or _key_included(_LEGACY_VMAP)
        or _any_autocast()
    )


def plain(args: Sequence[Any]) -> bool:
    """Whether only reverse-mode autograd looks at a call with these arguments.

    That is: nothing else looks on, and the tensors are torch's own, with storage that holds their values. What
    a transform saved stays wrapped after the transform's end.
    """
    if _watched():
        return False
    tensor = None
    for arg in args:
        kind = type(arg)
        if kind in _PLAIN_TYPES:
            if _wrapped(arg) or arg._is_zerotensor() or arg.is_neg():
                return False
            tensor = arg
        elif kind not in _PLAIN_OPTIONS:
            return False
    return tensor is not None and (tensor.is_cpu or tensor.device.type in DEVICE_TYPES)


def served_by_torch(first: Tensor, *others: Tensor, optional: Tensor | None = None) -> bool:
    """Whether a call needs no more than torch's own ops under torch's own autograd.

    So it is on the fallback for torch's own tensors of one dtype and device (what ``checks.tensors`` would find
    out too), unless something looks on that torch's ops do not serve: the mse_loss of torch has no forward
    derivative of its backward, for one. There the registered operators take over.
    """
    if _watched() or type(first) not in _PLAIN_TYPES:
        return False
    dtype, on_cpu = first.dtype, first.is_cpu
    for tensor in others if optional is None else (*others, optional):
        if (
            type(tensor) not in _PLAIN_TYPES
            or tensor.dtype is not dtype
            or not (tensor.is_cpu if on_cpu else tensor.device == first.device)
            or tensor.layout is not _STRIDED
        ):
            return False
    if dtype not in DTYPES or first.layout is not _STRIDED:
        return False
    # Asked last: where the backend cannot serve ``first``, devices that differ are still named by the checks.
    return (on_cpu or first.device.type in DEVICE_TYPES) and backends.backend_for(first) == "fallback"


def requires_grad(args: Sequence[Any]) -> bool:
    """Whether reverse mode has to differentiate a call with these arguments."""
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, Tensor) and arg.requires_grad:
                return True
    return False


def needs_derivative(args: Sequence[Any]) -> bool:
    """Whether autograd has to differentiate a call with these arguments, in reverse or forward mode."""
    if _single_level is None and _transforms_active():
        return True  # which of the levels differentiates is for Function.apply to find out
    if requires_grad(args):
        return True
    # Traced code enters forward mode without telling forward_ad, but always under a transform.
    if (forward_ad._current_level < 0 and not _transforms_active()) or not torch._C._is_fwd_grad_enabled():
        return False
    return any(torch._VF._unpack_dual(arg, level=0)[1] is not None for arg in args if isinstance(arg, Tensor))


def _bind(
    function: type[torch.autograd.Function], run: Callable[..., Any], vmap: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """``function`` with ``run`` as its forward, and derivatives under the forward's backend."""

    def forward(*args: Any) -> Any:
        outputs = run(*args)
        return tuple(outputs) if isinstance(outputs, list) else outputs

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = backends.current()
        ctx.set_materialize_grads(False)
        function.setup_context(ctx, inputs, output)

    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        if all(grad is None for grad in grad_outputs):
            return (None,) * len(ctx.needs_input_grad)
        if ctx.backend == backends.current() and not _any_autocast():
            return function.backward(ctx, *grad_outputs)
        with backends.use_backend(ctx.backend), without_autocast():
            return function.backward(ctx, *grad_outputs)

    def vmap_tuple(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        outputs, dims = vmap(info, in_dims, *args)
        return (tuple(outputs), tuple(dims)) if isinstance(outputs, list) else (outputs, dims)

    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        # Function.apply does this by itself.
        outer_levels = nullcontext() if _single_level is None else _outer_levels()
        with backends.use_backend(ctx.backend), without_autocast(), outer_levels:
            return function.jvp(ctx, *tangents)

    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, "jvp": jvp}
    if _single_level is None:
        methods["vmap"] = vmap_tuple
    return type(
        function.__name__, (function,), {name: staticmethod(method) for name, method in methods.items()}
    )


def _apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    if _single_level is None:
        return function.apply
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _level() -> AbstractContextManager[None]:
    return _single_level() if _single_level is not None and _transforms_active() else nullcontext()


@contextmanager
def _outer_levels() -> Iterator[None]:
    """Function runs with its grad modes off; the levels of torch.func further out have a say of their own."""
    if not _transforms_active():
        yield
        return
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _below_autograd():
        yield


@dataclass(frozen=True)
class _LegacyInfo:
    """What the vmap rules read of functorch's VmapInfo."""

    batch_size: int


def _legacy_vmap(rule: Callable[..., Any]) -> Callable[..., Any]:
    """``rule`` for the older vmap, which hands out tensors with a hidden dimension."""

    def batched(*args: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        # A tensor without the hidden dimension comes back with one of size 1.
        shown = [
            torch._remove_batch_dim(arg, level, 1, 0) if isinstance(arg, Tensor) else None for arg in args
        ]
        size = max(tensor.shape[0] for tensor in shown if tensor is not None)
        mapped = [tensor is not None and tensor.shape[0] == size for tensor in shown]
        values = [
            tensor if is_mapped else arg for arg, tensor, is_mapped in zip(args, shown, mapped, strict=True)
        ]
        outputs, dims = rule(
            _LegacyInfo(size), tuple(0 if is_mapped else None for is_mapped in mapped), *values
        )
        if isinstance(outputs, list):
            return [
                torch._add_batch_dim(output, dim, level) for output, dim in zip(outputs, dims, strict=True)
            ]
        return torch._add_batch_dim(outputs, dims, level)

    return batched


def _autocast_keys() -> torch._C.DispatchKeySet:
    first, *rest = (
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{key}"))
        for key in _DEVICE_KEYS
        if hasattr(torch._C.DispatchKey, f"Autocast{key}")
    )
    for keys in rest:
        first = first | keys
    return first


_AUTOCAST_KEYS = _autocast_keys()


def without_autocast() -> AbstractContextManager[None]:
    """The operators called inside see their arguments' own dtypes."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS)


def autocast_cast(tensor: Any) -> Any:
    """``tensor`` in the autocast dtype of its device; float64 and None as they are."""
    if tensor is None or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
