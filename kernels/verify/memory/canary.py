"""A kernel that touches memory in every way once: so the memory checker knows that it sees everything."""

import triton
import triton.language as tl


@triton.jit
def canary_kernel(x_ptr, y_ptr):
    """One program: y[0] = x[0], then y[1] += 1 and y[2] compared and swapped, atomically.

    x_ptr: (1,) int32. y_ptr: (3,) int32. Bytes: one element loaded, one stored, two atomics.
    """
    tl.store(y_ptr, tl.load(x_ptr))
    tl.atomic_add(y_ptr + 1, 1)
    tl.atomic_cas(y_ptr + 2, 0, 1)
