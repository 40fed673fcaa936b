"""Stages by name: functions of programs and frameworks become stages from outside, when their module is imported."""

from gpuscope.instrument._instrumentation import Target, instrument, uninstrument

__all__ = ["Target", "instrument", "uninstrument"]
