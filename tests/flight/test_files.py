"""The file of a flight recorder: ours alone, reserved, and what others left there is not harmed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from gpuscope._data import flight as layout
from gpuscope._flight import files
from gpuscope._flight.dumps import copies
from gpuscope._flight.files import RefusedError, file_system, open_file

SIZE = layout.LEAST_BYTES


@pytest.fixture
def opened():
    """Return a function that opens a file, and closes it after the test."""
    found = []

    def open_it(path, size=SIZE, **options):
        found.append(open_file(str(path), size, **options))
        return found[-1]

    yield open_it
    for each in found:
        if not each.mapped.closed:
            each.close()


def leave(path, *, ended, opened):
    """Leave the file of a process that is over."""
    file = opened(path)
    file.put("magic", layout.MAGIC)
    file.put("ended", ended)
    file.close()


def test_the_file_is_for_its_user_alone(tmp_path, opened):
    """Mode 0600, of the size that was asked for, with all its blocks there."""
    file = opened(tmp_path / "flight")
    status = file.path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_size) == (0o600, SIZE)
    assert status.st_blocks * 512 >= SIZE


def test_the_process_may_be_in_the_name(tmp_path, opened):
    """`{pid}` becomes its id."""
    assert opened(tmp_path / "flight-{pid}").path.name == f"flight-{os.getpid()}"


def test_a_link_is_not_followed(tmp_path, opened):
    """Whoever put it there would have us overwrite a file of ours."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "flight").symlink_to(victim)
    with pytest.raises(RefusedError, match="symbolic link"):
        opened(tmp_path / "flight")
    assert victim.read_text() == "precious"


def test_a_second_name_of_a_file_is_refused(tmp_path, opened):
    """It may be somebody's only one."""
    leave(tmp_path / "other", ended=1, opened=opened)
    os.link(tmp_path / "other", tmp_path / "flight")
    with pytest.raises(RefusedError, match="not a plain file"):
        opened(tmp_path / "flight")


def test_another_file_is_not_overwritten(tmp_path, opened):
    """What is not a flight recorder's stays."""
    (tmp_path / "flight").write_text("precious notes")
    with pytest.raises(RefusedError, match="not a file of a flight recorder"):
        opened(tmp_path / "flight")
    assert (tmp_path / "flight").read_text() == "precious notes"


@pytest.mark.parametrize("path", ["/dev/full", "/dev/null", "/dev/shm", "/proc/self/mem", "/nowhere/at/all"])
def test_what_is_no_file_is_refused(path, opened):
    """Devices, folders, and a place in no folder."""
    with pytest.raises(RefusedError):
        opened(path)


def test_an_empty_file_is_taken(tmp_path, opened):
    """As `mktemp` leaves one."""
    (tmp_path / "flight").touch()
    assert opened(tmp_path / "flight").path == tmp_path / "flight"


@pytest.mark.parametrize("name", ["data.bin", "flight.2024", ".123"])
def test_a_file_that_begins_with_zeros_is_not_ours(tmp_path, opened, name):
    """At the path itself it is refused; what only has a name like ours stays, empty or not."""
    other = tmp_path / name
    other.write_bytes(bytes(4096) if name != ".123" else b"")
    if name == "data.bin":
        with pytest.raises(RefusedError, match="is not a file of a flight recorder"):
            opened(other)
    else:
        opened(tmp_path / "flight")
    assert other.exists()


def test_what_other_processes_left_is_cleared_where_the_path_has_their_id(tmp_path, opened):
    """Those that ended well are removed, so that restarts do not fill the memory; the others stay where they are."""
    for pid, ended in ((2**22 + 1, 1), (2**22 + 2, 0)):
        left = opened(tmp_path / f"s-{pid}.flight")
        left.put("ended", ended)
        left.close()
    mine = opened(tmp_path / "s-{pid}.flight")
    assert mine.path == tmp_path / f"s-{os.getpid()}.flight"
    assert {path.name for path in tmp_path.iterdir()} == {mine.path.name, f"s-{2**22 + 2}.flight"}


@pytest.mark.skipif(os.geteuid() == 0 and not hasattr(os, "seteuid"), reason="needs another user")
def test_a_file_of_another_user_is_refused(tmp_path, opened):
    """Also where its mode would let us write."""
    if os.geteuid():
        pytest.skip("needs root")
    leave(tmp_path / "flight", ended=1, opened=opened)
    os.chown(tmp_path / "flight", 1234, 1234)
    with pytest.raises(RefusedError, match="not a plain file of this user"):
        opened(tmp_path / "flight")


def test_two_processes_have_two_files(tmp_path, opened):
    """The second has its id in the name; as long as the first lives it is not touched."""
    first, second = opened(tmp_path / "flight"), opened(tmp_path / "flight")
    assert (first.path.name, second.path.name) == ("flight", f"flight.{os.getpid()}")
    assert second.base == first.path
    first.put("lost", 5)
    second.put("lost", 6)
    assert layout.NUMBER.unpack_from(first.path.read_bytes(), layout.HEAD["lost"]) == (5,)


def test_what_a_process_left_that_died_is_kept(tmp_path, opened):
    """Under a name that says so."""
    leave(tmp_path / "flight", ended=0, opened=opened)
    opened(tmp_path / "flight")
    assert [reason for _, reason, _ in copies(tmp_path / "flight")] == ["died"]


def test_what_a_process_left_that_ended_well_is_removed(tmp_path, opened):
    """The next one takes its place."""
    leave(tmp_path / "flight", ended=1, opened=opened)
    inode = (tmp_path / "flight").stat().st_ino
    held = (tmp_path / "flight").open("rb")
    opened(tmp_path / "flight")
    with held:
        assert os.fstat(held.fileno()).st_ino == inode != (tmp_path / "flight").stat().st_ino
    assert copies(tmp_path / "flight") == []


def test_what_workers_left_is_found(tmp_path, opened):
    """Of those beside it that died, and no longer run, the files count as copies; of others they go."""
    leave(tmp_path / "flight.4111", ended=0, opened=opened)
    leave(tmp_path / "flight.4112", ended=1, opened=opened)
    leave(tmp_path / "flight.other", ended=0, opened=opened)
    lives = opened(tmp_path / "flight.4113")
    opened(tmp_path / "flight")
    names = {path.name for path in tmp_path.iterdir()} - {"flight", "flight.other", lives.path.name}
    (name,) = names
    assert name.startswith("flight.died-")


def test_a_place_on_a_full_disk_is_refused(tmp_path):
    """With a sentence, when the file is made: no write to its mapping may fail later. Nothing is left of it."""
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "x", tmp_path], check=False).returncode
    ):
        pytest.skip("needs to mount a file system")
    try:
        with pytest.raises(RefusedError, match="more than half of what is free"):
            open_file(str(tmp_path / "flight"), SIZE)
        files.SHARE, before = 0, files.SHARE
        try:
            with pytest.raises(RefusedError, match="cannot reserve 16,777,216 bytes"):
                open_file(str(tmp_path / "flight"), 16 * SIZE)
        finally:
            files.SHARE = before
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_limit_of_file_sizes_is_said(tmp_path):
    """`ulimit -f` for one; the program goes on."""
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))\n"
        "import gpuscope\n"
        "gpuscope.enable(exporters='none', flight='flight')\n"
        "with gpuscope.stage('a'): pass\n"
        "print(gpuscope.flush())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert "there is no flight recorder: cannot reserve 16,777,216 bytes" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_file_systems_that_promise_nothing_are_refused(tmp_path, monkeypatch):
    """The name of a path's file system is that of the mount it is below."""
    assert file_system(tmp_path) != ""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda rw\n"
        f"23 22 0:40 / {str(tmp_path).replace('/', chr(92) + '057')} rw shared:1 - btrfs /dev/sdb rw\n"
        "24 22 0:41 / /elsewhere rw - tmpfs x rw\n"
    )
    monkeypatch.setattr(files, "_MOUNTS", mounts)
    assert (file_system(tmp_path), file_system(tmp_path.parent)) == ("btrfs", "ext4")
    with pytest.raises(RefusedError, match="is on btrfs"):
        open_file(str(tmp_path / "flight"), SIZE)
