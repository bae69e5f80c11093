"""The training loop of linear models in plain torch: no autograd, and no new memory in a round."""

import torch
from torch import Tensor

from ..checks import cyclic
from ..optim.bucket import Update
from .matmul import ROWS, parts_of
from .threads import is_small, one_thread


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
    """Run ``len(losses)`` rounds of errors, losses, gradients and updates.

    The data are transposed once, so that the small products of a round run along contiguous rows of N numbers, and
    have a feature of ones, whose weight is the bias.

    Args:
        input: (B, N, D), or (1, N, D) for all models.
        weight: (B, K, D), and bias (B, K) or None: updated.
        target: (B, N, K), or (1, N, K) for all models.
        sample_weight: (B or 1, N, K or 1), or None.
        offsets: (B + 1,), where the rows of each model begin among all N, or None.
        batch_size: rows of a round, unless there are offsets.
        losses: (steps, B), written.
        update: what the optimizer does with the gradients.

    Returns:
        False, with nothing done, for 16-bit models and ragged rows.
    """
    if weight.dtype.itemsize == 2 or offsets is not None:
        return False
    B, K, _ = weight.shape
    N = input.shape[1]
    x = input.mT if bias is None else torch.cat([input.mT, input.new_ones(len(input), 1, N)], 1)
    x, minus_y = x.contiguous(), target.mT.neg().contiguous()
    s = None if sample_weight is None else sample_weight.mT.contiguous()
    params = [weight] if bias is None else [weight, bias]
    w, sums = (weight.new_empty(B, K, x.shape[1]) for _ in range(2))
    # The steps of small models cost what their calls cost: what is treated alike is one parameter.
    joined = update.one_rule()
    if joined:
        _join(params, w)
        state = {key: torch.empty_like(w) for key in update.states[0] if key != "step"}
        for key, value in state.items():
            _join([parts[key] for parts in update.states], value)
        if "step" in update.states[0]:
            state["step"] = update.states[0]["step"].clone()
        step = update.stepper([w], [sums], [state])
    else:
        grads = [torch.empty_like(param, memory_format=torch.contiguous_format) for param in params]
        step = update.stepper(params, grads, update.states)
    error, weighted, square = (weight.new_empty(B, K, batch_size) for _ in range(3))
    pieces = len(parts_of(batch_size))
    products = sums[None] if pieces == 1 else sums.new_empty(pieces, *sums.shape)
    with one_thread(is_small(error)):
        for t, loss in enumerate(losses):
            first = t * batch_size % N
            xs, ys = (cyclic(tensor, first, batch_size, 2) for tensor in (x, minus_y))
            if not joined:
                _join(params, w)
            _predict(w, xs, ys, error)
            share: float | Tensor = 1.0 / (batch_size * K)
            es = error
            if s is not None:
                ss = cyclic(s, first, batch_size, 2)
                total = ss.sum((1, 2)) * (K // ss.shape[1])
                share = (total != 0) / total  # 0 / 0 where the weights' sum is 0: nan
                es = torch.mul(error, ss, out=weighted)
            torch.sum(torch.mul(es, error, out=square).view(B, -1), 1, out=loss)
            loss.mul_(share)
            _contract(es, xs, products, sums)
            if bias is not None and batch_size >= ROWS:
                torch.sum(es, 2, out=sums[..., -1])
            sums.mul_(2.0 * share if isinstance(share, float) else (2.0 * share).view(-1, 1, 1))
            if not joined:
                _split(sums, grads)
            step()
    if joined:
        _split(w, params)
        for key, value in state.items():
            parts = [parts[key] for parts in update.states]
            if key == "step":
                torch._foreach_copy_(parts, [value] * len(parts))
            else:
                _split(value, parts)
    return True


def _join(parts: list[Tensor], whole: Tensor) -> None:
    """Write weights and, where there is one, the bias behind them."""
    for place, part in zip(_places(whole, parts), parts, strict=True):
        place.copy_(part)


def _split(whole: Tensor, parts: list[Tensor]) -> None:
    """Undo ``_join``."""
    for place, part in zip(_places(whole, parts), parts, strict=True):
        part.copy_(place)


def _places(whole: Tensor, parts: list[Tensor]) -> list[Tensor]:
    return [whole] if len(parts) == 1 else [whole[..., :-1], whole[..., -1]]


def _predict(w: Tensor, x: Tensor, minus_y: Tensor, error: Tensor) -> None:
    """Write ``error = w x - y``; all models may share x."""
    if len(x) == len(w):
        torch.baddbmm(minus_y.expand_as(error), w, x, out=error)
    else:
        torch.mm(w.flatten(0, 1), x[0], out=error.flatten(0, 1))
        error.add_(minus_y)


def _contract(error: Tensor, x: Tensor, products: Tensor, sums: Tensor) -> None:
    """Write ``sums = error x^T``; ``products`` holds those of the rows' parts, of which a single one is the sum."""
    for rows, product in zip(parts_of(x.shape[2]), products, strict=True):
        _product(error[..., rows], x[..., rows], product)
    if len(products) > 1:
        torch.sum(products, 0, out=sums)


def _product(error: Tensor, x: Tensor, sums: Tensor) -> None:
    if len(x) != len(sums):
        torch.mm(error.flatten(0, 1), x[0].mT, out=sums.flatten(0, 1))
    elif sums.shape[1] == 1:  # torch takes 0.8 of the other product's time
        torch.bmm(x, error.mT, out=sums.view(len(sums), -1, 1))
    else:
        torch.bmm(error, x.mT, out=sums)
