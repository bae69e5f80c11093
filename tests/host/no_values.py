"""A pytest plugin for a device on which no kernel runs: an assertion that fails there says nothing.

A test that fails by an assertion counts as an expected failure, and so does a comparison by torch.testing that does not
come to one: its own sums of what differs are wrong too, and one by torch's gradcheck. Any other exception remains a
failure, and so does one that was expected and not raised. Tensors are shown without their numbers: how many of them are
finite decides how long that takes, and is any number here.
"""

from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

torch.Tensor.__repr__ = lambda self, **_: f"tensor({tuple(self.shape)}, {self.dtype})"  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    report = yield
    raised = call.excinfo
    asserted = raised is not None and (
        raised.errisinstance((AssertionError, GradcheckError))
        or "torch/testing/" in str(raised.traceback[-1].path)
    )
    if report.failed and asserted and "tests/host" not in item.nodeid:  # whose tests look at no values
        report.outcome = "skipped"
        report.wasxfail = "reason: no kernel runs, and no value is right"
    return report
