# SPDX-License-Identifier: MIT
"""Records of what was set up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from microvm_host.errors import MicrovmHostError
from microvm_host.record import Record, holders


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(str(tmp_path / "web/tap-interfaces"))


def test_append_and_read(record: Record) -> None:
    assert record.read() == []
    record.append("tap", "vm0", "7")
    record.append("raised", "vm0")
    record.append("unit", "a b\\x2dc", "")
    assert record.read() == [["tap", "vm0", "7"], ["raised", "vm0"], ["unit", "a b\\x2dc", ""]]
    # Another object of the same path, as in the next helper.
    assert Record(record.path).read() == record.read()


def test_everybody_may_read(record: Record) -> None:
    old = os.umask(0o022)
    try:
        record.append("tap", "vm0", "7")
    finally:
        os.umask(old)
    assert os.stat(record.path).st_mode & 0o777 == 0o644
    assert os.stat(os.path.dirname(record.path)).st_mode & 0o777 == 0o755


def test_half_written_last_line_is_left_out(record: Record) -> None:
    record.append("tap", "vm0", "7")
    with open(record.path, "a") as target:
        target.write("tap\tvm")
    assert record.read() == [["tap", "vm0", "7"]]


def test_half_written_last_line_is_not_completed_by_the_next(record: Record) -> None:
    record.append("tap", "vm0", "7")
    with open(record.path, "a") as target:
        target.write("tap\tvm")
    record.append("tap", "vm1", "8")
    assert record.read() == [["tap", "vm0", "7"], ["tap", "vm1", "8"]]


@pytest.mark.parametrize("field", ["a\tb", "a\nb", "\n", "\t"])
def test_fields_that_would_be_misread(record: Record, field: str) -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        record.append("tap", field)
    assert record.read() == []


def test_clear_removes_the_directory_when_empty(record: Record) -> None:
    directory = Path(record.path).parent
    other = Record(str(directory / "virtiofsd"))
    record.append("tap", "vm0", "7")
    other.append("unit", "x")
    record.clear()
    assert record.read() == []
    assert other.read() == [["unit", "x"]]
    other.clear()
    assert not directory.exists()
    # Once more, as a stop after a stop does.
    other.clear()


def test_clear_without_a_record_touches_nothing_but_an_empty_directory(record: Record) -> None:
    """One whose writer was killed when it had made that alone."""
    directory = Path(record.path).parent
    directory.mkdir()
    other = directory / "other"
    other.touch()
    record.clear()
    assert other.exists()
    other.unlink()
    record.clear()
    assert not directory.exists()


def test_symlink_is_refused(record: Record, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("")
    os.makedirs(os.path.dirname(record.path))
    os.symlink(target, record.path)
    with pytest.raises(MicrovmHostError, match="the record cannot be written") as caught:
        record.append("tap", "vm0", "7")
    assert caught.value.path == record.path
    assert target.read_text() == ""


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MicrovmHostError, match="the record cannot be written"):
        Record(str(tmp_path / "file/web/taps")).append("tap", "x", "1")


def test_holders(tmp_path: Path) -> None:
    assert holders(str(tmp_path / "none"), "taps", ("tap", "vm0")) == []
    Record(str(tmp_path / "b/taps")).append("tap", "vm0", "7")
    Record(str(tmp_path / "a/taps")).append("adopted", "vm0", "7")
    Record(str(tmp_path / "a/taps")).append("tap", "vm0", "8")
    Record(str(tmp_path / "c/taps")).append("tap", "vm01", "9")
    Record(str(tmp_path / "d/other")).append("tap", "vm0", "9")
    assert holders(str(tmp_path), "taps", ("tap", "vm0")) == ["a", "b"]
    assert holders(str(tmp_path), "taps", ("adopted", "vm0")) == ["a"]
    assert holders(str(tmp_path), "taps", ("tap", "vm0", "7")) == ["b"]


def test_what_is_no_text_is_not_believed(record: Record) -> None:
    record.append("tap", "vm0", "7")
    with open(record.path, "ab") as target:
        target.write(b"tap\t\xff\t8\n")
    with pytest.raises(MicrovmHostError, match="is not UTF-8 text") as caught:
        record.read()
    assert caught.value.path == record.path


def test_a_file_among_the_directories_of_records(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    Record(str(tmp_path / "web/taps")).append("tap", "vm0", "7")
    assert holders(str(tmp_path), "taps", ("tap", "vm0")) == ["web"]


@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_what_is_no_file_is_not_read(record: Record, tmp_path: Path, kind: str) -> None:
    os.makedirs(os.path.dirname(record.path))
    if kind == "fifo":
        # Without a writer, for which opening it would wait.
        os.mkfifo(record.path)
    elif kind == "link":
        (tmp_path / "elsewhere").write_text("tap\tvm0\t7\n")
        os.symlink(tmp_path / "elsewhere", record.path)
    else:
        os.mkdir(record.path)
        with pytest.raises(MicrovmHostError, match="cannot be removed"):
            record.clear()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MicrovmHostError, match=r"cannot be read|is no regular file"):
        record.read()
    assert len(os.listdir("/proc/self/fd")) == before


def test_some_lines_are_kept(record: Record) -> None:
    for number in range(3):
        record.append("tap", f"vm{number}", "7")
    record.keep([["tap", "vm1", "7"]])
    assert record.read() == [["tap", "vm1", "7"]]
    # It goes on from there.
    record.append("tap", "vm3", "8")
    assert record.read() == [["tap", "vm1", "7"], ["tap", "vm3", "8"]]
    assert os.stat(record.path).st_mode & 0o777 == 0o644
    place = Path(record.path).parent
    assert os.listdir(place.parent) == [place.name]
    record.keep([])
    assert os.listdir(place.parent) == []


def test_what_cannot_be_written_anew_is_as_it_was(record: Record) -> None:
    record.append("tap", "vm0", "7")
    record.append("tap", "vm1", "7")
    place = Path(record.path).parent
    os.symlink("/dev/full", place.parent / f".{place.name}-{Path(record.path).name}")
    with pytest.raises(MicrovmHostError, match="cannot be written anew"):
        record.keep([["tap", "vm1", "7"]])
    assert record.read() == [["tap", "vm0", "7"], ["tap", "vm1", "7"]]


def test_lines_end_at_line_feeds_alone(record: Record) -> None:
    record.append("unit", "a\rb")
    assert record.read() == [["unit", "a\rb"]]


def test_records_are_not_elsewhere(record: Record, tmp_path: Path) -> None:
    place = Path(record.path).parent
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / Path(record.path).name).write_text("tap\tvm0\t7\n")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(elsewhere)
    for act in (record.read, record.clear, lambda: record.append("tap", "vm1", "8")):
        with pytest.raises(MicrovmHostError, match="is a link"):
            act()
    assert (elsewhere / Path(record.path).name).read_text() == "tap\tvm0\t7\n"
