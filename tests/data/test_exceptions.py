"""What is kept of an exception: plain, bounded, with what it was raised from; no code of the program runs for it."""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref

import pytest

from gpuscope import stage
from gpuscope._data.plain.exceptions import exception_info, facts_of, size_of_exception
from gpuscope._data.plain.tracebacks import text_of, traceback_of
from gpuscope._data.record import LEFT_OUT, ExceptionInfo

groups = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no groups")
FEW = 8
"""Exceptions that are kept of one failure."""


class Untouchable:
    """Anything that the program may have put into an exception."""

    def fail(self, *_):
        """Stand for whatever may wait for the GPU."""
        raise AssertionError("ran")

    __repr__ = __str__ = __len__ = __iter__ = __bool__ = __eq__ = __hash__ = __getattr__ = fail


class Hostile(Exception):
    """Runs code of the program's wherever it is asked."""

    def fail(self, *_):
        """Run."""
        raise AssertionError("ran")

    __repr__ = __str__ = __bool__ = __eq__ = __hash__ = fail
    __cause__ = __context__ = __traceback__ = __notes__ = __suppress_context__ = property(fail)


def raised(error, cause=None):
    """Return an exception that was raised, perhaps from another."""
    with contextlib.suppress(BaseException):
        raise error from cause
    return error


def chain_of(facts):
    """Return an exception and all before it."""
    found = [facts]
    while found[-1].before is not None:
        found.append(found[-1].before)
    return found


def chained(count):
    """Return the last of so many exceptions, each raised from the one before."""
    error = None
    for number in range(count):
        error = raised(ValueError(str(number)), error)
    return error


def test_a_chain_is_bounded_and_says_so():
    """Of a long chain the latest are kept, and the text says that there were more."""
    assert [each.message for each in chain_of(facts_of(chained(FEW)))] == list("76543210")
    kept = chain_of(facts_of(chained(1000)))
    assert [each.message for each in kept[:FEW]] == [str(number) for number in range(999, 999 - FEW, -1)]
    assert len(kept) == FEW + 1
    assert text_of(facts_of(chained(1000))).startswith(
        "...: earlier exceptions are left out\n\nThe above exception was"
    )


def test_circles_end():
    """Whatever refers to itself is kept once."""
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert [each.message for each in chain_of(facts_of(first))] == ["first", "second"]
    first.__cause__ = first
    assert [each.message for each in chain_of(facts_of(first))] == ["first"]


@pytest.mark.parametrize("error", [ValueError, Hostile])
def test_no_code_of_the_program_runs(error):
    """Not for the exception, nor for its cause, its context, its notes, or what those hold."""
    inner, middle, outer = error(Untouchable()), error(Untouchable(), 1), error(Untouchable())
    BaseException.__dict__["__cause__"].__set__(outer, middle)
    BaseException.__dict__["__context__"].__set__(middle, inner)
    outer.__dict__["__notes__"] = [Untouchable(), "plain", Untouchable()]
    facts = facts_of(outer)
    assert [each.message for each in chain_of(facts)] == ["<Untouchable>", "(<Untouchable>, 1)", "<Untouchable>"]
    assert [each.is_caused for each in chain_of(facts)][:2] == [True, False]
    assert facts.notes == ("plain",)


@pytest.mark.parametrize("notes", ["text", ("text",), {"a": 1}, Untouchable(), None, 3], ids=range(6))
def test_notes_that_are_none_are_left_alone(notes):
    """The program may have put anything there; a list of texts is what `add_note` makes."""
    error = ValueError("x")
    error.__notes__ = notes
    assert facts_of(error).notes == ()


def test_notes_are_bounded():
    """A few are kept, and of a long one the beginning."""
    error = ValueError("x")
    error.__notes__ = ["n" * 10_000] * 1000
    assert [len(note) for note in facts_of(error).notes] == [4096] * 16


def test_nothing_of_the_program_is_kept():
    """Neither exceptions nor frames nor what they hold outlive the program's own use of them."""

    class Held:
        pass

    class Oops(Exception):
        pass

    def fail():
        held = Held()
        seen.append(weakref.ref(held))
        cause = raised(Oops(held))
        seen.append(weakref.ref(cause))
        raise KeyError(held) from cause

    seen = []
    try:
        fail()
    except KeyError as error:
        facts = facts_of(error)
    gc.collect()
    assert [alive() for alive in seen] == [None, None]
    assert [len(each.frames) for each in chain_of(facts)] == [2, 1]


def several(depth, *, other=False):
    """Recurse by two functions in turn, so that no frame repeats the one before."""
    if depth == 0:
        raise ValueError("deep")
    (several if other else alternately)(depth - 1)


def alternately(depth):
    """Take the other's turn."""
    several(depth)


def alone(depth):
    """Recurse by one function."""
    if depth == 0:
        raise ValueError("deep")
    alone(depth - 1)


def test_of_many_frames_the_middle_is_left_out():
    """Those where the exception was raised and those where it left are kept, and the text says that more were there."""
    with pytest.raises(ValueError, match="deep") as caught:
        several(100)
    frames = facts_of(caught.value).frames
    assert len(frames) == 65
    assert frames[32] is LEFT_OUT
    assert [frame[2] for frame in frames[-2:]] == ["alternately", "several"]
    assert frames[-1][1] == several.__code__.co_firstlineno + 3
    assert text_of(facts_of(caught.value)).count("  [More frames are left out]\n") == 1


def test_a_recursion_is_one_frame():
    """It is kept by its number, and where it ended is kept as well."""
    with pytest.raises(ValueError, match="deep") as caught:
        alone(500)
    facts = facts_of(caught.value)
    assert len(facts.frames) == 502
    assert len(set(map(id, facts.frames))) == 3
    assert "  [Previous line repeated 497 more times]\n" in text_of(facts)
    assert size_of_exception(facts) < 10_000


def test_frames_are_looked_for_in_so_many_steps():
    """An exception that is raised over and over has one more frame each time; no more than 1,024 are looked at."""
    error = ValueError("again")
    for _ in range(3000):
        error = raised(error)
    frames = facts_of(error).frames
    assert len(frames) == 1025
    assert frames[-1] is LEFT_OUT


@groups
def test_members_of_groups_are_kept_while_there_is_room():
    """A group counts with its members and theirs; the last member says how many more there were."""
    group = sys.modules["builtins"].ExceptionGroup
    facts = facts_of(group("two", [ValueError("a"), raised(ValueError("b"), KeyError("cause"))]))
    assert [each.message for each in facts.members] == ["a", "b"]
    assert facts.members[1].before.message == "'cause'"
    facts = facts_of(group("many", [ValueError(str(number)) for number in range(100)]))
    assert [each.message for each in facts.members] == [*"0123456", "93 more exceptions are left out"]
    facts = facts_of(group("the same", [ValueError("a")] * 1000))
    assert [each.message for each in facts.members] == [*"aaaaaaa", "993 more exceptions are left out"]
    nested = group("innermost", [ValueError("a")])
    for _ in range(100):
        nested = group("around", [nested])
    assert text_of(facts_of(nested)).count("around (1 sub-exception)") == FEW


def test_the_size_counts_all_that_is_kept():
    """Messages and notes, with those of what it was raised from."""
    alone, caused = ValueError("x" * 1000), raised(ValueError("y" * 1000), ValueError("x" * 1000))
    assert 1000 <= size_of_exception(facts_of(alone)) < 1100
    assert 2000 <= size_of_exception(facts_of(caused)) < 2200
    caused.__notes__ = ["n" * 1000]
    assert 3000 <= size_of_exception(facts_of(caused)) < 3200
    member = ExceptionInfo("E", "m" * 1000, ())
    assert size_of_exception(ExceptionInfo("G", "", (), members=(member, member))) == 2000


def test_some_are_no_failures():
    """A generator that is closed has not failed; a log shows that exception all the same."""
    assert exception_info(GeneratorExit()) is None
    assert traceback_of(raised(GeneratorExit("x"))).endswith("GeneratorExit: x\n")


def test_a_stage_has_the_cause_of_what_left_it(bench):
    """What is exported says what the exception was raised from."""

    def infer():
        raise ValueError("no image") from RuntimeError("CUDA error")

    with pytest.raises(ValueError, match="no image"), stage("infer"):
        infer()
    (span,) = bench.named("infer")
    cause = span.error.before
    assert (cause.type, cause.message, span.error.is_caused) == ("RuntimeError", "CUDA error", True)
    assert "RuntimeError: CUDA error\n\nThe above" in span.events[0][2]["exception.stacktrace"]
