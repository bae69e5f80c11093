"""Checks for gradients and kernels that need no GPU.

``gradient/`` checks a gradient and names its fault, ``memory/`` watches the memory accesses of interpreted kernels,
``ops`` checks the ops of this package, ``tolerance`` is the tolerance policy of all comparisons.
"""

from .gradient.check import gradcheck as gradcheck
from .gradient.report import Diagnosis as Diagnosis
from .gradient.report import GradientError as GradientError
from .gradient.report import GradientReport as GradientReport
from .memory.check import memory_check as memory_check
from .memory.interpreter import InterpreterChangedError as InterpreterChangedError
from .memory.report import Fault as Fault
from .memory.report import MemoryFaultError as MemoryFaultError
from .memory.report import MemoryReport as MemoryReport
from .memory.report import Traffic as Traffic
from .ops import KernelReport as KernelReport
from .ops import Verdict as Verdict
from .ops import kernels as kernels

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
