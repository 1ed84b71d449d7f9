from pathlib import Path

from cantata.data.touched import stat_of, touch, touching


def test_files_are_told_from_changed_and_absent_ones(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("one")
    before = stat_of(file)
    assert before == (str(file), 3, file.stat().st_mtime_ns)
    file.write_text("three")
    assert stat_of(file) != before
    assert stat_of(tmp_path / "absent") == (str(tmp_path / "absent"), -1, -1)
    assert stat_of(Path("null\0"))[1:] == (-1, -1)


def test_who_listens_hears_of_each_file_as_it_was_first(tmp_path: Path) -> None:
    file, absent = tmp_path / "a", tmp_path / "b"
    file.write_text("one")
    touch(file)  # Nobody listens.
    with touching() as outer:
        touch(absent)
        with touching() as inner:
            touch(file)
            first = stat_of(file)
            file.write_text("changed while it was read")
            touch(file)
        touch(file)
    touch(tmp_path)
    assert inner == {file: first}
    assert outer == {absent: stat_of(absent), file: stat_of(file)}
