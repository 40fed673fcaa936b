"""The README and the pages of `docs/`: what they say in code runs, their links lead somewhere, and they stay short."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gpuscope
from gpuscope.__main__ import _parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md")])
OTHERS = [page for folder in ("integrations", "examples", "benchmarks") for page in ROOT.glob(f"{folder}/**/*.md")]
LINKED = sorted([*PAGES, *OTHERS])
PROSE = [page for page in PAGES if not page.name.startswith("api")]
NEEDS_GPU = ("torch.cuda.graph(", '"cuda"')


def name(page):
    """What a page is called in the report of the tests."""
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """The page's blocks of code in one language."""
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def stand_ins():
    """What the pages' code calls its own: a model, its inputs, what is done with the results."""
    model = torch.nn.Linear(4, 4)
    batches = [torch.ones(2, 4) for _ in range(12)]
    return {
        "gpuscope": gpuscope,
        "torch": torch,
        "model": model,
        "images": batches,
        "batches": batches,
        "rescale": lambda outputs: outputs,
        "resize": lambda batch: batch,
        "answer": lambda outputs: None,
        "array": np.zeros((8, 3, 224, 224), np.float32),
        "tensor": batches[0],
        "x": batches[0],
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """The blocks of a page run one after the other, as a reader would type them; on a GPU what needs one."""
    monkeypatch.chdir(tmp_path)
    names = stand_ins()
    for code in blocks(page, "python"):
        compiled = compile(code, name(page), "exec")
        if torch.cuda.is_available() or not any(word in code for word in NEEDS_GPU):
            exec(compiled, names)


def commands(page):
    """The words of each command of a page, without prompts, comments and what a block shows of the output."""
    for language in ("bash", "console", "sh"):
        for block in blocks(page, language):
            with_prompts = re.findall(r"^\$ (.*)$", block, re.MULTILINE)
            for line in with_prompts or block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words:
                    end = next((place for place, word in enumerate(words) if word in ("&&", "|", "&")), len(words))
                    yield words[:end]
                    words = words[end + 1 :]


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_commands_of_a_page_are_understood(page):
    """Variables of ours that stand before a command exist, and `gpuscope` takes the options that it is given."""
    known = (DOCS / "settings.md").read_text(encoding="utf-8")
    for words in commands(page):
        while words and re.match(r"[A-Z_]+=", words[0]):
            variable = words.pop(0).partition("=")[0]
            assert not variable.startswith("GPUSCOPE") or f"`{variable}`" in known, variable
        if words[:1] == ["gpuscope"]:
            _parser().parse_args(words[1:])  # Ends the process where it takes something for wrong.


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_pages_are_short(page):
    """A page is read in one go."""
    assert len(page.read_text(encoding="utf-8").splitlines()) < 200


def anchors(page):
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_lead_somewhere(page):
    """Each link to a file of the repository finds it, and the heading that it names."""
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert not missing


def test_every_page_is_linked_from_the_readme():
    """Nothing is found by chance only."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = [page for page in DOCS.glob("*.md") if f"](docs/{page.name}" in readme]
    reached = "".join(page.read_text(encoding="utf-8") for page in first)
    assert not [page.name for page in DOCS.glob("*.md") if page not in first and f"]({page.name}" not in reached]


@pytest.fixture(scope="module")
def generator():
    """The script that makes pages of the code."""
    names = {"__name__": "generate", "__file__": str(DOCS / "generate.py")}
    exec(compile((DOCS / "generate.py").read_text(encoding="utf-8"), "generate.py", "exec"), names)
    return names


def test_generated_pages_are_what_the_code_says(generator):
    """`python docs/generate.py` would change nothing."""
    for page, make in generator["PAGES"].items():
        assert (DOCS / page).read_text(encoding="utf-8") == make(), f"run `python docs/generate.py` for {page}"


def test_every_public_name_is_on_a_page():
    """What `import gpuscope` gives is described."""
    pages = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("api*.md"))
    assert not [public for public in gpuscope.__all__ if public[0] != "_" and f"## `gpuscope.{public}" not in pages]


def test_figures_are_generated_from_the_results(tmp_path):
    """The page of figures and the README's table are what `benchmarks/figures.py` makes of `benchmarks/results/`."""
    copied = tmp_path / "benchmarks"
    copied.mkdir()
    (copied / "figures.py").write_bytes((ROOT / "benchmarks/figures.py").read_bytes())
    (copied / "results").symlink_to(ROOT / "benchmarks/results")
    done = subprocess.run([sys.executable, copied / "figures.py"], capture_output=True, text=True, check=True)
    assert (copied / "figures.md").read_text() == (ROOT / "benchmarks/figures.md").read_text()
    assert done.stdout.strip() in (ROOT / "README.md").read_text(encoding="utf-8")
