"""Fixtures for the exporters' tests: a receiver on loopback, an account, and exporters for both."""

from __future__ import annotations

import pytest

from gpuscope._config import Config
from gpuscope.exporters.otlp import OtlpExporter

from .batches import Account, Row, make_batch
from .receiver import Receiver


@pytest.fixture
def otlp_receiver():
    """A receiver that answers 200 unless told otherwise; closed, and what hangs in it released, at the end."""
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def account() -> Account:
    """A ledger for deliveries."""
    return Account()


@pytest.fixture
def make_exporter(otlp_receiver):
    """Return a function that makes an exporter for the receiver; shut down at the end."""
    made = []

    def make(limits=None, backoff_s=0.001, **settings):
        config = Config().changed(**{"otlp_endpoint": otlp_receiver.url, "schedule_delay_s": 0.001, **settings})
        made.append(OtlpExporter(config, {"service.name": "tests"}, backoff_s=backoff_s, limits=limits))
        return made[-1]

    yield make
    otlp_receiver.release()
    for exporter in made:
        exporter.shutdown(5)


@pytest.fixture
def send(account):
    """Return a function that exports so many stages as one batch."""

    def export(exporter, stages=1):
        batch = make_batch(*(Row(span_id=number + 1) for number in range(stages)))
        exporter.export(batch, account.open(batch))

    return export
