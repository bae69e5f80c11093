"""Checks for gradients and kernels that need no GPU."""

from .gradient import gradcheck as gradcheck
from .interpreter import InterpreterChangedError as InterpreterChangedError
from .kernel_check import KernelReport as KernelReport
from .kernel_check import Verdict as Verdict
from .kernel_check import kernels as kernels
from .memory import Fault as Fault
from .memory import MemoryFaultError as MemoryFaultError
from .memory import MemoryReport as MemoryReport
from .memory import Traffic as Traffic
from .memory import memory_check as memory_check
from .report import Diagnosis as Diagnosis
from .report import GradientError as GradientError
from .report import GradientReport as GradientReport

__all__ = [
    "Diagnosis",
    "Fault",
    "GradientError",
    "GradientReport",
    "InterpreterChangedError",
    "KernelReport",
    "MemoryFaultError",
    "MemoryReport",
    "Traffic",
    "Verdict",
    "gradcheck",
    "kernels",
    "memory_check",
]
