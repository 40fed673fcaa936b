"""Several processes: one trace over all of them, and each exports what it recorded as itself."""

from __future__ import annotations

import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from ..spans_of_files import spans_in, wait_for

ON = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "file", "GPUSCOPE_FILE": "spans-{pid}.jsonl", "GPUSCOPE_INTERVAL": "30"}
"""Spans reach a file at the end of their process, not before."""

PIPELINE = """
import multiprocessing, sys
import gpuscope

def front(work):
    with gpuscope.stage("request"):
        for number in range(2):
            carrier = {}
            gpuscope.inject(carrier)
            work.put((number, carrier))

def worker(work, both):
    number, carrier = work.get()
    both.wait(60)  # So that each worker has one.
    with gpuscope.extract(carrier), gpuscope.stage("work"), gpuscope.stage("infer"):
        pass

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    work, both = context.Queue(), context.Barrier(2)
    processes = [context.Process(target=front, args=(work,))]
    processes += [context.Process(target=worker, args=(work, both)) for _ in range(2)]
    [process.start() for process in processes]
    [process.join() for process in processes]
    assert [process.exitcode for process in processes] == [0, 0, 0]
"""


class TestOneTrace:
    """A trace goes on in other processes."""

    def test_front_queue_and_two_workers(self, run_python, tmp_path):
        """What two workers do for a request of a front process is one trace, over three processes."""
        result = run_python(PIPELINE, **ON)
        assert result.returncode == 0, result.stderr
        spans = spans_in(tmp_path)
        assert [span.name for span in spans] == ["infer", "infer", "request", "work", "work"]
        *infer, request, work, other_work = spans
        assert len({span.trace_id for span in spans}) == 1
        assert request.parent_id == ""
        assert [work.parent_id, other_work.parent_id] == [request.span_id] * 2
        assert {span.parent_id for span in infer} == {work.span_id, other_work.span_id}
        assert len({request.instance, work.instance, other_work.instance}) == 3

    @pytest.mark.parametrize("sampler", ["parentbased_always_off", "parentbased_traceidratio"])
    def test_sampling_by_root_keeps_it_whole(self, run_python, tmp_path, sampler):
        """A trace that the front leaves out nobody has a part of; of one that it keeps all have theirs."""
        program = PIPELINE.replace("if __name__", "if False") + (
            "if __name__ == '__main__':\n"
            "    import queue, threading\n"
            "    for _ in range(40):\n"
            "        carrier = {}\n"
            "        if len(sys.argv) == 1:\n"
            "            with gpuscope.stage('request'): gpuscope.inject(carrier)\n"
            "            print(carrier['traceparent'])\n"
            "        else:\n"
            "            with gpuscope.extract({'traceparent': sys.argv.pop()}), gpuscope.stage('work'): pass\n"
        )
        ratio = {"OTEL_TRACES_SAMPLER_ARG": "0.5"}
        front = run_python(program, **ON, OTEL_TRACES_SAMPLER=sampler, **ratio)
        assert front.returncode == 0, front.stderr
        # The worker would keep every trace that began there.
        worker = run_python(program, *front.stdout.split(), **ON, OTEL_TRACES_SAMPLER="parentbased_always_on")
        assert worker.returncode == 0, worker.stderr
        traces = {
            name: {span.trace_id for span in spans_in(tmp_path) if span.name == name} for name in ("request", "work")
        }
        assert traces["request"] == traces["work"]
        assert len(traces["request"]) < 40
        assert bool(traces["request"]) == ("ratio" in sampler)


CHILDREN = """
import multiprocessing, sys
import gpuscope

def child():
    with gpuscope.stage("child"): pass

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with gpuscope.stage("parent"):
        children = [context.Process(target=child) for _ in range(2)]
        [process.start() for process in children]
        [process.join() for process in children]
"""

LOADER = """
import torch, gpuscope

class Squares(torch.utils.data.Dataset):
    def __len__(self): return 8
    @gpuscope.stage("load")
    def __getitem__(self, index): return index * index

if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(Squares(), batch_size=2, num_workers=2)
    with gpuscope.stage("epoch"):
        assert sum(int(batch.sum()) for batch in loader) == 140
"""


class TestWorkers:
    """Processes that a recording process starts, or that start the recording process."""

    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    def test_children_start_clean_and_export_as_themselves(self, run_python, tmp_path, method):
        """A child is not part of the stage that it was started in, and has a `service.instance.id` of its own."""
        result = run_python(CHILDREN, method, **ON)
        assert result.returncode == 0, result.stderr
        spans = spans_in(tmp_path)
        assert [span.name for span in spans] == ["child", "child", "parent"]
        for facts in ({span.instance for span in spans}, {span.trace_id for span in spans}):
            assert len(facts) == 3
        assert [span.parent_id for span in spans] == [""] * 3
        assert len({span.resource["process.pid"] for span in spans}) == 3

    def test_workers_of_a_data_loader_export_what_they_load(self, run_python, tmp_path):
        """Each worker exports what it loaded, up to the last, as a process of its own."""
        pytest.importorskip("torch")
        result = run_python(LOADER, **ON)
        assert result.returncode == 0, result.stderr
        loads = [span for span in spans_in(tmp_path) if span.name == "load"]
        assert len(loads) == 8
        assert len({span.instance for span in loads}) == 2

    def test_ranks_say_who_they_are_and_their_ids_differ(self, tmp_path):
        """Under `torchrun` each rank has its rank and the world's size, and ids of its own though all seed alike."""
        torch = pytest.importorskip("torch")
        if not torch.distributed.is_available():
            pytest.skip("this PyTorch has no `torch.distributed`")
        (tmp_path / "rank.py").write_text(
            "import random, numpy, torch, gpuscope\n"
            "random.seed(0); numpy.random.seed(0); torch.manual_seed(0)\n"
            "torch.distributed.init_process_group('gloo')\n"
            "random.seed(0); numpy.random.seed(0); torch.manual_seed(0)\n"
            "with gpuscope.stage('rank'): torch.distributed.barrier()\n"
            "torch.distributed.destroy_process_group()\n"
        )
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "rank.py"]
        with started(tmp_path, *command) as process:
            assert process.wait(100) == 0, process.stderr.read()
        first, second = sorted(spans_in(tmp_path), key=lambda span: span.resource["gpuscope.rank"])
        for rank, span in enumerate((first, second)):
            ranks = {name: int(span.resource[f"gpuscope.{name}"]) for name in ("rank", "local_rank", "world_size")}
            assert ranks == {"rank": rank, "local_rank": rank, "world_size": 2}
        assert first.trace_id != second.trace_id
        assert first.span_id != second.span_id
        assert first.instance != second.instance

    @pytest.mark.parametrize("variables", [{"RANK": "0"}, {"RANK": "first", "WORLD_SIZE": "2"}])
    def test_what_is_no_rank_is_left_alone(self, run_python, variables):
        """Variables of these names that do not make a rank of a world are somebody else's."""
        program = "from gpuscope.exporters._encoding.resource import resource_attributes as found; print(*found())"
        result = run_python(program, **variables)
        assert "process.pid" in result.stdout, result.stderr
        assert "gpuscope." not in result.stdout

    @pytest.mark.parametrize("server", ["gunicorn", "gunicorn preloaded", "uvicorn"])
    def test_workers_of_a_server_export_as_themselves(self, tmp_path, server):
        """Each worker of a server exports its requests, up to the last, under a `service.instance.id` of its own."""
        name, *preloaded = server.split()
        if importlib.util.find_spec(name) is None or (name == "uvicorn" and not importlib.util.find_spec("starlette")):
            pytest.skip(f"{name} is not installed")
        (tmp_path / "wsgi.py").write_text(WSGI)
        (tmp_path / "asgi.py").write_text(ASGI)
        command = {
            "gunicorn": [
                "-m",
                "gunicorn",
                "--bind",
                "unix:s",
                "--workers",
                "2",
                *map("--preload".format, preloaded),
                "wsgi:app",
            ],
            "uvicorn": ["-m", "uvicorn", "--uds", "s", "--workers", "2", "asgi:app"],
        }[name]
        with started(tmp_path, *command, **({"GPUSCOPE_FRAMEWORKS": "asgi"} if name == "uvicorn" else {})) as process:
            workers: dict[str, int] = {}

            def both_have_answered():
                assert process.poll() is None, process.stderr.read()
                if (worker := ask(str(tmp_path / "s"))) is not None:
                    workers[worker] = workers.get(worker, 0) + 1
                return len(workers) == 2

            wait_for(both_have_answered)
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        exported: dict[str, int] = {}
        instances = set()
        for span in spans_in(tmp_path):
            if span.name == "answer":
                worker = str(span.resource["process.pid"])
                exported[worker] = exported.get(worker, 0) + 1
                instances.add(span.instance)
        assert exported == workers
        assert len(instances) == 2


WSGI = """
import os, gpuscope
with gpuscope.stage("start"): pass
def app(environ, respond):
    with gpuscope.stage("answer"):
        respond("200 OK", [("Content-Type", "text/plain")])
        return [str(os.getpid()).encode()]
"""

ASGI = """
import os, gpuscope
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
async def answer(request):
    with gpuscope.stage("answer"):
        return PlainTextResponse(str(os.getpid()))
app = Starlette(routes=[Route("/", answer)])
"""


@contextmanager
def started(folder, *command, **environment):
    """Run a program of Python in a folder, recording to files there; end it with the block."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**kept, **ON, "PYTHONPATH": str(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=60)


def ask(path: str) -> str | None:
    """Ask a server at a Unix socket which process answers; None while it does not listen."""
    connection = http.client.HTTPConnection("localhost", timeout=20)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(path)
        connection.request("GET", "/", headers={"Connection": "close"})
        return connection.getresponse().read().decode()
    except OSError:
        return None
    finally:
        connection.close()
