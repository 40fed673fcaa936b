"""The watch for hidden synchronisations, on the CPU: tensors of another device stand for those of a GPU."""

# ruff: noqa: PLW0108 - the line of a lambda is what is found
from __future__ import annotations

import copy
import pickle
import threading
import time
import warnings
from types import SimpleNamespace

import pytest

import gpuscope
from gpuscope import stage
from gpuscope._data.attributes import OF_ONE_RUN, SYNC_BYTES, SYNC_COUNT, SYNCS
from gpuscope._host import sync_watch
from gpuscope._host.sync_calls import DEVICE_TO_HOST, HOST_TO_DEVICE, place
from gpuscope._host.sync_turns import SyncTurns
from gpuscope._host.sync_warnings import TEXT, debug_mode
from gpuscope._host.sync_watch import SyncWatch
from gpuscope._host.syncs import Syncs
from gpuscope.testing import capture

torch = pytest.importorskip("torch")
X = torch.arange(6, dtype=torch.float32).reshape(2, 3)
ONE = torch.tensor(1.0)


def watching(kind="cpu"):
    """A watch of its own, to which tensors of this kind are on a GPU."""
    return Syncs(SyncWatch(kind))


def program_of(**call):
    """Run one call under the watch, and return what was found."""
    ((_, action),) = call.items()
    with watching() as found:
        action()
    return found


def line_of(function):
    """The line of a function of one line."""
    return function.__code__.co_firstlineno


@pytest.mark.parametrize(
    ("name", "action", "direction", "size"),
    [
        ("item", lambda: ONE.item(), DEVICE_TO_HOST, 4),
        ("bool", lambda: bool(ONE), DEVICE_TO_HOST, 4),
        ("int", lambda: int(ONE), DEVICE_TO_HOST, 4),
        ("float", lambda: float(ONE.double()), DEVICE_TO_HOST, 8),
        ("index", lambda: [1, 2][torch.tensor(1)], DEVICE_TO_HOST, 8),
        ("is_nonzero", lambda: ONE.is_nonzero(), DEVICE_TO_HOST, 4),
        ("tolist", lambda: X.tolist(), DEVICE_TO_HOST, 24),
        ("numpy", lambda: X.numpy(), DEVICE_TO_HOST, 24),
        ("to", lambda: X.to("meta"), DEVICE_TO_HOST, 24),
        ("to", lambda: X.to("meta", torch.float64), DEVICE_TO_HOST, 24),
        ("to", lambda: X.to("meta", torch.float64, non_blocking=True), DEVICE_TO_HOST, 48),
        ("to", lambda: X.to("meta", torch.float64, True), DEVICE_TO_HOST, 48),
        ("copy_", lambda: torch.empty(2, 3, device="meta").copy_(X), DEVICE_TO_HOST, 24),
        ("copy_", lambda: torch.empty(4, 2, 3, device="meta").copy_(X), DEVICE_TO_HOST, 96),
        ("nonzero", lambda: X.nonzero(), "", None),
        ("masked_select", lambda: X.masked_select(X > 1), "", None),
        ("unique", lambda: X.unique(), "", None),
    ],
)
def test_calls_are_found_where_they_stand(name, action, direction, size):
    """With file, line, direction and bytes."""
    with watching() as found:
        action()
    (sync,) = found
    assert (sync.file, sync.line) == (__file__, line_of(action))
    assert (sync.operation, sync.direction, sync.bytes, sync.calls) == (name, direction, size, 1)
    assert sync.stage is None
    assert found.lost == 0


def test_copies_to_the_gpu():
    """The other direction, from pageable memory."""
    with watching("meta") as found:
        X.to("meta")
        torch.empty(2, 3, device="meta").copy_(X)
        torch.empty(2, 3, dtype=torch.float16, device="meta").copy_(X)
    assert [(sync.direction, sync.pinned, sync.bytes) for sync in sorted(found, key=lambda sync: sync.line)] == [
        (HOST_TO_DEVICE, False, 24),
        (HOST_TO_DEVICE, False, 24),
        (HOST_TO_DEVICE, False, 12),
    ]


@pytest.mark.parametrize(
    "action",
    [
        lambda: X + 1,
        lambda: X.to(torch.float64),
        lambda: X.to("cpu"),
        lambda: X.cpu(),
        lambda: torch.empty(2, 3).copy_(X),
        lambda: torch.where(X > 1, X, 0),
        lambda: X.shape,
        lambda: len(X),
    ],
)
def test_what_stays_on_the_gpu_is_not_found(action):
    """Nothing of it goes to the host."""
    assert program_of(action=action) == []


def test_equal_calls_are_one_entry():
    """By line, stage and kind; the most frequent first."""
    with watching() as found:
        for _ in range(3):
            X.tolist()
        with stage("decode"):
            for _ in range(5):
                ONE.item()
    assert [(sync.operation, sync.calls, sync.bytes) for sync in found] == [("item", 5, 20), ("tolist", 3, 72)]
    assert found[0].seconds > 0
    assert str(found[1]).endswith("tolist device to host (pageable), 72 bytes, 3 times")


def test_all_threads_are_seen():
    """Also those that were there before."""
    begun, go = threading.Event(), threading.Event()

    def work():
        begun.set()
        go.wait(10)
        ONE.item()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(10)
    with watching() as found:
        go.set()
        thread.join()
    assert [sync.operation for sync in found] == ["item"]


def test_what_pytorch_tells_of_is_found():
    """Its warning is taken, and shown to nobody; others are shown."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with watching() as found:
            warnings.warn(f"{TEXT} (Triggered internally)", stacklevel=1)
            warnings.warn("another", stacklevel=1)
    assert [str(each.message) for each in shown] == ["another"]
    assert [(sync.file, sync.operation, sync.bytes) for sync in found] == [(__file__, "synchronisation", None)]


def test_a_program_that_fails_at_warnings_does_not_fail():
    """The warning is no error, whatever the program's filters say, before the watch or within."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with watching() as found:
            warnings.warn(f"{TEXT} (Triggered internally)", stacklevel=1)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.warn(f"{TEXT} (Triggered internally)", stacklevel=1)
                warnings.resetwarnings()
                warnings.filterwarnings("error", category=UserWarning)
                warnings.warn(f"{TEXT} (Triggered internally)", stacklevel=1)
                with pytest.raises(UserWarning, match="another"):
                    warnings.warn("another", stacklevel=1)
    assert len(found) == 3


def test_a_program_that_keeps_warnings_gets_none_of_these():
    """Within `catch_warnings(record=True)`; others it gets."""
    with watching() as found, warnings.catch_warnings(record=True) as kept:
        warnings.simplefilter("always")
        warnings.warn(f"{TEXT} (Triggered internally)", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(each.message) for each in kept] == ["another"]
    assert len(found) == 1


def test_filters_that_the_program_adds_meanwhile_stay():
    """Also where the watch ends within `catch_warnings`; and of ours nothing does."""
    with warnings.catch_warnings():
        before, syncs = list(warnings.filters), watching()
        with watching():
            warnings.filterwarnings("ignore", "of the program's")
        added = warnings.filters[0]
        assert list(warnings.filters) == [added, *before]
        syncs.__enter__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "another of the program's")
            syncs.__exit__(None, None, None)
            assert list(warnings.filters)[1:] == [added, *before]
        assert list(warnings.filters) == [added, *before]


def what_the_program_has():
    """Methods, filters, who shows warnings, and the debug mode."""
    owners = [dict(vars(each)) for each in (torch.Tensor, torch.cuda.Stream, torch.cuda.Event, torch.cuda)]
    return owners, list(warnings.filters), warnings.showwarning, debug_mode()


def test_what_the_program_had_is_put_back():
    """Also after an exception, and after the last of several."""
    before = what_the_program_has()
    with pytest.raises(KeyError), watching():
        raise KeyError
    watch = SyncWatch("cpu")
    outer, inner = Syncs(watch), Syncs(watch)
    with outer:
        with inner:
            ONE.item()
        ONE.item()
    assert what_the_program_has() == before
    assert (len(inner), sum(sync.calls for sync in outer)) == (1, 2)


def test_the_programs_own_debug_mode_stays(monkeypatch):
    """Where it asked for warnings it gets them; where it asked for errors nothing is changed."""
    modes = []
    for mode in (1, 2):
        monkeypatch.setattr(torch._C, "_cuda_get_sync_debug_mode", lambda mode=mode: mode, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_set_sync_debug_mode", modes.append, raising=False)
        with warnings.catch_warnings(record=True) as shown, watching() as found:
            warnings.simplefilter("always")
            warnings.warn(f"{TEXT} (Triggered internally)", stacklevel=1)
        assert len(shown) == len(found) == 1
    assert modes == []


def test_what_the_program_put_in_place_of_a_method_stays():
    """Whoever came after us is not taken out."""
    with watching():
        theirs = torch.Tensor.item
        torch.Tensor.item = lambda tensor: theirs(tensor)
        mine = torch.Tensor.item
    try:
        assert torch.Tensor.item is mine
        assert ONE.item() == 1.0
    finally:
        del torch.Tensor.item


def test_a_watch_that_ended_lets_everything_pass():
    """A method that somebody kept from its time does what it did, and a list of filters lets warnings pass."""
    with watching() as found:
        kept, filters = torch.Tensor.item, warnings.filters[:]
    assert kept(ONE) == 1.0
    with warnings.catch_warnings(record=True) as shown:
        warnings.filters[:] = filters[:2]  # Ours.
        warnings.warn(f"{TEXT} (Triggered internally)", stacklevel=1)
    assert found == []
    assert len(shown) == 1


def test_methods_look_like_what_they_stand_for():
    """They are equal to it, have its name, can be pickled and are found in tables."""
    table = {torch.Tensor.item: "found", torch.Tensor.unique: "too"}
    with watching():
        assert table[torch.Tensor.item] == "found"
        assert table[torch.Tensor.unique] == "too"
        assert torch.Tensor.item.__name__ == "item"
        assert pickle.loads(pickle.dumps(torch.Tensor.item)) == torch.Tensor.item
        assert torch.Tensor.item != torch.Tensor.tolist


def test_subclasses_of_tensors_are_asked_as_ever():
    """What `__torch_function__` gets is equal to the method it knows."""
    item, asked = torch.Tensor.item, []

    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            asked.append(func == item)
            return super().__torch_function__(func, types, args, kwargs or {})

    mine = ONE.as_subclass(Mine)
    asked.clear()
    with watching() as found:
        assert mine.item() == 1.0
    assert asked
    assert all(asked[:1])
    assert [sync.operation for sync in found] == ["item"]


def test_what_raises_raises():
    """And the thread is watched on."""
    with watching() as found:
        with pytest.raises(RuntimeError):
            X.item()
        ONE.item()
    assert [sync.operation for sync in found] == ["item"]


def test_a_call_that_cannot_be_looked_at_goes_on(monkeypatch):
    """Faults of ours cost a finding."""

    def broken(*_, **__):
        raise OSError

    monkeypatch.setattr(sync_watch, "move_of", broken)
    with watching() as found:
        assert ONE.item() == 1.0
    assert found == []


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_wrapped_while_dynamo_compiles():
    """A function compiles as a whole, and as often as without the watch."""
    seen, counts = [], []

    def backend(graph, _inputs):
        seen.append(isinstance(vars(torch.Tensor).get("copy_"), sync_watch._Method))
        return graph.forward

    def f(x):
        y = torch.empty_like(x)
        y.copy_(x)
        return y.to(torch.float64).cpu() * 2

    for on in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(f, backend=backend, fullgraph=True)
        with watching() if on else capture():
            for _ in range(3):
                assert torch.equal(compiled(X), f(X))
            if on:
                assert isinstance(vars(torch.Tensor)["copy_"], sync_watch._Method)
        counts.append(len(seen))
    with watching():  # What was compiled before is not compiled anew.
        compiled(X)
    compiled(X)
    assert seen == [False, False]
    assert counts == [1, 2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("broken", "operations"),
    [
        (lambda x: x + 1 if (x * 2).sum().item() > 0 else x, {"item": 3}),
        (lambda x: (x > 0).nonzero().tolist(), {"nonzero": 3, "tolist": 3}),
        (lambda x: x.unique() + 1, {"unique": 3}),
    ],
)
def test_dynamo_compiles_nothing_of_ours(broken, operations):
    """Where a compiled function breaks its graph at a method: it is found, and nothing is compiled for the watch."""
    torch._dynamo.reset()
    compiled, frames = torch.compile(broken, backend="eager"), torch._dynamo.utils.counters["frames"]
    for _ in range(3):
        compiled(X)
    before = frames["total"]
    with watching() as found:
        for _ in range(3):
            compiled(X)
    compiled(X)
    assert {sync.operation: sync.calls for sync in found} == operations
    assert {sync.file for sync in found} == {__file__}
    assert frames["total"] == before


@pytest.mark.filterwarnings("ignore")
def test_what_is_compiled_under_the_watch_is_found_too():
    """The first compilation of the process is then one within the watch, or may be."""
    torch._dynamo.reset()
    compiled, frames = torch.compile(lambda x: x.sum().item(), backend="eager"), torch._dynamo.utils.counters["frames"]
    with watching() as found:
        compiled(X)
        before = frames["total"]
        compiled(X)
        compiled(X)
    assert sum(sync.calls for sync in found) >= 2
    assert frames["total"] == before


def test_a_pytorch_that_would_compile_what_is_ours_has_its_methods(monkeypatch):
    """Before 2.7, where Dynamo is imported: nothing is wrapped."""
    import torch._dynamo

    monkeypatch.delattr("torch._C._dynamo.eval_frame._FrameExecStrategy")
    for _ in range(2):
        with watching() as found:
            assert "copy_" not in vars(torch.Tensor)
            ONE.item()
        assert found == []


def test_nothing_is_noted_in_a_capture(monkeypatch):
    """There a wait would be an error of the program's, which PyTorch raises."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with watching() as found:
        ONE.item()
        with warnings.catch_warnings():
            warnings.warn(f"{TEXT} (Triggered internally)", stacklevel=1)
    assert found == []


def test_stages_have_what_was_found_in_them():
    """As text by line, with how often and how many bytes; the innermost stage has it."""
    with capture() as spans:
        with watching() as found, stage("request"), stage("decode", attributes={"user": 7}):
            for _ in range(3):
                ONE.item()
            X.tolist()
        with stage("after"):
            ONE.item()
        gpuscope.flush()
    by_name = {span.name: span.attributes for span in spans}
    told = by_name["decode"]
    assert (told[SYNC_COUNT], told[SYNC_BYTES], told["user"]) == (4, 36, 7)
    item, whole = told[SYNCS]
    assert item.startswith(f"{__file__}:")
    assert item.endswith(" item device to host 4 bytes")
    assert whole.endswith(" tolist device to host pageable 24 bytes")
    assert {sync.stage for sync in found} == {"decode"}
    assert SYNCS not in by_name["request"]
    assert SYNCS not in by_name["after"]


def test_a_block_that_is_entered_again_has_nothing_of_its_first_run():
    """What was found is that run's; what the program said of the stage it has again, also copied and as a decorator."""
    with capture() as spans:
        again = stage("again", attributes={"user": 7})
        with watching(), again:
            ONE.item()
            again.set_attribute("more", 8)
        for _ in range(2):
            with again:
                pass
        with copy.copy(again):
            pass
        again(lambda: None)()
        gpuscope.flush()
    first, *others = (span.attributes for span in spans)
    assert (first[SYNC_COUNT], first["user"], first["more"]) == (1, 7, 8)
    assert len(others) == 4
    for each in others:
        assert each["user"] == 7
        assert OF_ONE_RUN.isdisjoint(each)


def test_a_run_within_a_run_has_its_own():
    """Each entry of one block counts what was in it."""
    with capture() as spans:
        again = stage("again")
        with watching(), again:
            ONE.item()
            with again:
                for _ in range(2):
                    ONE.item()
        gpuscope.flush()
    assert sorted(span.attributes[SYNC_COUNT] for span in spans) == [1, 2]


def test_many_calls_are_bounded():
    """The oldest are left out, and counted."""
    syncs = Syncs(SyncWatch("cpu"))
    for number in range(65_536 + 10):
        syncs.take(("file", number % 3, None, "item", "", None, 4, 1))
    syncs.gather()
    assert syncs.lost == 10
    assert sum(sync.calls for sync in syncs) == 65_536


def test_the_place_is_the_programs():
    """Where there are only frames of PyTorch's, the innermost of them."""
    assert place()[0] == __file__


def test_without_pytorch_nothing_is_found(run_python):
    """And PyTorch is not imported for it."""
    done = run_python(
        "import gpuscope, sys\nwith gpuscope.watch_syncs() as found: pass\nprint(found, 'torch' in sys.modules)"
    )
    assert done.stdout.strip() == "[] False", done.stderr


def test_the_child_of_a_fork_has_no_watch(run_python):
    """It has the program's methods and hooks, whatever its parent does."""
    done = run_python(
        "import gpuscope, os, torch, warnings\n"
        "from gpuscope._host.sync_warnings import debug_mode\n"
        "def has(): return warnings.showwarning, dict(vars(torch.Tensor)), debug_mode(), list(warnings.filters)\n"
        "before = has()\n"
        "with gpuscope.watch_syncs():\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        os._exit(0 if has() == before else 1)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 'item' in vars(torch.Tensor))"
    )
    assert done.stdout.strip() == "0 True", done.stderr


class TestTurns:
    """`GPUSCOPE_SYNCS`: on for a share of the time."""

    @pytest.fixture
    def turns(self):
        """A second in ten, with a clock that stands still unless it is told."""
        now = SimpleNamespace(s=time.monotonic(), told=[])
        made = SyncTurns(
            "1/10",
            watch=SyncWatch("cpu"),
            clock=lambda: now.s,
            tell=lambda text, *what: now.told.append(text % what),
        )
        made.now = now
        yield made
        if made._syncs is not None:
            made._syncs.__exit__(None, None, None)

    def pass_until(self, turns, on):
        """Let the collector pass once a second until it is on, or off; return the seconds."""
        seconds = 0
        while (turns._syncs is not None) != on:
            turns.now.s += 1
            seconds += 1
            turns.poll()
            assert seconds < 100
        return seconds

    def test_it_is_on_for_a_share_of_the_time(self, turns):
        """About so often, and no longer."""
        before = what_the_program_has()
        with capture():
            found = [(self.pass_until(turns, on=True), self.pass_until(turns, on=False)) for _ in range(40)]
        assert what_the_program_has() == before
        pauses, lengths = zip(*found, strict=True)
        assert set(lengths) == {1}
        assert 6 < sum(pauses) / 40 < 12
        assert len(set(pauses)) > 2

    def test_places_are_told_once(self, turns):
        """Each line and kind of call."""
        with capture():
            for _ in range(2):
                self.pass_until(turns, on=True)
                for _ in range(5):
                    ONE.item()
                self.pass_until(turns, on=False)
        (told,) = turns.now.told
        assert "item device to host, 20 bytes, 5 times" in told

    def test_warnings_are_the_programs(self, turns, monkeypatch):
        """No filter and no mode of PyTorch's is touched, so nothing can be raised into a request."""
        monkeypatch.setattr(torch._C, "_cuda_get_sync_debug_mode", lambda: 0, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_set_sync_debug_mode", lambda _: pytest.fail("changed"), raising=False)
        filters = warnings.filters, list(warnings.filters), warnings.showwarning
        with capture():
            self.pass_until(turns, on=True)
            assert (warnings.filters, list(warnings.filters), warnings.showwarning) == filters
            assert warnings.filters is filters[0]
            self.pass_until(turns, on=False)

    def test_a_test_that_watches_meanwhile_listens(self, turns):
        """A block within a turn hears PyTorch's warnings until it ends."""
        with capture():
            self.pass_until(turns, on=True)
            before = list(warnings.filters)
            with Syncs(turns._watch) as found:
                warnings.warn(f"{TEXT} (Triggered internally)", stacklevel=1)
            assert [sync.operation for sync in found] == ["synchronisation"]
            assert list(warnings.filters) == before
            self.pass_until(turns, on=False)

    def test_it_is_off_while_nothing_is_recorded(self, turns):
        """And while a graph is captured."""
        for _ in range(50):
            turns.now.s += 1
            turns.poll()
        assert turns._syncs is None

    def test_without_a_further_pass_it_ends_itself(self):
        """The first call after its time puts back what the program had."""
        before = what_the_program_has()
        syncs = Syncs(SyncWatch("cpu"), until_s=0.0)
        syncs.__enter__()
        ONE.item()
        assert what_the_program_has() == before


def test_the_setting_switches_it_on(run_python):
    """In a service: lines come to the log, attributes to the stages."""
    done = run_python(
        "import gpuscope, torch, sys, time\n"
        "from gpuscope._host import sync_turns, syncs\n"
        "syncs.watch._kind = 'cpu'\n"
        "sync_turns.random.Random.uniform = lambda *_: 0.0\n"
        "gpuscope.enable(exporters='none', syncs='1s/2s', interval_s=0.01)\n"
        "x = torch.tensor(1.0)\n"
        "until = time.monotonic() + 2.5\n"
        "while time.monotonic() < until:\n"
        "    with gpuscope.stage('request'):\n"
        "        x.item()\n"
        "gpuscope.shutdown()\n"
        "x.item()\n"
        "print('item' in vars(torch.Tensor))\n",
        GPUSCOPE="idle",
    )
    assert done.returncode == 0, done.stderr
    assert "waits for the GPU or copies pageable memory" in done.stderr
    assert "program.py:10 item device to host" in done.stderr
