"""Upgrades and rollbacks between any two releases, in any order, lose nothing that was logged."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.schema.environments import image, releases
from tests.schema.journey import Journey

NEIGHBOURS = list(pairwise(releases()))
ENDS = (releases()[0], releases()[-1])
PAIRS = [
    pytest.param(*pair, id="-".join(pair), marks=() if pair == NEIGHBOURS[-1] else pytest.mark.slow)
    for one, other in [ENDS, *NEIGHBOURS]
    for pair in ((one, other), (other, one))
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_round_trips_with_writes_at_every_stop_lose_nothing(on_the_way: Journey, first: str, second: str) -> None:
    for version in (first, second, first, second):
        assert on_the_way.stop(image(version)) == []
    assert on_the_way.stop(image(first), write=False) == []
