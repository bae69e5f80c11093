"""``python -m tests.mutants`` (``make mutants``): plant one fault at a time in ``kernels/`` and see a test fail.

Each mutant replaces a text that occurs once in ``kernels/`` and names the tests that must notice. They run on a copy of
the checkout. A mutant is killed if a test fails, survives if all pass, and is broken if its text is gone (the list must
follow the code) or the tests did not run. Exit status 0 if at least 95 % are killed and none is broken. Over 500 lines,
since it is a list.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .gpu import in_order

ROOT = Path(__file__).parents[1]
GOAL = 0.95
LIMIT = 600  # seconds for the tests of one mutant

# What the lists of tests are called below.
TESTS = {
    "matmul": "tests/ops/test_matmul_kernels.py tests/ops/test_matmul.py",
    "mse": "tests/ops/test_mse_kernels.py tests/ops/test_mse.py",
    "trainers": "tests/ops/test_mse_trainers.py -k triton",
    "linear_mse": "tests/ops/test_linear_mse_kernels.py tests/ops/test_linear_mse.py",
    "models": "tests/ops/test_linear_mse_models.py",
    "fit": "tests/ops/test_linear_mse_fit_models.py tests/ops/test_linear_mse_fit.py",
    "derivatives": "tests/ops/test_corners.py tests/ops/test_derivatives.py tests/ops/test_transforms.py -k fallback",
    "saved": "tests/ops/test_saved_tensors.py",
    "autocast": (
        "tests/ops/test_autocast.py tests/ops/test_corners.py "
        "tests/ops/test_mse_trainers.py::test_under_autocast_16_bits_count_as_float32"
    ),
    "errors": (
        "tests/ops/test_mse.py tests/ops/test_linear_mse.py tests/ops/test_matmul.py tests/ops/test_corners.py "
        "-k errors"
    ),
    "corners": "tests/ops/test_corners.py tests/launch/test_backends.py tests/ops/test_nn.py",
    "layouts": "tests/ops/test_layouts.py tests/ops/test_zero_sizes.py",
    "work": "tests/ops/test_our_kernels_do_the_work.py",
    "reference": "tests/ops/test_reference.py tests/optim/test_reference.py",
    "launch": "tests/launch tests/host/test_launches.py",
    "config": (
        "tests/launch/test_config.py tests/launch/test_explain.py tests/launch/test_same_bits.py "
        "tests/ops/test_matmul_kernels.py"
    ),
    "optim": (
        "tests/optim/test_contract.py tests/optim/test_groups.py tests/optim/test_layouts.py "
        "tests/optim/test_rare_tensors.py tests/optim/test_options.py tests/optim/test_batches.py "
        "tests/optim/test_adam.py tests/optim/test_graphs.py"
    ),
    "distributed": "tests/optim/test_distributed.py",
    "sgd": "tests/optim/test_sgd.py",
    "stacked": "tests/optim/test_stacked_contract.py tests/optim/test_stacked.py",
    "training": (
        "tests/optim/test_amp.py tests/optim/test_clipping.py tests/optim/test_low_precision.py "
        "tests/optim/test_contract.py tests/optim/test_groups.py tests/optim/test_layouts.py "
        "tests/optim/test_rare_tensors.py tests/optim/test_compile.py"
    ),
    "gradient": "tests/verify/test_gradient.py tests/verify/test_diagnosis.py",
    "memory": "tests/verify/test_memory.py",
    "verify": "tests/verify/test_ops.py tests/verify/test_tolerance.py",
}


class Mutant(NamedTuple):
    """A fault: ``old``, which occurs once in ``kernels/`` (in ``where``, if that is given), becomes ``new``.

    Attributes:
        tests: which of TESTS must notice.
        survives: why no test can, where none can; then none runs.
    """

    old: str
    new: str
    tests: str
    where: str = ""
    survives: str = ""


MUTANTS = (
    # The way of a call.
    Mutant("if is_wrapped(arg) or is_zerotensor(arg) or arg.is_neg():", "if is_wrapped(arg):", "corners"),
    Mutant(
        "if grad_outputs[0] is None and all(grad is None for grad in grad_outputs):",
        "if False:",
        "corners",
    ),
    Mutant(
        "outputs = tuple(outputs)\n            ctx.backend = backends.current()",
        'outputs = tuple(outputs)\n            ctx.backend = "auto"',
        "corners",
    ),
    Mutant("first = len(outputs) - sum(output_mask)", "first = 0", "derivatives", "operator.py"),
    Mutant("_open_blocks.set(blocks[:i] + blocks[i + 1 :])", "_open_blocks.set(blocks[:i])", "corners"),
    Mutant(
        "if not isinstance(triton.language.sum, triton.runtime.JITFunction):\n        return 4",
        "return 4",
        "launch",
        survives="how many programs share the tiles of a TMA product: a matter of time",
    ),
    Mutant("if tensor.device != device:", "if False:", "errors"),
    Mutant(
        "if autocast_enabled(tensor):\n        return acc_dtype",
        "if False:\n        return acc_dtype",
        "autocast",
    ),
    Mutant("return tensor.dtype if tensor.dtype == torch.float64 else", "return", "autocast"),
    Mutant("return [name in names and tensor is not None for", "return [name in names for", "linear_mse"),
    # The fused loss: its derivatives.
    Mutant("needed = (input or target, weight, bias)", "needed = (input, weight, bias)", "derivatives"),
    Mutant(
        "return needed[4] or any(cotangent is not None for cotangent in others)",
        "return needed[4]",
        "derivatives",
    ),
    Mutant(
        "R = scaled(error, share, bounds, wide, R)",
        "R = scaled(error, share, bounds, wide)",
        "models",
    ),
    Mutant(
        "grad_input = rows_back(beside_slopes(error), d_grad_weight, like_input, bounds, grad_input)",
        "grad_input = rows_back(beside_slopes(error), d_grad_weight, like_input, bounds)",
        "derivatives",
    ),
    Mutant(
        "scale = (factor * grad_output.to(acc))",
        "scale = (factor * grad_output.detach().to(acc))",
        "derivatives",
    ),
    Mutant(
        'return 2.0 / max(1, math.prod(shape)) if reduction == "mean" else 2.0',
        'return 2.0 / (1 + math.prod(shape)) if reduction == "mean" else 2.0',
        "linear_mse",
    ),
    Mutant(
        "return _backward_formula(grad_output.expand(size), error",
        "return _backward_formula(grad_output, error",
        "derivatives",
    ),
    Mutant(
        "ctx.save_for_backward(input if needs_other else None, other if needs_input else None)",
        "ctx.save_for_backward(input, other)",
        "saved",
    ),
    Mutant("weight if everything or output_mask[0] else None", "weight", "saved"),
    Mutant("d_bias + (each * grad_bias)", "(each * grad_bias)", "saved"),
    # Launching.
    Mutant(
        "run = compiled.run  # loads the module, before which `function` is None",
        "run = lambda *given: compiled.run(*given)",
        "launch",
    ),
    Mutant("key = (device.index, *key_of(*args)", "key = (0, *key_of(*args)", "launch"),
    Mutant('terms.append(f"{name}.data_ptr() % 16 == 0")', "pass", "launch"),
    Mutant('terms.append(f"{name} % 16 == 0")', "pass", "launch"),
    Mutant(
        "return 0 if -(2**31) <= value < 2**31 else 1",
        "return 0 if -(2**31) <= value < 2**32 else 1",
        "launch",
    ),
    Mutant("({name}.data_ptr() or -0.5) % 16, {name}.device", "{name}.device", "launch", "repeat.py"),
    Mutant("{name}.shape, {name}.stride(), {place}", "{name}.shape, {place}", "launch", "repeat.py"),
    Mutant("MAX_KEYS = 512", "MAX_KEYS = 10**9", "launch", "repeat.py"),
    Mutant('return f"{name}_ptr + {offset}" if offset else', "return", "launch", "replay.py"),
    Mutant(
        "return 256 if itemsize == 2 and wide >= WIDE_TILES and", "return 256 if itemsize == 2 or", "config"
    ),
    Mutant("terms = [str(next(_numbers))]", 'terms = ["0"]', "launch"),
    Mutant(
        "if device.index is None or device.index == driver", "if True or device.index == driver", "launch"
    ),
    # Layouts.
    Mutant("if inner[0] == 1:\n        return outer", "if inner[0] == 0:\n        return outer", "layouts"),
    Mutant("return outer[0] * inner[0], *inner[1:]", "return outer[0] * inner[0], *outer[1:]", "layouts"),
    Mutant("key=lambda d: -dense[d])", "key=lambda d: dense[d])", "mse"),
    Mutant("swapped = not swapped\n            continue", "continue", "matmul"),
    Mutant(
        "summed = [dim._replace(bias=0) for",
        "summed = [dim for",
        "matmul",
        survives="the bias has stride 0 there",
    ),
    # Decisions.
    Mutant(
        '(batches != 1 or sums != 1, "it serves single matrices")',
        '(batches != 1, "it serves single matrices")',
        "config",
    ),
    Mutant("tiles < LARGE_TILES", "tiles < LARGE_TILES // 2", "config"),
    Mutant(
        "return max(1, min(FULL_GRID // max(tiles, 1)",
        "return max(1, min(FULL_GRID // max(tiles, 1) + 1",
        "config",
    ),
    Mutant(
        'return {"maxnreg": most} if target.backend == "cuda" else {}', 'return {"maxnreg": most}', "config"
    ),
    Mutant("return 64 if str(target.arch).startswith", "return 32 if str(target.arch).startswith", "config"),
    Mutant('return "tf32x3" if target.backend == "cuda" else "bf16x6"', 'return "tf32"', "config"),
    # Kernels.
    Mutant("rows = tl.minimum(m_tiles - group * GROUP_M, GROUP_M)", "rows = GROUP_M", "matmul"),
    Mutant(
        "inside = (rows < P)[:, None] & mask[None, :]",
        "inside = mask[None, :] & (rows >= 0)[:, None]",
        "linear_mse",
    ),
    Mutant("error = tl.where(inside, error, 0.0)", "error = error", "models"),
    Mutant(
        "weighted = error * scale.to(ACC)\n            losses",
        "weighted = error\n            losses",
        "linear_mse",
    ),
    Mutant(
        "losses = tl.fma(error, weighted, losses)",
        "losses = tl.fma(weighted, weighted, losses)",
        "linear_mse",
        "triton/linear_mse.py",
    ),
    Mutant(
        "if TRANSPOSED:\n                right = b.load([tile_n * BLOCK_N, k])",
        "if False:\n                right = b.load([tile_n * BLOCK_N, k])",
        "linear_mse",
    ),
    Mutant("grad = products * (tl.load(g_ptr).to(ACC) * factor)", "grad = products * factor", "linear_mse"),
    Mutant("first_k = step % work.k_steps * step_size", "first_k = step * step_size", "matmul"),
    Mutant(
        "output_ptr += (split.to(tl.int64) * work.batches + matrix)",
        "output_ptr += (split.to(tl.int64) + matrix)",
        "matmul",
    ),
    Mutant(
        "input_ptr += _offset(matrix, batch, INPUT)", "input_ptr += _offset(matrix, batch, OTHER)", "matmul"
    ),
    Mutant(
        "descriptors = aligned and output_vector > 1 and wide", "descriptors = aligned and wide", "matmul"
    ),
    Mutant("right = ([n.size, k.size], [n.other, 1]", "right = ([n.size, k.size], [k.size, 1]", "matmul"),
    Mutant("list(matrix.stride()), block)", "[matrix.shape[1], 1], block)", "linear_mse"),
    Mutant("cols = (tl.zeros((), tl.int64) + col_tile) * COLS", "cols = col_tile * COLS", "mse"),
    # mse_loss as trainers write it.
    Mutant("_row_offset(row, sizes, x.strides, 1)", "_row_offset(row * 0, sizes, x.strides, 1)", "trainers"),
    Mutant("else weight.expand(input.shape)", "else weight.expand(input.shape).flip(0)", "trainers"),
    Mutant(
        'return math.prod(shape[batch_dims:]) if reduction == "mean" else 1',
        'return math.prod(shape) if reduction == "mean" else 1',
        "trainers",
    ),
    Mutant(
        "if input.numel() == 0\n        else tensor.new_empty(",
        "if input.numel() == 0\n        else input.new_empty(",
        "trainers",
    ),
    Mutant("tiles = rows * tiles_of(n, COLS)", "tiles = tiles_of(n, COLS)", "trainers"),
    Mutant("if own == size != 1]", "if own == size != 1][:1]", "trainers"),
    Mutant("weight.new_empty(weight.shape, dtype=acc)", "weight.new_empty(weight.shape)", "trainers"),
    Mutant("sums.new_empty((P, sums.numel()), dtype=acc)", "sums.new_empty((P, sums.numel()))", "trainers"),
    Mutant("return torch.where(total == 0, math.nan, total)", "return total", "trainers"),
    Mutant("return wide, torch.where(mean == 0, math.nan, mean)", "return wide, mean", "trainers"),
    Mutant(
        "slope = (slope - (slope * scaled).sum() / weight.numel()) / mean", "slope = slope / mean", "trainers"
    ),
    Mutant("sums * share, total * share", "sums, total", "mse"),
    # The optimizers' kernels.
    Mutant(
        'bad = bad | (tl.abs(g) < float("inf")).to(tl.int32) ^ 1\n        else',
        "pass\n        else",
        "training",
    ),
    Mutant(
        "arrived == tl.maximum(tl.cdiv(numel, tl.load(row + CHUNKS) * CHUNK), 1) - 1",
        "arrived == tl.cdiv(numel, tl.load(row + CHUNKS) * CHUNK) - 1",
        "optim",
    ),
    Mutant("((self._addresses | addresses) & 15) == 0", "(self._addresses & 15) == 0", "optim launch"),
    Mutant("return tl.where(max_norm < 0, 1.0, clip)", "return clip", "training fit"),
    # stacked models: another one's step, a skipped one counted, an inactive one's moments, another one's norm
    Mutant(
        "steps = tl.load(steps_ptr, mask=inside", "steps = tl.load(steps_ptr - models, mask=inside", "stacked"
    ),
    Mutant(
        "tl.store(steps_ptr, steps + 1, mask=go)", "tl.store(steps_ptr, steps + 1, mask=inside)", "stacked"
    ),
    Mutant(
        "offs, mask = places_of(models, go, start, n, COLUMNS)\n        update_adam(",
        "offs, mask = places_of(models, go | True, start, n, COLUMNS)\n        update_adam(",
        "stacked",
    ),
    Mutant(
        "at = guard.norms + 2 * part * B.to(tl.int64) + models",
        "at = guard.norms + 2 * part * B.to(tl.int64) + (B - 1 - models)",
        "stacked",
    ),
    Mutant(
        "torch.add(made, 1, out=block.empty_row(p))",
        "torch.add(made.flip(0), 1, out=block.empty_row(p))",
        "stacked",
    ),
    Mutant("step += 1 if keep is None else keep", "step += 1", "stacked"),
    Mutant("counted = go if STOCHASTIC else go & (momentum != 0)", "counted = go", "stacked"),
    Mutant(
        "out.copy_(value if keep is None else torch.where(keep, value, out))", "out.copy_(value)", "stacked"
    ),
    Mutant(
        "(squares.sqrt() + 1e-6)).clamp(max=1.0)  # NaN stays",
        "(squares.flip(0).sqrt() + 1e-6)).clamp(max=1.0)",
        "stacked",
    ),
    Mutant(
        "counts = (tl.program_id(0) == 0) & skip",
        "counts = skip",
        "optim",
        survives="all programs write one sum",
    ),
    Mutant("t_new = step.to(tl.int64) + 1", "t_new = step.to(tl.int64)", "optim", "triton/adam"),
    Mutant("p = p * shrink", "p = p", "optim", "triton/adam"),
    Mutant("largest = tl.where((v > w) | (v != v), v, w)", "largest = v", "optim"),
    # The optimizers on the host.
    Mutant("or kinds != self.kinds\n", "", "optim training"),
    Mutant("or not _same(params, self.params)\n", "", "optim"),
    Mutant("return live if self.alike(*live, *self.stepped) else None", "return live", "optim"),
    Mutant("if _NUMBERS.issuperset(map(type, values)):", "if True:", "optim"),
    Mutant(", tensor.data_ptr() % 16 == 0)", ")", "launch", "triton/multi_tensor"),
    Mutant(
        "guard = guard._replace(skipped=None)  # the first part counts for all",
        "pass",
        "training",
        "optim/plan.py",
    ),
    Mutant(
        "memory = (param.device, param.data_ptr())\n            again = met[memory]",
        "memory = (param.device, param.data_ptr())",
        "training",
    ),
    Mutant('values["step"] = step.to(param.device, dtype).resolve_neg()', "pass", "training optim"),
    Mutant("counting = False\n        return True", "return True", "training"),
    Mutant(
        "if kind is None and (tensors is not self._bucket.grads or self._write_grads):",
        "if kind is None:",
        "optim training",
        survives="a copy that nothing wrote is written back as it was",
    ),
    Mutant(
        "return mix(mix((seed ^ mix(seed >> 32 & MASK)) & MASK)",
        "return mix(mix(seed & MASK)",
        "training optim",
    ),
    Mutant("if grad.placements != param.placements:", "if False:", "distributed"),
    Mutant("entry.seed, entry.shards, again)", "entry.seed, again)", "distributed"),
    Mutant(" if not place.is_replicate()", "", "distributed"),
    Mutant('return local.wait() if hasattr(local, "wait") else local', "return local", "distributed"),
    Mutant('if self.defaults["fused"]:', "if True:", "training"),
    Mutant("with torch.inference_mode(False):  # state", "with torch.no_grad():  # state", "optim"),
    Mutant("if _valueless(params) and", "if False and", "optim"),
    Mutant("return operations_are_traced() or any(", "return any(", "optim"),
    Mutant("not is_captured and not operations_are_traced()", "not is_captured", "optim"),
    Mutant("        _Adam.__init__(", "        torch.optim.Adam.__init__(", "optim"),
    Mutant("if any(map(overlaps, (param, *moving))):", "if overlaps(param):", "optim"),
    Mutant('plain = plain and len(own) == len(group["params"])', "pass", "training"),
    Mutant(
        "return tl.where(unwritten, master, p.to(ACC))", "return master.to(ACC)", "training", "triton/multi"
    ),
    Mutant("            and not is_wrapper(local_part(param))\n", "", "optim"),
    Mutant("            and not is_wrapper(grad)\n", "", "optim"),
    Mutant("if is_wrapper(local):", "if False:", "optim"),
    Mutant("if self._loading is not None:\n", "if False:\n", "training"),
    Mutant("self._hooked_step(*args, **kwargs)", "self._hooked_step(*args, *kwargs.values())", "optim"),
    # The fallback.
    Mutant("clip = 1.0 if ratio > 1.0 else ratio", "clip = ratio", "optim"),
    Mutant(
        "if bucket.seed is not None:\n        return min(most, RANDOM)",
        "pass",
        "optim training",
        survives="a matter of time",
    ),
    Mutant(
        "grads.values = _clipped(bucket, tuple(chunks), grads.values, None if divides else decision.clip)",
        "grads.replace(torch.mul, 1.0)",
        "optim",
    ),
    Mutant(
        "yield torch.linalg.vector_norm(flat[rows * ROW :]",
        "yield torch.linalg.vector_norm(flat[rows * ROW + 1 :]",
        "optim",
    ),
    Mutant('p = torch.where(followed, work.pop("master_param"), p)', 'p = work.pop("master_param")', "sgd"),
    Mutant("new = torch.where(fresh[block.rows].unsqueeze(1), g, new)", "pass", "sgd"),
    Mutant("if acc == torch.float64:  # Triton passes", "if False:  # Triton passes", "work"),
    Mutant("if output.dtype == torch.float64:  # Triton passes", "if False:  # Triton passes", "work"),
    # The training loop in one call.
    Mutant("first = t * batch_size % N\n", "first = (t * batch_size + 1) % N\n", "fit"),
    Mutant("first = t * batch_size % self.total", "first = (t * batch_size + 1) % self.total", "fit"),
    Mutant("begin = (begin + count) % N", "begin = (begin + count + 1) % N", "fit"),
    Mutant("row = tl.where(row >= N, row - N, row)", "row = tl.minimum(row, N - 1)", "fit"),
    Mutant("own = model if ALONE else 0", "own = 0", "fit"),
    Mutant("go = active & (bad == 0)", "go = active", "fit"),
    Mutant("active = tl.load(active_ptr + model) != 0", "active = True", "fit"),
    Mutant("v = tl.where(go, v_new, v)", "v = v_new", "fit"),
    Mutant(
        "for t, loss in enumerate(losses):", "for t, loss in enumerate([losses[-1], *losses[:-1]]):", "fit"
    ),
    Mutant(
        "losses_ptr + t * tl.num_programs(0)", "losses_ptr + tl.maximum(t - 1, 0) * tl.num_programs(0)", "fit"
    ),
    Mutant(
        "sgd_rule(p, g * factor, buffer, t == 0, scalars)",
        "sgd_rule(p, g * factor, buffer, False, scalars)",
        "fit",
    ),
    Mutant("first_new = first + (1.0 - beta1) * (1.0 - first)", "first_new = first + (1.0 - beta1)", "fit"),
    Mutant("divisor = tl.sum(tl.sum(total, 1), 0)", "divisor = divisor", "fit"),
    Mutant('divisor = tl.where(divisor == 0, float("nan"), divisor)', "divisor = divisor", "fit"),
    Mutant("share = tl.where(count > 0, 2.0 / divisor, 0.0)", "share = 2.0 / divisor", "fit"),
    Mutant(
        "clip = clip_factor(max_norm, squares.to(tl.float64))",
        "clip = max_norm * squares.to(tl.float64)",
        "fit",
    ),
    Mutant("table[:, 0] *= self.models.lr_scale", "pass", "fit"),
    Mutant('state["step"].add_(len(losses))', 'state["step"].add_(1)', "fit"),
    Mutant(
        "sample_weight = sample_weight.expand(*models, input.shape[-2], self.weight.shape[1])",
        "sample_weight = sample_weight.squeeze(-1)",
        "fit",
    ),
    Mutant(
        "if a is not b and (isinstance(a, Tensor)",
        "if a is not b and False and (isinstance(a, Tensor)",
        "fit",
    ),
    Mutant(
        'if "step" in state and not (state["step"].is_cpu', 'if False and not (state["step"].is_cpu', "fit"
    ),
    Mutant("or optimizer._has_step_hooks()\n", "", "fit"),
    Mutant("param._backward_hooks or param._post_accumulate_grad_hooks", "param._backward_hooks", "fit"),
    Mutant("(optimizer.stacked and self.rows.dim == 0)", "(optimizer.stacked and False)", "fit"),
    # verify.
    Mutant("(), False, nan, died)", "(), True, nan, died)", "verify"),
    Mutant("        tensor = unwrapped(tensor)\n", "        break\n", "memory"),
    Mutant("                storage.copy_(content)\n", "                pass\n", "memory"),
    Mutant("trials = order[:0:-1] if configuration is None else []", "trials = []", "memory"),
    Mutant(
        "self.upstream = Upstream.of(function, self.native, self.cotangents, self.only)", "pass", "gradient"
    ),
    Mutant(
        "passed = passed and stale is None and upstream is None",
        "passed = passed and upstream is None",
        "gradient",
    ),
    Mutant(
        "if not np.array_equal(_array(before), _array(self.native[i]), equal_nan=True):",
        "if False:",
        "gradient",
    ),
    Mutant(
        "allowed = relative * scale + rounding", "allowed = 100 * relative * scale + rounding", "gradient"
    ),
    Mutant("found &= (words >> _ATOMIC_AT) & 1 == 0", "pass", "memory"),
    Mutant("found &= self.seen[np.where(found, program, 0)] <= epoch", "found &= False", "memory"),
    Mutant(
        "ok = (addresses >= self.start) & (addresses + np.uint64(itemsize) <= self.end)",
        "ok = addresses >= self.start",
        "memory",
    ),
    Mutant("ok &= index < size", "pass", "memory"),
    Mutant("return 0 if report else 1", "return 0", "verify"),
)


def sources(tree: Path) -> dict[str, str]:
    """The texts of ``kernels/``, by their paths in a checkout."""
    files = sorted((tree / "kernels").rglob("*.py"))
    return {file.relative_to(tree).as_posix(): file.read_text() for file in files}


def place_of(mutant: Mutant, texts: dict[str, str]) -> str | None:
    """The file in which the fault is planted, or None if its text is not there once."""
    counts = {file: text.count(mutant.old) for file, text in texts.items() if mutant.where in file}
    found = [file for file, count in counts.items() if count]
    return found[0] if len(found) == 1 and counts[found[0]] == 1 else None


def plant(mutant: Mutant, tree: Path) -> str | None:
    """Write the fault into a copy of the checkout; gives the file's name, or None if the text is not there once."""
    texts = sources(tree)
    file = place_of(mutant, texts)
    if file is not None:
        (tree / file).write_text(texts[file].replace(mutant.old, mutant.new))
    return file


def judge(mutant: Mutant) -> tuple[str, str]:
    """``killed``, ``survives`` or ``broken``, and where the fault was or what killed it."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "checkout"
        skipped = shutil.ignore_patterns(".git", ".venv", "build", "results", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, tree, ignore=skipped)
        (tree / "build" / "here").mkdir(parents=True)
        (tree / "build" / "here" / "gradkernels").symlink_to("../../kernels")
        file = plant(mutant, tree)
        if file is None:
            return "broken", "its text does not occur once"
        if mutant.survives:
            return "survives", file
        tests = " ".join(TESTS[name] for name in mutant.tests.split()).split()
        options = ["-x", "-q", "-n", "0", "-m", "not full", "-p", "no:cacheprovider", "-p", "tests.mutants"]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        environment = {**os.environ, "PYTHONPATH": str(tree / "build" / "here")}
        try:
            done = subprocess.run(
                command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            return "killed", f"{file}: no end within {LIMIT} s"
        if done.returncode == 1:
            first = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
            return "killed", f"{file}: {first[1] if first else '?'}"
        return (
            ("survives", file)
            if done.returncode == 0
            else ("broken", f"{file}: pytest ended in {done.returncode}")
        )


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """A first case of every test, then a second: the one that fails is soon met."""
    items[:] = in_order(items)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument(
        "-k", default="", metavar="TEXT", help="only mutants whose text or tests contain this"
    )
    parser.add_argument("-n", type=int, default=2, help="how many at once (default: 2)")
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if arguments.k in f"{m.old} {m.new} {m.tests}"]
    counts = {"killed": 0, "survives": 0, "broken": 0}
    start = time.monotonic()
    with ThreadPoolExecutor(arguments.n) as pool:
        for mutant, (verdict, where) in zip(chosen, pool.map(judge, chosen), strict=True):
            counts[verdict] += 1
            reason = f" (known: {mutant.survives})" if verdict == "survives" and mutant.survives else ""
            print(f"{verdict:9} {where}  {mutant.old!r} -> {mutant.new!r}{reason}", flush=True)
    share = counts["killed"] / max(1, len(chosen))
    listed = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"{listed} of {len(chosen)}: {share:.0%} killed in {time.monotonic() - start:.0f} s")
    return 0 if share >= GOAL and not counts["broken"] else 1


if __name__ == "__main__":
    sys.exit(main())
