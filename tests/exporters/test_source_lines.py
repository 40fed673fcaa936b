"""Lines of the source in stack traces: where they come from, and from where they never come."""

from __future__ import annotations

import linecache
import os
import sys
import zipfile

import pytest

from gpuscope._data.record import ExceptionInfo
from gpuscope.exporters._encoding import source_lines
from gpuscope.exporters._encoding.source_lines import stacktrace


@pytest.fixture(autouse=True)
def _forget():
    """Each test begins with nothing known."""
    source_lines._with_source_of_file.cache_clear()


def shown(file, line):
    """Return what a stack trace has below the place."""
    title, place, *source, ending = stacktrace(ExceptionInfo("E", "m", ((str(file), line, "f"),))).splitlines()
    assert (title, ending) == ("Traceback (most recent call last):", "E: m")
    assert place == f'  File "{file}", line {line}, in f'
    return source


def test_a_line_is_shown_without_its_indent(tmp_path):
    """As a traceback shows it; an empty line, or one that the file has not, is left out."""
    file = tmp_path / "model.py"
    file.write_text("def f():\n    fail()  \n\n")
    assert shown(file, 2) == ["    fail()"]
    assert [shown(file, line) for line in (0, 3, 4, -1, None)] == [[]] * 5


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"# -*- coding: latin-1 -*-\nraise Oops('\xe9')\n", "    raise Oops('é')"),
        ("\ufeff\nraise Oops('é')\n".encode(), "    raise Oops('é')"),
        (b"\r\nraise Oops('')\r\n", "    raise Oops('')"),
        (b"\nlast", "    last"),
    ],
)
def test_the_encoding_is_that_of_the_file(tmp_path, content, line):
    """As Python itself reads it."""
    file = tmp_path / "model.py"
    file.write_bytes(content)
    assert shown(file, 2) == [line]


@pytest.mark.parametrize("content", [b"\n\xff\n", b"# coding: nonsense\nx\n", b"\0\n\0\xfe\n"])
def test_what_is_no_text_is_left_out(tmp_path, content):
    """A file that cannot be decoded costs the line, and not the stack trace."""
    file = tmp_path / "model.py"
    file.write_bytes(content)
    assert shown(file, 2) in ([], ["    \0\xfe"])


def test_what_is_not_there_is_left_out(tmp_path):
    """A file that has vanished, a folder, a text that was compiled, no name at all."""
    names = (tmp_path / "gone.py", tmp_path, "<string>", "", "a\0b", "x" * 5000)
    assert [shown(name, 1) for name in names] == [[]] * 6


def test_a_pipe_is_not_read(tmp_path):
    """Nobody waits for a pipe, nor takes what is in it from whom it is for."""
    pipe = tmp_path / "program.py"
    os.mkfifo(pipe)
    assert shown(pipe, 1) == []


def test_a_huge_file_is_not_read(tmp_path):
    """Its lines would have to be passed over one by one; and of a long line the beginning is shown."""
    file = tmp_path / "generated.py"
    file.write_text("x = 1\n" * 400_000)
    assert shown(file, 1) == []
    file = tmp_path / "minified.py"
    file.write_text("x" * 100_000)
    assert shown(file, 1) == ["    " + "x" * 512]


def test_each_line_is_looked_for_once(tmp_path):
    """Found or not, it is remembered: a storm of errors reads no file over and over."""
    file = tmp_path / "model.py"
    assert shown(file, 1) == []
    file.write_text("first\nsecond\n")
    assert (shown(file, 1), shown(file, 2)) == ([], ["    second"])
    file.unlink()
    assert (shown(file, 1), shown(file, 2)) == ([], ["    second"])


def test_cells_of_a_notebook_are_shown(monkeypatch):
    """What somebody else has put into `linecache` is used as it is now."""
    monkeypatch.setitem(linecache.cache, "<cell 1>", (9, None, ["first()\n", "second()\n"], "<cell 1>"))
    assert shown("<cell 1>", 2) == ["    second()"]
    monkeypatch.setitem(linecache.cache, "<cell 1>", (9, None, ["third()\n"], "<cell 1>"))
    assert (shown("<cell 1>", 1), shown("<cell 1>", 2)) == (["    third()"], [])


def test_no_loader_is_asked(monkeypatch, tmp_path):
    """A loader is code of the program's. Also one that waits in `linecache` is left alone, as is what is zipped."""
    archive = tmp_path / "models.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("zipped_model.py", "def fail():\n    raise ValueError('bad')\n")
    monkeypatch.syspath_prepend(str(archive))
    import zipped_model

    asked, file = [], zipped_model.__file__
    linecache.lazycache(file, {"__name__": "m", "__loader__": type("Mine", (), {"get_source": asked.append})()})
    monkeypatch.delitem(sys.modules, "zipped_model")
    assert len(linecache.cache[file]) == 1
    assert shown(file, 2) == []
    assert asked == []
    del linecache.cache[file]
