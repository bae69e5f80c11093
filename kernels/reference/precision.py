"""The precision of the references: float64, or what a caller brings that is wider."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def wide(values: ArrayLike) -> Array:
    """The values in float64; in ``np.longdouble`` if they come so, to judge float64 results by.

    Example:
        >>> wide([1, 2])
        array([1., 2.])
    """
    array = np.asarray(values)
    dtype: Any = np.longdouble if array.dtype == np.longdouble else np.float64
    return np.asarray(array, dtype=dtype)
