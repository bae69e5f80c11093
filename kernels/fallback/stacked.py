"""SGD and Adam over a batch of models in plain torch: each model by options, a step, a clip and a guard of its own.

A stack is seen as a matrix, a row per model, and is updated in batches of rows (of columns too, where one row is long)
that fit a cache. What has one value per model is a column beside them. Tensors of another dtype than the arithmetic's,
and rows that may not be written, are worked on in copies.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import acc_dtype
from ..optim.bucket import UNGUARDED, AdamOptions, Bucket, Guard, Models, SGDOptions
from . import fused
from .multi_tensor import batch_size, draw_words, is_native, stochastic_bfloat16, tensor_key
from .threads import is_small, one_thread

# torch's loops over a matrix and a column are slow where rows are shorter: the column of a large block is spread first.
SHORT = 64
LARGE = 1 << 14

Value = float | Tensor  # a number, or one per model
Options = SGDOptions | AdamOptions


class Decision(NamedTuple):
    """What guard and ``active`` say.

    Attributes:
        keep: (B,) bool, the models that make the step; None for all.
        scale: 0-d; gradients are divided by it, and written back so.
        clip: (B,), what gradients are multiplied by, or None.
    """

    keep: Tensor | None
    scale: Tensor | None
    clip: Tensor | None


GO = Decision(None, None, None)


class Block:
    """Rows and columns of the matrices, and memory for temporaries of that size, or the largest block's.

    On a CPU the memory is kept from step to step: fresh pages would cost more than the arithmetic.
    """

    def __init__(self, rows: slice, columns: slice, memory: list[Tensor], largest: int, models: int) -> None:
        self.rows, self.columns, self._memory, self._largest = rows, columns, memory, largest
        self.shape = (rows.stop - rows.start, columns.stop - columns.start)
        self._has_all_models = self.shape[0] == models
        self._spreads = self.shape[1] < SHORT and self.shape[0] * self.shape[1] >= LARGE
        self._views: list[Tensor] = []
        self._used = 0

    def of(self, matrix: Tensor) -> Tensor:
        return matrix[self.rows, self.columns]

    def empty(self, like: Tensor) -> Tensor:
        """Return a temporary of the block's shape, whose memory the next block uses again."""
        place = self._used
        self._used += 1
        if place == len(self._views):
            size = self.shape[0] * self.shape[1]
            if place == len(self._memory):
                self._memory.append(torch.empty(self._largest, dtype=like.dtype, device=like.device))
            self._views.append(self._memory[place][:size].view(self.shape))
        return self._views[place]

    def empty_row(self, like: Tensor) -> Tensor:
        """Return a temporary with one value per model."""
        return self.empty(like).flatten()[: self.shape[0]]

    def begin(self) -> None:
        """Let all temporaries go."""
        self._used = 0

    def row(self, value: Any) -> Any:
        """Return a number as it is; of one value per model those of the block's models."""
        if isinstance(value, float) or value.dim() == 0 or self._has_all_models:
            return value
        return value[self.rows]

    def column(self, values: Any) -> Any:
        """Shape what ``row`` gave, or what was made of it, to stand beside the block."""
        if isinstance(values, float) or values.dim() == 0:
            return values
        column = values.unsqueeze(1)
        if not self._spreads or not column.is_cpu:
            return column
        return self.empty(values).copy_(column.expand(self.shape))


Rule = Callable[[Tensor, Tensor, dict[str, Tensor], Block], None]


def stacked_grad_norm(bucket: Bucket, grad_scale: Tensor | None, models: Models, out: Tensor) -> None:
    """Write each model's sum of squares of the unscaled gradients, and the number of its non-finite tensors.

    Args:
        bucket: its ``grads`` are read.
        grad_scale: 0-d float32, or None for 1.
        models: how many, and which are active; the others get nan and 0.
        out: (2, B), overwritten.
    """
    out.zero_()
    for i, grad in enumerate(bucket.grads):
        with one_thread(is_small(grad)):
            matrix = _matrix(grad, models.B)
            bad = torch.zeros(models.B, dtype=torch.bool, device=out.device)
            for block in _blocks(bucket, i, models.B):
                wide = block.of(matrix).to(out.dtype)
                if grad_scale is not None:
                    wide = wide / grad_scale
                out[0, block.rows] += wide.square().sum(1)
                bad[block.rows] |= ~wide.isfinite().all(1)
            out[1] += bad
    if models.active is not None:
        out[0].masked_fill_(~models.active, math.nan)
        out[1].masked_fill_(~models.active, 0)


def stacked_sgd_step(bucket: Bucket, options: Sequence[SGDOptions], guard: Guard, models: Models) -> None:
    """Update every parameter of ``bucket`` in place, its states and steps with it.

    Args:
        bucket: states, all optional: ``momentum_buffer``, ``step``, ``master_param``.
        options: of each group, by the index that ``bucket.groups`` holds.
        guard: scale, clipping and whether to skip.
        models: how many, which are active, and the factors of their rates.
    """
    decision = _decide(guard, models)
    if decision is None:
        return
    for i, group in enumerate(bucket.groups):
        given, momentum = options[group], options[group].momentum
        rate = _rate(given.lr, models, bucket.params[i].dtype)
        if decision is GO and _takes_fused(bucket, i, given, rate):
            _fused_update(bucket, i, models, rate, given, fused.sgd)
            continue
        # A step without momentum leaves the first one with it to come; random numbers go by all steps.
        counted = momentum != 0 if isinstance(momentum, Tensor) and bucket.seed is None else None
        _update(bucket, i, decision, models, _sgd_rule(bucket, i, given, models), counted)


def stacked_adam_step(bucket: Bucket, options: Sequence[AdamOptions], guard: Guard, models: Models) -> None:
    """Update every parameter of ``bucket`` in place, its states and steps with it.

    Args:
        bucket: states ``exp_avg``, ``exp_avg_sq``, ``step``, perhaps ``max_exp_avg_sq`` and ``master_param``.
        options: of each group, by the index that ``bucket.groups`` holds.
        guard: scale, clipping and whether to skip.
        models: how many, which are active, and the factors of their rates.
    """
    decision = _decide(guard, models)
    if decision is None:
        return
    for i, group in enumerate(bucket.groups):
        given = options[group]
        rate = _rate(given.lr, models, bucket.params[i].dtype)
        if decision is GO and _takes_fused(bucket, i, given, rate):
            _fused_update(bucket, i, models, rate, given, fused.adam)
        else:
            _update(bucket, i, decision, models, _adam_rule(bucket, i, given, models))


def _decide(guard: Guard, models: Models) -> Decision | None:
    """Read the guard, and count the skipped steps; None if no model makes the step, where that costs no wait."""
    if guard is UNGUARDED and models.active is None:
        return GO
    skip, clip, keep = None, None, models.active
    if guard.found_inf is not None:
        skip = (guard.found_inf != 0).expand(models.B)
    if guard.norms is not None:
        squares, nonfinite = guard.norms.sum(0)
        if guard.skip_nonfinite:
            skip = nonfinite != 0 if skip is None else skip | (nonfinite != 0)
        if guard.max_norm is not None:
            clip = (guard.max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)  # NaN stays
    if skip is not None:
        skipped = skip if keep is None else skip & keep
        if guard.skipped is not None:
            guard.skipped.add_(skipped)
        keep = ~skip if keep is None else keep & ~skip
    if keep is not None and keep.is_cpu:
        if keep.all():
            keep = None
        elif not keep.any():
            return None
    if clip is not None and clip.is_cpu and (clip == 1).all():
        clip = None
    return Decision(keep, guard.grad_scale, clip)


def _matrix(tensor: Tensor, models: int) -> Tensor:
    """View the tensor's memory as a row per model; it has no holes, and the models are its outermost dimension."""
    if tensor.dim() == 2 and tensor.is_contiguous():
        return tensor
    width = tensor.numel() // max(1, models)
    return tensor.as_strided((models, width), (width, 1))


def _blocks(bucket: Bucket, i: int, models: int) -> list[Block]:
    """Return the blocks of one entry, the largest first; on a CPU all entries share their temporaries by size.

    On a device each step makes its own: the allocator there has memory at hand, and lends it to others meanwhile.
    """
    param = bucket.params[i] if bucket.params else bucket.grads[i]
    known: list[Block] | None = bucket.memory.get(f"blocks {i}")
    if known is None:
        columns = param.numel() // max(1, models)
        most = batch_size(param.device, acc_dtype(param))
        wide = max(1, min(columns, most))
        high = max(1, most // wide)
        largest = min(high, models) * min(wide, columns)
        kept = bucket.memory if param.is_cpu else {}
        memory = kept.setdefault("temporaries", {}).setdefault(largest, [])
        rows = [slice(top, min(top + high, models)) for top in range(0, models, high)]
        pieces = [slice(left, min(left + wide, columns)) for left in range(0, columns, wide)]
        known = kept[f"blocks {i}"] = [
            Block(row, piece, memory, largest, models) for row in rows for piece in pieces
        ]
    return known


def _update(
    bucket: Bucket, i: int, decision: Decision, models: Models, rule: Rule, counted: Tensor | None = None
) -> None:
    """Update one entry; ``counted``: (B,) bool, the models whose step rises; None for all that make it."""
    param = bucket.params[i]
    with one_thread(is_small(param)):
        matrices = {key: _matrix(t[i], models.B) for key, t in bucket.states.items() if key != "step"}
        matrices = {"param": _matrix(param, models.B), **matrices}
        grad = _matrix(bucket.grads[i], models.B)
        step = bucket.states["step"][i] if "step" in bucket.states else None
        for block in _blocks(bucket, i, models.B):
            block.begin()
            _update_block(bucket, i, decision, rule, block, grad, matrices, step)
        if step is not None:
            keep = decision.keep
            if counted is not None:
                keep = counted if keep is None else keep & counted
            step += 1 if keep is None else keep


def _update_block(
    bucket: Bucket,
    i: int,
    decision: Decision,
    rule: Rule,
    block: Block,
    grad: Tensor,
    matrices: dict[str, Tensor],
    step: Tensor | None,
) -> None:
    dtype = acc_dtype(bucket.params[i])
    keep = None if decision.keep is None else decision.keep[block.rows].unsqueeze(1)
    narrow = {key: block.of(matrix) for key, matrix in matrices.items()}
    place = block.of(grad)
    g = place.to(dtype)
    if decision.scale is not None:
        g = g / decision.scale
        place.copy_(g if keep is None else torch.where(keep, g.to(place.dtype), place))
    if decision.clip is not None:
        g = g * block.column(block.row(decision.clip).to(dtype))

    # Whatever may not be written as it comes is computed in a copy.
    work = {key: value.to(dtype, copy=keep is not None) for key, value in narrow.items()}
    p = work.pop("param")
    if "master_param" in work:
        followed = narrow["master_param"].to(narrow["param"].dtype) == narrow["param"]
        p = torch.where(followed, work.pop("master_param"), p)
    rule(p, g, work, block)

    results = {"param": p, **work}
    if "master_param" in narrow:
        results["master_param"] = p
    words = _draws(bucket, i, block, grad, step) if bucket.seed is not None else []
    for (key, value), out in zip(results.items(), (narrow[key] for key in results), strict=True):
        if value is out:
            continue
        if words and key != "master_param":
            value = stochastic_bfloat16(value.contiguous(), words.pop(0))
        value = value.to(out.dtype)
        out.copy_(value if keep is None else torch.where(keep, value, out))


def _draws(bucket: Bucket, i: int, block: Block, grad: Tensor, step: Tensor | None) -> list[Tensor]:
    """Draw random bits for the block's elements, by their places in memory and the updates of their model."""
    assert step is not None
    assert bucket.seed is not None
    rows, columns = (torch.arange(s.start, s.stop, device=grad.device) for s in (block.rows, block.columns))
    place = rows.unsqueeze(1) * grad.shape[1] + columns
    return draw_words(place, tensor_key(bucket.seed, bucket.indices[i], step[block.rows].unsqueeze(1)))


def _takes_fused(bucket: Bucket, i: int, options: Options, rate: Value) -> bool:
    """Return whether torch's fused kernel can do all but multiply by the models' rates."""
    param = bucket.params[i]
    others = options._replace(lr=0.0)
    if not (is_native(bucket) and param.is_cpu) or any(isinstance(x, Tensor) and x.dim() > 0 for x in others):
        return False
    wide, decays = param.dtype == acc_dtype(param), float(options.weight_decay) != 0
    if isinstance(options, AdamOptions):
        step = bucket.states["step"][i]
        fits, decays = bool((step == step[:1]).all()), decays and not options.decoupled
    else:  # without momentum one addition does
        fits = (
            wide
            and "momentum_buffer" in bucket.states
            and float(options.momentum) != 0
            and not options.dampening
        )
    # What is left to do after that kernel would be done in 16 bits: rates and moves would be rounded.
    return fits and (isinstance(rate, float) or (wide and not decays))


def _fused_update(
    bucket: Bucket, i: int, models: Models, rate: Value, options: Options, update: Callable[..., None]
) -> None:
    """Update one entry by torch's fused kernel.

    Where models have rates of their own, it makes the update at rate 1 from a parameter of zeros, which has no decay,
    and the rates multiply the result.
    """
    param = bucket.params[i]
    known = bucket.memory.get(f"fused {i}")
    if known is None:
        count = torch.zeros((), dtype=torch.float32, device=param.device)
        matrices = {key: _matrix(t[i], models.B) for key, t in bucket.states.items() if key != "step"}
        blocks = _blocks(bucket, i, models.B)
        starts = [block.of(_matrix(param, models.B)) for block in blocks]
        views = [{key: [block.of(state)] for key, state in matrices.items()} for block in blocks]
        places = [view | {"step": [count]} for view in views]
        known = bucket.memory[f"fused {i}"] = list(zip(blocks, starts, places, strict=True)), count
    parts, count = known
    grad, decay = _matrix(bucket.grads[i], models.B), float(options.weight_decay)
    alone = isinstance(rate, float)
    options = options._replace(lr=rate if alone else 1.0)
    step = bucket.states["step"][i]
    with one_thread(is_small(param)):
        torch.add(step[0], 1, out=count)
        for block, p, states in parts:
            block.begin()
            moved = p if alone else block.empty(p).zero_()
            update(options, [moved], [grad if len(parts) == 1 else block.of(grad)], states)
            if not alone:
                column = block.column(block.row(rate))
                if decay != 0:
                    p.mul_(1 - column * decay)
                p.addcmul_(moved, column)
        step += 1


def _number(value: Any, dtype: torch.dtype) -> Value:
    """Return an option as a float; as a tensor of ``dtype`` if it is one per model, or if only the device knows it."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.dim() == 0 and value.is_cpu:
        return float(value)
    return value.to(dtype)


def _rate(lr: Any, models: Models, dtype: torch.dtype) -> Value:
    rate = _number(lr, dtype)
    return rate if models.lr_scale is None else models.lr_scale.to(dtype) * rate


def _add_scaled(block: Block, tensor: Tensor, other: Tensor, factor: Any) -> Tensor:
    """Return ``tensor + factor * other``, in another tensor unless the factor is 0."""
    if isinstance(factor, float):
        return torch.add(tensor, other, alpha=factor, out=block.empty(tensor)) if factor != 0 else tensor
    return torch.addcmul(tensor, other, factor, out=block.empty(tensor))


def _sgd_rule(bucket: Bucket, i: int, options: SGDOptions, models: Models) -> Rule:
    dtype = acc_dtype(bucket.params[i])
    lr = _rate(options.lr, models, dtype)
    decay, momentum = _number(options.weight_decay, dtype), _number(options.momentum, dtype)
    share = 1 - float(options.dampening)
    fresh = bucket.states["step"][i] == 0 if "momentum_buffer" in bucket.states and share != 1 else None

    def rule(p: Tensor, g: Tensor, states: dict[str, Tensor], block: Block) -> None:
        g = torch.neg(g, out=block.empty(g)) if options.maximize else g
        g = _add_scaled(block, g, p, block.column(block.row(decay)))
        if "momentum_buffer" in states:
            buffer, mu = states["momentum_buffer"], block.column(block.row(momentum))
            new = torch.mul(buffer, mu, out=block.empty(g)).add_(g, alpha=share)
            if fresh is not None:
                new = torch.where(fresh[block.rows].unsqueeze(1), g, new)
            ahead = _add_scaled(block, g, new, mu) if options.nesterov else new
            if isinstance(mu, Tensor):  # a model without momentum leaves its buffer as it is
                buffer.copy_(torch.where(mu == 0, buffer, new))
                g = torch.where(mu == 0, g, ahead)
            else:
                buffer.copy_(new)
                g = ahead
        rate = block.column(block.row(lr))
        if isinstance(rate, float):
            p.add_(g, alpha=-rate)
        else:
            p.addcmul_(g, rate, value=-1)

    return rule


def _adam_rule(bucket: Bucket, i: int, options: AdamOptions, models: Models) -> Rule:
    dtype = acc_dtype(bucket.params[i])
    lr = _rate(options.lr, models, dtype)
    decay = _number(options.weight_decay, dtype)
    beta1, beta2 = (  # 1 - beta is rounded to dtype, beta before it is not
        _number(beta, torch.promote_types(beta.dtype, dtype) if isinstance(beta, Tensor) else dtype)
        for beta in (options.beta1, options.beta2)
    )
    less1, less2, kept2 = (_number(value, dtype) for value in (1 - beta1, 1 - beta2, beta2))
    step = bucket.states["step"][i]

    def rule(p: Tensor, g: Tensor, states: dict[str, Tensor], block: Block) -> None:
        m, v = states["exp_avg"], states["exp_avg_sq"]
        rate, shrink, b1, b2 = map(block.row, (lr, decay, beta1, beta2))
        steps = block.row(step)
        least = 0.0
        if steps.is_cpu and len(steps) > 0:
            low, high = steps.aminmax()
            least = low.item()
            steps = low if low == high else steps
        inverses = _inverse_corrections(block, p, steps, least, b1, b2)
        g = torch.neg(g, out=block.empty(g)) if options.maximize else g
        if not options.decoupled:
            g = _add_scaled(block, g, p, block.column(shrink))
        elif not isinstance(shrink, float) or shrink != 0:
            p.mul_(block.column(1 - rate * shrink))
        m.lerp_(g, block.column(block.row(less1)))
        fresh = block.column(block.row(less2))
        if isinstance(fresh, float):
            v.mul_(b2).addcmul_(g, g, value=fresh)
        else:
            v.mul_(block.column(block.row(kept2))).addcmul_(torch.mul(g, g, out=block.empty(g)), fresh)
        largest = v
        if "max_exp_avg_sq" in states:
            largest = torch.maximum(states["max_exp_avg_sq"], v, out=states["max_exp_avg_sq"])
        _descend(block, p, m, largest, rate, *inverses, options.eps)

    return rule


def _descend(
    block: Block, p: Tensor, m: Tensor, v: Tensor, rate: Value, inverse1: Value, inverse2: Value, eps: float
) -> None:
    """Update ``p -= rate inverse1 m / (sqrt(v inverse2) + eps)``; two values per model are each spread once."""
    root = inverse2.rsqrt_() if isinstance(inverse2, Tensor) else inverse2**-0.5
    move = torch.sqrt(v, out=block.empty(v)).add_(block.column(_product(block, root, float(eps))))
    torch.div(m, move, out=move)
    size = block.column(_product(block, _product(block, rate, root), inverse1))
    if isinstance(size, float):
        p.add_(move, alpha=-size)
    else:
        p.addcmul_(move, size, value=-1)


def _product(block: Block, a: Value, b: Value) -> Value:
    """Multiply: numbers give a number, others a temporary, since fresh pages would cost more than the product."""
    if isinstance(a, float) and isinstance(b, float):
        return a * b
    like = a if isinstance(a, Tensor) else b
    assert isinstance(like, Tensor)
    return torch.mul(a, b, out=block.empty_row(like))


def _inverse_corrections(
    block: Block, p: Tensor, made: Tensor, least: float, beta1: Value, beta2: Value
) -> tuple[Value, Value]:
    """Return ``1 / (1 - beta^(made + 1))`` of both betas, a number where all models have the same.

    Args:
        p: of the temporaries' dtype.
        made: how many steps each model has made, or 0-d on a CPU.
        least: none is smaller.
    """
    steps = made + 1 if made.dim() == 0 else torch.add(made, 1, out=block.empty_row(p))

    def inverse(beta: Value) -> Value:
        if isinstance(beta, float):
            if steps.dim() == 0:
                return 1 / (1 - beta ** int(steps))
            if beta ** (least + 1) < torch.finfo(p.dtype).eps / 4:
                return 1.0
        rate = torch.log1p(beta - 1) if isinstance(beta, Tensor) else math.log1p(beta - 1)
        half = torch.mul(steps, -0.5 * rate, out=block.empty_row(p)).tanh_()
        # 1 / (1 - exp(-2 x)) is (1 + 1 / tanh(x)) / 2, and expm1 takes three times as long.
        return half.reciprocal_().add_(1).mul_(0.5)

    return inverse(beta1), inverse(beta2)
