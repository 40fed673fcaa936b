"""
The ids of stages that batches work for, and the sampling of batches.

A member may still run, may have ended long ago, or may be of another process. Changes no current context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.trace import SpanContext

from gpuscope._data.native import StageRecord
from gpuscope._otel.contexts import flags
from gpuscope._otel.identities import Identities, ids_of
from gpuscope._otel.lazy_span import settled_ids
from gpuscope._recording.batches.token import source_of

if TYPE_CHECKING:
    from gpuscope._recording.batches.token import Token


class MemberIdentities(Identities):
    """Decides for batches by their members as well."""

    def ids_of_member(self, record: StageRecord) -> SpanContext:
        """Settle a stage's ids for good, because another process or a header is to have them."""
        found = self.lazy(record).get_span_context()
        if settled_ids(record) is not None:
            return found
        # Recording has ended meanwhile, or another thread is settling: these are the ones that it was exported with.
        (trace_id, span_id), sampled = ids_of(record), flags(sampled=record.trace.sampled is not False)
        return SpanContext(trace_id, span_id, is_remote=False, trace_flags=sampled)

    def settle_member(self, record: StageRecord) -> tuple[int, int, bool]:
        """Return what `settle` does of a stage that a batch has worked for, in less time where that is known."""
        trace = record.trace
        if trace.sampled is None and not trace.parent_id and self.keeps_roots():
            trace.sampled = True
        if not self.sdk and trace.sampled is not None and settled_ids(record) is None:
            return trace.trace_id, record.span_id, trace.sampled
        return self.settle(record)

    def _decision(self, root: StageRecord) -> bool:
        """Decide for a trace; that of a batch is exported if the trace of a member is."""
        kept = super()._decision(root)
        return kept or (root.members is not None and any(map(self._is_sampled, root.members.tokens)))

    def _is_sampled(self, token: Token) -> bool:
        record = source_of(token)
        if not isinstance(record, StageRecord):
            return token.sampled
        self._decide(record)
        return record.trace.sampled is not False
