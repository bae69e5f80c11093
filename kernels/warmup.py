"""Compile ahead of the first call: before a loop is timed, or a CUDA graph captured."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .adam import FusedAdam
from .backends import backend_for
from .linear_mse import linear_mse_loss
from .matmul import matmul
from .mse import mse_loss
from .sgd import FusedSGD

# Of each op: how many tensors it takes at least and at most, and which of them need a gradient as a rule.
_ARGUMENTS = {
    "matmul": (2, 3, (True, True, True)),
    "mse": (2, 2, (True, False)),
    "linear_mse": (3, 4, (False, True, False, True)),
}
_OPTIMIZERS = {
    "sgd": (lambda params: FusedSGD(params, lr=0.0), lambda params: FusedSGD(params, lr=0.0, momentum=0.9)),
    "adam": (lambda params: FusedAdam(params, lr=0.0),),
}


def warmup(
    op: str,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
    *,
    requires_grad: Sequence[bool] | None = None,
) -> None:
    """Compile and load what calls of these shapes will launch, so that the first of them does not wait for it.

    The op runs once without gradients and once with its backward (an optimizer: one step) on tensors made for
    the purpose, contiguous and aligned, and what comes out is thrown away. Sizes are run-time values: one call
    covers all shapes that take the same path. Where Triton does not serve the device there is nothing to do.

    Args:
        op: ``"matmul"``, ``"mse"``, ``"linear_mse"``, ``"sgd"`` or ``"adam"``.
        shapes: of the op's tensor arguments in their order (``matmul``: input, other, perhaps bias; ``mse``:
            input, target; ``linear_mse``: input, weight, target, perhaps bias); for the optimizers, of the
            parameters.
        dtype: of all the tensors.
        device: where they live.
        requires_grad: which arguments the gradient is taken for; by default all of ``matmul``'s, the input of
            ``mse``, weight and bias of ``linear_mse``. Ignored for the optimizers.

    Raises:
        ValueError: an unknown op, or a number of shapes that is not the op's.

    Example:
        >>> warmup("linear_mse", [(8192, 512), (1, 512), (8192, 1), (1,)], torch.bfloat16, "cuda")
    """
    if op not in _ARGUMENTS and op not in _OPTIMIZERS:
        names = ", ".join(map(repr, (*_ARGUMENTS, *_OPTIMIZERS)))
        raise ValueError(f"warmup: unknown op {op!r}; expected one of {names}")
    if op in _ARGUMENTS:
        least, most, default = _ARGUMENTS[op]
        if not least <= len(shapes) <= most:
            counts = str(least) if least == most else f"{least} or {most}"
            raise ValueError(f"warmup: {op} takes {counts} shapes, got {len(shapes)}: {list(shapes)}")
        if requires_grad is not None and len(requires_grad) != len(shapes):
            raise ValueError(
                f"warmup: requires_grad has {len(requires_grad)} entries for {len(shapes)} shapes"
            )
    if backend_for(torch.empty(0, device=device)) != "triton":
        return
    tensors = [torch.ones(tuple(shape), dtype=dtype, device=device) for shape in shapes]
    if op in _OPTIMIZERS:
        for make in _OPTIMIZERS[op]:
            params = [tensor.clone() for tensor in tensors]
            for param in params:
                param.grad = torch.zeros_like(param)
            make(params).step()
        return
    with torch.no_grad():
        _call(op, tensors)
    for tensor, needed in zip(tensors, default if requires_grad is None else requires_grad, strict=False):
        tensor.requires_grad_(needed)
    if any(tensor.requires_grad for tensor in tensors):
        result = _call(op, tensors)
        result.backward(torch.ones_like(result))


def _call(op: str, tensors: list[Tensor]) -> Tensor:
    if op == "matmul":
        return matmul(*tensors)
    if op == "mse":
        return mse_loss(*tensors)
    input, weight, target, *bias = tensors
    return linear_mse_loss(input, weight, target, *bias)
