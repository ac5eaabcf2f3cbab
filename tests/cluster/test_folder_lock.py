"""A run's folder is held by one job: on one machine, on several that share it, and after its owner died."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time

import pytest
from source_fixtures import as_nobody

from scalekd_ds.cluster import folder_lock
from scalekd_ds.cluster.folder_lock import NAME, FolderLock, held
from scalekd_ds.errors import UserError

_FORKS = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT", 0.1)
    monkeypatch.setattr(folder_lock, "STALE", 0.6)
    monkeypatch.setattr(folder_lock, "GRACE", 0.3)
    # the further wait before a refusal
    monkeypatch.setattr(folder_lock, "MARGIN", 0.3)


def owner_elsewhere(folder, **more):
    """The file of an owner on another machine."""
    owner = {"host": "node7", "pid": 77, "since": "yesterday", "boot": "another", "start": "1", "count": 1} | more
    # in one write, as an owner does: who reads the file meanwhile never finds it empty, and so nobody's
    file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT)
    os.pwrite(file, json.dumps(owner).ljust(512).encode(), 0)
    os.close(file)


def hold(folder, ready):
    with held(folder, "run.dir"):
        ready.set()
        time.sleep(60)


def test_a_second_job_is_refused_and_told_who_holds_the_folder(tmp_path, capsys):
    with held(tmp_path, "run.dir"):
        with pytest.raises(UserError, match=rf"run.dir is .*, in which process {os.getpid()} on \S+ since .* trains"):
            FolderLock(tmp_path, "run.dir").acquire()
        assert "waiting" in capsys.readouterr().err
        assert (tmp_path / NAME).is_file()
    assert not (tmp_path / NAME).exists()
    with held(tmp_path, "run.dir"):
        pass


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_job_that_died_leaves_the_folder_free(tmp_path, end):
    ready = _FORKS.Event()
    job = _FORKS.Process(target=hold, args=(tmp_path, ready))
    job.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match=f"process {job.pid} on"):
        FolderLock(tmp_path, "run.dir").acquire()
    os.kill(job.pid, end)
    job.join()
    assert (tmp_path / NAME).is_file()
    started = time.monotonic()
    with held(tmp_path, "run.dir"):
        assert time.monotonic() - started < 0.3


def test_a_job_that_is_about_to_end_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "GRACE", 30.0)
    ready = _FORKS.Event()
    job = _FORKS.Process(target=hold, args=(tmp_path, ready))
    job.start()
    assert ready.wait(30)
    os.kill(job.pid, signal.SIGSTOP)
    # it is killed while the next one waits
    killer = _FORKS.Process(target=lambda: (time.sleep(0.5), os.kill(job.pid, signal.SIGKILL)))
    killer.start()
    with held(tmp_path, "run.dir"):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    killer.join()
    job.join()


def test_an_owner_on_another_machine_that_lives_is_respected(tmp_path):
    def live():
        for count in range(2, 200):
            owner_elsewhere(tmp_path, count=count)
            time.sleep(0.05)

    owner_elsewhere(tmp_path)
    machine = _FORKS.Process(target=live)
    machine.start()
    try:
        with pytest.raises(UserError, match="in which process 77 on node7 since yesterday trains"):
            FolderLock(tmp_path, "run.dir").acquire()
    finally:
        machine.kill()
        machine.join()


def test_an_owner_on_another_machine_that_died_is_recognised(tmp_path, capsys):
    owner_elsewhere(tmp_path)
    with held(tmp_path, "run.dir"):
        said = capsys.readouterr().err
        assert "is in use by process 77 on node7" in said and "no sign of life" in said and "taken over" in said
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "\xff" * 9, "junk", "[]", "{}", " " * 512, "\0" * 512, '{"pid": 1'])
def test_what_is_no_owner_does_not_stand_in_the_way(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with held(tmp_path, "run.dir"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_without_the_kernels_locks_the_process_is_looked_for(tmp_path, monkeypatch, number):
    def unsupported(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with held(tmp_path, "run.dir"):
        with pytest.raises(UserError, match=f"process {os.getpid()} on"):
            FolderLock(tmp_path, "run.dir").acquire()
        left = (tmp_path / NAME).read_text()
    for change in ({"pid": 2**22 + 1}, {"start": "5"}):
        # a process that ended, and another one that has its number since
        (tmp_path / NAME).write_text(json.dumps(json.loads(left) | change).ljust(512))
        with held(tmp_path, "run.dir"):
            pass


def test_a_process_in_another_container_of_this_machine_cannot_be_looked_for(tmp_path, monkeypatch, capsys):
    """Two pods on one node have processes of the same numbers; their boot is one, and some file systems have no flock."""

    def unsupported(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    here = FolderLock(tmp_path, "run.dir")._self | {"since": "yesterday", "count": 1, "numbering": "pid:[77]"}

    def live():
        for count in range(2, 200):
            owner_elsewhere(tmp_path, **here | {"pid": 2**22 + 1, "count": count})
            time.sleep(0.05)

    owner_elsewhere(tmp_path, **here | {"pid": 2**22 + 1})
    other = _FORKS.Process(target=live)
    other.start()
    try:
        with pytest.raises(UserError, match="in which process 4194305 on"):
            FolderLock(tmp_path, "run.dir").acquire()
    finally:
        other.kill()
        other.join()
    with held(tmp_path, "run.dir"):
        assert "no sign of life" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"boot": "another", "host": "node7"}, {"numbering": "pid:[77]"}, {"pid": 77}])
def test_a_job_that_was_suspended_and_lost_its_folder_ends(tmp_path, change, capfd):
    """A scheduler stops a job for a while; another one takes what looks dead, and two must not write into one folder."""
    ready = _FORKS.Event()
    job = _FORKS.Process(target=hold, args=(tmp_path, ready))
    job.start()
    assert ready.wait(30)
    os.kill(job.pid, signal.SIGSTOP)
    owner_elsewhere(tmp_path, **json.loads((tmp_path / NAME).read_text()) | change)
    os.kill(job.pid, signal.SIGCONT)
    job.join(30)
    assert job.exitcode == 2
    assert "was taken over by process" in capfd.readouterr().err
    # the file is the other's
    assert json.loads((tmp_path / NAME).read_text())[next(iter(change))] == next(iter(change.values()))


def test_a_job_that_was_suspended_and_kept_its_folder_goes_on(tmp_path):
    ready = _FORKS.Event()
    job = _FORKS.Process(target=hold, args=(tmp_path, ready))
    job.start()
    assert ready.wait(30)
    os.kill(job.pid, signal.SIGSTOP)
    before = json.loads((tmp_path / NAME).read_text())["count"]
    time.sleep(0.5)
    os.kill(job.pid, signal.SIGCONT)
    time.sleep(0.5)
    assert job.is_alive() and json.loads((tmp_path / NAME).read_text())["count"] > before
    job.kill()
    job.join()


def test_a_folder_that_cannot_be_written_is_named():
    with as_nobody() as (folder, become):
        folder.chmod(0o555)
        become()
        with pytest.raises(UserError, match=r"run.dir is .* which cannot be locked .Permission denied.: it must be"):
            FolderLock(folder, "run.dir").acquire()


def test_a_lock_of_another_user_is_not_taken_for_a_folder_that_cannot_be_written():
    with as_nobody() as (folder, become):
        (folder / NAME).touch(0o600)
        folder.chmod(0o777)
        become()
        with pytest.raises(UserError, match=r"locked .Permission denied.: '.*lock' is of the user root, who trains"):
            FolderLock(folder, "run.dir").acquire()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/nowhere/x", path)])
def test_what_is_no_file_in_the_place_of_the_lock_is_named(tmp_path, make):
    make(tmp_path / NAME)
    with pytest.raises(UserError, match=r"run.dir is .*, which cannot be locked .*: '.*lock' is no file: remove it"):
        FolderLock(tmp_path, "run.dir").acquire()


def take_turns(folder, inside, worst, turns):
    while turns.value < 20:
        lock = FolderLock(folder, "run.dir")
        try:
            lock.acquire()
        except UserError:
            continue
        with inside.get_lock():
            inside.value += 1
            worst.value = max(worst.value, inside.value)
        time.sleep(0.005)
        with inside.get_lock():
            inside.value -= 1
        turns.value += 1
        lock.release()


def test_of_many_jobs_one_at_a_time_has_the_folder(tmp_path):
    inside, worst, turns = (_FORKS.Value("i", 0) for _ in range(3))
    jobs = [_FORKS.Process(target=take_turns, args=(tmp_path, inside, worst, turns)) for _ in range(6)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    assert worst.value == 1 and turns.value >= 20
