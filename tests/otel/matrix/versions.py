"""
Runs the tests of OpenTelemetry's matrix, and some others, under other versions of OpenTelemetry than those installed.

`python tests/otel/matrix/versions.py [VERSION ...] [-- PYTEST_ARGUMENTS]` makes a virtual environment for each version
in a folder that is kept (`--into`), with that version's packages first and those of this Python behind them, and runs
pytest there. Needs the package index.
"""

from __future__ import annotations

import argparse
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[3]
VERSIONS = {"1.25.0": "0.46b0", "1.33.1": "0.54b1", "1.39.1": "0.60b1"}
"""Of the SDK, and of the packages that are versioned by themselves. The oldest is what pyproject.toml demands."""
TESTS = (
    "tests/otel/matrix/test_by_hand.py",
    "tests/otel/matrix/test_launched.py",
    "tests/otel/test_otel.py",
    "tests/otel/test_stock.py",
    "tests/exporters/test_application.py",
    "tests/exporters/test_otlp_equals_sdk.py",
    "tests/exporters/test_sdk.py",
)


def make(version: str, into: Path) -> Path:
    """Make the environment, if it is not there, and return its Python."""
    folder = into / f"opentelemetry-{version}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False)
    exporters = [f"opentelemetry-exporter-otlp-proto-{protocol}=={version}" for protocol in ("http", "grpc")]
    # Before version 0.51 `opentelemetry-instrument` needs what setuptools had until version 80.
    launcher = [f"opentelemetry-distro=={VERSIONS[version]}", "setuptools<80"]
    wanted = [f"opentelemetry-sdk=={version}", *exporters, *launcher]
    # Before the others can be seen, so that all that these need comes here, in versions of their time.
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *wanted], check=True)
    (packages,) = folder.glob("lib/python3.*/site-packages")
    behind = "".join(f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages())
    (packages / "behind.pth").write_text(behind)
    (folder / "complete").touch()
    return python


def main() -> int:
    """Run, and return how many versions failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help=f"by default all: {', '.join(VERSIONS)}")
    parser.add_argument("--into", type=Path, default=ROOT / ".venv-opentelemetry", help="where the environments are")
    arguments = [*sys.argv[1:], "--"]
    at = arguments.index("--")
    options, of_pytest = parser.parse_args(arguments[:at]), arguments[at + 1 : -1]
    failed = 0
    for version in options.versions or VERSIONS:
        python = make(version, options.into)
        sys.stdout.write(f"== opentelemetry-sdk {version}\n")
        sys.stdout.flush()
        command = [python, "-m", "pytest", "-q", *(of_pytest or TESTS)]
        failed += subprocess.run(command, cwd=ROOT, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
