"""
`gpuscope doctor`: what there is, whether it is right, and what to do if it is not.

Only prints; the checks are in `_checks/`.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

from gpuscope._settings.complaints import SPANS
from gpuscope.commands import _console
from gpuscope.commands._checks.finding import OK, PROBLEM, WARNING, Finding
from gpuscope.commands._endpoint import options as endpoint_options

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


HELP = "Check this machine and your settings: PyTorch, GPU, NVTX, exporter, clock, cost of a stage."
WIDTH = 120
MARKS = {OK: "ok     ", WARNING: "WARNING", PROBLEM: "PROBLEM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = "With --endpoint, --protocol or --header it looks at the OTLP endpoint alone, in some five seconds."
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    endpoint_options.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Check everything; return 1 if there is a problem."""
    from gpuscope.commands._checks import checks

    _console.show_any_text()
    findings: list[Finding] = []
    of_endpoint = bool(options.endpoint is not None or options.protocol or options.header)
    for check in (lambda: _endpoint(options),) if of_endpoint else checks.all_checks():
        for finding in check():
            findings.append(finding)
            if not options.json:
                _show(finding)
    problems = sum(finding.verdict == PROBLEM for finding in findings)
    if options.json:
        print(json.dumps({"ok": not problems, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        warnings = sum(finding.verdict == WARNING for finding in findings)
        print(f"\n{_count(problems, 'problem')}, {_count(warnings, 'warning')}.")
    return 1 if problems else 0


def _endpoint(options: argparse.Namespace) -> Iterator[Finding]:
    """Look at the endpoint of the options, and at the variables that are about it."""
    from gpuscope.commands._checks import checks

    config, complaints = endpoint_options.settings(options)
    for complaint in complaints:
        if SPANS in complaint.uses:
            yield Finding("settings", PROBLEM, complaint, complaint.advice)
    yield checks.of_endpoint(config)


def _show(finding: Finding) -> None:
    head = f"{MARKS[finding.verdict]}  {finding.subject:<10} "
    print(_wrapped(head, finding.seen), flush=True)
    if finding.advice:
        print(_wrapped(" " * len(head) + "-> ", finding.advice), flush=True)


def _wrapped(head: str, text: str) -> str:
    # No word is broken up, because paths, URLs and messages are there to be copied.
    lines = textwrap.wrap(text, WIDTH - len(head), break_long_words=False, break_on_hyphens=False)
    return head + ("\n" + " " * len(head)).join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
