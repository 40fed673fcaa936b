"""
Recordings of any shape that a file can have, for properties that hold for all of them.

Reading refuses spans that end before they begin, so no recording has any.
"""

from __future__ import annotations

from hypothesis import strategies as st

from gpuscope._data.batch import RowFlag

from .recordings import Stage, recording

TIMES = st.integers(0, 10**6)
INTERVALS = st.tuples(TIMES, TIMES).map(sorted).map(tuple)
ASKED = st.just((0, 0)) | st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted).map(tuple)
"""How many answers found work, and how many there were."""
STAGES = st.recursive(
    st.just([]),
    lambda inside: st.lists(
        st.builds(
            lambda interval, asked, **rest: Stage(
                start=interval[0], end=interval[1], had_work=asked[0], samples=asked[1], **rest
            ),
            INTERVALS,
            ASKED,
            name=st.sampled_from(["a", "b", "c"]),
            gpu=st.none() | INTERVALS,
            inside=inside,
            stream=st.integers(0, 1),
            device=st.integers(0, 1),
            process=st.sampled_from(["one", "two"]),
            thread=st.sampled_from(["one", "two"]),
            flags=st.sampled_from([0, 0, 0]) | st.integers(0, sum(RowFlag) - RowFlag.SHARED),
            attributes=st.dictionaries(
                st.sampled_from(["batch_size", "bytes", "input_shape", "é"]),
                st.none() | st.integers() | st.floats() | st.text(max_size=2) | st.lists(st.integers(), max_size=2),
                max_size=2,
            ),
        ),
        max_size=3,
    ),
    max_leaves=8,
)


@st.composite
def nested(draw, start=0, end=10**6, depth=0):
    """Draw stages that lie in order within a stretch of time, each with stages within it, as a program runs them."""
    points = sorted(draw(st.lists(st.integers(start, end), min_size=0, max_size=6 if depth < 3 else 0)))
    return [
        Stage(
            draw(st.sampled_from(["a", "b", "c"])),
            first,
            last,
            **dict(zip(("had_work", "samples"), draw(ASKED), strict=True)),
            gpu=draw(st.none() | st.integers(0, 10**6).map(lambda more, first=first: (first + 5, first + 5 + more))),
            inside=draw(nested(first, last, depth + 1)) if draw(st.booleans()) else [],
        )
        for first, last in zip(points[::2], points[1::2], strict=False)
    ]


@st.composite
def recordings(draw):
    """Draw a recording of requests that are alike but for their lengths."""
    stages = draw(STAGES | nested())
    count, every = draw(st.integers(1, 15)), draw(st.sampled_from([10**5, 10**6]))
    return recording(*(stage.shifted(every * number) for number in range(count) for stage in stages))
