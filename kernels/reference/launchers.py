"""The launchers of ``use_backend("reference")``: the NumPy float64 references behind the common signatures.

For checking, not for speed: tensors travel to the CPU and back.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import acc_dtype, in_float64
from ..optim.bucket import AdamOptions, Bucket, Guard, Models, SGDOptions, Update
from . import adam, linear_mse, matmul, mse, sgd
from .precision import Array

State = dict[str, Array]


def _array(tensor: Tensor) -> Array:
    return in_float64(tensor).numpy()


def _arrays(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else _array(tensor) for tensor in tensors]


def _tensor(array: Array, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on ``like``'s device and of its dtype, unless another is named."""
    values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64)).reshape(np.shape(array))
    return values.to(like.device, like.dtype if dtype is None else dtype)


def _in_layout(array: Array, like: Tensor) -> Tensor:
    return torch.empty_like(like).copy_(_tensor(array, like))


def matmul_forward(
    input: Tensor, other: Tensor, bias: Tensor | None, sum_dims: list[int], dtype: torch.dtype
) -> Tensor:
    left, right, plus = _arrays(input, other, bias)
    with np.errstate(all="ignore"):
        result = matmul.forward(left, right).sum(axis=tuple(sum_dims), keepdims=True)
        return _tensor(result if plus is None else result + plus, input, dtype)


def _per_element(grad: Any, shape: Sequence[int], reduction: str, batch_dims: int) -> Any:
    """Return the gradient of a reduced loss, as that of each element's loss."""
    if grad is None or reduction == "none":
        return grad
    grad = np.reshape(grad, np.shape(grad) + (1,) * (len(shape) - batch_dims))
    count = np.prod(shape[batch_dims:], dtype=np.int64) if reduction == "mean" else 1
    return np.broadcast_to(grad / max(count, 1), shape)


def _reduced(losses: Array, reduction: str, batch_dims: int) -> Array:
    if reduction == "none":
        return losses
    axes = tuple(range(batch_dims, losses.ndim))
    total = losses.sum(axis=axes)
    with np.errstate(all="ignore"):
        return total / np.prod(losses.shape[batch_dims:], dtype=np.int64) if reduction == "mean" else total


def mse_forward(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, batch_dims: int, dtype: torch.dtype
) -> Tensor:
    x, y, w = _arrays(input, target, weight)
    losses = mse.forward(x, y, w, "none")
    loss = _tensor(_reduced(losses, reduction, batch_dims), input, dtype)
    return _in_layout(_array(loss), input.to(dtype)) if reduction == "none" else loss


def mse_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    batch_dims: int,
    output_mask: list[bool],
) -> list[Tensor]:
    grad = _per_element(_array(grad_output), input.shape, reduction, batch_dims)
    x, y, w = _arrays(input, target, weight)
    grads = mse.backward(grad, x, y, w, "none")
    tensors = zip(grads, (input, target, weight), output_mask, strict=True)
    return [_in_layout(g, like) for g, like, need in tensors if need and g is not None and like is not None]


def mse_hvp(
    grad_output: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    d_grad: Tensor | None,
    d_input: Tensor | None,
    d_target: Tensor | None,
    d_weight: Tensor | None,
    reduction: str,
    batch_dims: int,
    output_mask: list[bool],
) -> list[Tensor]:
    """Differentiate the gradient along the direction by a complex step: no difference is taken that could cancel."""
    shape = tuple(input.shape)
    shapes = shape, shape, shape, shape if weight is None else tuple(weight.shape)

    def point(tensors: Sequence[Tensor | None]) -> list[Array]:
        grad, *rest = _arrays(*tensors)
        values = [_per_element(grad, shape, reduction, batch_dims), *rest]
        return [
            np.zeros(sizes) if value is None else value for value, sizes in zip(values, shapes, strict=True)
        ]

    at = point((grad_output, input, target, weight))
    along = point((d_grad, d_input, d_target, d_weight))
    if weight is None:
        at[3] = np.ones(shape)

    # Of a polynomial at a point with an imaginary step: the step times the derivative, and terms in the step's cube.
    step = 2.0**-300
    with np.errstate(all="ignore"):
        g, x, y, w = (value + 1j * step * direction for value, direction in zip(at, along, strict=True))
        gradient = mse.forward(x, y, w, "none"), *mse.backward(g, x, y, w, "none")
        results = [np.imag(value) / step for value in gradient if value is not None]
    first = input if grad_output is None else grad_output
    tangent = _reduced(results[0], reduction, batch_dims)
    likes = (input.to(first.dtype) if reduction == "none" else None, input, target, weight)
    return [
        _tensor(tangent, first) if like is None else _in_layout(tangent if i == 0 else results[i], like)
        for i, (like, need) in enumerate(zip(likes, output_mask, strict=True))
        if need
    ]


def mse_forward_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weight_sum: Tensor | None,
    reduction: str,
    output_mask: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    share = torch.ones((), dtype=torch.float64, device="cpu")
    share = share if weight_sum is None else share / weight_sum.cpu()
    loss = mse_forward(input.cpu(), target, weight, reduction, 0, torch.float64) * share
    gradients = mse_backward(share, input, target, weight, reduction, 0, output_mask)
    return [loss.to(input.device, dtype), *gradients]


def linear_mse_forward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
    output_mask: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Call the launcher of a batch of models with one."""
    x, w, y = (tensor.unsqueeze(0) for tensor in (input, weight, target))
    b, s = (None if tensor is None else tensor.unsqueeze(0) for tensor in (bias, sample_weight))
    results = linear_mse_models_forward(x, w, y, b, s, None, reduction, output_mask, dtype)
    return [result.squeeze(0) for result in results]


def linear_mse_backward(
    grad_output: Tensor, error: Tensor, weight: Tensor, factor: float, output_mask: list[bool]
) -> list[Tensor]:
    with np.errstate(all="ignore"):
        scaled = factor * _array(grad_output) * _array(error)
    results = ((matmul.forward(scaled, _array(weight)), weight), (-scaled, error))
    return [_tensor(value, like) for (value, like), need in zip(results, output_mask, strict=True) if need]


def linear_mse_fit_rounds(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    sample_weight: Tensor | None,
    offsets: Tensor | None,
    batch_size: int,
    losses: Tensor,
    update: Update,
) -> bool:
    x, y, s = _arrays(input, target, sample_weight)
    if s is not None:
        s = np.broadcast_to(s, (*s.shape[:2], y.shape[2]))
    params = [param for param in (weight, bias) if param is not None]
    grads = [torch.empty_like(param) for param in params]
    step = update.stepper(params, grads, update.states)
    for t in range(len(losses)):
        w, b = _arrays(weight, bias)
        for i in range(len(w)):
            rows = np.arange(t * batch_size, (t + 1) * batch_size) % x.shape[1]
            if offsets is not None:
                rows = np.arange(*offsets[i : i + 2].clamp(0, x.shape[1]).tolist())
            batch = x[i % len(x)][rows], w[i], y[i % len(y)][rows], None if b is None else b[i]
            weights = None if s is None else s[i % len(s)][rows]
            losses[t, i] = _tensor(linear_mse.forward(*batch, weights), losses)
            _, grad_weight, _, grad_bias, _ = linear_mse.backward(1.0, *batch, weights)
            for out, grad in zip(grads, (grad_weight, grad_bias), strict=False):
                # The mean of no elements is nan, and changes with nothing.
                out[i] = _tensor(np.asarray(grad), out) if len(rows) else 0
        step()
    return True


def linear_mse_models_forward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    sample_weight: Tensor | None,
    bounds: Tensor | None,
    reduction: str,
    output_mask: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    x, w, y, b, s = _arrays(input, weight, target, bias, sample_weight)
    B, K, D = w.shape
    acc = acc_dtype(input, weight, target, bias, sample_weight)
    likes = (weight.new_empty(B, dtype=dtype), torch.empty_like(target, dtype=dtype))
    outputs = [*likes, weight.new_empty((B, K, D), dtype=acc), weight.new_empty((B, K), dtype=acc)]
    loss, error, grad_weight, grad_bias = (np.zeros(tuple(output.shape)) for output in outputs)
    for model in range(B):
        at: Any = model if bounds is None else slice(*bounds[model].tolist())
        rows = x if x.ndim == 2 and bounds is None else x[at]
        operands = rows, w[model], y[at], np.zeros(K) if b is None else b[model], None if s is None else s[at]
        count = y[at].size if reduction == "mean" else 1
        with np.errstate(all="ignore"):
            loss[model] = linear_mse.forward(*operands, reduction="sum") / count
        _, grad_w, grad_y, grad_b, _ = linear_mse.backward(1.0, *operands, reduction="sum")
        assert grad_b is not None
        error[at] = -grad_y / 2  # half of what the sum's gradient takes from the target
        grad_weight[model], grad_bias[model] = grad_w / max(1, count), grad_b / max(1, count)
    values = zip((loss, error, grad_weight, grad_bias), outputs, [True, *output_mask], strict=True)
    return [_tensor(value, like) for value, like, need in values if need]


def linear_mse_models_product(rows: Tensor, models: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    left, right = _arrays(rows, models)
    result = np.zeros((len(left), right.shape[1]))
    for (start, end), model in zip(bounds.tolist(), right, strict=True):
        result[start:end] = matmul.forward(left[start:end], model.T)
    return _tensor(result, rows, dtype)


def linear_mse_models_outer(left: Tensor, right: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    a, b = _arrays(left, right)
    products = [matmul.forward(a[start:end].T, b[start:end]) for start, end in bounds.tolist()]
    shape = (len(bounds), a.shape[1], b.shape[1])
    return _tensor(np.array(products, dtype=np.float64).reshape(shape), left, dtype)


def grad_norm(bucket: Bucket, grad_scale: Tensor | None, out: Tensor) -> None:
    scale = 1.0 if grad_scale is None else float(grad_scale)
    with np.errstate(all="ignore"):
        out[0] = sum(float(((_array(grad) / scale) ** 2).sum()) for grad in bucket.grads)
    out[1] = sum(not np.isfinite(_array(grad)).all() for grad in bucket.grads)


def sgd_step(bucket: Bucket, options: Sequence[SGDOptions], guard: Guard) -> None:
    def update(param: Array, grad: Array, state: State, given: SGDOptions) -> tuple[Array, State]:
        first = "step" in state and state["step"] == 0
        buffer = {key: value for key, value in state.items() if key == "momentum_buffer" and not first}
        new, new_state = sgd.step(
            param,
            grad,
            buffer,
            lr=float(given.lr),
            momentum=float(given.momentum),
            dampening=given.dampening,
            weight_decay=float(given.weight_decay),
            nesterov=given.nesterov,
            maximize=given.maximize,
        )
        return new, {
            **state,
            **new_state,
            "step": state.get("step", np.zeros(())) + (float(given.momentum) != 0),
        }

    _step(bucket, options, guard, update)


def adam_step(bucket: Bucket, options: Sequence[AdamOptions], guard: Guard) -> None:
    def update(param: Array, grad: Array, state: State, given: AdamOptions) -> tuple[Array, State]:
        return adam.step(
            param,
            grad,
            state,
            lr=float(given.lr),
            betas=(float(given.beta1), float(given.beta2)),
            eps=given.eps,
            weight_decay=float(given.weight_decay),
            amsgrad="max_exp_avg_sq" in state,
            maximize=given.maximize,
            decoupled_weight_decay=given.decoupled,
        )

    _step(bucket, options, guard, update)


def _step(
    bucket: Bucket,
    options: Sequence[Any],
    guard: Guard,
    update: Callable[[Array, Array, State, Any], tuple[Array, State]],
) -> None:
    if bucket.seed is not None:
        raise RuntimeError("backend 'reference' has no stochastic rounding")
    squares, nonfinite = (0.0, 0.0) if guard.norms is None else _array(guard.norms).sum(axis=0)
    skip = guard.found_inf is not None and float(guard.found_inf) != 0
    skip |= guard.skip_nonfinite and bool(nonfinite != 0)
    if guard.skipped is not None:
        guard.skipped.add_(skip)
    if skip:
        return
    scale = 1.0 if guard.grad_scale is None else float(guard.grad_scale)
    # np.minimum keeps a NaN, as torch's clamp does; min would not.
    clip = 1.0 if guard.max_norm is None else np.minimum(1.0, guard.max_norm / (np.sqrt(squares) + 1e-6))
    for i, (param, grad) in enumerate(zip(bucket.params, bucket.grads, strict=True)):
        tensors = {key: values[i] for key, values in bucket.states.items()}
        master = tensors.pop("master_param", param)
        # A parameter may have been written since.
        start = torch.where(master.to(param.dtype) == param, master, param)
        state = {key: _array(tensor) for key, tensor in tensors.items()}
        with np.errstate(all="ignore"):
            unscaled = _array(grad) / scale
            new, new_state = update(_array(start), unscaled * clip, state, options[bucket.groups[i]])
        results = [(param, new), (master, new), *((tensors[key], new_state[key]) for key in tensors)]
        if guard.grad_scale is not None:
            results.append((grad, unscaled))
        for tensor, value in results:
            tensor.copy_(_tensor(value, tensor))


def stacked_grad_norm(bucket: Bucket, grad_scale: Tensor | None, models: Models, out: Tensor) -> None:
    for b in range(models.B):
        out[:, b] = out.new_tensor([np.nan, 0.0])
        if _is_active(models, b):
            grad_norm(_model(bucket, b), grad_scale, out[:, b])


def stacked_sgd_step(bucket: Bucket, options: Sequence[SGDOptions], guard: Guard, models: Models) -> None:
    _step_each_model(sgd_step, bucket, options, guard, models)


def stacked_adam_step(bucket: Bucket, options: Sequence[AdamOptions], guard: Guard, models: Models) -> None:
    _step_each_model(adam_step, bucket, options, guard, models)


def _step_each_model(
    step: Callable[[Bucket, Sequence[Any], Guard], None],
    bucket: Bucket,
    options: Sequence[Any],
    guard: Guard,
    models: Models,
) -> None:
    """Update one model after the other, by the step of plain parameters."""
    for b in range(models.B):
        if _is_active(models, b):
            norms = None if guard.norms is None else guard.norms[:, :, b]
            skipped = None if guard.skipped is None else guard.skipped[b : b + 1]
            own = [_options_of_model(each, models, b) for each in options]
            step(_model(bucket, b), own, guard._replace(norms=norms, skipped=skipped))


def _is_active(models: Models, b: int) -> bool:
    return models.active is None or bool(models.active[b])


def _model(bucket: Bucket, b: int) -> Bucket:
    """Return the bucket of one model: views into the stacks."""
    states = {key: [tensor[b] for tensor in tensors] for key, tensors in bucket.states.items()}
    params, grads = ([tensor[b] for tensor in tensors] for tensors in (bucket.params, bucket.grads))
    return Bucket(params, grads, states, bucket.groups, bucket.indices, bucket.seed)


def _options_of_model(options: Any, models: Models, b: int) -> Any:
    own = {
        name: value[b].item()
        for name, value in options._asdict().items()
        if isinstance(value, Tensor) and value.dim() > 0
    }
    chosen = options._replace(**own)
    return (
        chosen
        if models.lr_scale is None
        else chosen._replace(lr=float(chosen.lr) * models.lr_scale[b].item())
    )
