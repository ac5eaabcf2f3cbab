"""A lock that a killed compilation has left lets nobody wait for ever without a word."""

import os
import threading
import time

import pytest
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from scalekd_ds.engine.build_locks import clear_build_locks


@pytest.fixture(params=["TORCH_EXTENSIONS_DIR", "cache"])
def folder(request, tmp_path, monkeypatch):
    """Where torch compiles an operator."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    if request.param == "cache":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        place = tmp_path / "torch_extensions" / "py311_cpu" / "deepspeed_shm_comm"
    else:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        place = tmp_path / "deepspeed_shm_comm"
    place.mkdir(parents=True)
    # as up to torch 2.13
    monkeypatch.setattr(cpp_extension, "FileBaton", FileBaton, raising=False)
    return place


def age(folder, seconds):
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - seconds,) * 2)


def test_an_old_lock_is_removed_with_a_line(folder, capsys):
    # torch's own, as a process leaves it that is killed
    baton = FileBaton(str(folder / "lock"))
    assert baton.try_acquire()
    os.close(baton.fd)
    (folder / "shm.o").touch()
    age(folder, 1000)
    clear_build_locks()
    (line,) = capsys.readouterr().err.splitlines()
    assert not (folder / "lock").exists() and (folder / "shm.o").exists()
    assert line.startswith(
        f"{folder / 'lock'} is removed: whoever compiled deepspeed_shm_comm was ended 17 minutes ago"
    )
    clear_build_locks()
    assert capsys.readouterr().err == ""


def test_a_lock_that_somebody_holds_stays(folder, capsys):
    baton = FileBaton(str(folder / "lock"))
    assert baton.try_acquire()
    age(folder, 100_000)
    clear_build_locks()
    assert (folder / "lock").exists() and capsys.readouterr().err == ""
    baton.release()


def test_locks_in_their_last_moment_are_nobodys_fault(folder, capsys):
    """Each start takes the lock for a moment, and closes it before it removes it."""
    ended = threading.Event()

    def load_the_operator_again_and_again():
        while not ended.is_set():
            baton = FileBaton(str(folder / "lock"))
            assert baton.try_acquire()
            time.sleep(0.01)
            os.close(baton.fd)
            # the moment in between, made long
            time.sleep(0.05)
            os.remove(baton.lock_file_path)

    other = threading.Thread(target=load_the_operator_again_and_again)
    other.start()
    for _ in range(6):
        clear_build_locks()
    ended.set()
    other.join()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("changed", ["lock", "shm.o"])
def test_a_young_lock_is_named_since_another_machine_may_have_it(folder, capsys, changed):
    for name in ("lock", "shm.o"):
        (folder / name).touch()
    age(folder, 1000)
    (folder / changed).touch()
    clear_build_locks()
    (line,) = capsys.readouterr().err.splitlines()
    assert (folder / "lock").exists() and f"warning: {folder / 'lock'} is the lock of a process that no longer" in line
    assert "remove the file, unless another machine compiles there now" in line


def test_a_folder_that_is_missing_or_forbidden_stops_nothing(tmp_path, monkeypatch, capsys):
    for place in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").touch()
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(place))
        clear_build_locks()
    assert capsys.readouterr().err == ""


def test_torch_locks_in_one_of_two_ways():
    """What is here rests on it: a new way would need another look."""
    assert hasattr(cpp_extension, "FileBaton") != hasattr(cpp_extension, "FileLock")


@pytest.mark.parametrize("seconds", [1, 1000])
def test_a_file_that_the_operating_system_locks_stays_without_a_word(folder, monkeypatch, capsys, seconds):
    monkeypatch.delattr(cpp_extension, "FileBaton")
    (folder / "lock").touch()
    age(folder, seconds)
    clear_build_locks()
    assert (folder / "lock").exists() and capsys.readouterr().err == ""
