"""
`gpuscope demo`: the six stages of an image classification, recorded, with nothing to set up.

Says what it does, what came out and what to do next. Leaves nothing behind but the file that it writes.
"""

from __future__ import annotations

import argparse
import shlex
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from gpuscope._errors import CommandError
from gpuscope.analysis.durations import duration
from gpuscope.commands import _console

if TYPE_CHECKING:
    from gpuscope.commands._demo.pipeline import Pipeline

HELP = "Run a six-stage image classification, print where the time goes, and write the spans to a file."
SAMPLE = Path(__file__).parents[1] / "analysis" / "assets" / "h200.jsonl.gz"
"""What this demo recorded on an NVIDIA H200, with 50 requests of 8 images by vit-base."""
SAMPLE_HTML = Path("gpuscope-sample.html")
MODELS = ("vit-tiny", "vit-small", "vit-base")
FLUSH_TIMEOUT_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument(
        "--iterations", type=_positive, metavar="N", help="requests to run (default: 50 on a GPU, else 20)"
    )
    parser.add_argument("--batch", type=_positive, metavar="N", help="images per request (default: 8 on a GPU, else 4)")
    add = parser.add_argument
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to run (default: %(default)s)")
    add("--model", choices=MODELS, help="size of the model (default: vit-base on a GPU, else vit-tiny)")
    add("--out", type=Path, default=Path("gpuscope-demo.jsonl"), help="file for the spans (default: %(default)s)")
    parser.add_argument(
        "--sample",
        action="store_true",
        help=f"run nothing: report what this demo recorded on an NVIDIA H200, and write its timeline to {SAMPLE_HTML}",
    )
    parser.add_argument("--otlp", action="store_true", help="also send the spans to the OTLP endpoint")


def run(options: argparse.Namespace) -> int:
    """Run the demo; return 1 if spans were lost on their way."""
    if options.sample:
        return _show_sample()
    _console.show_any_text()
    more = _check_writable(options.out)
    device = _device(options.device)
    # Without a GPU, so few that the whole demo takes some ten seconds on two cores.
    iterations = options.iterations or (50 if device == "cuda" else 20)
    batch = options.batch or (8 if device == "cuda" else 4)
    model = options.model or ("vit-base" if device == "cuda" else "vit-tiny")
    print(f"Loading {model} (random weights) and two photographs ...", flush=True)
    pipeline = _build(model, device)
    print(f"Running {iterations} requests of {batch} images on {_name(device)} ...", flush=True)
    seconds = _record(pipeline, options, iterations, batch)
    place = f"{'added to ' if more else ''}{options.out} (OTLP JSON lines)"
    status = _report(place, seconds)
    if status == 0:
        _next_steps(str(options.out), otlp=options.otlp)
    return status


def _show_sample() -> int:
    """Report the recording that is shipped, as `gpuscope report` would."""
    from gpuscope.commands import report

    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    print("What this demo recorded on an NVIDIA H200: 50 requests of 8 images, vit-base with random weights.\n")
    status = report.run(parser.parse_args([str(SAMPLE), "--html", str(SAMPLE_HTML)]))
    print(f"Open {SAMPLE_HTML} in a browser.")
    return status


def _record(pipeline: Pipeline, options: argparse.Namespace, iterations: int, batch: int) -> float:
    """Run the requests with recording on, and return how long they took."""
    import gpuscope

    exporters = "file,otlp" if options.otlp else "file"
    gpuscope.enable(exporters=exporters, file=str(options.out), sampler="always_on")
    start = time.perf_counter()
    for _ in range(iterations):
        pipeline.run(batch)
    seconds = time.perf_counter() - start
    gpuscope.flush(FLUSH_TIMEOUT_S)
    return seconds


def _report(place: str, seconds: float) -> int:
    import gpuscope

    print(f"\n{gpuscope.summary()}\n")
    statistics = gpuscope.statistics()
    gpuscope.shutdown(FLUSH_TIMEOUT_S)
    print(f"{statistics.recorded} stages in {duration(1e3 * seconds)}, {statistics.exported} exported.", end=" ")
    if statistics.clock_uncertainty_ns is not None:
        print(f"GPU times are placed within {duration(statistics.clock_uncertainty_ns / 1e6)}.", end=" ")
    print(f"Spans: {place}.")
    missing = {**statistics.dropped, **statistics.lost}
    if missing or statistics.exported < statistics.recorded:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in missing.items()) or "still pending"
        print(f"Not all stages were exported ({reasons}). `gpuscope doctor` looks for the cause.")
        return 1
    return 0


def _next_steps(file: str, *, otlp: bool) -> None:
    print("\nNext:")
    print(f"  see where time goes    gpuscope report {shlex.quote(file)} --html timeline.html")
    if find_spec("rich") is None or find_spec("scipy") is None:
        print('                         (after pip install "gpuscope[report]")')
    if otlp:
        print("  look at the spans      where your OTLP endpoint shows them; with Jaeger: http://localhost:16686")
    else:
        print("  see them in Jaeger     docker run --rm -p 16686:16686 -p 4318:4318 \\")
        print("                             cr.jaegertracing.io/jaegertracing/jaeger:2.20.0")
        print("                         OTEL_SERVICE_NAME=demo gpuscope demo --otlp; then open http://localhost:16686")
    print("  see one of a GPU       gpuscope demo --sample")
    print('  in your own code       put @gpuscope.stage("name") on functions, and run it with GPUSCOPE=1')
    print("  check your set-up      gpuscope doctor")


def _build(model: str, device: str) -> Pipeline:
    from gpuscope.commands._demo import pipeline

    try:
        return pipeline.build(model, device)
    except ImportError as error:
        raise CommandError(f'`{error.name}` is missing; pip install "gpuscope[demo]" brings it.') from error


def _device(wanted: str) -> str:
    """Choose the device: the GPU, where there is one."""
    try:
        import torch
    except ImportError as error:
        raise CommandError(f'`{error.name}` is missing; pip install "gpuscope[demo]" brings it.') from error
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise CommandError("`--device cuda` needs a GPU that PyTorch can use; `gpuscope doctor` says what it found.")
    return wanted


def _name(device: str) -> str:
    import torch

    if device == "cuda":
        return str(torch.cuda.get_device_name())
    threads = torch.get_num_threads()
    return f"the CPU, {threads} thread{'s' * (threads > 1)} (so the copies are empty, and there are no GPU times)"


def _check_writable(path: Path) -> bool:
    """Return whether the file has something in it already, to which spans are added."""
    try:
        with path.open("a") as file:
            return file.tell() > 0
    except OSError as error:
        raise CommandError(
            f"cannot write spans to {str(path)!r}: {error.strerror}; name another file with `--out`."
        ) from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, not {text!r}")
    return int(text)
