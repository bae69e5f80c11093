"""The gradient steps of training as fused Triton kernels, each with a NumPy reference and a gradient check."""

from .backends import backend_for as backend_for
from .backends import use_backend as use_backend

__version__ = "0.1.0"
__all__ = ["backend_for", "use_backend"]
