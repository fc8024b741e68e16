"""Files that are written whole or not at all: where a link points to, and nowhere but in files."""

import os
import socket
import stat

import pytest
import torch

from msn_ext import Corpus, Habits
from msn_ext.paths import replacing
from msn_ext.profile import Profile


def write(path, text: str) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(text)


def names(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("there", [True, False], ids=["over a file", "dangling"])
def test_a_link_stays_and_its_file_is_written(tmp_path, there):
    kept, target = tmp_path / "kept", tmp_path / "far" / "target"
    target.parent.mkdir()
    if there:
        target.write_text("before")
    (tmp_path / "between").symlink_to("far/target")
    kept.symlink_to(tmp_path / "between")
    write(kept, "after")
    assert kept.is_symlink() and (tmp_path / "between").is_symlink()
    assert not target.is_symlink() and target.read_text() == "after"
    assert names(target.parent) == ["target"] and names(tmp_path) == ["between", "far", "kept"]


def test_what_writes_files_writes_through_links(tmp_path):
    corpus, profile = Corpus.build([[1, 2, 3]], 5, progress=False), Profile({1: 0.5})
    habits = Habits.count(torch.ones(1, 3).int(), torch.ones(1, 8).int(), 5)
    for saved in corpus, profile, habits:
        target, link = tmp_path / "target", tmp_path / "link"
        target.write_text("before")
        link.symlink_to("target")
        saved.save(link)
        assert link.is_symlink()
        assert type(saved).load(target)
        link.unlink()


def fifo(path):
    os.mkfifo(path)


def unix_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's address is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def ring(path):
    path.symlink_to(path.name)


def lost(path):
    path.symlink_to("nowhere/file")


def device(path):
    path.symlink_to("/dev/null")


IN_THE_WAY = {
    "a FIFO": fifo,
    "a socket": unix_socket,
    "a folder": os.mkdir,
    "a device": device,
    "symbolic links": ring,
    "a folder that exists": lost,
}


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_what_is_no_file_stays_and_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "output"
    IN_THE_WAY[kind](path)
    before = path.lstat()
    corpus = Corpus.build([[1, 2, 3]], 5, progress=False)
    for save in corpus.save, Profile({1: 0.5}).save, lambda path: write(path, "after"):
        with pytest.raises(OSError, match=kind) as refused:
            save(path)
        assert refused.value.filename == str(path)
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert names(tmp_path) == ["output"]


def test_a_file_keeps_its_mode_and_a_new_one_gets_the_usual(tmp_path):
    path, usual = tmp_path / "x", tmp_path / "usual"
    usual.touch()
    write(path, "before")
    assert path.stat().st_mode == usual.stat().st_mode
    path.chmod(0o640)
    write(path, "after")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_an_error_leaves_what_was(tmp_path):
    path = tmp_path / "x"
    path.write_text("before")
    with pytest.raises(RuntimeError, match="in the middle"), replacing(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError("in the middle")
    assert path.read_text() == "before" and names(tmp_path) == ["x"]


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(OSError) as error:
        write(tmp_path / ("x" * 300), "")
    assert error.value.filename == str(tmp_path / ("x" * 300))
    with pytest.raises(OSError) as error, replacing(tmp_path / "y") as unfinished:
        unfinished.unlink()  # as somebody who clears the folder does
    assert error.value.filename == str(tmp_path / "y")
