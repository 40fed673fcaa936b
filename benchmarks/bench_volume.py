"""
What a fleet sends and what its collectors pay: bytes per span, and the CPU time of a real OpenTelemetry Collector.

Requests of seven stages on a fake GPU, through the real recorder, collector and OTLP exporter to the real receiver,
plain and with gzip. Then the same payloads through `rotel`, an OTLP collector in one process, to the same receiver.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sysconfig
import tempfile
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests
from _common import arguments, save, table
from _receiver import PATH, Receiver

import gpuscope
from gpuscope import _runtime
from gpuscope._settings.config import Config
from gpuscope.exporters.otlp import OtlpExporter
from gpuscope.testing import FakeDevice, ManualClock

if TYPE_CHECKING:
    from collections.abc import Iterator

INNER = ("decode", "preprocess", "h2d", "infer", "d2h", "postprocess")
STAGES_A_REQUEST = len(INNER) + 1
SPANS_A_STAGE = 2
"""A host span and a GPU span."""
RATES = (100, 1_000, 10_000)
DAY_S = 86_400
RESOURCE = {
    "service.name": "volume",
    "service.instance.id": "0c6a9f0e-3a4c-4c6e-8f5d-2d8f0a6f7b11",
    "host.name": "gpu-node-17",
    "host.id": "3d1219c7c4c5404aaa1f6d2a48adfda4",
    "k8s.namespace.name": "inference",
    "k8s.pod.name": "detector-6f7c9d8b5-x2x4q",
    "k8s.node.name": "gpu-node-17",
    "telemetry.distro.name": "gpuscope",
}


@dataclass
class Sent:
    """What left the process."""

    compression: str
    stages: int = 0
    payloads: list[bytes] = field(default_factory=list)
    """The bodies as they went over the connection."""
    sender_s: float = 0.0
    """CPU time of the sending thread."""

    @property
    def spans(self) -> int:
        return self.stages * SPANS_A_STAGE

    def bytes_a_span(self) -> float:
        return sum(map(len, self.payloads)) / self.spans


def record(endpoint: str, compression: str, stages: int) -> Sent:
    """Record and export this many stages; the queue never overflows, because each thousand is waited for."""
    sent, clock, chance = Sent(compression), ManualClock(), random.Random(0)
    sending = {"otlp_base_endpoint": endpoint, "otlp_compression": compression}
    config = Config().changed(mode="on", exporters="none", gpu_spans="all", **sending)
    exporter = OtlpExporter(config, RESOURCE)
    client = exporter._sender._client
    attempt = client._attempt

    def keep(body: bytes, deadline: float) -> Any:
        sent.payloads.append(body)
        return attempt(body, deadline)

    client._attempt = keep
    device = FakeDevice(clock, completes=True, delay_ns=20_000)
    with _runtime.period(config, exporters=(exporter,), device=device, clock=clock):
        for number in range(stages // STAGES_A_REQUEST):
            request(number, clock, device, chance)
            if number % (1_000 // STAGES_A_REQUEST) == 0:
                # Resolved and encoded; sent by the sender's own rules, 2,048 stages at a time.
                _runtime.state.engine.flush(60, send=False)
        gpuscope.flush(60)
        spent = time.pthread_getcpuclockid(exporter._sender._thread.ident)
        sent.sender_s = time.clock_gettime(spent)
        statistics = gpuscope.statistics()
        assert statistics.exported == statistics.recorded, statistics
        sent.stages = statistics.exported
    return sent


def request(number: int, clock: ManualClock, device: FakeDevice, chance: random.Random) -> None:
    """Record one request. Its times are irregular, as real ones are: regular ones would compress to half the size."""
    with gpuscope.stage("request", attributes={"model": "vit"}) as outer:
        outer.set_attribute("batch_size", 1 + number % 8)
        for name in INNER:
            device.delay_ns = chance.randrange(10_000, 900_000)
            with gpuscope.stage(name):
                clock.advance(chance.lognormvariate(-8, 1))
                device.delay_ns += chance.randrange(900_000)


@contextmanager
def rotel(receiver: str, protocol: str = "http") -> Iterator[tuple[str, int]]:
    """Run rotel before the receiver; yield its endpoint and process id."""
    package = find_spec("rotel")
    assert package is not None
    assert package.origin is not None
    with socket.socket() as http, socket.socket() as grpc, tempfile.TemporaryDirectory() as folder:
        http.bind(("127.0.0.1", 0))
        grpc.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in (http, grpc)]
        http.close()
        grpc.close()
        settings = {
            "otlp-http-endpoint": f"127.0.0.1:{ports[0]}",
            "otlp-grpc-endpoint": f"127.0.0.1:{ports[1]}",
            "exporter": "otlp",
            "otlp-exporter-protocol": protocol,
            "otlp-exporter-endpoint": receiver,
            "pid-file": f"{folder}/pid",
            "log-file": f"{folder}/log",
        }
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("ROTEL", "OTEL"))}
        environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR") or ""
        agent = Path(package.origin).with_name("rotel-agent")
        flags = [f"--{name}={value}" for name, value in settings.items()]
        with subprocess.Popen([agent, "start", *flags], env=environ, stdout=subprocess.DEVNULL) as process:
            try:
                wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", ports[0])))
                yield f"http://127.0.0.1:{ports[0]}", process.pid
            finally:
                process.terminate()


def wait_for(condition: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the collector did not get there within a minute")
        time.sleep(0.02)


def cpu_s(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def through_rotel(sent: Sent, spans: int) -> dict[str, float]:
    """Send the payloads until this many spans have gone through; return what that cost the collector."""
    headers = {"Content-Type": "application/x-protobuf"}
    if sent.compression != "none":
        headers["Content-Encoding"] = sent.compression
    with closing(Receiver()) as receiver, rotel(receiver.endpoint) as (endpoint, pid), requests.Session() as session:
        before, start, passed = cpu_s(pid), time.monotonic(), 0
        while passed < spans:
            for payload in sent.payloads:
                session.post(endpoint + PATH, data=payload, headers=headers, timeout=30).raise_for_status()
            passed += sent.spans
            # At most one round ahead of the receiver, which is Python: otherwise the collector holds or drops the rest.
            wait_for(lambda expected=passed: sum(receiver.counts().values()) >= expected)
        taken_s = time.monotonic() - start
        return {
            "spans": passed,
            "cpu_s_per_million_spans": (cpu_s(pid) - before) / passed * 1e6,
            "spans_a_second": passed / taken_s,
            "peak_mb": peak_mb(pid),
        }


def volumes(sent: list[Sent]) -> list[dict[str, float]]:
    """What processes send in all, at several rates of stages per second."""
    return [
        {
            "stages_a_second": rate,
            "spans_a_second": rate * SPANS_A_STAGE,
            **{
                f"{item.compression}_{unit}": item.bytes_a_span() * rate * SPANS_A_STAGE * seconds / scale
                for item in sent
                for unit, seconds, scale in (("kb_a_second", 1, 1e3), ("gb_a_day", DAY_S, 1e9))
            },
        }
        for rate in RATES
    ]


def main() -> None:
    options = arguments(__doc__).parse_args()
    stages, passing = (7_000, 28_000) if options.quick else (140_000, 1_000_000)
    with closing(Receiver()) as receiver:
        sent = [record(receiver.endpoint, compression, stages) for compression in ("none", "gzip")]
        received = receiver.counts()
    assert received == {"volume": sum(item.spans for item in sent)}, received
    rows = [[s.compression, str(s.spans), s.bytes_a_span(), s.sender_s / s.spans * 1e6] for s in sent]
    print(table(["compression", "spans", "bytes per span", "sending, CPU µs per span"], rows))
    rates = volumes(sent)
    print(table(list(rates[0]), [[str(line["stages_a_second"]), *list(line.values())[1:]] for line in rates]))
    collector = {}
    if find_spec("rotel"):
        collector = {item.compression: through_rotel(item, passing) for item in sent}
        rows = [[name, *figures.values()] for name, figures in collector.items()]
        print(table(["rotel", "spans", "CPU s per million spans", "spans per second", "peak MB"], rows))
    save(
        "volume",
        options.out,
        sent={
            item.compression: {
                "stages": item.stages,
                "spans": item.spans,
                "requests": len(item.payloads),
                "bytes_a_span": item.bytes_a_span(),
                "sender_cpu_us_a_span": item.sender_s / item.spans * 1e6,
            }
            for item in sent
        },
        rates=rates,
        rotel=collector,
    )


if __name__ == "__main__":
    main()
