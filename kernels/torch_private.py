"""Every private part of torch that the ops use, with its reason and what serves where torch no longer has it.

The first is optional: ``single_level`` is None where it is gone. The others have no public equivalent, or only a
slower one; they are resolved at import, so that a torch without one fails there, with its name. Only the compiler's
tables are asked for when they are needed: to import them takes seconds.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

F = TypeVar("F", bound=Callable[..., Any])

# What the interpreter does at each call while a compiled function runs.
_frames: Any = torch._C._dynamo.eval_frame

# Allows a function of one level to be applied at a functorch level. Without it Function.apply serves, which handles
# all levels itself and is therefore called before the dispatcher: right in eager mode and in torch.func, but not
# traceable with a jvp.
single_level: Callable[[], AbstractContextManager[None]] | None
try:
    from torch._functorch.utils import enable_single_level_autograd_function as single_level
except ImportError:
    single_level = None


def single_level_function(name: str, methods: dict[str, Any]) -> Any:
    """Return a Function of the current functorch level alone; torch.autograd.Function hands functorch all of it.

    From torch 2.15 on that is no longer its Python layer's doing, which could be left out.
    """
    return function_of(
        name, methods, torch.autograd.Function if single_level is None else _SingleLevelFunction
    )


def function_of(name: str, methods: dict[str, Any], base: type = torch.autograd.Function) -> Any:
    """Return an ``autograd.Function`` with these methods, which the compiler does not see."""
    return type(
        name, (base,), {key: staticmethod(outside_compiler(method)) for key, method in methods.items()}
    )


def apply_function(function: Any) -> Callable[..., Any]:
    """Return ``function.apply`` without its Python layer, which costs 9 us: ``torch._C._FunctionBase.apply``."""
    if single_level is None or not issubclass(function, torch.autograd.Function):
        return function.apply
    return super(torch.autograd.Function, function).apply


@contextmanager
def functions_replaced() -> Iterator[None]:
    """Keep torch.compile's tables right while functions of torch are others: the tables hold the originals.

    The tables are made at its first use. One that was made inside the block would miss the originals ever after.
    """
    name = "torch._dynamo.trace_rules"
    before = sys.modules.get(name)
    if before is not None:
        before.get_torch_obj_rule_map()
        before.get_tensor_method()
    try:
        yield
    finally:
        if before is None and name in sys.modules:
            sys.modules[name].clear_lru_cache()


def outside_compiler(function: F) -> F:
    """Let dynamo neither trace ``function`` nor what it calls, where a compiled function comes to it without a graph.

    So it does where backward() is part of what is compiled, and goes wrong in a Function's own. What a graph is made
    of, it still sees. Public: torch.compiler.disable, which imports the compiler and takes time at each call.
    """
    code: CodeType = function.__code__
    _frames.set_code_exec_strategy(code, _frames._FrameExecStrategy(*[_frames._FrameAction.SKIP] * 2))
    return function


# What an operator does below its Autograd key, as C++ kernels do. Public: torch.no_grad, at three times the cost.
below_autograd = torch._C._AutoDispatchBelowAutograd

# Who else takes part in a call.
transforms_active = torch._C._are_functorch_transforms_active
any_autocast = torch._C._is_any_autocast_enabled
_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_key_included = torch._C._dispatch_tls_is_dispatch_key_included
# The older vmap, by which autograd.grad(is_grads_batched=True) and gradcheck's batched checks work. It has no
# register_vmap: a rule is registered for the dispatch key ``Batched``, and unpacks the hidden dimensions itself.
_OLDER_VMAP: Any = torch._C._parse_dispatch_key("VmapMode")


def needs_dispatcher() -> bool:
    """Return whether anything besides plain reverse-mode autograd is active.

    That is: tracing, a transform of torch.func, forward mode, a dispatch mode, the older vmap or autocast.
    """
    return (
        _compiling()
        or _tracing_state() is not None
        or transforms_active()
        or forward_ad._current_level >= 0
        or _dispatch_modes() > 0
        or _key_included(_OLDER_VMAP)
        or any_autocast()
    )


# Whether a tensor holds its own values: one saved inside a transform stays wrapped after it ends, and a ZeroTensor
# (a derivative of a constant) has no storage.
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
is_zerotensor: Callable[[Tensor], bool] = Tensor._is_zerotensor
# The tensor one wrapper further in, for the memory checker's marks.
unwrapped = torch._C._functorch.get_unwrapped

# torch.nn.functional.mse_loss without its checks and broadcasting, which take 2 of its 5 us.
torch_mse_loss: Callable[..., Tensor] = torch._C._nn.mse_loss


def _precision() -> str:
    return torch.backends.cuda.matmul.fp32_precision


# ``torch.backends.cuda.matmul.fp32_precision`` without the 0.6 us of its module's lookup.
_precision_getter: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
matmul_precision: Callable[[], str] = (
    partial(_precision_getter, "cuda", "matmul") if _precision_getter else _precision
)


def _empty_strided_cuda(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


# ``torch.empty_strided`` on the current CUDA device, past the dispatcher: as inductor allocates, in half the time.
empty_strided_cuda: Callable[..., Tensor] = getattr(
    torch._C._dynamo.guards, "_empty_strided_cuda", _empty_strided_cuda
)
# ``torch.cuda.current_device`` without its check that CUDA has been initialised; a CPU build has none.
current_cuda_device: Callable[[], int] | None = getattr(torch._C, "_cuda_getDevice", None)


def alike(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return a function that tells whether as many tensors, no two the same, are like these, under the same modes.

    That is: of their types, dtypes, devices, sizes, strides, bits such as the negative one, and ``requires_grad``.
    Public: each of these by itself and tensor by tensor, at three times the cost.
    """
    guards = torch._C._dynamo.guards.TensorGuards
    return guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


def forward_mode_active() -> bool:
    """Return whether a call may have to give a tangent.

    Traced code enters forward mode without telling ``forward_ad``, but always under a transform.
    """
    return (forward_ad._current_level >= 0 or transforms_active()) and torch._C._is_fwd_grad_enabled()


def enable_forward_grad() -> AbstractContextManager[None]:
    """Enable forward mode, as ``torch.enable_grad`` does reverse mode."""
    return forward_ad._set_fwd_grad_enabled(True)


def has_tangent(tensor: Tensor) -> bool:
    """Return whether forward mode carries a tangent; ``unpack_dual`` needs a level, which traced code lacks."""
    return torch._VF._unpack_dual(tensor, level=0)[1] is not None


# The level of vmap in whose name the dispatch key ``FuncTorchBatched`` is called, its tensors without and with their
# hidden dimension, and what is below it. Public: torch.library.register_vmap, at 200 us a call (it flattens trees).
vmap_interpreter: Callable[[], Any] = retrieve_current_functorch_interpreter
unwrap_batched: Callable[[Tensor, int], tuple[Tensor, int | None]] = torch._C._functorch._unwrap_batched
wrap_batched: Callable[[Tensor, int, int], Tensor] = torch._C._functorch._add_batch_dim
BELOW_VMAP = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)


def older_vmap_level() -> int:
    """Return the level of the older vmap's innermost loop."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def remove_batch_dim(tensor: Tensor, level: int) -> Tensor:
    """Return the older vmap's tensor with its hidden dimension first; without one the first dimension has size 1."""
    return torch._remove_batch_dim(tensor, level, 1, 0)


def add_batch_dim(tensor: Tensor, level: int) -> Tensor:
    """Hide the first dimension: the opposite."""
    return torch._add_batch_dim(tensor, 0, level)


def autocast_keys(device_keys: tuple[str, ...]) -> Any:
    """Return the dispatch keys of autocast on these devices, as far as this torch has them."""
    found = [f"Autocast{key}" for key in device_keys if hasattr(torch._C.DispatchKey, f"Autocast{key}")]
    first, *rest = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in found)
    for keys in rest:
        first = first | keys
    return first


# A context without these dispatch keys. Public: torch.autocast(enabled=False), for one device type at a time.
exclude_keys: Callable[[Any], AbstractContextManager[None]] = torch._C._ExcludeDispatchKeyGuard


def autocast_depth() -> int:
    """Return how many blocks of torch.autocast are open in this thread."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def operations_are_traced() -> bool:
    """Return whether make_fx, FakeTensorMode or functionalization is active; other dispatch modes see values."""
    return _dispatch_modes() > 0 and any(
        torch._C._get_dispatch_mode(key) is not None
        for key in torch._C._TorchDispatchModeKey.__members__.values()
    )
