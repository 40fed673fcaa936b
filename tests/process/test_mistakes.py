"""Mistakes that newcomers make, each as a small program: what is said names what was seen, and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

import pytest

HEAD = "import gpuscope\n"
STAGE = f"{HEAD}with gpuscope.stage('infer'): pass\n"
DECORATED = f"{HEAD}@gpuscope.stage\ndef infer(): pass\n"
NOBODY = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "GPUSCOPE_SHUTDOWN_TIMEOUT": "1"}
NOWHERE = {"GPUSCOPE": "1", "GPUSCOPE_EXPORTER": "none", "GPUSCOPE_METRICS": "none"}


class Mistake(NamedTuple):
    """What somebody does, what they are told was seen, and what they are told to do."""

    what: str
    program: str | list[str]
    variables: dict[str, str]
    seen: str
    advice: str


MISTAKES = [
    # Nothing would happen.
    Mistake(
        "settings without the switch",
        STAGE,
        {"GPUSCOPE_EXPORTER": "file"},
        "GPUSCOPE_EXPORTER is set and GPUSCOPE is not, so nothing is recorded",
        "Set GPUSCOPE=1; or GPUSCOPE=idle",
    ),
    Mistake(
        "stages without the switch",
        "import gpuscope",
        {"GPUSCOPE_STAGES": "x=json:dumps", "GPUSCOPE_FILE": "x.jsonl"},
        "GPUSCOPE_FILE and GPUSCOPE_STAGES are set and GPUSCOPE is not",
        "Set GPUSCOPE=1",
    ),
    Mistake("a switch that means nothing", STAGE, {"GPUSCOPE": "yess"}, "ignoring GPUSCOPE", "did you mean yes?"),
    Mistake("nothing is a stage", HEAD, NOWHERE, "no stage was recorded", 'Put `@gpuscope.stage("name")` on functions'),
    Mistake("no stage is called", DECORATED, NOWHERE, "no stage was recorded", "on functions that it calls"),
    Mistake(
        "enabled after decorating",
        f"{DECORATED}gpuscope.enable(exporters='none')\ninfer()",
        {},
        "`infer` will not be recorded",
        "Set GPUSCOPE=idle",
    ),
    Mistake("nobody listens", STAGE, {"GPUSCOPE": "1", **NOBODY}, "127.0.0.1:9/v1/traces", "GPUSCOPE_EXPORTER=file"),
    Mistake(
        "a file, and no exporter that writes it",
        STAGE,
        {"GPUSCOPE": "1", "GPUSCOPE_FILE": "x.jsonl", **NOBODY},
        "nothing is written to x.jsonl, because the exporter is auto",
        "Set GPUSCOPE_EXPORTER=file",
    ),
    Mistake(
        "the same by keyword",
        f"{HEAD}gpuscope.enable(exporters='none', file='x.jsonl')\nwith gpuscope.stage('a'): pass",
        {},
        "nothing is written to x.jsonl, because the exporter is none",
        "`exporters='file'`",
    ),
    Mistake(
        "a provider that nobody set",
        STAGE,
        {**NOWHERE, "GPUSCOPE_EXPORTER": "sdk"},
        "1 no_provider",
        "the program has set no TracerProvider, which `sdk` needs",
    ),
    Mistake(
        "a folder that is not there",
        STAGE,
        {**NOWHERE, "GPUSCOPE_EXPORTER": "file", "GPUSCOPE_FILE": "nowhere/x.jsonl"},
        "cannot write to nowhere/x.jsonl",
        "No such file or directory",
    ),
    # Names of functions.
    Mistake(
        "a stage without a path",
        STAGE,
        {**NOWHERE, "GPUSCOPE_STAGES": "infer"},
        "number 1 of GPUSCOPE_STAGES",
        "expected",
    ),
    Mistake(
        "a function that does not exist",
        f"import json\n{STAGE}",
        {**NOWHERE, "GPUSCOPE_STAGES": "x=json:dumbs"},
        "json:dumbs does not exist",
        "did you mean `dumps`?",
    ),
    Mistake(
        "a module that never comes",
        STAGE,
        {**NOWHERE, "GPUSCOPE_STAGES": "x=serv:infer"},
        "serv was never imported",
        "so `serv:infer` is not a stage",
    ),
    Mistake(
        "a framework misspelt",
        STAGE,
        {**NOWHERE, "GPUSCOPE_FRAMEWORKS": "transformer"},
        "number 1 of GPUSCOPE_FRAMEWORKS",
        "did you mean transformers?",
    ),
    # Variables.
    Mistake(
        "a variable misspelt",
        STAGE,
        {"GPUSCOPE_EXPORTR": "file"},
        "GPUSCOPE_EXPORTR is not a variable",
        "did you mean GPUSCOPE_EXPORTER?",
    ),
    Mistake(
        "another name for the service",
        STAGE,
        {**NOWHERE, "GPUSCOPE_SERVICE_NAME": "x"},
        "GPUSCOPE_SERVICE_NAME",
        "OTEL_SERVICE_NAME?",
    ),
    Mistake(
        "an exporter that is none",
        STAGE,
        {**NOWHERE, "GPUSCOPE_EXPORTER": "jaeger", **NOBODY},
        "ignoring GPUSCOPE_EXPORTER",
        "any of otlp, sdk and file",
    ),
    Mistake(
        "a unit with the number",
        STAGE,
        {**NOWHERE, "GPUSCOPE_INTERVAL": "1s"},
        "ignoring GPUSCOPE_INTERVAL",
        "expected a number of seconds",
    ),
    Mistake(
        "an endpoint without http",
        STAGE,
        {
            "GPUSCOPE": "1",
            **NOBODY,
            "OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4318",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9",
        },
        "ignoring OTEL_EXPORTER_OTLP_ENDPOINT",
        "a URL such as http://localhost:4318",
    ),
    # Arguments.
    Mistake(
        "a keyword misspelt",
        f"{HEAD}gpuscope.enable(exporter='file')",
        {},
        "`exporter` is not a setting",
        "did you mean `exporters`?",
    ),
    Mistake(
        "an exporter misspelt",
        f"{HEAD}gpuscope.enable(exporters='filee')",
        {},
        "`exporters` is 'filee'",
        "did you mean file?",
    ),
    Mistake(
        "one setting twice",
        f"{HEAD}gpuscope.enable(exporters='file', GPUSCOPE_EXPORTER='otlp')",
        {},
        "`exporters` and `GPUSCOPE_EXPORTER` are one setting",
        "give one of them",
    ),
    Mistake(
        "a folder that is not there, by keyword",
        f"{HEAD}gpuscope.enable(exporters='file', file='nowhere/x.jsonl')",
        {},
        "there is no directory 'nowhere'",
        "create it first",
    ),
    Mistake(
        "stages by keyword",
        f"{HEAD}gpuscope.enable(stages='x=json:dumps')",
        {},
        "`stages` is set by its variable only",
        "call `gpuscope.instrument.instrument(stages)`",
    ),
    Mistake(
        "a class as a stage", f"{HEAD}@gpuscope.stage\nclass Model: pass", {}, "`Model`", "Decorate its methods instead"
    ),
    Mistake(
        "a stage without a name", f"{HEAD}gpuscope.stage('')", {}, "The name of a `stage` is ''", "expected one that"
    ),
    Mistake(
        "a name in the plural", f"{HEAD}gpuscope.stages", {}, "has no attribute 'stages'", "Did you mean: 'stage'?"
    ),
    Mistake(
        "a time as text",
        f"{STAGE}gpuscope.flush('1')",
        NOWHERE,
        "`timeout` is of type `str`",
        "expected a number of seconds",
    ),
    # Commands.
    Mistake(
        "a report of what is not there",
        ["report", "x.jsonl"],
        {},
        "cannot read 'x.jsonl'",
        "GPUSCOPE=1 GPUSCOPE_EXPORTER=file python PROGRAM records",
    ),
    Mistake(
        "a report of nothing",
        ["report", "/dev/null"],
        {},
        "no stages in '/dev/null'",
        "GPUSCOPE=1 GPUSCOPE_EXPORTER=file records some",
    ),
    Mistake(
        "a program that is not there", ["run", "serv.py"], {}, "gpuscope run: cannot read 'serv.py'", "No such file"
    ),
    Mistake("a stage of a run without a path", ["run", "--stage", "infer", "-c", ""], {}, "infer", "expected"),
    Mistake(
        "a report into no folder",
        ["run", "--report", "nowhere/x.html", "-c", ""],
        {},
        "there is no folder",
        "create it first",
    ),
    Mistake(
        "a run without a stage",
        ["run", "-c", "print(1)"],
        NOWHERE,
        "no stage was recorded",
        "GPUSCOPE_STAGES=name=module:function",
    ),
    Mistake("a command misspelt", ["raport"], {}, "invalid choice: 'raport'", "report"),
]


def said_by(mistake: Mistake, folder) -> str:
    """Run the program, and return what is on standard error."""
    command = ["-c", mistake.program] if isinstance(mistake.program, str) else ["-m", "gpuscope", *mistake.program]
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("GPUSCOPE", "OTEL_", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=kept | mistake.variables,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout in ("", "1\n")
    return done.stderr


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_it_is_said_what_was_seen_and_what_to_do(mistake, tmp_path):
    """Once, in one line, with our name before it where it is not an error of Python's or of a command."""
    lines = said_by(mistake, tmp_path).splitlines()
    found = [line for line in lines if mistake.seen in line]
    assert len(found) == 1, lines
    assert mistake.advice in found[0], lines
    ours = [line for line in lines if line.startswith("gpuscope")]
    assert ours or "Error" in found[0]


def test_what_is_right_says_nothing(tmp_path):
    """A program that records where it was told to, off a terminal."""
    right = Mistake("", STAGE, {**NOWHERE, "GPUSCOPE_EXPORTER": "file"}, "", "")
    assert said_by(right, tmp_path) == ""
    assert [path.suffix for path in tmp_path.iterdir()] == [".jsonl"]
    for variables in (
        {},
        {"GPUSCOPE": "0", "GPUSCOPE_EXPORTER": "file"},
        {"GPUSCOPE": "idle"},
        {"GPUSCOPE_QUIET": "1"},
    ):
        assert said_by(Mistake("", DECORATED, variables, "", ""), tmp_path) == ""
