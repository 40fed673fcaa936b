"""A real receiver of OTLP over gRPC on loopback, that answers as it is told to."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
from google.rpc.error_details_pb2 import RetryInfo
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service


class GrpcReceiver:
    """
    Listens at `endpoint`, keeps `requests` and their `metadata`, and fails with the queued codes in turn.

    Args:
        takes_metrics: whether it knows that service.
        credentials: of a server with TLS.

    """

    def __init__(self, *, takes_metrics=True, credentials=None):
        self.requests, self.metrics, self.metadata, self.codes = [], [], [], []
        self.retry_s = None
        """With a failure: when to come again."""
        self.rejects = 0
        """Spans of each request that are not taken."""
        self._server = grpc.server(ThreadPoolExecutor(2))
        for name, module, take in (
            ("trace.v1.TraceService", service, self._take),
            ("metrics.v1.MetricsService", metrics_service, self._take_metrics),
        ):
            if module is service or takes_metrics:
                kind = "Trace" if module is service else "Metrics"
                handler = grpc.unary_unary_rpc_method_handler(
                    take,
                    request_deserializer=getattr(module, f"Export{kind}ServiceRequest").FromString,
                    response_serializer=getattr(module, f"Export{kind}ServiceResponse").SerializeToString,
                )
                full = f"opentelemetry.proto.collector.{name}"
                self._server.add_generic_rpc_handlers(
                    (grpc.method_handlers_generic_handler(full, {"Export": handler}),)
                )
        if credentials is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self._server.add_secure_port("localhost:0", credentials)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._server.start()

    def _take(self, request, call):
        self._say(call)
        self.requests.append(request)
        response = service.ExportTraceServiceResponse()
        if self.rejects:
            response.partial_success.rejected_spans = self.rejects
            response.partial_success.error_message = "no room"
        return response

    def _take_metrics(self, request, call):
        self._say(call)
        self.metrics.append(request)
        return metrics_service.ExportMetricsServiceResponse()

    def _say(self, call):
        self.metadata.append(dict(call.invocation_metadata()))
        if self.codes:
            if self.retry_s is not None:
                info = RetryInfo()
                info.retry_delay.FromMilliseconds(int(self.retry_s * 1e3))
                call.set_trailing_metadata((("google.rpc.retryinfo-bin", info.SerializeToString()),))
            call.abort(self.codes.pop(0), "not now")

    def close(self):
        """End."""
        self._server.stop(None)

    @property
    def spans(self):
        """Every span received."""
        groups = [group for request in self.requests for group in request.resource_spans]
        return [span for group in groups for scope in group.scope_spans for span in scope.spans]

    @property
    def names(self):
        """The names of all spans."""
        return [span.name for span in self.spans]
