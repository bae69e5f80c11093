"""The gradient check: ``check`` compares, ``diagnosis`` names the fault, by experiments of ``suspect`` and ``tape``."""

from .check import gradcheck as gradcheck
