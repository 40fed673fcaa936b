"""Batches by name: a target says whom each call of a function works for."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

import gpuscope
from gpuscope.instrument import Target, instrument, uninstrument
from gpuscope.instrument._targets import read_file


@pytest.fixture
def module(monkeypatch):
    """A module with functions that a target can name; it is as before afterwards."""
    made = ModuleType("batching_by_name")
    made.sum = sum

    def predict(batch, lengths=None):
        return len(batch)

    def stream(batch):
        yield from batch

    for function in (predict, stream):
        function.__module__ = made.__name__
        setattr(made, function.__name__, function)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    yield made
    uninstrument()


def tokens(count):
    """So many tokens of other processes' requests."""
    return [gpuscope.Token.from_traceparent(f"00-{number:032x}-{number:016x}-01") for number in range(1, count + 1)]


def target(name="predict", **said):
    """A target in the module."""
    return Target("predict", f"batching_by_name:{name}", {"n": "len(batch)"} if name == "predict" else {}, **said)


@pytest.mark.parametrize(
    "members", ["batch", lambda batch, lengths=None: [each["token"] for each in batch]], ids=["expression", "function"]
)
def test_members_of_a_call(bench, module, members):
    """They are an expression over the call's arguments, or a function of them; attributes are there, too."""
    key = "token" if members == "batch" else None
    instrument([target(members=members, key=key, weights="lengths", basis="tokens")])
    assert module.predict([{"token": token} for token in tokens(2)], [1, 3]) == 2
    (span,) = bench.named("predict")
    assert (span.attributes["n"], span.attributes["gpuscope.batch.size"]) == (2, 2)
    assert span.attributes["gpuscope.batch.basis"] == "tokens"
    assert len(span.links) == 2


def test_a_call_that_is_no_batch(bench, module):
    """Where the function returns None, the call is a stage like any other, and nothing is wrong."""
    instrument([target(members=lambda batch, lengths=None: batch or None)])
    module.predict([])
    module.predict(tokens(1))
    assert ["gpuscope.batch.size" in span.attributes for span in bench.named("predict")] == [False, True]
    assert gpuscope.statistics().batch_faults == {}


@pytest.mark.usefixtures("bench", "module")
@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"name": "stream", "members": "batch"}, "not a plain or coroutine function"),
        ({"name": "sum", "members": "batch"}, "plain and coroutine functions"),
        ({"members": "requests"}, "requests"),
    ],
)
def test_what_can_be_no_batch_is_said(caplog, said, why):
    """A generator, a function in C and an expression of other names are not batches; the program runs as before."""
    instrument([target(**said)])
    assert "cannot be a stage" in caplog.text
    assert why in caplog.text


@pytest.mark.parametrize("said", [{"weights": "lengths"}, {"members": 3}, {"members": "open(x)"}])
def test_bad_input(said):
    """What can't be members or weights is refused where the target is made."""
    with pytest.raises((TypeError, ValueError)):
        target(**said)


def test_in_a_file(tmp_path):
    """A TOML file has members, weights, basis and key as texts."""
    pytest.importorskip("tomllib", reason="from Python 3.11 on")
    file = tmp_path / "stages.toml"
    file.write_text(
        '[stages]\npredict = { path = "app:f", members = "batch", key = "token", weights = "sizes", basis = "tokens" }'
    )
    said = {"members": "batch", "key": "token", "weights": "sizes", "basis": "tokens"}
    assert read_file(file) == ([Target("predict", "app:f", **said)], [])
