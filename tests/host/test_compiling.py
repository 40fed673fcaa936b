"""Compilations as stages of the request that waited for one. On the CPU."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import SimpleNamespace

import pytest

import gpuscope
from gpuscope import stage
from gpuscope._data.attributes import COMPILE_ID, COMPILE_KIND, COMPILE_SPAN
from gpuscope._host.compiling import Compilations, compilations, kind_of
from gpuscope.analysis.verdict import judge
from gpuscope.testing import ManualClock, capture

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Each test begins with nothing compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def double():
    """A function that is compiled anew for each length of its argument."""
    return torch.compile(lambda x: x * 2, backend="eager", dynamic=False)


def compiled(spans):
    """The kinds of the compilations, in order."""
    return [span.attributes[COMPILE_KIND] for span in spans if span.name == COMPILE_SPAN]


def test_the_request_that_waits_has_the_compilation():
    """The first call compiles, another shape once more, and a shape that is known not at all."""
    double_it = double()
    with capture() as spans:
        for length in (3, 3, 4, 3):
            with stage("request"):
                double_it(torch.ones(length))
        gpuscope.flush()
    requests = [span for span in spans if span.name == "request"]
    inside = [[span for span in spans if span.parent_id == request.span_id] for request in requests]
    assert [compiled(each) for each in inside] == [["compile"], [], ["recompile"], []]
    assert [span.attributes[COMPILE_ID] for span in spans if span.name == COMPILE_SPAN] == ["0/0", "0/1"]
    first = inside[0][0]
    assert requests[0].start_ns <= first.start_ns < first.end_ns <= requests[0].end_ns
    assert not any(span.attributes.get("gpuscope.warmup") for span in spans if span.name == COMPILE_SPAN)


def test_a_compilation_outside_of_stages_is_nobodys():
    """No trace is made of it."""
    with capture() as spans:
        double()(torch.ones(3))
        gpuscope.flush()
    assert spans == []


def test_dynamo_may_be_reset():
    """`torch._dynamo.reset` takes all callbacks out; ours comes back."""
    with capture() as spans:
        for _ in range(2):
            torch._dynamo.reset()
            with stage("request"):
                double()(torch.ones(3))
        gpuscope.flush()
    assert compiled(spans) == ["compile", "compile"]
    handler = torch._dynamo.callback.callback_handler
    assert handler.start_callbacks.count(compilations.begin) == handler.end_callbacks.count(compilations.end) == 1


def test_the_programs_callbacks_stay():
    """Others may listen, before us and after us."""
    heard = []
    handler = torch._dynamo.callback.callback_handler
    heard_start = handler.register_start_callback(lambda *_: heard.append("start"))
    heard_end = handler.register_end_callback(lambda *_: heard.append("end"))
    with capture():
        double()(torch.ones(3))
    assert heard == ["start", "end"]
    handler.remove_start_callback(heard_start)
    handler.remove_end_callback(heard_end)


def test_a_compilation_that_fails_has_ended():
    """What raises in it reaches the program, and no stage stays open."""

    def broken(_graph, _inputs):
        raise ValueError("no backend")

    with capture() as spans:
        with stage("request"), pytest.raises(Exception, match="no backend"):
            torch.compile(lambda x: x * 2, backend=broken)(torch.ones(3))
        gpuscope.flush()
    assert compiled(spans) == ["compile"]
    assert gpuscope.statistics().pending == 0


def test_no_events_are_recorded_for_it():
    """What the stream does meanwhile is not the compiler's time, and the pair of events goes back."""
    clock = ManualClock()
    from gpuscope.testing import FakeDevice

    device = FakeDevice(clock, completes=True)
    with capture(device=device, clock=clock) as spans:
        with stage("request"):
            double()(torch.ones(3))
        gpuscope.flush()
    assert [span.kind for span in spans if span.name == COMPILE_SPAN] == ["host"]
    assert device.pairs_in_use == 0


def test_nothing_is_recorded_while_recording_is_off():
    """The callbacks stay, and do nothing."""
    with capture():
        pass
    assert compilations._open == {}
    with stage("request"):
        double()(torch.ones(3))
    assert compilations._open == {}


def told(trigger, compile_id):
    """What PyTorch tells."""
    return SimpleNamespace(callback_trigger=SimpleNamespace(name=trigger), compile_id=compile_id)


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        (None, "compile"),
        (told("DYNAMO", "0/0"), "compile"),
        (told("DYNAMO", "3/2"), "recompile"),
        (told("DYNAMO", "3/2_1"), "recompile"),
        (told("DYNAMO", "!0/3/0"), "compile"),
        (told("DYNAMO", "None"), "compile"),
        (told("LAZY_BACKWARD", "0/1"), "backward"),
        (told("CUDAGRAPH_RECORDING", "0/0"), "graph_recording"),
        (told("SOMETHING_NEW", "0/0"), "compile"),
    ],
)
def test_kinds(what, kind):
    """What is compiled, as PyTorch's versions tell it."""
    assert kind_of(what) == kind


def test_a_version_that_tells_nothing():
    """Before 2.7 the callbacks get no argument."""
    mine = Compilations()
    with capture() as spans:
        with stage("request"):
            mine.begin()
            mine.end()
            mine.end()
        gpuscope.flush()
    assert compiled(spans) == ["compile"]


def test_the_end_may_come_on_another_thread():
    """Of compilations that overlap PyTorch tells the first begin and the last end."""
    mine = Compilations()
    with capture() as spans:
        with stage("request"):
            mine.begin(told("DYNAMO", "0/0"))
            thread = threading.Thread(target=mine.end)
            thread.start()
            thread.join()
        gpuscope.flush()
    assert compiled(spans) == ["compile"]
    assert mine._open == {}


def test_what_the_program_raises_in_a_handler_reaches_it():
    """Ctrl-C within our callback is the program's."""

    class Interrupted(Exception):
        """Of the program's own handler."""

    def handler(*_):
        raise Interrupted

    class Told:
        """Sends a signal while it is looked at."""

        @property
        def callback_trigger(self):
            os.kill(os.getpid(), signal.SIGUSR2)
            raise OSError

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with capture(), stage("request"), pytest.raises(Interrupted):
            compilations.begin(Told())
    finally:
        signal.signal(signal.SIGUSR2, before)
        compilations.forget()


def test_it_is_not_imported_for_programs_that_do_not_compile(run_python):
    """Neither PyTorch nor its compiler is imported by us."""
    done = run_python(
        "import gpuscope, sys\n"
        "with gpuscope.stage('request'): pass\n"
        "gpuscope.flush()\n"
        "print(any(name.startswith('torch') for name in sys.modules))",
        GPUSCOPE="1",
        GPUSCOPE_EXPORTER="none",
    )
    assert done.stdout.split() == ["False"], done.stderr


def test_the_report_says_what_waited():
    """A request that compiles after the warm-up is told of, with what to do."""
    double_it = double()
    with capture(warmup=1) as spans:
        for length in (3, 3, 4, 3):
            with stage("asked"):
                double_it(torch.ones(length))
        gpuscope.flush()
    said = [note for note in judge(spans.recording()).notes if "torch.compile" in note]
    assert len(said) == 1
    assert said[0].startswith("1 of 3 requests `asked` waited for `torch.compile` after the warm-up")


def test_it_takes_nothing_while_nothing_is_compiled():
    """A call of what is compiled does not come here."""
    double_it, calls = double(), []
    with capture():
        double_it(torch.ones(3))
        seen = {compilations.begin.__code__, compilations.end.__code__}
        sys.setprofile(lambda frame, event, _: calls.append(frame.f_code) if event == "call" else None)
        try:
            for _ in range(10):
                double_it(torch.ones(3))
        finally:
            sys.setprofile(None)
    assert not seen & set(calls)
