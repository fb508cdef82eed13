"""Model specifications: input sizes that a model supports, and the closest of them."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import assume, given
from hypothesis import strategies as st

from models.spec import Sizes


def members(sizes: Sizes) -> Iterator[int]:
    return (size for size in range(1, sizes.maximum + 1) if size in sizes)


@given(multiple=st.integers(1, 70), minimum=st.integers(1, 200), span=st.integers(0, 500), size=st.integers(-100, 2000))
def test_the_nearest_sizes_work_and_nothing_closer_does(multiple: int, minimum: int, span: int, size: int) -> None:
    sizes = Sizes(multiple_of=multiple, minimum=minimum, maximum=minimum + span)
    working = list(members(sizes))
    assume(working)
    nearest = sizes.nearest(size)
    assert 1 <= len(nearest) <= 2 and set(nearest) <= set(working) and list(nearest) == sorted(set(nearest))
    assert min(abs(found - size) for found in nearest) == min(abs(found - size) for found in working)
    if size in sizes:
        assert nearest == (size,)
