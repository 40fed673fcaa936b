"""Settings that were mistyped: what is wrong is said where it is given, with the closest name and no secret."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import gpuscope
from gpuscope._settings.config import Config

NAMES = "auto, none, or any of otlp, sdk and file, separated by commas"
SOMEWHERE = "http://localhost:4318"


class TestExporters:
    """Names of exporters, as a text, in a list, and in the variable."""

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ("otpl", rf"`exporters` is 'otpl': expected {NAMES} \(did you mean otlp\?\)\."),
            (["otpl"], rf"`exporters` is \['otpl'\]: expected {NAMES} \(did you mean otlp\?\)\."),
            (("otlp", "filee"), r"did you mean file\?"),
            (["file", "none"], rf"is \['file', 'none'\]: expected {NAMES}\."),
            ([], rf"is \[\]: expected {NAMES}\."),
            ([["otlp"]], r"has a `list` in it: expected a text or a list of texts, of auto, otlp, sdk, file, none\."),
            (["otlp", None], r"has None in it: expected a text or a list"),
            ([5], r"has a `int` in it: expected a text or a list"),
            (None, r"is None: expected a text or a list"),
            (b"otlp", r"is of type `bytes`: expected a text or a list"),
            ({"otlp": True}, r"is of type `dict`: expected a text or a list"),
            (iter(["otlp"]), r"is of type `list_iterator`: expected a text or a list"),
        ],
    )
    def test_what_is_not_a_name_is_refused(self, given, said):
        """A list is checked as the text is: each name in it, that there is one, and that `none` stands alone."""
        with pytest.raises(ValueError, match=said):
            Config().changed(exporters=given)
        with pytest.raises(ValueError, match=said):
            gpuscope.enable(exporters=given)

    @pytest.mark.parametrize("given", ["otlp,file", ["otlp", "file"], ("OTLP ", "file", "otlp"), ["otlp,file"]])
    def test_names_in_any_form_mean_the_same(self, given):
        """Case, spaces and repetitions do not matter, whatever the names stand in."""
        assert Config().changed(exporters=given).exporters == ("otlp", "file")

    def test_the_variable_names_the_closest(self):
        """A typo in one of several names is found."""
        config, (said,) = Config.from_env({"GPUSCOPE_EXPORTER": "otlp,filee"})
        assert config.exporters == ("auto",)
        assert said == (
            f"ignoring GPUSCOPE_EXPORTER (a text of 10 characters): expected {NAMES}, unlike number 2 "
            "(did you mean file?); using the default, auto."
        )

    def test_objects_are_named_by_their_type(self):
        """What is not a text is not printed: that would be the program's own code."""

        class Mine:
            def __repr__(self):
                raise AssertionError("printed")

        for given in (Mine(), [Mine()]):
            with pytest.raises(ValueError, match="`Mine`"):
                Config().changed(exporters=given)


class TestKeywords:
    """Any other setting, given as a keyword argument."""

    def test_a_name_that_is_not_a_setting_brings_the_closest(self):
        """The closest comes first, then all."""
        with pytest.raises(TypeError, match=r"`exportr` is not a setting of gpuscope; did you mean `exporters`\? The"):
            gpuscope.enable(exportr="file")
        with pytest.raises(TypeError, match=r"`zzz` is not a setting of gpuscope\. The settings are batch_spans,"):
            gpuscope.enable(zzz=1)

    def test_a_variable_s_name_is_a_keyword_too(self):
        """Its value is what the variable's text would be, unit included, or what the keyword takes."""
        given = Config().changed(GPUSCOPE_EXPORTER="file", GPUSCOPE_WARMUP=5, OTEL_BSP_SCHEDULE_DELAY=250)
        assert given == Config().changed(exporters=["file"], warmup="5", schedule_delay_s=0.25)
        assert (
            given
            == Config.from_env({"GPUSCOPE_EXPORTER": "file", "GPUSCOPE_WARMUP": "5", "OTEL_BSP_SCHEDULE_DELAY": "250"})[
                0
            ]
        )

    def test_a_variable_for_both_signals_sets_both_but_for_what_one_of_them_has(self):
        """As in the environment."""
        given = Config().changed(OTEL_EXPORTER_OTLP_TIMEOUT=3, OTEL_EXPORTER_OTLP_TRACES_TIMEOUT=4)
        assert (given.otlp_timeout_s, given.otlp_metrics_timeout_s) == (4.0, 3.0)

    def test_one_setting_twice_is_refused(self):
        """In two spellings; and a misspelt variable brings the closest."""
        with pytest.raises(TypeError, match="`exporters` and `GPUSCOPE_EXPORTER` are one setting; give one of them"):
            gpuscope.enable(exporters="file", GPUSCOPE_EXPORTER="otlp")
        with pytest.raises(TypeError, match="did you mean `GPUSCOPE_EXPORTER`"):
            gpuscope.enable(GPUSCOPE_EXPORTR="file")
        with pytest.raises(TypeError, match="`GPUSCOPE_STAGES` is set by its variable only"):
            gpuscope.enable(GPUSCOPE_STAGES="x=json:dumps")

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"metrics": "optl"}, r"expected one of auto, otlp, sdk, none \(did you mean otlp\?\)"),
            ({"metrics": ["otlp"]}, "`metrics` is of type `list`: expected a text"),
            ({"warmup": None}, "`warmup` is None: expected a whole number"),
            ({"warmup": True}, "`warmup` is True: expected a whole number"),
            ({"interval_s": [1]}, "`interval_s` is of type `list`: expected a number"),
            ({"nvtx": None}, "`nvtx` is None: expected True or False"),
            ({"file": None}, "`file` is None: expected a text"),
            ({"file": 1}, "`file` is of type `int`: expected a text"),
            ({"file": True}, "`file` is of type `bool`: expected a text"),
            ({"file": ""}, "`file` is '': expected the path of a file"),
            ({"schedule_delay_s": "soon"}, "`schedule_delay_s` is 'soon': expected a number of seconds from 0"),
            ({"schedule_delay_s": -1}, "`schedule_delay_s` is -1: expected a number of seconds from 0"),
            ({"metrics_interval_s": 0}, "`metrics_interval_s` is 0: expected a number of seconds from 0.001"),
            ({"otlp_headers": ["a=b"]}, "`otlp_headers` is of type `list`: expected a text or a mapping of texts"),
            ({"otlp_headers": {"a": "b", "c d": "e"}}, "`otlp_headers`: expected texts .* unlike number 2"),
            ({"otlp_headers": {"a": None}}, "`otlp_headers`: expected texts .* unlike number 1"),
        ],
    )
    def test_a_value_of_another_type_is_refused(self, given, said):
        """Each value is checked, whatever its type; the sentence says what was seen and what is allowed."""
        with pytest.raises(ValueError, match=said):
            gpuscope.enable(**given)

    def test_values_that_mean_the_same_are_taken(self, tmp_path):
        """Paths, numbers of numpy, seconds and mappings."""
        config = Config().changed(
            file=tmp_path / "a.jsonl",
            warmup=np.int64(4),
            schedule_delay_s=0.5,
            metrics_interval_s=np.float64(2),
            otlp_headers={"Key": "value"},
        )
        assert (config.file, config.warmup) == (str(tmp_path / "a.jsonl"), 4)
        assert (config.schedule_delay_s, config.metrics_interval_s) == (0.5, 2.0)
        assert config.otlp_headers == {"Key": "value"}

    @pytest.mark.parametrize("name", ["mode", "stages", "frameworks", "stages_file"])
    def test_what_only_a_variable_sets_is_refused(self, name):
        """A keyword without an effect is not taken in silence."""
        with pytest.raises(TypeError, match=rf"`{name}` is set by its variable only; "):
            gpuscope.enable(**{name: "idle"})
        with (
            pytest.raises(TypeError, match=rf"`{name}` is set by its variable only; "),
            gpuscope.testing.capture(**{name: "idle"}),
        ):
            pass

    def test_a_file_must_be_one(self, tmp_path):
        """No folder is made for a file, and a folder is not a file."""
        with pytest.raises(ValueError, match=r"there is no directory .*; create it first"):
            gpuscope.enable(exporters=["file"], file=tmp_path / "typo" / "spans.jsonl")
        with pytest.raises(ValueError, match="that is a directory; name a file in it"):
            gpuscope.enable(exporters=["file"], file=tmp_path)
        assert not list(tmp_path.iterdir())
        for name in ("otlp_certificate", "otlp_client_key", "otlp_metrics_client_certificate"):
            with pytest.raises(ValueError, match=f"`{name}` is '.*': there is no such file"):
                gpuscope.enable(exporters="otlp", **{name: tmp_path / "typo.pem"})

    @pytest.mark.parametrize("function", [gpuscope.flush, gpuscope.shutdown])
    def test_a_time_to_wait_is_a_number(self, function):
        """Or None, for that of the settings."""
        with (
            gpuscope.testing.capture(),
            pytest.raises(TypeError, match="`timeout` is of type `str`: expected a number"),
        ):
            function("5")


class TestEndpoints:
    """URLs that cannot be used are said when they are given, by the part that is wrong."""

    @pytest.mark.parametrize(
        ("url", "said"),
        [
            ("localhost:4318", "does not begin with http:// or https://"),
            ("secret:4318", "does not begin with http:// or https://"),
            ("user:secret@host:4318", "does not begin with http:// or https://"),
            ("'http://secret'", "does not begin with http:// or https://"),
            ("grpc://secret", "does not begin with http:// or https://"),
            ("http:/secret", "does not begin with http:// or https://"),
            ("http://", "has no host"),
            ("http:///secret", "has no host"),
            ("http://user:secret@", "has no host"),
            ("http://:4318", "has no host"),
            ("http://host:secret", "has a port that is not a number from 1 to 65535"),
            ("http://host:99999", "has a port that is not a number from 1 to 65535"),
            ("http://host:0", "has a port that is not a number from 1 to 65535"),
            ("http://host:-1", "has a port that is not a number from 1 to 65535"),
            ("http://secret host:4318", "has a host that is not a name or an address"),
            ("http://secret..host", "has a host that is not a name or an address"),
            (f"http://{'secret' * 11}", "has a host that is not a name or an address"),
            ("http://<secret>", "has a host that is not a name or an address"),
            ("http://host\n:4318/secret", "has a control character in it"),
            ("http://[secret", "has brackets that are not around an IPv6 address"),
        ],
    )
    def test_what_is_wrong_is_said_and_the_url_is_not_quoted(self, url, said):
        """By a variable it is a warning, and the default is used; by a keyword it is an error."""
        for setting, variable in (
            ("otlp_base_endpoint", "OTEL_EXPORTER_OTLP_ENDPOINT"),
            ("otlp_endpoint", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"),
            ("otlp_metrics_endpoint", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"),
        ):
            config, (complaint,) = Config.from_env({variable: url})
            assert getattr(config, setting) == getattr(Config(), setting)
            assert complaint.startswith(
                f"ignoring {variable} (a text of {len(url)} characters): expected a URL such as"
            )
            assert f" such as {SOMEWHERE} (this one {said})" in complaint
            with pytest.raises(ValueError, match=f"`{setting}`: expected a URL such as") as caught:
                Config().changed(**{setting: url})
            assert said in str(caught.value)
            assert "secret" not in complaint + str(caught.value)

    @pytest.mark.parametrize(
        "url",
        [
            "http://host",
            "HTTPS://host:4318/",
            "http://user:pass%20word@a_b.c-d.:1/x?y=z",
            "http://[::1]:4318",
            "http://[fe80::1%25eth0]:4318",
            "http://10.0.0.1:65535/v1/my traces",
            "http://b\u00fccher.example",
        ],
    )
    def test_urls_that_can_be_used(self, url):
        """Names, addresses of both kinds, users and queries are taken as they are."""
        assert Config.from_env({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f" {url} "})[0].traces_url == url

    def test_an_empty_endpoint_is_an_unset_one(self):
        """Also as a keyword; the base of both cannot be empty."""
        assert Config().changed(otlp_endpoint="").traces_url == f"{SOMEWHERE}/v1/traces"
        with pytest.raises(ValueError, match="expected a URL"):
            Config().changed(otlp_base_endpoint="")


class TestVariables:
    """Variables that look like ours and are not."""

    @pytest.mark.parametrize(
        ("variable", "meant"),
        [
            ("GPUSCOPE_EXPORTR", "GPUSCOPE_EXPORTER"),
            ("GPUSCOPE_QUEUESIZE", "GPUSCOPE_QUEUE_SIZE"),
            ("GPUSCOPE_WARM_UP", "GPUSCOPE_WARMUP"),
            ("GPUSCOPE_STAGE", "GPUSCOPE_STAGES"),
            ("GPUSCOPE_FRAMEWORK", "GPUSCOPE_FRAMEWORKS"),
            ("GPUSCOPE_NATIV", "GPUSCOPE_NATIVE"),
            ("gpuscope_file", "GPUSCOPE_FILE"),
            ("GPUSCOPES", "GPUSCOPE"),
            ("GPUSCOPE_ENABLED", "GPUSCOPE"),
            ("GPUSCOPE_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
            ("GPUSCOPE_SAMPLER", "OTEL_TRACES_SAMPLER"),
            ("GPUSCOPE_SERVICE_NAME", "OTEL_SERVICE_NAME"),
        ],
    )
    def test_the_closest_name_is_said_and_never_the_value(self, variable, meant):
        """One sentence for each."""
        config, complaints = Config.from_env({variable: "secret"})
        assert complaints == [f"{variable} is not a variable of gpuscope; did you mean {meant}?"]
        assert config == Config()

    def test_no_malformed_variable_is_quoted(self):
        """What a variable has to be is said, not the word in it, which may be a credential of another variable."""
        variables = [each for field in fields(Config) for each in field.metadata["variables"]]
        complained = [
            complaint
            for variable in variables
            for complaint in Config.from_env({variable: "hunter2"})[1]
            if variable in complaint
        ]
        assert len(complained) > len(variables) / 2
        assert "hunter2" not in str(complained)

    def test_a_number_that_is_not_allowed_is_quoted(self):
        """A short number tells more than its length, and is not a credential."""
        _, (complaint,) = Config.from_env({"GPUSCOPE_WARMUP": " -1"})
        assert complaint.startswith("ignoring GPUSCOPE_WARMUP (-1): expected a whole number from 0 to")
        assert "(a text of 12 characters)" in Config.from_env({"GPUSCOPE_WARMUP": "123456789012"})[1][0]

    def test_one_that_is_like_none(self):
        """There is no closest name, so the sentence says where all are."""
        assert Config.from_env({"GPUSCOPE_ZZZ": "1"})[1] == [
            "GPUSCOPE_ZZZ is not a variable of gpuscope, and has no effect; docs/settings.md lists those that are."
        ]

    def test_those_of_others_are_left_alone(self):
        """Known ones, other prefixes, and what Kubernetes sets for a Service whose name begins with `gpuscope`."""
        names = [
            "GPUSCOPE_NATIVE",
            "GPUSCOPE_SERVICE_HOST",
            "GPUSCOPE_SERVICE_PORT",
            "GPUSCOPE_COLLECTOR_SERVICE_PORT_OTLP_HTTP",
            "GPUSCOPE_PORT",
            "GPUSCOPE_PORT_4318_TCP_ADDR",
            "OTEL_EXPORTERS",
            "MY_GPUSCOPE_FILE",
        ]
        assert Config.from_env(dict.fromkeys(names, "1"))[1] == []

    @pytest.mark.parametrize(
        ("command", "more"),
        [
            (["-c", "import gpuscope; gpuscope.enable(exporters='none'); gpuscope.disable(); gpuscope.enable()"], {}),
            (["-c", "import gpuscope"], {}),
            (["-c", "import gpuscope; gpuscope.stage('s')"], {"GPUSCOPE": "1"}),
            (["-m", "gpuscope", "run", "-c", "import gpuscope; gpuscope.stage('s')"], {"GPUSCOPE": "1"}),
            (["-m", "gpuscope", "run", "-c", "import gpuscope; gpuscope.stage('s')"], {}),
        ],
    )
    def test_each_is_said_once_in_a_process(self, command, more):
        """Also where nothing says on or off, because then the variable that does may be the misspelt one."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_"))}
        environ = kept | {"GPUSCOPE_EXPORTR": "secret", "GPUSCOPE_METRICS": "none", "GPUSCOPE_EXPORTER": "none"}
        done = subprocess.run(
            [sys.executable, *command],
            env=environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | more,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        said = [line for line in done.stderr.splitlines() if "did you mean" in line]
        assert said == ["gpuscope: GPUSCOPE_EXPORTR is not a variable of gpuscope; did you mean GPUSCOPE_EXPORTER?"]

    def test_off_is_off(self, run_python):
        """A program that says no hears nothing of its other settings."""
        assert run_python("import gpuscope", GPUSCOPE="0", GPUSCOPE_EXPORTR="file").stderr == ""
