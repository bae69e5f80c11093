"""Compile ahead of the first call: before a loop is timed, or a CUDA graph captured."""

from collections.abc import Sequence

import torch

from .backends import backend_for
from .ops import OPS, OPTIMIZERS, Function, Shaped, Training


@torch.inference_mode(False)  # whatever block the caller is in
@torch.enable_grad()
def warmup(
    op: str,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
    *,
    requires_grad: Sequence[bool] | None = None,
) -> None:
    """Compile and load what calls of these shapes will launch, so that the first of them does not wait for it.

    The op runs once without gradients and once with its backward (an optimizer: one step) on temporary tensors,
    contiguous and aligned. Sizes are run-time values: one call covers all shapes that take the same kernels. Where
    Triton does not serve the device it does nothing.

    Strided, misaligned or transposed tensors take other variants: make those calls themselves once. Under the capture
    of a CUDA graph a call whose kernels are not loaded is refused.

    Args:
        op: ``"matmul"``, ``"mse"``, ``"linear_mse"``, ``"linear_mse_models"``, ``"linear_mse_fit"``, ``"sgd"`` or
            ``"adam"``.
        shapes: of the tensor arguments that the op takes by position, in their order (``matmul``: input, other,
            perhaps bias; ``mse``: input, target; ``linear_mse``, ``linear_mse_models`` and ``linear_mse_fit``: input,
            weight, target, perhaps bias); for the optimizers, of the parameters.
        dtype: of all the tensors.
        device: where they live.
        requires_grad: which arguments the gradient is taken for; by default all of ``matmul``'s, the input of
            ``mse``, weight and bias of ``linear_mse`` and ``linear_mse_models``. Ignored for ``linear_mse_fit`` and the
            optimizers.

    Raises:
        ValueError: an unknown op, or a number of shapes or of ``requires_grad`` that does not fit.

    Example:
        >>> warmup("linear_mse", [(8192, 512), (1, 512), (8192, 1), (1,)], torch.bfloat16, "cuda")
    """
    if op not in OPS:
        raise ValueError(f"warmup: unknown op {op!r}; expected one of {', '.join(map(repr, OPS))}")
    if op in OPTIMIZERS:
        if _has_kernels(device):
            _step(op, shapes, dtype, device)
        return
    record = OPS[op]
    assert isinstance(record, Shaped)
    required, optional = record.arguments
    names = (required + optional)[: len(shapes)]
    if not len(required) <= len(shapes) <= len(required + optional):
        counts = " or ".join(str(len(required) + extra) for extra in range(len(optional) + 1))
        raise ValueError(f"warmup: {op} takes {counts} shapes, got {len(shapes)}: {list(shapes)}")
    if requires_grad is not None and len(requires_grad) != len(shapes):
        raise ValueError(f"warmup: requires_grad has {len(requires_grad)} entries for {len(shapes)} shapes")
    if not _has_kernels(device):
        return
    function = record.function()
    tensors = [torch.ones(tuple(shape), dtype=dtype, device=device) for shape in shapes]
    if isinstance(record, Training):
        _train(record, dict(zip(names, tensors, strict=True)))
        return
    assert isinstance(record, Function)
    with torch.no_grad():
        function(*tensors)
    for i, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
        tensor.requires_grad_(name in record.gradients if requires_grad is None else requires_grad[i])
    if any(tensor.requires_grad for tensor in tensors):
        result = function(*tensors)
        result.backward(torch.ones_like(result))


def _has_kernels(device: torch.device | str) -> bool:
    return backend_for(torch.empty(0, device=device)) == "triton"


def _step(op: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device | str) -> None:
    for options in OPTIMIZERS[op].variants:
        params = [torch.ones(tuple(shape), dtype=dtype, device=device) for shape in shapes]
        for param in params:
            param.grad = torch.zeros_like(param)
        OPTIMIZERS[op].function()(params, **options).step()


def _train(op: Training, tensors: dict[str, torch.Tensor]) -> None:
    params = [tensors[name].requires_grad_() for name in op.trained if name in tensors]
    stacked = params[0].dim() == 3  # a batch of models
    for name in op.optimizers:
        for options in OPTIMIZERS[name].variants:
            optimizer = OPTIMIZERS[name].function()(params, **options, stacked=stacked)
            op.function()(**tensors, optimizer=optimizer, steps=1)
