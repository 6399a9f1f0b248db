"""Both trainers that train on packed blocks."""

import pytest

from .helpers import TRAINERS, MakeTrainer


@pytest.fixture(params=list(TRAINERS.values()), ids=list(TRAINERS))
def make_trainer(request: pytest.FixtureRequest) -> MakeTrainer:
    make: MakeTrainer = request.param
    return make
