"""``name`` runs a test for each of the optimizers."""

import pytest

from .optimizers import NAMES


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param
