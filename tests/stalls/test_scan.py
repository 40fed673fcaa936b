"""Which stages make no progress: the watch in C and its twin in Python find the same."""

from __future__ import annotations

import pytest


def test_a_stage_that_stays_open_is_found_once(watched):
    """When its limit is over and not before; when it ends, it is said that it goes on."""
    stage = watched.begin("infer")
    assert [watched.look(second) for second in (1, 9.9, 10.1, 11, 100)] == [[], [], ["infer"], [], []]
    watched.end(stage)
    assert watched.look(101) == ["+infer"]
    assert watched.look(200) == []


def test_what_is_found_says_where_and_since_when(watched):
    """Its ids, thread, beginning and limit."""
    stage = watched.begin("infer")
    watched.look(9.75)
    (found,) = watched.found(10.2)
    assert (found.trace_high, found.trace_low, found.span_id) == (5, 6, stage.span_id)
    assert (found.thread, found.thread_name, found.site_name) == (7, b"worker", b"infer")
    assert (found.start_ns, found.active_ns, found.limit_ns) == (stage.start_ns, stage.start_ns, 10**10)
    assert (found.now_ns, found.watch, found.written) == (watched.now_ns, 0, 0)


def test_stages_that_end_in_time_are_never_found(watched):
    """However many there are, and although the ring comes round between two looks."""
    for second in range(1, 100):
        watched.run("infer", times=700)
        assert watched.look(second) == []


def test_of_stages_inside_one_another_the_innermost_is_named(watched):
    """One stall, one name."""
    request = watched.begin("request")
    infer = watched.begin("infer", request)
    watched.begin("copy", infer)
    watched.look(1)
    assert watched.look(10.5) == ["copy"]
    assert watched.look(50) == []


def test_a_stage_in_which_others_begin_and_end_makes_progress(watched):
    """A loop around a whole service may be open for days."""
    loop = watched.begin("loop")
    for second in range(5, 200, 5):
        request = watched.begin("request", loop)
        watched.run("infer", request)
        watched.end(request)
        assert watched.look(second) == []
    assert watched.look(199.5) == []
    assert watched.look(201) == ["loop"]


def test_a_stage_inside_that_ends_between_two_looks_is_progress(watched):
    """Also where its outer stage has been seen before, and the ring has come round meanwhile."""
    loop = watched.begin("loop")
    watched.look(9)
    watched.run("infer", loop, times=1000)
    assert watched.look(18) == []
    assert watched.look(19.5) == ["loop"]


def test_after_the_inner_stage_the_outer_one_may_stall(watched):
    """These are two stalls, because there was progress between them."""
    request = watched.begin("request")
    infer = watched.begin("infer", request)
    watched.look(1)
    assert watched.look(11) == ["infer"]
    watched.end(infer)
    assert watched.look(12) == ["+infer"]
    assert watched.look(22) == ["request"]


def test_each_stalled_stage_of_many_is_found(watched):
    """Sibling stages of one request, and others."""
    request = watched.begin("request")
    for name in ("a", "b"):
        watched.begin(name, request)
    watched.begin("c")
    watched.look(1)
    assert sorted(watched.look(10.5)) == ["a", "b", "c"]


def test_the_first_calls_of_a_stage_are_excused(make_watched):
    """And what is inside them, and what is around them: it waits for them."""
    watched = make_watched(warmup=2)
    watched.run("request", times=5)
    for _ in range(2):
        request = watched.begin("request")
        first = watched.begin("compile", request)
        watched.begin("inside", first)
        assert watched.look(watched.now_s + 1) == []
        assert watched.look(watched.now_s + 50) == []
    request = watched.begin("request")
    watched.begin("compile", request)
    watched.look(watched.now_s + 1)
    assert watched.look(watched.now_s + 10.5) == ["compile"]


def test_a_name_may_have_limits_of_its_own(watched):
    """Shorter, longer, none; and warm-up calls of its own."""
    for name, limit_ns, warmup in (("short", 10**9, -1), ("long", 10**11, -1), ("never", -1, -1), ("warm", 0, 5)):
        watched.watch.limit(watched.ring.site(watched.site(name)), limit_ns, warmup)
        watched.begin(name)
    watched.begin("usual")
    watched.look(0.5)
    assert watched.look(1.5) == ["short"]
    assert watched.look(10.5) == ["usual"]
    assert watched.look(21) == []
    assert [name for second in range(22, 105) for name in watched.look(second)] == ["long"]


def test_excuses_begin_anew(watched):
    """After a compilation the time begins again."""
    watched.begin("infer")
    watched.look(9)
    watched.watch.excuse(watched.now_ns)
    assert watched.look(18) == []
    assert watched.look(19.5) == ["infer"]


def test_a_process_that_was_stopped_has_not_stalled(watched):
    """By a signal, by its machine's sleep: no look for longer than a limit is none of the stage's."""
    watched.begin("infer")
    watched.look(1)
    assert watched.found(500) == []
    assert [watched.look(500 + second) for second in (5, 8, 9.5)] == [[], [], ["infer"]]


def test_stages_that_run_keep_their_places(make_watched):
    """A ring that is full of others still shows the one that hangs."""
    watched = make_watched(slots=64)
    watched.begin("infer")
    for second in range(1, 10):
        watched.run("other", times=100)
        watched.look(second)
        watched.run("other", times=1000)
    assert watched.look(10.5) == ["infer"]


def test_nothing_is_read_of_a_ring_that_is_closed(watched):
    """The mapping may be gone."""
    watched.begin("infer")
    watched.look(1)
    watched.ring.close()
    assert watched.look(50) in ([], ["infer"])  # The twin keeps what it knew.
    del watched.ring


def test_many_stalls_at_once_are_all_found(watched):
    """What finds no room in one look comes in a later one, begins and ends alike; nothing twice."""
    stages = [watched.begin(f"stage {number}") for number in range(100)]
    names = {f"stage {number}" for number in range(100)}
    watched.look(1)
    found = watched.look(13)
    assert len(found) == 100
    assert set(found) == names
    for each in stages:
        watched.end(each)
    gone = watched.look(16)
    assert len(gone) == 100
    assert set(gone) == {f"+{name}" for name in names}
    assert watched.look(100) == []


def test_stalls_that_found_no_room_go_on_unsaid(watched):
    """If they end before the next look nobody was told of them, and nobody is told that they go on."""
    stages = [watched.begin(f"stage {number}") for number in range(100)]
    watched.look(9.9)
    first = watched.found(10.1)
    for each in stages:
        watched.end(each)
    assert len(watched.look(13)) == len(first)
    assert watched.look(100) == []


def test_a_stages_own_warm_up_holds_at_once(make_watched):
    """From its first call on: longer than the general one, shorter, or of all that is in it."""
    watched = make_watched(warmup=2)
    watched.site("long").warmup, watched.site("none").warmup, watched.site("all").warms_up = 5, 0, True
    watched.begin("none")
    watched.run("long", times=4)
    watched.begin("long")
    watched.run("all", times=50)
    watched.begin("inside", watched.begin("all"))
    watched.look(1)
    assert watched.look(15) == ["none"]
    watched.begin("long")
    watched.look(16)
    assert watched.look(30) == ["long"]


def test_what_was_said_of_one_ring_does_not_hold_for_the_next(make_watched):
    """Numbers of stages are the ring's: the next ring gives them to others."""
    watched, other = make_watched(), make_watched()
    watched.watch.limit(watched.ring.site(watched.site("a")), 10**9, 1000)
    assert watched.watch.follow(other.ring)
    watched.ring = other.ring
    watched.begin("b")
    watched.look(1)
    assert watched.look(5) == []
    assert watched.look(10.5) == ["b"]


@pytest.mark.parametrize("stages", [4, 300])
def test_more_than_the_table_holds_is_no_failure(make_watched, stages):
    """Deep nesting: the innermost is named."""
    watched = make_watched(slots=4096)
    at = None
    for number in range(stages):
        at = watched.begin(f"stage {number}", at)
    watched.look(1)
    assert watched.look(10.5) == [f"stage {stages - 1}"]
