from __future__ import annotations

import pytest
from model_oracle import NAMES, WITH_NEURONS, Case, case


@pytest.fixture(params=list(NAMES))
def any_case(request: pytest.FixtureRequest) -> Case:
    return case(request.param)


@pytest.fixture(params=WITH_NEURONS)
def neuron_case(request: pytest.FixtureRequest) -> Case:
    return case(request.param)
