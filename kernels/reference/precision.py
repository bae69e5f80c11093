"""What the references share: the precision, float64 or what a caller brings that holds more, and sums to a shape."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def wide(values: ArrayLike) -> Array:
    """Return the values in float64; in ``np.longdouble``, to judge float64 by, or ``np.complex128`` if they come so.

    Example:
        >>> wide([1, 2])
        array([1., 2.])
    """
    array = np.asarray(values)
    dtype: Any = array.dtype if array.dtype in (np.longdouble, np.complex128) else np.float64
    return np.asarray(array, dtype=dtype)


def sum_to(values: Array, shape: tuple[int, ...]) -> Array:
    """Add ``values`` up to a shape that broadcasts to theirs: the gradient of the broadcast."""
    values = values.sum(axis=tuple(range(values.ndim - len(shape))))
    repeated = tuple(axis for axis, size in enumerate(shape) if size != values.shape[axis])
    return np.asarray(values.sum(axis=repeated, keepdims=True))
