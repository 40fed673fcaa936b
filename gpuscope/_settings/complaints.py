"""
What is wrong with variables, and what has to be in use for it to matter: of others nobody has to be told.

`opentelemetry-instrument` sets some of them itself, and beside a provider of the application's most mean nothing to us.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Self

SPANS, METRICS, SAMPLING = "spans", "metrics", "sampling"
"""Sent by `otlp`; sent by `otlp`; decided here, because without a provider nobody else does."""
CONFIG_FILE = "config_file"


class Complaint(str):
    """
    One sentence.

    Args:
        text: the sentence.
        settings: the fields of `Config` whose variables it is about; none where it always matters.

    """

    __slots__ = ("settings",)
    settings: tuple[str, ...]

    def __new__(cls, text: str, settings: Iterable[str] = ()) -> Self:
        made = super().__new__(cls, text)
        made.settings = tuple(settings)
        return made

    @property
    def advice(self) -> str:
        """What to do, where the sentence does not say so itself."""
        return "" if self.settings == (CONFIG_FILE,) else "Correct the variable, or unset it."

    @property
    def uses(self) -> set[str]:
        """What has to be in use for it to matter; empty where it always does."""
        found = {_use_of(setting) for setting in self.settings}
        return set() if "" in found else found


def _use_of(setting: str) -> str:
    if setting.startswith("sampler"):
        return SAMPLING
    if setting.startswith("otlp_metrics_"):
        return METRICS
    return SPANS if setting.startswith("otlp_") or setting == CONFIG_FILE else ""


def merged(complaints: Iterable[Complaint]) -> list[Complaint]:
    """Return each sentence once: a variable for both spans and metrics is read twice."""
    settings: dict[str, tuple[str, ...]] = {}
    for complaint in complaints:
        settings[complaint] = settings.get(complaint, ()) + complaint.settings
    return [Complaint(text, about) for text, about in settings.items()]
