"""What the tests share: the dtypes, the awkward sizes, the tolerance policy as an assertion."""

import numpy as np
import torch
from gradkernels.verify.tolerance import compare
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, 3, 63, 65, 1000, 1023)


def assert_matches(
    ours: Tensor,
    theirs: Tensor,
    reference: np.ndarray,
    what: str = "result",
    scale: np.ndarray | None = None,
) -> None:
    """Assert that ``ours`` is within the tolerance policy (gradkernels.verify.tolerance)."""
    comparison = compare(ours, theirs, reference, scale)
    assert comparison.passed, f"{what}: {comparison}"


def to_numpy(tensor: Tensor | None) -> np.ndarray | None:
    """The values as float64, exactly."""
    return None if tensor is None else tensor.detach().to("cpu", torch.float64).numpy()
