"""The ring of the flight recorder: what is written is read, by both twins, and what is torn is left out."""

from __future__ import annotations

import signal
import threading

import pytest

from gpuscope._data import flight as layout
from gpuscope._data.native import StageRecord, native
from gpuscope._data.record import Site, ThreadInfo
from gpuscope._flight.ring import RingInPython
from gpuscope.analysis._reading.flight_ring import NotAFlightError, durations_ns, have_ended, numbers_of, read_flight

from .conftest import Fields, Ring


def names_in(found):
    """The names of the stages, in the order of their beginnings."""
    return [found.names[number] for number in numbers_of(found.stages).tolist()]


class DeadlineError(Exception):
    """What a program's signal handler raises."""


@pytest.mark.parametrize("what", ["begin", "end"])
def test_what_a_signal_handler_raises_reaches_the_program(site, make_ring, what, monkeypatch):
    """It is no fault of the ring's, in Python, where a handler may run within; a second call ends the stage."""
    ring = make_ring()
    if not isinstance(ring.ring, RingInPython):
        pytest.skip("no handler runs within the parts in C")
    record = ring.begin(site) if what == "end" else ring.record(site)

    def handler(number, frame):
        raise DeadlineError

    before = signal.signal(signal.SIGUSR1, handler)
    name = "_is_of" if what == "end" else "_write"
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ring.ring, name, lambda *_: signal.raise_signal(signal.SIGUSR1))
            with pytest.raises(DeadlineError):
                ring.ring.begin(record) if what == "begin" else ring.end(record)
    finally:
        signal.signal(signal.SIGUSR1, before)
    if what == "end":
        ring.end(record)
        assert have_ended(ring.read().stages).all()


def test_a_stage_is_read_as_it_was_written(make_ring, site):
    """Ids, parent, times, thread and name; one that has not ended has no duration."""
    ring = make_ring()
    outer = ring.begin(Site("request", {}), parent_id=9, remote=True)
    ring.end(ring.begin(site, outer), took=250)
    found = ring.read()
    assert names_in(found) == ["request", "infer"]
    assert found.stages[:, :4].tolist() == [[5, 6, 101, 9], [5, 6, 102, 101]]
    assert have_ended(found.stages).tolist() == [False, True]
    assert durations_ns(found.stages).tolist() == [0, 250]
    assert found.threads == {7: "MainThread"}
    assert (found.torn, len(found.marks)) == (0, 0)


def test_a_stage_has_one_record(make_ring, site):
    """Its end is written where its beginning stands."""
    ring = make_ring(slots=4)
    for _ in range(4):
        ring.run(site)
    assert len(ring.read().stages) == 4


def test_the_newest_are_kept(make_ring, site):
    """When the ring comes round the oldest make room, lap after lap."""
    ring = make_ring(slots=16)
    last = [ring.run(site).span_id for _ in range(1000)][-16:]
    found = ring.read()
    assert (found.stages[:, 2].tolist(), found.torn) == (last, 0)


def test_what_runs_is_stepped_over(make_ring, site):
    """A stage that hangs is still there when the ring has come round many times, and ends where it stands."""
    ring = make_ring(slots=32)
    hangs = [ring.begin(Site("hangs", {})) for _ in range(3)]
    for _ in range(500):
        ring.run(site)
    found = ring.read()
    assert (names_in(found)[:3], len(found.stages)) == (["hangs"] * 3, 32)
    for record in hangs:
        ring.end(record, took=10**9)
    found = ring.read()
    assert (durations_ns(found.stages)[:3].tolist(), have_ended(found.stages).all()) == ([10**9] * 3, True)


def test_a_ring_full_of_what_runs_takes_more(make_ring, site):
    """After 16 of them the next is overwritten; when that stage ends, it has a record again."""
    ring = make_ring(slots=20)
    running = [ring.begin(site) for _ in range(20)]
    newest = ring.begin(site)
    found = ring.read()
    assert newest.span_id in found.stages[:, 2].tolist()
    assert len(found.stages) == 20
    (lost,) = {record.span_id for record in running} - {*found.stages[:, 2].tolist()}
    for record in running:
        ring.end(record)
    assert lost in ring.read().stages[:, 2].tolist()


def test_an_end_without_a_beginning_is_no_record(make_ring, site):
    """A stage that began before there was a ring, or whose end comes twice."""
    ring = make_ring()
    ring.end(ring.record(site))
    record = ring.run(site)
    ring.end(record, took=9999)
    assert durations_ns(ring.read().stages).tolist() == [500]


def test_the_end_says_whether_an_exception_left(make_ring, site):
    """The third number of states of an end."""
    ring = make_ring()
    inner = ring.begin(site, ring.begin(site))
    ring.end(inner, error=KeyError())
    found = ring.read()
    assert (found.stages[:, 5] & 2).tolist() == [0, 2]


@pytest.mark.parametrize("took", [999, 1000])
def test_a_slow_request_asks_for_a_dump(make_ring, site, took):
    """And says so in the ring; stages inside do not, and neither does one below the limit."""
    ring = make_ring(slow_ns=1000)
    outer = ring.begin(site)
    ring.end(ring.begin(site, outer), took=5000)
    assert ring.ring.take_wanted() == 0
    ring.end(outer, took=took)
    wanted = layout.SLOW if took == 1000 else 0
    assert ring.ring.take_wanted() == wanted
    assert ring.ring.take_wanted() == 0
    marks = ring.read().marks
    assert marks[:, [2, 3, 5]].tolist() == ([[outer.span_id, layout.SLOW, took]] if wanted else [])


@pytest.mark.parametrize(("error", "wanted"), [(ValueError(), layout.FAILED), (KeyboardInterrupt(), 0), (None, 0)])
def test_an_exception_that_leaves_a_request_asks_for_a_dump(make_ring, site, error, wanted):
    """Not one that only stops the program, or cancels a task."""
    ring = make_ring()
    ring.end(ring.begin(site), error=error)
    assert ring.ring.take_wanted() == wanted


def test_any_change_of_a_record_is_noticed(make_ring, site):
    """Whichever byte is another, but for the end, which is one write: the record is left out and counted."""
    ring = make_ring(slots=2)
    ring.run(site)
    for at in [*range(layout.END_AT), *range(layout.END_AT + 8, layout.SLOT_BYTES)]:
        place = layout.RING_AT + at
        before, ring.view[place] = ring.view[place], ring.view[place] ^ 0x41
        found = ring.read()
        assert (len(found.stages), found.torn) == (0, 1), at
        ring.view[place] = before
    assert len(ring.read().stages) == 1


def test_a_record_without_its_word_is_torn(make_ring, site):
    """The word is what is written last, and what goes first when a slot is used again."""
    ring = make_ring(slots=4)
    ring.run(site)
    layout.NUMBER.pack_into(ring.view, layout.RING_AT + 56, 0)
    found = ring.read()
    assert (len(found.stages), found.torn) == (0, 1)


def test_names_are_cut_between_letters(make_ring):
    """A long name keeps what there is room for; one that is not a text of UTF-8 gets a question mark."""
    ring = make_ring()
    ring.run(Site("ü" * 100, {}))
    ring.run(Site("\ud800", {}))
    assert names_in(ring.read()) == ["ü" * 62, "?"]


def test_names_without_room_share_one(make_ring):
    """After 4,095 names the others are `(other stages)`: number 0."""
    ring = make_ring(slots=8)
    sites = [Site(f"stage {number}", {}) for number in range(5000)]
    for each in sites:
        ring.run(each)
    assert numbers_of(ring.read().stages).tolist() == [0] * 8
    ring.run(sites[3])
    assert numbers_of(ring.read().stages)[-1] == 4


def test_threads_come_and_go(make_ring, site):
    """The names of the newest 512 are known."""
    ring = make_ring(slots=8)
    for ident in range(1, 2001):
        ring.run(site, thread=ThreadInfo(ident, f"worker-{ident}"))
    found = ring.read()
    assert [found.threads[ident] for ident in found.stages[:, 6].tolist()] == [f"worker-{n}" for n in range(1993, 2001)]
    assert len(found.threads) == 512


def test_many_threads_write_at_once(make_ring):
    """Each record is whole, and belongs to whom it says."""
    ring = make_ring(slots=4096)
    sites = [Site(f"of {number}", {}) for number in range(8)]
    start = threading.Barrier(8)

    def work(number):
        thread = ThreadInfo(1000 + number, f"worker-{number}")
        start.wait()
        for step in range(300):
            record = ring.record(sites[number], thread=thread, start=1 + step)
            record.span_id = number << 32 | step
            ring.ring.begin(record)
            ring.end(record, took=number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    found = ring.read()
    numbers = (found.stages[:, 2] >> 32).tolist()
    assert (len(found.stages), found.torn) == (2400, 0)
    assert len(set(found.stages[:, 2].tolist())) == 2400
    assert names_in(found) == [f"of {number}" for number in numbers]
    assert durations_ns(found.stages).tolist() == numbers


def test_the_collector_takes_no_place_of_stages(make_ring, site):
    """However much it writes at once, and however late."""
    ring = make_ring(slots=8)
    for _ in range(8):
        ring.run(site)
    ring.ring.write(b"".join(layout.SLOT.pack(1, 2, 3, n, 5, 6, 7, layout.RESOLVED) for n in range(100)))
    found = ring.read()
    assert (len(found.stages), found.resolved[:, 3].tolist()) == (8, [96, 97, 98, 99, 92, 93, 94, 95])


def test_a_closed_ring_takes_nothing(make_ring, site):
    """Neither beginnings nor ends nor records of the collector, and nothing is raised."""
    ring = make_ring()
    record = ring.begin(site)
    ring.ring.close()
    ring.end(record)
    ring.begin(site)
    ring.ring.write(bytes(64))
    assert len(ring.read().stages) == 1


def test_a_ring_needs_room(make_ring):
    """Fewer than two records are none."""
    with pytest.raises(ValueError, match="no room"):
        make_ring(slots=0)


@pytest.mark.skipif(native is None, reason="needs both twins")
def test_twins_write_the_same_bytes(tmp_path):
    """Stages, ends, marks, names, laps and what the collector writes."""
    written = []
    for writer, kind in ((RingInPython, Fields), (native.FlightRing, StageRecord)):
        ring = Ring(writer, kind, 24, 400, tmp_path)
        sites = [Site(name, {}) for name in ("a", "b", "ü" * 80)]
        held = []
        for number in range(200):
            outer = ring.begin(
                sites[number % 3], parent_id=number % 2, remote=bool(number % 4), thread=ThreadInfo(number, "t")
            )
            ring.end(ring.begin(sites[0], outer), error=ValueError() if number % 7 == 0 else None)
            if number % 50 == 0:
                held.append(outer)
            else:
                ring.end(outer, took=number * 5)
            ring.ring.write(layout.SLOT.pack(1, 2, 3, number, 5, 6, 7, layout.RESOLVED | 0x85 << 4 | 2 << 12))
        written.append((bytes(ring.view), ring.ring.take_wanted()))
    assert written[0] == written[1]


@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(layout.RING_AT + 64)])
def test_what_is_no_ring_is_refused(tmp_path, content):
    """Another file, or one that its process did not finish."""
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(NotAFlightError):
        read_flight(tmp_path / "file")
