"""What of ``make setup`` is taken: what is made of the sources as they are."""

import os

import launchers
import pytest


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source whose object is newer than all that it is made of."""
    monkeypatch.setattr(launchers, "CSRC", tmp_path)
    monkeypatch.setattr(launchers, "BUILT", tmp_path / "built")
    (tmp_path / "built").mkdir()
    file, header = tmp_path / "one.cu", tmp_path / "one.cuh"
    for seconds, path in enumerate((file, header, launchers.BUILT / "one.cu.o")):
        path.write_text("")
        os.utime(path, (seconds, seconds))
    (launchers.BUILT / "one.cu.d").write_text(f"one.cu.o : {file} \\\n    {header}\n")
    return file


def test_what_is_current_is_taken(source):
    assert launchers.built(source, "one.cu.o") == launchers.BUILT / "one.cu.o"


def test_a_header_has_changed(source):
    os.utime(source.with_name("one.cuh"), (9, 9))
    assert launchers.built(source, "one.cu.o") is None


def test_a_header_is_gone(source):
    source.with_name("one.cuh").unlink()
    assert launchers.built(source, "one.cu.o") is None


def test_it_was_made_of_another_checkout(source):
    other = source.with_name("other.cu")
    other.write_text("")
    os.utime(other, (0, 0))
    (launchers.BUILT / "one.cu.d").write_text(f"one.cu.o : {other}\n")
    assert launchers.built(source, "one.cu.o") is None


def test_an_architecture_was_not_compiled_for(source):
    assert launchers.built(source, "one.compute_80.ptx") is None


def test_a_folder_of_a_test(source, tmp_path):
    other = tmp_path / "deep" / "one.cu"
    assert launchers.built(other, "one.cu.o") is None
