"""Faults planted in the specimens: what stands there, what is put in its place, and the verdict that has to come of it.

``python -m tests.verify.planted [SPECIMEN ...]`` judges each specimen by the command's own way, a process each, and prints
kernel, verdict, points and seconds as a table; with ``--faults`` each planted fault too.
"""

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gradkernels.verify.judge import verdict as v
from gradkernels.verify.judge.process import judge

SPECIMENS = Path(__file__).parent / "specimens"
UNSAFE, MUTATED, REUSED = "unsafe memory", "mutated input", "reused result"
RANDOM, NO_KERNEL = "nondeterministic", "no kernel"
VALUE, GRADIENT = "wrong value", "wrong gradient"


@dataclass(frozen=True)
class Plant:
    """A fault: in ``specimen`` the text ``old``, which stands there once, becomes ``new``."""

    specimen: str
    old: str
    new: str
    verdict: str
    says: str = ""

    def write(self, folder: Path) -> Path:
        """Write the faulty file into the folder."""
        text = (SPECIMENS / f"{self.specimen}.py").read_text()
        assert text.count(self.old) == 1, (
            f"{self.specimen}: {self.old!r} stands there {text.count(self.old)} times"
        )
        file = folder / f"{self.specimen}.py"
        file.write_text(text.replace(self.old, self.new) + "\n\nKEPT = {}\n")
        return file


PLANTS = (
    # square
    Plant("square", "x * x, mask=offs < n)", "x * x * x, mask=offs < n)", VALUE),
    Plant("square", "tl.store(y_ptr + offs, x * x, mask=offs < n)", "tl.store(y_ptr + offs, x * x)", UNSAFE, "out-of-bounds store"),
    Plant("square", "    x = tl.load(x_ptr + offs, mask=offs < n)\n    tl.store(y_ptr", "    x = tl.load(x_ptr + offs)\n    tl.store(y_ptr", UNSAFE, "out-of-bounds load"),
    Plant("square", "2 * x * grad, mask", "x * grad, mask", GRADIENT, "1/2"),
    Plant("square", "2 * x * grad, mask", "-2 * x * grad, mask", GRADIENT, "sign flipped"),
    Plant("square", "2 * x * grad, mask", "2 * x, mask", GRADIENT, "grad_output"),
    Plant("square", "2 * x * grad, mask", "2 * grad, mask", GRADIENT),
    Plant("square", "2 * x * grad, mask", "2 * x * tl.abs(grad), mask", GRADIENT, "absolute value"),
    Plant("square", "        x = x.contiguous()\n        ctx", "        ctx", UNSAFE),
    Plant("square", "        return grad_x\n", "        return grad_x.zero_()\n", GRADIENT, "no signal"),
    Plant("square", "        return grad_x\n", "        return None\n", GRADIENT, "no gradient reaches input 0"),
    Plant("square", "Square.apply, (x,),", "lambda x: Square.apply(x.detach()), (x,),", GRADIENT, "no gradient reaches input 0"),
    Plant("square", "Square.apply, (x,),", "lambda x: x * x, (x,),", NO_KERNEL, "torch did the work"),
    Plant("square", "        return y\n\n", "        x.mul_(1.5)\n        return y\n\n", MUTATED, "input 0"),
    Plant("square", "Square.apply, (x,),", "lambda x: Square.apply(x.mul_(1.5)), (x,),", MUTATED, "input 0"),
    Plant("square", "        return grad_x\n", "        grad.mul_(2)\n        return grad_x\n", MUTATED, "grad_output"),
    Plant("square", "        return y\n\n", "        return y + 0.01 * torch.rand_like(y)\n\n", RANDOM),
    Plant("square", "        return y\n\n", "        KEPT.setdefault(x.data_ptr(), y)\n        return KEPT[x.data_ptr()].clone()\n\n", REUSED),
    Plant("square", "Square.apply, (x,),", "lambda x: KEPT.setdefault(x.data_ptr(), Square.apply(x)), (x,),", REUSED),
    Plant("square", "Square.apply, (x,),", "lambda x: KEPT.setdefault(id(x), Square.apply(x)), (x,),", REUSED),
    Plant("square", "        y = torch.empty_like(x)\n", "        y = KEPT.setdefault(x.shape, torch.empty_like(x))\n", REUSED),
    Plant("square", "BLOCK=64)\n        return y", "BLOCK=128)\n        return y.view(-1)", VALUE, "shape"),
    Plant("square", "        y = torch.empty_like(x)\n", "        y = torch.empty_like(x, dtype=torch.float64)\n", VALUE, "dtype"),
    Plant("square", "(triton.cdiv(x.numel(), 64),)](x, y, x", "(x.numel() // 64,)](x, y, x", UNSAFE, "unwritten"),
    Plant("square", "grad, grad_x = grad.contiguous(), torch.empty_like(x)", "grad_x = torch.empty_like(x)", UNSAFE, "loads grad_ptr"),
    Plant("square", "grad, grad_x = grad.contiguous(), torch.empty_like(x)", "assert grad.is_contiguous()\n        grad_x = torch.empty_like(x)", "verified"),
    Plant("square", "grad, grad_x = grad.contiguous(), torch.empty_like(x)", "grad, grad_x = grad.contiguous(), torch.empty_like(grad)", GRADIENT, "strides of grad_output"),
    Plant("square", "grad, grad_x = grad.contiguous(), torch.empty_like(x)", "grad_x = torch.empty_like(x)\n        grad = grad if grad.stride(-1) == 1 else grad.contiguous()", UNSAFE, "loads grad_ptr"),
    # mse
    Plant("mse", "tl.sum(part, axis=0) / n)", "tl.sum(part, axis=0))", VALUE),
    Plant("mse", "    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)", "    x = tl.load(x_ptr + offs, mask=offs < n, other=1.0)", VALUE),
    Plant("mse", "* tl.load(grad_ptr)", "* tl.load(grad_ptr + offs)", UNSAFE, "grad_ptr"),
    Plant("mse", "* tl.load(grad_ptr)", "", GRADIENT, "grad_output"),
    Plant("mse", "d = 2 * (x - y) / n", "d = (x - y) / n", GRADIENT),
    Plant("mse", "d = 2 * (x - y) / n", "d = 2 * (x - y)", GRADIENT, "sum"),
    Plant("mse", "grad_y_ptr + offs, -d", "grad_y_ptr + offs, d", GRADIENT, "sign flipped"),
    Plant("mse", "        return grad_x, grad_y\n", "        return grad_x, None\n", GRADIENT, "no gradient reaches input 1"),
    Plant("mse", "tl.store(grad_y_ptr + offs, -d, mask=offs < n)", "pass", UNSAFE),
    Plant("mse", "torch.empty(parts, device=x.device), torch", "torch.empty(parts + 1, device=x.device)[1:], torch", "verified"),
    Plant("mse", "        return MSE.apply(predictions, targets)", "        return torch.mean((predictions - targets) ** 2)", NO_KERNEL),
    Plant("mse", "        return MSE.apply(predictions, targets)", "        MSE.apply(predictions, targets)\n        return torch.mean((predictions - targets) ** 2)", NO_KERNEL),
    Plant("mse", "        return MSE.apply(predictions, targets)", "        return KEPT.setdefault(predictions.shape, MSE.apply(predictions, targets))", REUSED),
    # softmax
    Plant("softmax", "tl.exp(x - tl.max(x, axis=0))", "tl.exp(x)", VALUE),
    Plant("softmax", 'other=-float("inf")', "other=0.0", VALUE),
    Plant("softmax", "y * (grad - inner)", "y * grad", GRADIENT, "off-diagonal"),
    Plant("softmax", "y * (grad - inner)", "y * (1 - y) * grad", GRADIENT),
    Plant("softmax", "y_ptr + row * n + cols, e / tl.sum(e, axis=0), mask=cols < n)", "y_ptr + row * n + cols, e / tl.sum(e, axis=0))", UNSAFE),
    Plant("softmax", "row * stride + cols", "row * n + cols", UNSAFE),
    Plant("softmax", "        return y\n\n", "        return y if n < 30 else y * 1.001\n\n", VALUE),
    Plant("softmax", "        ctx.save_for_backward(y)\n", "        ctx.save_for_backward(x)\n", UNSAFE),
    # layer_norm
    Plant("layer_norm", "axis=0) / n + eps)", "axis=0) / (n - 1) + eps)", VALUE),
    Plant("layer_norm", "d = tl.where(mask, x - mean, 0.0)", "d = x - mean", VALUE),
    Plant("layer_norm", "wg - hat * c1 - c2", "wg - c2", GRADIENT),
    Plant("layer_norm", "wg - hat * c1 - c2", "wg - hat * c1", GRADIENT),
    Plant("layer_norm", "sum_b += grad", "sum_b = grad", GRADIENT, "input 2"),
    Plant("layer_norm", "        return grad_x, grad_w, grad_b", "        return grad_x, grad_w, None", GRADIENT, "no gradient reaches input 2"),
    Plant("layer_norm", "sum_w = tl.zeros((BLOCK,), tl.float32)", "sum_w = tl.load(grad_w_ptr + cols, mask=mask)", UNSAFE, "unwritten"),
    Plant("layer_norm", "rstd = 1 / tl.sqrt(tl.sum(d * d, axis=0) / n + eps)", "rstd = 1 / (tl.sqrt(tl.sum(d * d, axis=0) / n) + eps)", VALUE),
    Plant("layer_norm", "        grad = grad.contiguous()\n", "", UNSAFE, "loads grad_ptr"),
    # matmul
    Plant("matmul", "for start in range(0, k, TK)", "for start in range(0, k - TK + 1, TK)", VALUE),
    Plant("matmul", "mask=(rows[:, None] < m) & (inner[None, :] < k),", "mask=(rows[:, None] < m),", UNSAFE, "a_ptr"),
    Plant("matmul", "mask = (rows[:, None] < m) & (cols[None, :] < n)\n", "mask = cols[None, :] < n\n", UNSAFE, "c_ptr"),
    Plant("matmul", "product(grad, b.t()), product(a.t(), grad)", "product(grad, b.t()), None", GRADIENT, "input 1"),
    Plant("matmul", "acc += tl.dot(a, b, input_precision", "acc += (1 if TM == 16 else 2) * tl.dot(a, b, input_precision", VALUE, "configuration 1"),
    Plant("matmul", "a, b, c, m, n, k, a.stride(0), a.stride(1), b", "a, b, c, m, n, k, k, 1, b", UNSAFE),
    # linear
    Plant("linear", "grad, masked = grad.contiguous(), torch.empty_like(y)\n", "masked = grad = grad.contiguous()\n", MUTATED, "grad_output"),
    Plant("linear", "tl.where(y > 0, grad, 0.0)", "grad", GRADIENT, "mask"),
    Plant("linear", "masked.sum(0)\n", "masked.mean(0)\n", GRADIENT),
    Plant("linear", "masked.sum(0)\n", "masked.sum(1)\n", GRADIENT, "wrong shape"),
    Plant("linear", "+ tl.load(b_ptr + unit)", "", VALUE),
    Plant("linear", "BLOCK=triton.next_power_of_2(d), RELU", "BLOCK=8, RELU", VALUE),
    Plant("linear", "self.linear.weight, self.linear.bias)", "self.linear.weight.detach(), self.linear.bias)", GRADIENT),
    # gelu
    Plant("gelu", "0.5 * x * (1 + t), mask", "0.5 * x * (1 + t) * 1.0001, mask", VALUE),
    Plant("gelu", " + 0.5 * x * (1 - t * t) * slope)", ")", GRADIENT),
    Plant("gelu", "(1 - t * t) * slope", "(1 - t * t)", GRADIENT),
    Plant("gelu", 'gelu(x, approximate="tanh")', "gelu(x)", VALUE),
    # swiglu
    Plant("swiglu", "(s + a * s * (1 - s))", "s * (1 - s)", GRADIENT, "input 0"),
    Plant("swiglu", "        return grad_a, grad_b", "        return grad_b, grad_a", GRADIENT),
    Plant("swiglu", "grad, grad_a, grad_b = grad.contiguous(), torch.empty_like(a), torch.empty_like(b)", "grad, grad_a, grad_b = grad.contiguous(), torch.empty_like(a), b", MUTATED),
    Plant("swiglu", "(triton.cdiv(a.numel(), 64),)](a, b, y", "(triton.cdiv(a.numel(), 64) + 1,)](a, b, y", "verified"),
    # cross_entropy
    Plant("cross_entropy", "lse = top + tl.log", "lse = tl.log", VALUE),
    Plant("cross_entropy", "row * n + tl.load(label_ptr + row))", "row * n + tl.load(label_ptr + row) + 1)", UNSAFE),
    Plant("cross_entropy", "p * tl.load(grad_ptr + row)", "p * tl.load(grad_ptr)", GRADIENT),
    Plant("cross_entropy", "p - 1, p)", "p, p)", GRADIENT),
    Plant("cross_entropy", "    tl.store(lse_ptr + row, lse)\n", "", UNSAFE, "unwritten"),
    # row_sum
    Plant("row_sum", "tl.atomic_add(y_ptr + row, tl.sum(x, axis=0))", "tl.store(y_ptr + row, tl.load(y_ptr + row) + tl.sum(x, axis=0))", UNSAFE, "race"),
    Plant("row_sum", "y = torch.zeros(m", "y = torch.empty(m", UNSAFE, "unwritten"),
    Plant("row_sum", "(m, 2)](x", "(m, 1)](x", VALUE),
    Plant("row_sum", "tl.load(grad_ptr + row) + tl", "tl.load(grad_ptr) + tl", GRADIENT),
)  # fmt: skip


def main() -> None:
    """Judge, and print the table; an unexpected verdict is the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.verify.planted")
    parser.add_argument("specimen", nargs="*", default=sorted(path.stem for path in SPECIMENS.glob("*.py")))
    parser.add_argument("--faults", action="store_true")
    arguments = parser.parse_args()
    wrong = 0
    print("| kernel | verdict | points | seconds | planted faults |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.specimen:
            plants = [plant for plant in PLANTS if plant.specimen == name]
            kinds = Counter(plant.verdict for plant in plants)
            listed = ", ".join(f"{count} {verdict}" for verdict, count in kinds.items())
            for plant in (None, *(plants if arguments.faults else ())):
                file = SPECIMENS / f"{name}.py" if plant is None else plant.write(Path(folder))
                text = listed if plant is None else f"`{' '.join(plant.new.split())}`"
                began = time.perf_counter()
                cases = judge(file, timeout=600)
                seconds = time.perf_counter() - began
                found = v.of_file(cases)
                wrong += found != (v.VERIFIED if plant is None else plant.verdict)
                print(f"| {name} | {found} | {len(cases)} | {seconds:.1f} | {text} |", flush=True)
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
