"""Fixtures for the exporters' tests: a receiver on loopback, and an account."""

from __future__ import annotations

import pytest

from .batches import Account
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
