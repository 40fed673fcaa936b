"""What `GPUSCOPE_KEEP` may say, and what is said of what it may not."""

from __future__ import annotations

import pytest

from gpuscope._settings.config import Config
from gpuscope._settings.keeping.rules import Rules, rules_of


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        (
            "slower=250ms, p99, error, header=X-Force-Trace, share=0.01",
            Rules(250_000_000, 0.99, True, "x-force-trace", 0.01, 65_536),
        ),
        ("slower=2s", Rules(slower_ns=2_000_000_000)),
        ("SLOWER = 1m", Rules(slower_ns=60_000_000_000)),
        ("p99.9,rows=4096", Rules(quantile=0.999, rows=4096)),
        ("share=1", Rules(share=1.0)),
    ],
)
def test_rules_are_read(text, rules):
    """In any order and case, with or without spaces."""
    assert rules_of(text) == rules
    assert Config().changed(keep=text).keep == text


@pytest.mark.parametrize("text", ["", "0", "off", " no "])
def test_none_means_all(text):
    """Words for no leave every trace exported."""
    assert rules_of(text) is None
    assert Config().changed(keep=text).keep == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slowr=250ms", r"number 1, `slowr` is none of slower, p99, .* \(did you mean slower\?\)"),
        ("error, secret-token-of-mine", "number 2 is none of slower"),
        ("p99,", "number 2, which is empty is none of"),
        ("p99, p95", "number 2 is the second one for `p95`: leave one out"),
        ("slower", "number 1, `slower`, takes a value, as in slower=250ms"),
        ("error=1", "number 1, `error`, takes no value"),
        ("slower=abc", "a time such as 250ms, 2s or 1m, up to a day for `slower`, number 1"),
        ("slower=0", "a time such as 250ms"),
        ("p100", "a quantile from p50 to p99.9 for `p100`, number 1"),
        ("share=1.5", "a number from 0 to 1, such as 0.01 for one trace in a hundred for `share`"),
        ("share=nan", "a number from 0 to 1"),
        ("header=a b", "the name of a header, such as x-force-trace for `header`"),
        ("header=", "the name of a header"),
        ("p99, rows=3", "a whole number from 1024 to 16777216 for `rows`, number 2"),
        ("share=0", "these keep nothing: add a rule, or say 0 to export every trace"),
        ("rows=5000", "these keep nothing"),
        ("1", "or 0 to export every trace"),
    ],
)
def test_what_is_no_rule_is_refused(text, said):
    """The error says which part it is, what is allowed and, where it may be shown, what was seen."""
    with pytest.raises(ValueError, match=rf"^`keep`.*expected .*{said}"):
        Config().changed(keep=text)
    config, (complaint,) = Config.from_env({"GPUSCOPE_KEEP": text})
    assert config.keep == ""
    assert "secret" not in str(complaint)


@pytest.mark.parametrize(("text", "name"), [("X-Trace-Id", "x-trace-id"), ("0", ""), ("", "")])
def test_the_header_of_responses(text, name):
    """A name in any case, or none."""
    assert Config().changed(trace_header=text).trace_header == name


@pytest.mark.parametrize("text", ["1", "a b", "ä", "a:b"])
def test_what_is_no_header_is_refused(text):
    """HTTP would refuse it later, in a request."""
    with pytest.raises(ValueError, match="the name of a header, such as x-trace-id, or 0 for none"):
        Config().changed(trace_header=text)
