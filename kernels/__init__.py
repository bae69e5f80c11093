"""The gradient steps of training as fused Triton kernels, each with a NumPy reference and a gradient check."""

import importlib as _importlib

from . import layers as layers
from . import nn as nn
from .adam import FusedAdam as FusedAdam
from .adam import FusedAdamW as FusedAdamW
from .backends import backend_for as backend_for
from .backends import use_backend as use_backend
from .linear_mse import linear_mse_loss as linear_mse_loss
from .linear_mse import linear_mse_loss_and_grad as linear_mse_loss_and_grad
from .linear_mse_fit import linear_mse_fit as linear_mse_fit
from .matmul import linear as linear
from .matmul import matmul as matmul
from .mse import mse_loss as mse_loss
from .mse import mse_loss_and_grad as mse_loss_and_grad
from .sgd import FusedSGD as FusedSGD
from .warmup import warmup as warmup

__version__ = "0.2.0"
__all__ = [
    "FusedAdam",
    "FusedAdamW",
    "FusedSGD",
    "backend_for",
    "layers",
    "linear",
    "linear_mse_fit",
    "linear_mse_loss",
    "linear_mse_loss_and_grad",
    "matmul",
    "mse_loss",
    "mse_loss_and_grad",
    "nn",
    "use_backend",
    "warmup",
]


def __getattr__(name: str) -> object:
    """Import a subpackage that most programs do without when it is first asked for."""
    if name in ("reference", "verify"):
        return _importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
