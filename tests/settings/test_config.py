"""Settings: what the environment means, and what is said of a malformed value."""

from __future__ import annotations

import re

import pytest

from gpuscope._settings.config import Config
from gpuscope._settings.flight import limits as limits_of
from gpuscope._settings.shown import shown_setting, shown_url


class TestEnvironment:
    """Variables: a malformed value warns and never raises."""

    @pytest.mark.parametrize(
        ("word", "placed"), [("1", "beside"), ("beside", "beside"), ("Inline", "inline"), ("0", ""), ("off", "")]
    )
    def test_where_the_nodes_of_graph_stages_stand(self, word, placed):
        """One variable says whether stages in CUDA graphs are timed, and where their nodes stand."""
        config, complaints = Config.from_env({"GPUSCOPE_GRAPH_STAGES": word})
        assert (config.graph_stages, complaints) == (placed, [])
        assert Config().changed(graph_stages=word).graph_stages == placed
        assert Config().changed(graph_stages=False).graph_stages == ""

    @pytest.mark.parametrize(("word", "wanted"), [("1", True), ("Yes", True), ("0", False), ("off", False), ("", True)])
    def test_a_switch_is_on_or_off(self, word, wanted):
        """Every word for yes and for no, whatever its case; none at all leaves it as it is, which is on."""
        config, complaints = Config.from_env({"GPUSCOPE_NVTX": word})
        assert (config.nvtx, complaints) == (wanted, [])

    @pytest.mark.parametrize(
        ("value", "seconds"), [("0", 0.0), ("1500", 1.5), ("86400000", 86400.0), ("86400001", 5.0)]
    )
    def test_a_delay_is_a_day_at_most(self, value, seconds):
        """A longer one is a mistake, and the default is taken."""
        config, complaints = Config.from_env({"OTEL_BSP_SCHEDULE_DELAY": value})
        assert config.schedule_delay_s == seconds
        assert bool(complaints) is (value == "86400001")

    @pytest.mark.parametrize(("text", "calls"), [("0", 0), (" 12 ", 12), ("1000000", 1_000_000)])
    def test_a_count_is_a_whole_number(self, text, calls):
        """In the range that its row of the table tells."""
        config, complaints = Config.from_env({"GPUSCOPE_WARMUP": text})
        assert (config.warmup, complaints) == (calls, [])

    @pytest.mark.parametrize(
        ("variable", "allowed"),
        [
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "one of http/protobuf, grpc"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "one of none, gzip"),
        ],
    )
    def test_what_is_allowed_is_told(self, variable, allowed):
        """All of it or, where there is one word, that."""
        _, (complaint,) = Config.from_env({variable: "grpc-web"})
        assert f"expected {allowed}" in complaint

    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("250ms", 0.25),
            ("1.5 s", 1.5),
            ("2min", 120.0),
            ("3", 0.0),
            ("0", 0.0),
            ("-1", 0.0),
            ("5h", 18_000.0),
            ("ms", 0.0),
        ],
    )
    def test_a_duration_has_a_unit(self, text, seconds):
        """What has none, or is not a duration, is said; the keyword has its unit in its name."""
        config, complaints = Config.from_env({"GPUSCOPE_FLIGHT_SLOW": text})
        assert config.flight_slow_s == seconds
        assert bool(complaints) is (text in ("-1", "ms", "3"))
        assert Config().changed(flight_slow_s=seconds).flight_slow_s == seconds

    @pytest.mark.parametrize(
        ("variable", "text", "said"),
        [
            ("GPUSCOPE_FLIGHT_SLOW", "250", "(250 has no unit: 250ms or 250s)"),
            ("GPUSCOPE_FLIGHT_SLOW", "0.1ms", "expected a time from 1ms to 86400s"),
            ("GPUSCOPE_STALL", "10", "(10 has no unit: 10ms or 10s)"),
            ("GPUSCOPE_STALL", "20x, 10", "(10 has no unit: 10ms or 10s)"),
            ("GPUSCOPE_STALL", "1ms", "(a time of 50 ms at least)"),
            ("GPUSCOPE_KEEP", "error, slower=250", "(250 has no unit: 250ms or 250s)"),
        ],
    )
    def test_a_time_that_could_be_two_is_none(self, variable, text, said):
        """250 may be meant as milliseconds: a thousandth of what it would be taken for."""
        config, (complaint,) = Config.from_env({variable: text})
        assert said in complaint
        assert (config.flight_slow_s, config.stall, config.keep) == (0.0, "", "")

    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("2097152", 1 << 21),
            ("16MiB", 1 << 24),
            ("2048 kib", 1 << 21),
            ("1.5 MiB", 3 << 19),
            ("2000000B", 2_000_000),
            ("2000kB", 2_000_000),
            ("3MB", 3_000_000),
            ("1GiB", 1 << 30),
            ("1GB", 10**9),
            ("16M", None),
            ("1MB", None),
            ("1e7", None),
            ("MiB", None),
            ("-2MiB", None),
            ("1.1MiB", None),
            ("100GiB", None),
        ],
    )
    @pytest.mark.parametrize("name", ["flight_bytes", "file_max_bytes", "queue_bytes"])
    def test_a_size_may_have_a_unit(self, name, text, size):
        """Of 1,024 or of 1,000, in any case; bytes, if it has none. What is no size, or not in the range, is said."""
        config, complaints = Config.from_env({f"GPUSCOPE_{name.upper()}": text})
        if size is None and text not in ("1MB", "100GiB"):
            assert len(complaints) == 1
            assert "or with a unit as in 64KiB, 16MiB" in complaints[0]
        elif size is not None:
            assert (getattr(config, name), complaints) == (size, [])
            assert getattr(Config().changed(**{name: text}), name) == size
        elif name == "flight_bytes":  # The others have wider ranges.
            assert len(complaints) == 1

    @pytest.mark.parametrize(
        ("text", "share"),
        [
            ("1s/60s", "1/60"),
            ("5s / 10m", "5/600"),
            ("2/2", "2/2"),
            ("0", ""),
            ("off", ""),
            ("1s", None),
            ("60s/1s", None),
            ("1s/2s/3s", None),
            ("0/60", None),
            ("100ms/1s", None),
            ("often", None),
        ],
    )
    def test_a_share_of_the_time(self, text, share):
        """How long, every how long; what is no share is said, and nothing is watched."""
        config, complaints = Config.from_env({"GPUSCOPE_SYNCS": text})
        assert config.syncs == (share or "")
        assert bool(complaints) is (share is None)
        if share is not None:
            assert Config().changed(syncs=text).syncs == share
        else:
            with pytest.raises(ValueError, match="every how long"):
                Config().changed(syncs=text)

    @pytest.mark.parametrize(
        ("text", "limits"),
        [("10s", (10, 0)), ("20x", (0, 20)), ("10s, 20x", (10, 20)), ("2.5X,250ms", (0.25, 2.5)), ("0", (0, 0))],
    )
    def test_stalls_have_a_limit_or_a_multiple_or_both(self, text, limits):
        """In any order; off is no limit."""
        config, complaints = Config.from_env({"GPUSCOPE_STALL": text})
        assert not complaints
        assert limits_of(config.stall) == limits if config.stall else limits == (0, 0)
        assert Config().changed(stall=text).stall == config.stall

    @pytest.mark.parametrize("text", ["yes", "1x", "10s, 5s", "10s,", "20x, 30x", "x", "-5s", "10s, 0", "1ms"])
    def test_other_limits_of_stalls_are_refused(self, text):
        """A variable warns and changes nothing; a keyword raises."""
        config, complaints = Config.from_env({"GPUSCOPE_STALL": text})
        assert (config.stall, len(complaints)) == ("", 1)
        with pytest.raises(ValueError, match="a multiple of a stage's p99"):
            Config().changed(stall=text)

    @pytest.mark.parametrize(("text", "path"), [("0", ""), ("off", ""), ("/dev/shm/a b", "/dev/shm/a b"), ("1", "")])
    def test_the_flight_recorder_is_a_file(self, text, path):
        """A word for no is none, and one for yes does not say where."""
        config, complaints = Config.from_env({"GPUSCOPE_FLIGHT": text})
        assert (config.flight, bool(complaints)) == (path, text == "1")

    @pytest.mark.parametrize("word", ["0", "false", "No", "OFF", "", " "])
    def test_false_words_mean_absent(self, word):
        """Every word for no leaves gpuscope out, whatever its case."""
        assert Config.from_env({"GPUSCOPE": word})[0].mode == "absent"

    @pytest.mark.parametrize("word", ["1", "true", "Yes", "ON"])
    def test_true_words_mean_on(self, word):
        """Every word for yes switches recording on."""
        assert Config.from_env({"GPUSCOPE": word})[0].mode == "on"

    def test_unset_means_absent_and_idle_means_idle(self):
        """Without the variable nothing is recorded; `idle` asks for togglability."""
        assert Config.from_env({})[0].mode == "absent"
        assert Config.from_env({"GPUSCOPE": "idle"})[0].mode == "idle"

    @pytest.mark.parametrize(
        ("variable", "value", "field", "default"),
        [
            ("GPUSCOPE", "maybe", "mode", "absent"),
            ("GPUSCOPE_QUEUE_SIZE", "lots", "queue_size", 8192),
            ("GPUSCOPE_QUEUE_SIZE", "-5", "queue_size", 8192),
            ("GPUSCOPE_QUEUE_SIZE", "9" * 5000, "queue_size", 8192),
            ("GPUSCOPE_EXPORTER", "otlp,carrier-pigeon", "exporters", ("auto",)),
            ("GPUSCOPE_EXPORTER", "none,otlp", "exporters", ("auto",)),
            ("GPUSCOPE_INTERVAL", "nan", "interval_s", 1.0),
            ("GPUSCOPE_NVTX", "perhaps", "nvtx", True),
            ("GPUSCOPE_GRAPH_STAGES", "aside", "graph_stages", "beside"),
            ("OTEL_TRACES_SAMPLER", "sometimes", "sampler", "parentbased_always_on"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "otlp_protocol", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon", "otlp_timeout_s", 10.0),
            ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "soon", "otlp_metrics_timeout_s", 10.0),
            ("OTEL_METRIC_EXPORT_INTERVAL", "0", "metrics_interval_s", 60.0),
            ("GPUSCOPE_METRICS", "prometheus", "metrics", "auto"),
        ],
    )
    def test_malformed_value_is_named_and_the_default_used(self, variable, value, field, default):
        """A typo yields one sentence with what was seen, what is allowed and what is used instead."""
        config, (complaint,) = Config.from_env({variable: value})
        assert getattr(config, field) == default
        assert variable in complaint
        said = value.strip() if re.fullmatch(r"-?\d{1,9}", value.strip()) else f"a text of {len(value)} characters"
        assert f"({said})" in complaint
        assert "expected" in complaint
        assert "using" in complaint

    def test_traces_variable_comes_before_the_general_one(self):
        """`OTEL_EXPORTER_OTLP_TRACES_*` wins over `OTEL_EXPORTER_OTLP_*`."""
        config, _ = Config.from_env(
            {
                "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "a=1",
                "OTEL_EXPORTER_OTLP_HEADERS": "a=2,b=3",
                "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
            }
        )
        assert config.otlp_headers == {"a": "1"}
        assert config.otlp_compression == "gzip"

    def test_endpoints_as_opentelemetry_defines_them(self):
        """The base URL gets the path of traces; the URL for traces is used as it is."""
        assert Config().traces_url == "http://localhost:4318/v1/traces"
        assert (
            Config.from_env({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:1/x/"})[0].traces_url == "http://c:1/x/v1/traces"
        )
        exact = Config.from_env({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:1/x"})[0]
        assert exact.traces_url == "http://c:1/x"

    def test_metrics_have_variables_of_their_own(self):
        """What is said of metrics, or of both, holds for metrics; what is said of spans, keys above all, does not."""
        config, _ = Config.from_env(
            {
                "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "key=of-spans",
                "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT": "3",
                "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:1",
                "OTEL_METRIC_EXPORT_INTERVAL": "15000",
            }
        )
        assert config.otlp_metrics_headers == {}
        assert (config.otlp_timeout_s, config.otlp_metrics_timeout_s) == (10.0, 3.0)
        assert config.otlp_metrics_compression == "gzip"
        assert config.metrics_url == "http://c:1/v1/metrics"
        assert config.metrics_interval_s == 15.0
        assert Config().changed(otlp_metrics_endpoint="http://m:2/x").metrics_url == "http://m:2/x"

    def test_headers_are_percent_decoded(self):
        """Header values are percent-encoded lists, as in W3C baggage."""
        config, _ = Config.from_env({"OTEL_EXPORTER_OTLP_HEADERS": "Authorization=Bearer%20abc%3D, x=y"})
        assert config.otlp_headers == {"authorization": "Bearer abc=", "x": "y"}

    def test_a_malformed_header_costs_itself_and_is_not_quoted(self):
        """The sentence names the variable and the pair's number; the other pairs are sent."""
        text = "a=1,Bearer secret,b=2,=secret,c=secret%0D%0A,sp ace=secret,d=\u20acsecret,,e=5"
        config, (complaint,) = Config.from_env({"OTEL_EXPORTER_OTLP_HEADERS": text})
        assert config.otlp_headers == {"a": "1", "b": "2", "e": "5"}
        assert complaint.startswith("OTEL_EXPORTER_OTLP_HEADERS: expected name=value")
        assert "unlike number 2, 4, 5, 6, 7;" in complaint
        assert "secret" not in complaint
        with pytest.raises(ValueError, match=r"`otlp_headers`: expected name=value .* unlike number 2") as caught:
            Config().changed(otlp_headers="a=1,secret")
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize(
        "text",
        [
            "sk-secret" + 40 * "0",
            "http://user:secret@host",
            "key=secret",
            "user:secret@host:4318",
            "https://host/?key=secret",
        ],
    )
    def test_what_may_be_a_credential_is_not_quoted(self, text):
        """A URL or a pair in the wrong variable is named by the variable alone."""
        _, complaints = Config.from_env(dict.fromkeys(("GPUSCOPE_EXPORTER", "OTEL_EXPORTER_OTLP_TIMEOUT"), text))
        assert len(complaints) == 2
        assert "secret" not in str(complaints)
        with pytest.raises(ValueError, match=r"`otlp_timeout_s` is \.\.\.: expected a number") as caught:
            Config().changed(otlp_timeout_s=text)
        assert "secret" not in str(caught.value)

    def test_settings_can_be_printed(self):
        """Neither headers nor URLs are in the text of a configuration; as shown settings they lack their secrets."""
        secrets = {"otlp_headers": {"key": "secret"}, "otlp_endpoint": "http://u:secret@host/v1?key=secret#secret"}
        config = Config().changed(**secrets, otlp_metrics_headers={"key": "secret"})
        assert "secret" not in repr(config)
        assert "warmup=3" in repr(config)
        shown = {name: shown_setting(name, getattr(config, name)) for name in secrets}
        assert shown == {"otlp_headers": "<key>", "otlp_endpoint": "'http://host/v1'"}

    def test_parts_of_a_credential_do_not_pass_for_something_else(self):
        """A value that its commas and its padding cut into pairs, and a key in place of the path of its file."""
        text, key = "authorization=Basic abc,secret==", "-----BEGIN PRIVATE KEY-----secret"
        config, _ = Config.from_env({"OTEL_EXPORTER_OTLP_HEADERS": text, "OTEL_EXPORTER_OTLP_CLIENT_KEY": key})
        assert shown_setting("otlp_headers", config.otlp_headers) == "<authorization, ...>"
        assert "secret" not in repr(config) + shown_setting("otlp_metrics_client_key", config.otlp_metrics_client_key)
        assert shown_setting("otlp_client_key", "/etc/tls/key.pem") == "'/etc/tls/key.pem'"

    @pytest.mark.parametrize(
        "url",
        [
            "http://u:sec/ret@h/",
            "http://u:sec#ret@h",
            "http://u:sec?ret@h/",
            "u:sec/ret@h:4318",
            "http://h:sec/",
            "//[sec",
            "http://u%3Asec%40h:4318",
            "http://h:1/v1;key=sec",
            "http://h:1/%3Fkey=sec",
            "http://h;key=sec/v1",
            "key=sec",
            "sec",
        ],
    )
    def test_a_url_that_cannot_be_told_apart_is_not_shown(self, url):
        """Where a password has characters that end a host, no part of the URL is quoted."""
        assert "sec" not in shown_url(url)

    def test_only_true_disables_the_sdk(self):
        """`OTEL_SDK_DISABLED=1` is not OpenTelemetry's spelling, and is said to be wrong."""
        assert Config.from_env({"OTEL_SDK_DISABLED": "TRUE"})[0].sdk_disabled
        config, complaints = Config.from_env({"OTEL_SDK_DISABLED": "1"})
        assert not config.sdk_disabled
        assert len(complaints) == 1


class TestKeywords:
    """Keywords: a malformed value raises."""

    def test_unknown_setting_is_refused(self):
        """A keyword that is not a setting raises, and lists those that are."""
        with pytest.raises(TypeError, match=r"`qeue_size` is not a setting.*queue_size"):
            Config().changed(qeue_size=5)

    def test_value_out_of_range_is_refused(self):
        """A keyword is checked as its variable would be, but raises."""
        with pytest.raises(ValueError, match=r"`queue_size` is 1: expected a whole number from 16"):
            Config().changed(queue_size=1)

    def test_values_are_parsed_like_variables(self):
        """`exporters="otlp,file"` means the same as the variable."""
        assert Config().changed(exporters="otlp,file").exporters == ("otlp", "file")
