"""Five lessons on gradients, backpropagation and training, replayed on gradkernels.

    python examples/lessons.py                          all of them
    python examples/lessons.py A6 C3                    some of them
    python examples/lessons.py --backend reference      on the NumPy reference (or fallback, or triton)

Each example is one function: its docstring says what the figures show, and it returns them by name.
tests/examples/test_lessons.py holds the figures and compares them on every backend. Squared error is ``(p - y)^2``,
"half" is ``0.5 (p - y)^2``; float64 unless a lesson says otherwise. Over 500 lines, since it is read from top to bottom
as one text.
"""

import argparse
import textwrap
from collections.abc import Callable
from inspect import cleandoc

import gradkernels
import numpy as np
import torch
from gradkernels import (
    FusedAdam,
    FusedSGD,
    linear,
    linear_mse_loss,
    linear_mse_loss_and_grad,
    matmul,
    mse_loss,
    mse_loss_and_grad,
)
from gradkernels.reference.scalar import Value
from gradkernels.verify import gradcheck
from torch import Tensor

Figures = dict[str, object]
LESSONS: dict[str, tuple[str, Callable[[], Figures]]] = {}


def lesson(number: str, title: str) -> Callable[[Callable[[], Figures]], Callable[[], Figures]]:
    def register(function: Callable[[], Figures]) -> Callable[[], Figures]:
        LESSONS[number] = (title, function)
        return function

    return register


def data(*values: object, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=dtype)


def parameter(*values: object, dtype: torch.dtype = torch.float64) -> Tensor:
    return data(*values, dtype=dtype).requires_grad_()


def centered(loss: Callable[[], Tensor], parameter: Tensor, eps: float = 1e-5) -> list[float]:
    """Return the slope of ``loss`` along each entry of ``parameter``, by centered differences."""
    slopes = []
    flat = parameter.detach().view(-1)
    for i, value in enumerate(flat.tolist()):
        flat[i] = value + eps
        above = loss().item()
        flat[i] = value - eps
        slopes.append((above - loss().item()) / (2 * eps))
        flat[i] = value
    return slopes


def descend(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Run the canonical loop: clear, forward, backward, update. Return the loss before each update."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        current = loss()
        current.backward()
        losses.append(current.item())
        optimizer.step()
    return losses


# A. Latency predictor: prompt length, queue delay -> seconds

ROWS = [[1, 0.5], [2, 1], [3, 0.5], [4, 2]]
LATENCIES = [2.5, 5, 6.5, 10]


@lesson("A1", "One weight")
def one_weight() -> Figures:
    """For x = 2 the weight 3 predicts 6, where y is 5: loss (6 - 5)^2 = 1. Raising w by 0.001 raises the loss
    by 0.004004, a slope of 4.004. backward gives the exact slope, 2 (w x - y) x = 4; the one-sided slope is
    off by the curvature, the centered one is not.
    """
    x, y = data([2]), data(5)

    def loss(w: Tensor) -> Tensor:
        return linear_mse_loss(x, w, y)

    w, nudged = parameter([3]), data([3.001])
    loss(w).backward()
    return {
        "prediction": linear(x, w).item(),
        "loss": loss(w).item(),
        "nudged prediction": linear(x, nudged).item(),
        "nudged loss": loss(nudged).item(),
        "one-sided slope": ((loss(nudged) - loss(w)) / 0.001).item(),
        "analytic gradient": w.grad.item(),
        "centered difference": centered(lambda: loss(w), w),
    }


@lesson("A2", "Five steps of gradient descent")
def five_steps() -> Figures:
    """Each step subtracts 0.1 times the gradient from w. The error shrinks to a fifth each time, the loss to a
    25th, and w approaches 2.5, which predicts 5.
    """
    x, y, w = data([2]), data(5), parameter([3])
    optimizer = FusedSGD([w], lr=0.1)
    rows = []
    for _ in range(5):
        optimizer.zero_grad()
        prediction = linear(x, w)
        loss = mse_loss(prediction, y)
        loss.backward()
        rows.append([w.item(), prediction.item(), loss.item(), w.grad.item()])
        optimizer.step()
    return {"w, prediction, loss, gradient": rows}


@lesson("A3", "A correct gradient, a bad step")
def bad_step() -> Figures:
    """With rate 0.1 the loss falls from 1 to 0.04. With rate 1 the same gradient takes w from 3 past the
    minimum at 2.5 to -1, and the loss rises to 49: the gradient was right, the step too long.
    """
    figures: Figures = {}
    for lr in (0.1, 1.0):
        x, y, w = data([2]), data(5), parameter([3])
        descend(lambda x=x, w=w, y=y: linear_mse_loss(x, w, y), FusedSGD([w], lr=lr), steps=1)
        figures[f"lr {lr}: w, loss"] = [w.item(), linear_mse_loss(x, w, y).item()]
    return figures


@lesson("A4", "Two weights")
def two_weights() -> Figures:
    """The gradient of each weight is 2 (prediction - y) times its own feature: 2 * 1 * (2, 1) = (4, 2). After
    one step with rate 0.1 the weights predict 5 exactly: loss 0.
    """
    features, y, w = data(2, 1), data(5), parameter(2, 2)
    prediction = linear(features, w)
    mse_loss(prediction, y).backward()
    FusedSGD([w], lr=0.1).step()
    return {
        "prediction": prediction.item(),
        "gradient": w.grad.tolist(),
        "weights": w.tolist(),
        "new loss": linear_mse_loss(features, w, y).item(),
    }


@lesson("A5", "Paths that meet add")
def shared_weight() -> Figures:
    """One weight multiplies both features. Its gradient is the sum over the two paths to the loss: 4 + 2 = 6."""
    features, y, w = data(2, 1), data(5), parameter(2)
    both = w.expand(2)
    both.retain_grad()
    linear_mse_loss(features, both, y).backward()
    return {"path contributions": both.grad.tolist(), "gradient": w.grad.item()}


@lesson("A6", "Four rows")
def four_rows() -> Figures:
    """The loss is the mean over four rows. 100 steps bring it from 43.4 to 0.0007. The learned weights say
    2.03 seconds per unit of length and 0.94 per unit of delay; the predictions miss the targets 2.5, 5,
    6.5, 10 by 0.05 at most.
    """
    x, y, w = data(ROWS), data(LATENCIES), parameter(0, 0)
    optimizer = FusedSGD([w], lr=0.03, on_nonfinite="raise")
    figures: Figures = {}
    for step in range(101):
        optimizer.zero_grad()
        loss = linear_mse_loss(x, w, y)
        loss.backward()
        if step in (0, 1, 10, 100):
            figures[f"step {step}: loss, weights"] = [loss.item(), w.tolist()]
        optimizer.step()
    return {**figures, "learned weights": w.tolist(), "predictions": linear(x, w).tolist()}


@lesson("A7", "Gradient check")
def gradient_check() -> Figures:
    """Three ways to one gradient: backward, the one-pass form without autograd, and centered differences of
    the loss, which use neither formula. All agree.
    """
    x, y, w = data(ROWS), data(LATENCIES), parameter(1.3, 1.1)
    loss = linear_mse_loss(x, w, y)
    loss.backward()
    _, (_, one_pass, _, _) = linear_mse_loss_and_grad(x, w, y, wrt=("weight",))
    return {
        "loss": loss.item(),
        "backward": w.grad.tolist(),
        "one pass, without autograd": one_pass.tolist(),
        "centered difference": centered(lambda: linear_mse_loss(x, w, y), w),
    }


@lesson("A8", "Gradients accumulate")
def accumulation() -> Figures:
    """backward adds to .grad: after two calls it holds twice the gradient, and a step would be twice as long.
    After zero_grad it holds the gradient of one call.
    """
    x, y, w = data(ROWS), data(LATENCIES), parameter(1.3, 1.1)
    optimizer = FusedSGD([w], lr=0.03)
    linear_mse_loss(x, w, y).backward()
    linear_mse_loss(x, w, y).backward()
    twice = w.grad.tolist()
    optimizer.zero_grad()
    linear_mse_loss(x, w, y).backward()
    return {"backward twice": twice, "after clearing": w.grad.tolist()}


@lesson("A9", "Non-finite guard")
def nonfinite_guard() -> Figures:
    """One nan or inf in the data makes the gradient non-finite. on_nonfinite="raise" names the parameter and
    raises before the update: the weights are still 1.3 and 1.1.
    """
    figures: Figures = {}
    for name, bad in (("NaN", float("nan")), ("infinite", float("inf"))):
        for where in ("feature", "target"):
            x, y, w = data(ROWS), data(LATENCIES), parameter(1.3, 1.1)
            (x[0] if where == "feature" else y)[0] = bad
            optimizer = FusedSGD([w], lr=0.03, on_nonfinite="raise")
            try:
                descend(lambda x=x, w=w, y=y: linear_mse_loss(x, w, y), optimizer, steps=1)
            except FloatingPointError as error:
                figures[f"{name} {where}: error"] = str(error)
            figures[f"{name} {where}: weights"] = w.tolist()
    return figures


# B. Shipment delay: disruption score -> hours late, half squared error, with a bias


@lesson("B1", "One weight and a bias")
def weight_and_bias() -> Figures:
    """Half the squared error is 0.5 (2 - 6)^2 = 8, so dL/dprediction is prediction - y = -4. dL/dw is that
    times x = 2, dL/db is that itself. One step takes the prediction from 2 to 4: half the error, a quarter
    of the loss.
    """
    x, y, w, b = data([2]), data(6), parameter([1]), parameter([0])
    prediction = linear(x, w, b)
    prediction.retain_grad()
    loss = 0.5 * mse_loss(prediction, y)
    loss.backward()
    _, (slope, _, _) = mse_loss_and_grad(prediction.detach(), y)
    FusedSGD([w, b], lr=0.1).step()
    return {
        "prediction": prediction.item(),
        "loss": loss.item(),
        "dL/dprediction": prediction.grad.item(),
        "dL/dprediction, without autograd": 0.5 * slope.item(),
        "dL/dw": w.grad.item(),
        "dL/db": b.grad.item(),
        "w, b": [w.item(), b.item()],
        "new prediction": linear(x, w, b).item(),
        "new loss": 0.5 * linear_mse_loss(x, w, y, b).item(),
    }


@lesson("B2", "Five steps")
def five_steps_with_bias() -> Figures:
    """Each step halves the error, so each loss is a quarter of the one before. w and b move in the ratio 2 to
    1, that of their gradients.
    """
    x, y, w, b = data([2]), data(6), parameter([1]), parameter([0])
    optimizer = FusedSGD([w, b], lr=0.1)
    rows = []
    for _ in range(5):
        prediction = linear(x, w, b).item()
        [loss] = descend(lambda: 0.5 * linear_mse_loss(x, w, y, b), optimizer, steps=1)
        rows.append([prediction, loss, w.item(), b.item()])
    return {"prediction, loss before; w, b after": rows}


@lesson("B3", "Learning-rate sweep")
def learning_rate_sweep() -> Figures:
    """Each step multiplies the error by 0.95 at rate 0.01 (slow), by 0.5 at 0.1 (good) and by -1.5 at 0.5
    (overshooting, further away each time), and the loss by the square of that.
    """
    figures: Figures = {}
    for lr in (0.01, 0.1, 0.5):
        x, y, w, b = data([2]), data(6), parameter([1]), parameter([0])
        figures[f"losses at lr {lr}"] = descend(
            lambda x=x, w=w, y=y, b=b: 0.5 * linear_mse_loss(x, w, y, b), FusedSGD([w, b], lr=lr), steps=5
        )
    return figures


@lesson("B4", "Centered check")
def centered_check() -> Figures:
    """Centered differences of the loss find the slopes that B1 has by the chain rule: -8 and -4."""
    x, y, w, b = data([2]), data(6), parameter([1]), parameter([0])

    def loss() -> Tensor:
        return 0.5 * linear_mse_loss(x, w, y, b)

    return {"dL/dw": centered(loss, w), "dL/db": centered(loss, b)}


@lesson("B5", "Scalar reverse-mode autodiff")
def scalar_autodiff() -> Figures:
    """Scalar reverse-mode autodiff gives the loss and gradients of B1. a * a uses a twice, so the gradient is
    the sum of two paths: 3 + 3 = 6.
    """
    w, b, a = Value(1), Value(0), Value(3)
    loss = (w * 2 + b - 6) ** 2 * 0.5
    loss.backward()
    square = a * a
    square.backward()
    return {"loss": loss.data, "dL/dw": w.grad, "dL/db": b.grad, "a*a": square.data, "d(a*a)/da": a.grad}


SHIPMENTS = [[1], [2], [3]]


@lesson("B6", "Three shipments")
def three_shipments() -> Figures:
    """The rows (1, 3), (2, 5), (3, 7) lie on 2 x + 1. After 20 steps the loss is 0.0005, and w = 2.04, b =
    0.92 are still on their way to 2 and 1.
    """
    x, y, w, b = data(SHIPMENTS), data(3, 5, 7), parameter([0]), parameter([0])
    optimizer = FusedSGD([w, b], lr=0.08)
    figures: Figures = {}
    for step in range(20):
        [loss] = descend(lambda: 0.5 * linear_mse_loss(x, w, y, b), optimizer, steps=1)
        if step in (0, 1, 19):
            figures[f"step {step}: loss before; w, b after"] = [loss, w.item(), b.item()]
    return figures


@lesson("B7", "Train/validation mismatch")
def train_validation_mismatch() -> Figures:
    """The training targets are 4 x, the validation targets 2 x, and w begins at 2. Each step lowers the
    training loss and raises the validation loss: the optimizer is right, the two sets of data disagree.
    """
    x, train, validation, w = data(SHIPMENTS), data(4, 8, 12), data(2, 4, 6), parameter([2])
    optimizer = FusedSGD([w], lr=0.02)
    rows = []
    for _ in range(4):
        descend(lambda: 0.5 * linear_mse_loss(x, w, train), optimizer, steps=1)
        rows.append([0.5 * linear_mse_loss(x, w, y).item() for y in (train, validation)] + [w.item()])
    return {"train, validation, w": rows}


@lesson("B8", "The same through a Linear layer")
def linear_layer() -> Figures:
    """nn.Linear and nn.MSELoss on the shipments of B6: the losses before and after one step are the first two
    of B6.
    """
    x, y = data(SHIPMENTS), data([3], [5], [7])
    model = gradkernels.nn.Linear(1, 1, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    half_mse = gradkernels.nn.MSELoss()
    optimizer = FusedSGD(model.parameters(), lr=0.08)
    before = 0.5 * half_mse(model(x), y)
    before.backward()
    optimizer.step()
    return {
        "before": before.item(),
        "weight gradient": model.weight.grad.item(),
        "bias gradient": model.bias.grad.item(),
        "after": 0.5 * half_mse(model(x), y).item(),
    }


@lesson("B9", "Accumulation without and with zeroing")
def zeroing() -> Figures:
    """The gradient of one call is -8. A second call adds to it: -16. With .grad cleared before the third it is
    -8 again.
    """
    x, y, w = data([2]), data(6), parameter([1])
    gradients = []
    for zero in (False, False, True):
        if zero:
            w.grad = None
        (0.5 * linear_mse_loss(x, w, y)).backward()
        gradients.append(w.grad.item())
    return {"gradients": gradients}


# C. Delivery time: distance in hundreds of km, weight in kg -> hours

DELIVERIES = [[2, 3], [1.5, 1], [4, 5], [0.8, 0.5], [3.2, 2.5]]
HOURS = [5, 3.2, 9.5, 2.1, 6.8]


@lesson("C1", "Two steps by hand")
def two_steps() -> Figures:
    """The prediction 8 is 3 too high: loss 9, gradient 2 * 3 * (2, 3) = (12, 18). The step overshoots to 4.1,
    which is 0.9 too low: the second gradient has the other sign and is smaller.
    """
    x, y, w = data(2, 3), data(5), parameter(1, 2)
    optimizer = FusedSGD([w], lr=0.05)
    rows = []
    for _ in range(2):
        prediction = linear(x, w).item()
        [loss] = descend(lambda: linear_mse_loss(x, w, y), optimizer, steps=1)
        rows.append([prediction, loss, w.grad.tolist(), w.tolist()])
    return {"prediction, loss, gradient, weights after": rows}


def deliveries(
    make: Callable[..., torch.optim.Optimizer], steps: int, dtype: torch.dtype = torch.float32
) -> tuple[list[float], list[list[float]]]:
    """The losses before, and the weights after, each step of ``make([w])`` on the five deliveries."""
    x, y, w = data(DELIVERIES, dtype=dtype), data(HOURS, dtype=dtype), parameter(0.8, 1.5, dtype=dtype)
    optimizer = make([w])
    losses, weights = [], []
    for _ in range(steps):
        losses += descend(lambda: linear_mse_loss(x, w, y), optimizer, steps=1)
        weights.append(w.tolist())
    return losses, weights


@lesson("C2", "Three learning rates, float32")
def three_learning_rates() -> Figures:
    """The losses tell a rate that is too low from one that is too high: after 12 steps 0.05 has reached 0.34
    and 0.001 only 0.64, while 1.5 makes the loss explode at the second step.
    """
    return {
        "losses at lr 0.05": deliveries(lambda p: FusedSGD(p, lr=0.05), 12)[0],
        "12th loss at lr 0.001": deliveries(lambda p: FusedSGD(p, lr=0.001), 12)[0][-1],
        "2nd loss at lr 1.5": deliveries(lambda p: FusedSGD(p, lr=1.5), 2)[0][-1],
    }


@lesson("C3", "Adam beside torch's, float32")
def adam() -> Figures:
    """The weights after each of 20 steps of Adam, ours and torch's: equal to the rounding of float32."""
    options = {"lr": 0.05, "betas": (0.9, 0.999), "eps": 1e-8}
    return {
        "weights": deliveries(lambda p: FusedAdam(p, **options), 20)[1],
        "torch's": deliveries(lambda p: torch.optim.Adam(p, **options, foreach=False), 20)[1],
    }


@lesson("C4", "Schedules of torch")
def schedules() -> Figures:
    """torch's schedulers drive our optimizer as they drive torch's. ReduceLROnPlateau divides the rate by 10
    at the second epoch in a row without a better validation loss; the cosine falls from 0.05 to 0.0001 in
    10 steps. The weights after the last step are torch's.
    """
    x, y = data(DELIVERIES), data(HOURS)
    figures: Figures = {}
    for name, make in (("ours", FusedSGD), ("torch's", torch.optim.SGD)):
        w = parameter(0.8, 1.5)
        optimizer = make([w], lr=0.05)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1)
        rates = []
        for validation in (0.9, 0.5, 0.5, 0.5, 0.4, 0.4, 0.4, 0.3):
            descend(lambda w=w: linear_mse_loss(x, w, y), optimizer, steps=1)
            rates.append(optimizer.param_groups[0]["lr"])
            plateau.step(validation)
        figures[f"plateau: rates, weights, {name}"] = [rates, w.tolist()]

        w = parameter(0.8, 1.5)
        optimizer = make([w], lr=0.05)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=1e-4)
        rates = []
        for _ in range(11):
            rates.append(optimizer.param_groups[0]["lr"])
            descend(lambda w=w: linear_mse_loss(x, w, y), optimizer, steps=1)
            cosine.step()
        figures[f"cosine: rates, weights, {name}"] = [rates, w.tolist()]
    return figures


@lesson("C5", "A weight that gets no signal")
def no_signal() -> Figures:
    """The second feature is 0 in every row, so its weight does not change the loss: its gradient is 0 although
    the loss is large, and the gradient check says that this weight gets no signal.
    """
    x, y, w = data(DELIVERIES), data(HOURS), parameter(0.8, 1.5)
    x[:, 1] = 0
    loss = linear_mse_loss(x, w, y)
    loss.backward()
    report = gradcheck(linear_mse_loss, (x, w, y))
    return {
        "loss": loss.item(),
        "gradient": w.grad.tolist(),
        "gradient check": [str(diagnosis) for input in report.inputs for diagnosis in input.diagnoses],
    }


# D. A bowl, matrix form and the canonical loop


def bowl(point: Tensor) -> Tensor:
    """``x^2 + 3 y^2``, as a weighted squared error against the origin."""
    return mse_loss(point, torch.zeros_like(point), weight=data(1, 3), reduction="sum")


@lesson("D1", "A bowl")
def descend_the_bowl() -> Figures:
    """At (4, 3) the gradient of x^2 + 3 y^2 is (2 x, 6 y) = (8, 18); a step of rate 0.1 leads to (3.2, 1.2).
    Rate 0.4 multiplies y by 1 - 0.4 * 6 = -1.4 each time, so the loss grows. The points of 20 steps are
    those of torch's SGD.
    """
    point = parameter(4, 3)
    descend(lambda: bowl(point), FusedSGD([point], lr=0.1), steps=1)
    far = parameter(4, 3)
    tracks: dict[str, list[list[float]]] = {"ours": [], "torch's": []}
    for make, track in ((FusedSGD, tracks["ours"]), (torch.optim.SGD, tracks["torch's"])):
        p = parameter(4, 3)
        optimizer = make([p], lr=0.1)
        for _ in range(20):
            descend(lambda p=p: bowl(p), optimizer, steps=1)
            track.append(p.tolist())
    return {
        "gradient": point.grad.tolist(),
        "one step": point.tolist(),
        "losses at lr 0.4": descend(lambda: bowl(far), FusedSGD([far], lr=0.4), steps=5),
        **{f"20 steps, {name}": track for name, track in tracks.items()},
    }


def hundred_samples() -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(0)
    return data(rng.normal(size=(100, 5))), parameter(rng.normal(size=5)), data(rng.normal(size=100))


@lesson("D2", "Linear regression in matrix form")
def matrix_form() -> Figures:
    """The gradient has one entry per weight. backward and the matrix formula, two products, give the same
    numbers.
    """
    x, w, y = hundred_samples()
    linear_mse_loss(x, w, y).backward()
    with torch.no_grad():
        formula = 2 / 100 * matmul(x.T, matmul(x, w) - y)
    return {"shape": list(w.grad.shape), "backward": w.grad.tolist(), "(2/n) X^T (X w - y)": formula.tolist()}


@lesson("D3", "Clipping by the global norm")
def clipping() -> Figures:
    """Clipping scales all gradients together until their joint norm is max_norm; 1000 is above the norm and
    changes nothing. The first number is the norm before clipping, the others are the weights after the
    step: as torch's.
    """
    x, y = data(DELIVERIES), data(HOURS)
    figures: Figures = {}
    for max_norm in (1.0, 1000.0):
        w, b = parameter(8, 15), parameter([2])
        optimizer = FusedSGD([w, b], lr=0.1, max_norm=max_norm)
        descend(lambda w=w, b=b: linear_mse_loss(x, w, y, b), optimizer, steps=1)

        v, c = parameter(8, 15), parameter([2])
        linear_mse_loss(x, v, y, c).backward()
        norm = torch.nn.utils.clip_grad_norm_([v, c], max_norm)
        torch.optim.SGD([v, c], lr=0.1).step()
        figures[f"max_norm {max_norm}: norm, weights"] = [optimizer.grad_norm.item(), *w.tolist(), b.item()]
        figures[f"max_norm {max_norm}: norm, weights, torch's"] = [norm.item(), *v.tolist(), c.item()]
    return figures


@lesson("D4", "Monotone check")
def monotone() -> Figures:
    """50 steps downhill never raise the loss. With the sign flipped the first step does: watching the loss for
    a rise finds a wrong sign at once.
    """
    x, y = data(DELIVERIES), data(HOURS)
    figures: Figures = {}
    for name, uphill in (("downhill", False), ("sign flipped", True)):
        w = parameter(0.8, 1.5)
        optimizer = FusedSGD([w], lr=0.01, maximize=uphill)
        losses = descend(lambda w=w: linear_mse_loss(x, w, y), optimizer, steps=50)
        rises = [step for step in range(1, 50) if losses[step] > losses[step - 1] + 1e-12]
        figures[f"first step that made the loss rise, {name}"] = rises[0] if rises else "none"
    return figures


@lesson("D5", "(n, 1) against (n,)")
def mismatched_shapes() -> Figures:
    """A column (4, 1) minus a row (4,) would broadcast to (4, 4): 16 differences, 12 of them between wrong
    pairs. Both losses refuse it and name the shapes.
    """
    figures: Figures = {}
    column, row, x, w = torch.ones(4, 1), torch.ones(4), torch.ones(4, 3), torch.ones(1, 3)
    for name, call in (
        ("mse_loss", lambda: mse_loss(column, row)),
        ("linear_mse_loss", lambda: linear_mse_loss(x, w, row)),
    ):
        try:
            figures[name] = list(call().shape)
        except ValueError as error:
            figures[name] = str(error).removeprefix(f"{name}: ")
    return figures


def readable(figure: object) -> str:
    if isinstance(figure, float):
        return f"{figure:.7g}"
    if isinstance(figure, list):
        return "[" + ", ".join(readable(part) for part in figure) + "]"
    return str(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="*", default=list(LESSONS), metavar="LESSON", help="A1, A2, ... D5")
    parser.add_argument("--backend", choices=("auto", "triton", "fallback", "reference"), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if unknown := sorted(set(options.lessons) - set(LESSONS)):
        parser.error(f"no lesson {', '.join(unknown)}; there are {', '.join(LESSONS)}")
    try:
        with gradkernels.use_backend(options.backend):
            gradkernels.backend_for(torch.empty(0, device=options.device))
    except (AssertionError, RuntimeError) as error:  # no such device, or a backend that does not serve it
        parser.error(f"--backend {options.backend} --device {options.device}: {str(error).splitlines()[0]}")
    with gradkernels.use_backend(options.backend), torch.device(options.device):
        for number in options.lessons:
            title, function = LESSONS[number]
            print(f"{number}  {title}")
            print(textwrap.indent(cleandoc(function.__doc__), "    "))
            for name, figure in function().items():
                nested = isinstance(figure, list) and figure and isinstance(figure[0], list)
                lines = [readable(row) for row in figure] if nested else [readable(figure)]
                print(f"    {name}: " + ("\n" + " " * 8).join(["", *lines] if nested else lines))


if __name__ == "__main__":
    main()
