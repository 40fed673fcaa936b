"""What has to be true of the service's trace, whatever made it, and of the account of its stages."""

from __future__ import annotations

COLUMNS = "as columns through the application's own exporter to "
AT_THE_END = "to the application's span processors, made at their end, because "
ONE_BY_ONE = "one by one through the application's TracerProvider, because "


def groups_of(receiver):
    """Every `ResourceSpans` that came, over HTTP or gRPC."""
    messages = [getattr(request, "message", request) for request in receiver.requests]
    return [group for message in messages for group in message.resource_spans]


def assert_whole(receiver, *, service=None):
    """
    The trace came once: the same id, each span below the right one, and one resource for all; return its spans.

    What the resource does not say, and Jaeger asks for, is the host: stages have it beside the application's resource.
    """
    found, resources = {}, []
    for group in groups_of(receiver):
        for scope in group.scope_spans:
            for span in scope.spans:
                assert span.name not in found, f"{span.name} came twice"
                found[span.name] = span
                if (scope.scope.name == "gpuscope") is not (span.name in ("infer", "attention")):
                    raise AssertionError(f"{span.name} is of the scope {scope.scope.name}")
        resources.append(
            {item.key: item.value.string_value or item.value.int_value for item in group.resource.attributes}
        )
    names = {span.span_id: span.name for span in found.values()}
    assert {name: names.get(span.parent_span_id) for name, span in found.items()} == {
        "request": None,
        "infer": "request",
        "attention": "infer",
        "look up": "attention",
    }
    assert not found["request"].parent_span_id
    assert len({span.trace_id for span in found.values()}) == 1
    hosts = {resource.pop("host.name", None) for resource in resources}
    assert len(hosts - {None}) <= 1
    assert all(resource == resources[0] for resource in resources)
    if service is not None:
        assert resources[0]["service.name"] == service
    assert {"batch_size": 8}.items() <= {item.key: item.value.int_value for item in found["infer"].attributes}.items()
    return found


def assert_nothing_lost(told, *, way, said, quiet=False):
    """
    Both stages count as exported, this way was taken for that reason, and the log says so and complains of nothing.

    `quiet`: where the log's line came before the service could hear it.
    """
    assert (told["recorded"], told["exported"], told["lost"], told["flushed"]) == (2, 2, {}, True)
    assert told["exporters"] == [way]
    assert told["route"].startswith({"application": COLUMNS, "processors": AT_THE_END, "sdk": ONE_BY_ONE}[way])
    assert said in told["route"]
    assert [line for level, line in told["heard"] if level != "INFO"] == []
    if not quiet:
        assert ["INFO", f"spans go {told['route']}."] in told["heard"]
