"""torch.autograd's own checks in float64: reverse, forward, batched, second order, for every mask of inputs.

gradcheck's tolerances are its defaults. The fallback is checked entry by entry, the interpreted kernels along
random directions (``fast_mode``) and without undefined gradients, which never reach a kernel.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ..cases import CASES, Case, label, on_both_backends


def check(
    function: Callable[..., Tensor], tensors: list[Tensor], mask: tuple[bool, ...], interpreted: bool
) -> None:
    arguments = [tensor.requires_grad_(needed) for tensor, needed in zip(tensors, mask, strict=True)]
    assert gradcheck(
        function,
        arguments,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=not interpreted,
        fast_mode=interpreted,
    )
    assert gradgradcheck(
        function,
        arguments,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
        check_undefined_grad=not interpreted,
        fast_mode=interpreted,
    )


@pytest.mark.parametrize(
    ("backend", "case", "mask"),
    on_both_backends(
        [(case, mask) for case in CASES for mask in case.masks()],
        triton=lambda case, mask: [
            (case.op, case.options.get("reduction")),
            *((case.op, name) for name, needed in zip(case.shapes, mask, strict=True) if needed),
        ],
    ),
    ids=label,
    indirect=["backend"],
)
def test_every_derivative(backend: str, device: torch.device, case: Case, mask: tuple[bool, ...]) -> None:
    check(case.ours, case.arguments(device=device), mask, interpreted=backend == "triton")
