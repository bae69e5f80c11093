"""A pytest plugin for a device on which no kernel runs: an assertion that fails there says nothing.

A test that fails by an assertion counts as an expected failure, and so does what else wrong numbers bring about: a
comparison by torch.testing or gradcheck that does not come to one, since its own sums are wrong too; arithmetic on
the host; sizes and learning rates that are read from the device and refused; gradients that were to be refused. Any
other exception remains a failure, and so does one that was expected and not raised. Tensors are shown without their
numbers: how many of them are finite decides how long that takes, and is any number here. Hypothesis looks for no
smaller call that fails: it would fail or pass anew.
"""

import re
from collections.abc import Generator, Sequence
from traceback import extract_tb
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from torch.autograd.gradcheck import GradcheckError

torch.Tensor.__repr__ = lambda self, **_: f"tensor({tuple(self.shape)}, {self.dtype})"  # type: ignore[method-assign]

settings.register_profile("no values", phases=[Phase.generate], report_multiple_bugs=False)
settings.load_profile("no values")

# From optimizers, from sizes that overflow, and from pytest.raises.
MESSAGES = re.compile(r"^(Invalid|Nesterov) |overflow|SymInt|DID NOT RAISE FloatingPointError")


def by_value(error: BaseException) -> bool:
    """Whether a value raised ``error``, or each of those that it groups."""
    grouped: Sequence[BaseException] = getattr(error, "exceptions", ())
    if grouped:
        return all(by_value(one) for one in grouped)
    return (
        isinstance(error, (AssertionError, GradcheckError, ArithmeticError, RuntimeWarning))
        or MESSAGES.search(str(error)) is not None
        or any("torch/testing/" in str(frame.filename) for frame in extract_tb(error.__traceback__)[-1:])
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    report = yield
    excused = call.excinfo is not None and by_value(call.excinfo.value)
    if report.failed and excused and "tests/host" not in item.nodeid:  # whose tests look at no values
        report.outcome = "skipped"
        report.wasxfail = "reason: no kernel runs, and no value is right"
    return report
