"""Threads that record at once, each on a stream of its own, keep apart and lose nothing."""

from __future__ import annotations

import threading

import torch

import gpuscope
from gpuscope.testing import capture

THREADS, STAGES = 4, 500


def run_threads():
    """Run nested stages with kernels on four threads; return each thread's stream handle by its name."""
    handles, start = {}, threading.Barrier(THREADS)

    def work():
        stream = torch.cuda.Stream()
        buffer = torch.zeros(256, device="cuda")
        handles[threading.current_thread().name] = stream.cuda_stream
        torch.cuda.synchronize()
        start.wait(30)
        with torch.cuda.stream(stream):
            for _ in range(STAGES):
                with gpuscope.stage("outer"), gpuscope.stage("inner"):
                    buffer.add_(1)

    threads = [threading.Thread(target=work, name=f"worker-{number}") for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return handles


def test_every_stage_of_every_thread_is_timed_on_its_own_stream(gpu_of):
    """All stages get GPU times, with the stream and the name of the thread that ran them, below their own parents."""
    with capture(queue_size=65_536, interval_s=0.001) as spans:
        handles = run_threads()
        assert gpuscope.flush(60)
        statistics = gpuscope.statistics()
    gpu = gpu_of(spans)
    hosts = {span.span_id: span for span in spans if span.kind == "host"}
    assert len(hosts) == 2 * THREADS * STAGES
    assert len(set(handles.values())) == THREADS
    for host in hosts.values():
        thread = host.attributes["thread.name"]
        assert gpu[host.span_id].attributes["gpuscope.cuda.stream"] == handles[thread]
        if host.name == "inner":
            assert hosts[host.parent_id].name == "outer"
            assert hosts[host.parent_id].attributes["thread.name"] == thread
    assert statistics.untimed == {}


def test_the_account_balances():
    """Recorded = exported + dropped + lost + pending, with a queue that holds everything and with one that does not."""
    for queue_size in (65_536, 16):
        with capture(queue_size=queue_size, interval_s=0.001):
            run_threads()
            flushed = gpuscope.flush(60)
            account = gpuscope.statistics()
        assert flushed is ("queue_full" not in account.dropped)
        settled = account.exported + sum(account.dropped.values()) + sum(account.lost.values())
        assert account.recorded == 2 * THREADS * STAGES
        assert account.recorded == settled + account.pending
        assert account.pending == 0
        assert account.lost == {}
        if queue_size == 65_536:
            assert account.exported == account.recorded
