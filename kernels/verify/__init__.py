"""Checks for gradients and kernels that need no GPU."""

from .gradient import gradcheck as gradcheck
from .report import Diagnosis as Diagnosis
from .report import GradientError as GradientError
from .report import GradientReport as GradientReport

__all__ = ["Diagnosis", "GradientError", "GradientReport", "gradcheck"]
