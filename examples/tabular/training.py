"""The training loop, and its two contestants."""

import hashlib
import math
import time
from typing import ClassVar

import gradkernels
import numpy as np
import torch
from gradkernels import FusedAdam, FusedAdamW, FusedSGD, linear_mse_loss, linear_mse_loss_and_grad
from gradkernels.verify import GradientReport, gradcheck
from torch import Tensor
from torch.nn import functional
from torch.optim import lr_scheduler

from .preparing import Data
from .settings import Settings


class Training:
    """A linear model with its optimizer and schedule, and what each epoch came to."""

    DTYPE: ClassVar = torch.float32
    LINEAR: ClassVar[type[torch.nn.Linear]]
    OPTIMIZERS: ClassVar[dict[str, type[torch.optim.Optimizer]]]

    def __init__(self, settings: Settings, data: Data) -> None:
        self.settings = settings
        self.train_x, self.train_y, self.validation_x, self.validation_y = (
            torch.as_tensor(part, dtype=self.DTYPE, device=settings.device)
            for part in (data.train_x, data.train_y, data.validation_x, data.validation_y)
        )
        self.batch_size = settings.batch_size or max(64, len(self.train_x) // 256)
        self.model = self.LINEAR(
            data.train_x.shape[1], data.train_y.shape[1], device=settings.device, dtype=self.DTYPE
        )
        for parameter in self.model.parameters():
            torch.nn.init.zeros_(parameter)
        options = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        if settings.optimizer == "sgd":
            options["momentum"] = settings.momentum
        self.optimizer = self.make_optimizer(options)
        self.schedule = None
        if settings.schedule == "cosine":
            self.schedule = lr_scheduler.LambdaLR(self.optimizer, self.cosine)
        elif settings.schedule == "plateau":
            self.schedule = lr_scheduler.ReduceLROnPlateau(self.optimizer, factor=0.1, patience=5)
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0

    def cosine(self, epoch: int) -> float:
        """Return a factor that falls from 1 to a thousandth between one restart and the next."""
        ends = [0, *self.settings.restarts_at(), self.settings.epochs]
        start = max(end for end in ends[:-1] if end <= epoch)
        end = min((end for end in ends if end > epoch), default=epoch + 1)
        return 0.001 + 0.999 * (1 + math.cos(math.pi * (epoch - start) / (end - start))) / 2

    def make_optimizer(self, options: dict[str, float]) -> torch.optim.Optimizer:
        raise NotImplementedError

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One update on a mini-batch. Returns the loss before it, and the gradient's norm before clipping."""
        raise NotImplementedError

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def check_guard(self) -> None:
        """Raise FloatingPointError if a step of the last epoch met a gradient that is not finite."""

    @torch.no_grad()
    def predict(self, x: np.ndarray) -> np.ndarray:
        x = torch.as_tensor(x, dtype=self.DTYPE, device=self.settings.device)
        return self.model(x).cpu().double().numpy()

    def epoch(self) -> dict[str, float]:
        """One pass over the training rows in mini-batches, then the validation loss and the schedule."""
        started = time.perf_counter()
        rate = self.optimizer.param_groups[0]["lr"]
        rows = len(self.train_x)
        # The order depends on the seed and the epoch alone: nothing of it has to be kept for --resume.
        order = np.random.default_rng([self.settings.seed, len(self.history)]).permutation(rows)
        shuffled = torch.from_numpy(order).to(self.settings.device)
        # Shuffled once, on the device: each mini-batch is then a view, and costs no copy.
        batches = (part[shuffled].split(self.batch_size) for part in (self.train_x, self.train_y))
        losses = []
        for x, y in zip(*batches, strict=True):
            loss, norm = self.step(x, y)
            losses.append(loss.detach())
        self.check_guard()
        losses[-1] = losses[-1] * (len(x) / self.batch_size)  # the last batch may be shorter
        with torch.no_grad():
            validation_loss = self.loss(self.validation_x, self.validation_y).item()
        train_loss = torch.stack(losses).sum().item() * self.batch_size / rows
        if not math.isfinite(train_loss + validation_loss):
            raise FloatingPointError(f"train loss {train_loss}, validation loss {validation_loss}")
        if self.settings.schedule == "plateau":
            self.schedule.step(validation_loss)
        elif self.schedule is not None:
            self.schedule.step()
        self.seconds += time.perf_counter() - started
        self.history.append(
            {
                "epoch": len(self.history) + 1,
                "train_loss": train_loss,
                "validation_loss": validation_loss,
                "gradient_norm": norm.item(),
                "lr": rate,
            }
        )
        return self.history[-1]

    def state(self) -> dict[str, object]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule and self.schedule.state_dict(),
            "history": self.history,
            "seconds": self.seconds,
        }

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.history, self.seconds = state["history"], state["seconds"]
        if (
            self.settings.schedule == "cosine"
        ):  # its next rate is another if the run goes on for longer than planned
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.lr * self.cosine(len(self.history))

    def identity(self) -> str:
        """Return a short hash of the weights' bits."""
        parts = [parameter.detach().cpu().numpy().tobytes() for parameter in self.model.parameters()]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


class Ours(Training):
    """With gradkernels: one pass gives the loss and its gradients, the optimizer's step clips and guards."""

    LINEAR = gradkernels.nn.Linear
    OPTIMIZERS: ClassVar = {"adam": FusedAdam, "adamw": FusedAdamW, "sgd": FusedSGD}

    def make_optimizer(self, options: dict[str, float]) -> torch.optim.Optimizer:
        # "skip" leaves out a step whose gradient is not finite without a wait for the device.
        return self.OPTIMIZERS[self.settings.optimizer](
            self.model.parameters(), **options, max_norm=self.settings.max_norm, on_nonfinite="skip"
        )

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return linear_mse_loss(x, self.model.weight, y, self.model.bias)

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = self.model.weight, self.model.bias
        loss, (_, weight.grad, _, bias.grad) = linear_mse_loss_and_grad(x, weight, y, bias)
        self.optimizer.step()
        return loss, self.optimizer.grad_norm

    def check_guard(self) -> None:
        if skipped := self.optimizer.steps_skipped:
            raise FloatingPointError(
                f"the gradient was not finite in {skipped} steps, which changed no weight"
            )


class PlainTorch(Training):
    """The same in plain torch."""

    LINEAR = torch.nn.Linear
    OPTIMIZERS: ClassVar = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}

    def make_optimizer(self, options: dict[str, float]) -> torch.optim.Optimizer:
        return self.OPTIMIZERS[self.settings.optimizer](self.model.parameters(), **options)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(self.model(x), y)

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        loss = self.loss(x, y)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_norm)
        self.optimizer.step()
        return loss, norm


def check_gradients(training: Training) -> GradientReport:
    """Hold the loss's gradients, on a few rows and at random weights, against centered differences."""
    rng = np.random.default_rng(0)
    weight, bias = (
        torch.tensor(rng.normal(size=parameter.shape), dtype=parameter.dtype, device=parameter.device)
        for parameter in training.model.parameters()
    )
    inputs = (training.train_x[:32], weight.requires_grad_(), training.train_y[:32], bias.requires_grad_())

    def gradient(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        _, (_, grad_weight, _, grad_bias) = linear_mse_loss_and_grad(*inputs)
        return grad_weight, grad_bias

    return gradcheck(linear_mse_loss, inputs, gradient=gradient)
