"""Any image, any time: nothing that was ever logged is missing, whatever order the releases come in."""

from __future__ import annotations

from itertools import pairwise

import pytest
from schema.environments import image, releases
from schema.journey import Journey

NEIGHBOURS = list(pairwise(releases()))
ENDS = (releases()[0], releases()[-1])
PAIRS = [
    pytest.param(*pair, id="-".join(pair), marks=() if pair in (ENDS, NEIGHBOURS[-1]) else pytest.mark.slow)
    for one, other in [ENDS, *NEIGHBOURS]
    for pair in ((one, other), (other, one))
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_there_and_back_twice_with_writes_at_every_stop_loses_nothing(
    on_the_way: Journey, first: str, second: str
) -> None:
    for version in (first, second, first, second):
        assert on_the_way.stop(image(version)) == []
    assert on_the_way.stop(image(first), write=False) == []
