"""Checks for gradients and kernels that need no GPU."""
