"""Matrix products: ``matmul`` and ``linear``.

Both are one registered operator on matrices with batch dimensions,

    result = (input @ other).sum(sum_dims, keepdim=True) + bias,

chosen so that it is closed under differentiation: the gradients of a product are products of the same form (a
sum over broadcast batch dimensions included), the gradient of a bias is a product with ones, and a tangent is
a product that adds another. So every derivative of any order, and vmap, is again this one operator.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from . import checks
from .operator import Launches, Operator, autocast_cast, in_places, use_torch_fast_path
from .repeat import repeatable
from .torch_private import needs_dispatcher

# Bytes of input up to which torch's own products of one column serve on the fallback: see _suits_torch.
SMALL = 1 << 24


@repeatable
def matmul(input: Tensor, other: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a matrix product, with a bias added before the result is stored.

        result[..., m, n] = sum_k input[..., m, k] * other[..., k, n] + bias[n]

    Accumulates in float32 (float64 for float64). float32 products follow
    ``torch.backends.cuda.matmul.fp32_precision``. By default they are accurate to float32 (3xTF32 on NVIDIA, 6xBF16
    on AMD), but operands above (1 - 2^-12) FLT_MAX (1 - 2^-9 on AMD) overflow to inf. Differentiable to any order,
    in reverse and forward mode.

    Shapes:
        input ``(*, M, K)`` or ``(K,)``; other ``(*, K, N)`` or ``(K,)``; bias ``(N,)``, or one element where
        ``other`` is 1-D; result as ``torch.matmul``: batch dimensions broadcast, a 1-D operand's is dropped.

    Args:
        input: float64, float32, float16 or bfloat16, any strides.
        other: of the same dtype and device.
        bias: of the same dtype and device.

    Returns:
        A new tensor of the operands' dtype (under autocast, of the autocast dtype).

    Raises:
        TypeError: dtypes differ or are not served.
        RuntimeError: devices differ, or the shapes do not fit.
        ValueError: ``bias`` has the wrong shape.

    Example:
        >>> matmul(torch.randn(8, 3, 4), torch.randn(4, 5), torch.zeros(5)).shape
        torch.Size([8, 3, 5])
    """
    in_torch = use_torch_fast_path(input, other, optional=bias)
    if not in_torch:
        checks.tensors("matmul", {"input": input, "other": other, "bias": bias}, ("bias",))
    if input.dim() == 0 or other.dim() == 0:
        raise RuntimeError(
            f"matmul: both arguments need at least one dimension, got input {tuple(input.shape)}, "
            f"other {tuple(other.shape)}"
        )
    left = input if input.dim() > 1 else input.unsqueeze(0)
    right = other if other.dim() > 1 else other.unsqueeze(1)
    if left.shape[-1] != right.shape[-2]:
        raise RuntimeError(
            f"matmul: input has shape {tuple(input.shape)} and other {tuple(other.shape)}; "
            f"the inner sizes {left.shape[-1]} and {right.shape[-2]} must be equal"
        )
    if bias is not None:
        checks.bias_shape("matmul", bias, right.shape[-1], other=other)
    if in_torch and _suits_torch(input, right.shape[-1] if right.dim() == 2 else right.numel()):
        result = torch.matmul(input, other)
        return result if bias is None else result + (_number(bias) if other.dim() == 1 else bias)
    result = product(left, right, bias if bias is None or bias.dim() == 1 else bias.reshape(1))
    if other.dim() == 1:
        result = result.squeeze(-1)
    if input.dim() == 1:
        result = result.squeeze(-2 if other.dim() > 1 else -1)
    return result


@repeatable
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the affine map of ``torch.nn.functional.linear``.

        result[..., k] = sum_d input[..., d] * weight[k, d] + bias[k]

    Shapes:
        input ``(*, D)``; weight ``(K, D)`` or ``(D,)``; bias ``(K,)``, or one element where weight is
        ``(D,)``; result ``(*, K)``, or ``(*)`` where weight is ``(D,)``.

    Args:
        input: float64, float32, float16 or bfloat16, any strides.
        weight: of the same dtype and device.
        bias: of the same dtype and device.

    Returns:
        A new tensor of the operands' dtype (under autocast, of the autocast dtype).

    Raises:
        TypeError: dtypes differ or are not served.
        RuntimeError: devices differ, or the shapes do not fit.
        ValueError: ``bias`` has the wrong shape.

    Example:
        >>> linear(torch.randn(8, 4), torch.randn(5, 4), torch.zeros(5)).shape
        torch.Size([8, 5])
    """
    in_torch = use_torch_fast_path(input, weight, optional=bias)
    if not in_torch:
        checks.tensors("linear", {"input": input, "weight": weight, "bias": bias}, ("bias",))
    checks.linear_shapes("linear", input, weight, bias)
    if in_torch and _suits_torch(input, weight.shape[:-1].numel()):
        return linear_in_torch(input, weight, bias)
    matrix = weight if weight.dim() == 2 else weight.unsqueeze(0)
    left = input if input.dim() > 1 else input.unsqueeze(0)
    result = product(left, matrix.mT, bias if bias is None or bias.dim() == 1 else bias.reshape(1))
    if weight.dim() == 1:
        result = result.squeeze(-1)
    return result.squeeze(0) if input.dim() == 1 else result


def _suits_torch(input: Tensor, columns: int) -> bool:
    """Return whether torch's products suit: of one column, save in 16 bits, they have one thread, the fallback all."""
    return input.nbytes <= SMALL or columns > 1 or input.element_size() == 2


def linear_in_torch(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute torch's own linear, which has no bias for a 1-D weight."""
    if bias is not None and weight.dim() == 1:
        return torch.matmul(input, weight) + _number(bias)
    return torch_linear(input, weight, bias)


def _number(bias: Tensor) -> Tensor:
    """Return the only element. Its gradient is no view of the sum's, unlike a reshape's: see ``sum_to``."""
    return bias[(0,) * bias.dim()]


def scale_and_add(
    factor: Tensor, tensor: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Compute ``factor * tensor + bias``; ``factor`` has one element, on the device, and is a 1 x 1 matrix."""
    column = None if bias is None else bias.unsqueeze(-1)
    return product(tensor.unsqueeze(-1), factor.reshape(1, 1), column, dtype=dtype).squeeze(-1)


def product(
    input: Tensor,
    other: Tensor,
    bias: Tensor | None = None,
    sum_dims: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Call the registered operator with its defaults: operands of at least two dimensions, no checks.

    Args:
        input: ``(*A, M, K)``.
        other: ``(*B, K, N)``, of any float dtype.
        bias: broadcastable to the result.
        sum_dims: which of the broadcast batch dimensions are summed (and kept with size 1).
        dtype: of the result; input's if None.
    """
    return _matmul(input, other, bias, list(sum_dims), input.dtype if dtype is None else dtype)


def _batch_shape(input: Tensor, other: Tensor) -> list[int]:
    left, right = input.shape[:-2], other.shape[:-2]
    # torch.broadcast_shapes takes 20 us.
    return list(left if left == right else torch.broadcast_shapes(left, right))


def _result_shape(input: Tensor, other: Tensor, sum_dims: Sequence[int]) -> list[int]:
    batch = _batch_shape(input, other)
    for dim in sum_dims:
        batch[dim] = 1
    return [*batch, input.shape[-2], other.shape[-1]]


class _Like(NamedTuple):
    """What a gradient goes by of its tensor, whose values it does not need."""

    shape: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "_Like":
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    @property
    def transposed(self) -> bool:
        """Return whether it is the transpose of a contiguous matrix, such as ``linear``'s weight.

        A gradient that lies as the transpose does is one for the matrix; autograd would copy another.
        """
        shape = self.shape
        return len(shape) == 2 and self.stride == (1, shape[0]) and shape[0] > 1


def _product_like(input: Tensor, other: Tensor, like: _Like) -> Tensor:
    """Return ``input @ other`` with batch dimensions summed or expanded to those of ``like``: a gradient's shape."""
    shape, stride, dtype = like
    if not needs_dispatcher() and like.transposed:
        return _product_like(other.mT, input.mT, _Like(shape[::-1], stride[::-1], dtype)).mT
    if input.dim() == other.dim() == len(shape) == 2:
        return product(input, other, dtype=dtype)
    batch = _batch_shape(input, other)
    target = [1] * (len(batch) - (len(shape) - 2)) + list(shape[:-2])
    sum_dims = [
        dim for dim, (size, want) in enumerate(zip(batch, target, strict=True)) if want == 1 and size != 1
    ]
    result = product(input, other, None, sum_dims, dtype)
    if result.shape == shape:
        return result
    return result.reshape(result.shape[result.dim() - len(shape) :]).expand(shape)


def sum_to(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Sum ``tensor`` (at least 2-D) to a ``shape`` that broadcasts to its own, by products with ones.

    Never a view of it: autograd takes one for a new tensor, keeps it as ``.grad`` and adds to it in place.
    """
    if tuple(tensor.shape) == tuple(shape):
        return tensor if dtype is None else tensor.to(dtype)
    padded = [1] * (tensor.dim() - len(shape)) + list(shape)
    summed = [dim for dim, (size, want) in enumerate(zip(tensor.shape, padded, strict=True)) if want != size]
    batch_dims = [dim for dim in summed if dim < tensor.dim() - 2]
    rows, columns = tensor.dim() - 2 in summed, tensor.dim() - 1 in summed
    ones = tensor.new_ones(())
    if not rows and not columns:
        tensor = product(tensor.unsqueeze(-1), ones.expand(1, 1), None, batch_dims, dtype)
    if rows:
        tensor = product(ones.expand(1, tensor.shape[-2]), tensor, None, batch_dims, dtype)
    if columns:
        tensor = product(tensor, ones.expand(tensor.shape[-1], 1), None, [] if rows else batch_dims, dtype)
    return tensor.reshape(shape)


def _launch_gradients(
    product: Callable[..., Tensor], grad: Tensor, input: Tensor | None, other: Tensor | None, ones: Tensor | None,
    bias_dtype: torch.dtype | None, needs_input: bool, needs_other: bool, dtype: torch.dtype | None, transposed: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of a product of matrices, as MatmulFunction has them: those that are needed.

    ``dtype``, ``transposed``: of the operand that has a gradient and was not saved, if there is one.
    """

    def product_like(left: Tensor, right: Tensor, like: Tensor | None) -> Tensor:
        kind, turned = (dtype, transposed) if like is None else (like.dtype, _Like.of(like).transposed)
        if turned:
            return product(right.mT, left.mT, None, [], kind).mT
        return product(left, right, None, [], kind)

    gradients = []
    if needs_input and other is not None:
        gradients.append(product_like(grad, other.mT, input))
    if needs_other and input is not None:
        gradients.append(product_like(input.mT, grad, other))
    if ones is not None:
        gradients.append(product(ones, grad, None, [], bias_dtype).reshape(-1))
    return gradients


class MatmulFunction(torch.autograd.Function):
    """Derivatives of ``(input @ other).sum(sum_dims) + bias``, each one or two calls of the operator.

    An operand is kept for the other one's gradient alone, as torch keeps it: a frozen weight lets go of the input.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, other, bias, ctx.sum_dims, ctx.dtype = inputs
        needs_input, needs_other = ctx.needs_input_grad[:2]
        # Of the operand that has a gradient and is not saved; one that is saved says it itself.
        ctx.like = None if needs_input == needs_other else _Like.of(input if needs_input else other)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.save_for_backward(input if needs_other else None, other if needs_input else None)
        ctx.save_for_forward(input, other)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, other = ctx.saved_tensors
        like = ctx.like
        needs = needs_input, needs_other, needs_bias = ctx.needs_input_grad[:3]
        if grad.dim() == 2 and not (torch.is_grad_enabled() or needs_dispatcher()):
            # A bias of one element for each column, below more than one row: its gradient is a product with ones.
            summed = needs_bias and len(grad) != 1 and ctx.bias[0] == grad.shape[1:]
            ones = grad.new_ones(()).expand(1, len(grad)) if summed else None
            unsaved = (None, False) if like is None else (like.dtype, like.transposed)
            args = grad, input, other, ones, ctx.bias and ctx.bias[1], needs_input, needs_other, *unsaved
            if summed == needs_bias and (launch := _gradients.plain(args)):
                return tuple(in_places(launch(*args), needs))
        return (
            _product_like(grad, other.mT, like or _Like.of(input)) if needs_input else None,
            _product_like(input.mT, grad, like or _Like.of(other)) if needs_other else None,
            sum_to(grad, *ctx.bias) if needs_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, d_input: Tensor | None, d_other: Tensor | None, d_bias: Tensor | None) -> Tensor | None:
        input, other = ctx.saved_tensors
        tangent = d_bias
        # torch.func makes the tangent of ``0.5 * scalar`` float64, whatever the scalar is.
        if d_input is not None:
            tangent = product(d_input.to(input.dtype), other, tangent, ctx.sum_dims, ctx.dtype)
        if d_other is not None:
            tangent = product(input, d_other.to(other.dtype), tangent, ctx.sum_dims, ctx.dtype)
        if tangent is d_bias and tangent is not None:
            tangent = product(input[..., :0], other[..., :0, :], tangent, ctx.sum_dims, ctx.dtype)
        return tangent


def _fake(input: Tensor, other: Tensor, _: Tensor | None, sum_dims: list[int], dtype: torch.dtype) -> Tensor:
    return input.new_empty(_result_shape(input, other, sum_dims), dtype=dtype)


def _vmap(operator: Operator, batch_size: int, in_dims: Sequence[int | None], *args: Any) -> Tensor:
    *tensors, sum_dims, dtype = args
    rank = max(tensor.dim() - (dim is not None) for tensor, dim in zip(tensors[:2], in_dims[:2], strict=True))

    def front(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        """Return the mapped dimension first, then ones up to the rank of the result."""
        if tensor is None or dim is None:
            return tensor
        tensor = tensor.movedim(dim, 0)
        return tensor.reshape(tensor.shape[0], *(1,) * (rank - (tensor.dim() - 1)), *tensor.shape[1:])

    operands = [front(tensor, dim) for tensor, dim in zip(tensors, in_dims[:3], strict=True)]
    if in_dims[0] is None and in_dims[1] is None:
        input = tensors[0]
        operands[0] = input.expand(batch_size, *(1,) * (rank - input.dim()), *input.shape)
    return operator(*operands, [dim + 1 for dim in sum_dims], dtype)


def _autocast(*args: Any) -> tuple[Any, ...]:
    *tensors, sum_dims, _ = args
    input, other, bias = map(autocast_cast, tensors)
    return input, other, bias, sum_dims, input.dtype


_GRADIENTS = ("Tensor", *("Tensor?",) * 3, "ScalarType?", "bool", "bool", "ScalarType?", "bool")
_gradients = Launches("matmul", "matmul_forward", _GRADIENTS, _launch_gradients)
_matmul = Operator("matmul", "forward", fake=_fake, vmap=_vmap, derivative=MatmulFunction, autocast=_autocast)
