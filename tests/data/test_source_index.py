"""The index of a source: used while it is right, built again when it is not, and built by one of many."""

import io
import multiprocessing
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_fixtures import make_folder
from launching import LIMIT
from source_fixtures import JPEGS, as_nobody, labelled, message, write_table, write_tar

from scalekd_ds.data.sources import index as index_module
from scalekd_ds.data.sources.index import SUFFIX
from scalekd_ds.data.sources.open import open_source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def builds(monkeypatch):
    """Counts how often an index is built, by its being stored."""
    counted = []
    store = index_module._store
    monkeypatch.setattr(index_module, "_store", lambda *args: counted.append(args[3]) or store(*args))
    return counted


def test_an_index_is_used_until_its_tar_changes(tmp_path, builds, capsys):
    tar = write_tar(tmp_path / "s.tar", labelled([0, 1, 0, 1]))
    first = open_source(tar, "data.train")
    assert open_source(tar, "data.train").labels.tolist() == [0, 1, 0, 1]
    assert len(builds) == 1 and capsys.readouterr().err == ""
    # as long as it was, and other labels: an older index would be wrong without a sign
    write_tar(tar, labelled([1, 0, 1, 0]))
    with pytest.raises(OSError, match="has changed since this run indexed it"):
        first.read(0)
    assert open_source(tar, "data.train").labels.tolist() == [1, 0, 1, 0]
    assert len(builds) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "is stale" in told and "s.tar' has changed" in told
    (tmp_path / "more").mkdir()
    shutil.move(tar, tmp_path / "more" / "s.tar")
    assert len(open_source(tmp_path / "more", "data.train")) == 4
    write_tar(tmp_path / "more" / "t.tar", labelled([1, 0]))
    assert len(open_source(tmp_path / "more", "data.train")) == 6
    assert "the shards are others" in capsys.readouterr().err


def test_an_index_is_used_until_its_folder_or_table_changes(tmp_path, builds, capsys):
    folder = make_folder(tmp_path / "set", {"a": 3, "b": 3})
    (folder / "a" / "deep").mkdir()
    (folder / "a" / "deep" / "x.jpg").write_bytes(JPEGS[0])
    table = write_table(tmp_path, [("t/0.jpg", 0), ("t/1.jpg", 1)])

    def add_class():
        make_folder(folder, {"c": 1})

    changes = [
        (lambda: (folder / "a" / "new.jpg").write_bytes(JPEGS[1]), 8),
        (lambda: (folder / "a" / "deep" / "new.jpg").write_bytes(JPEGS[1]), 9),
        (lambda: (folder / "b" / "000.jpg").unlink(), 8),
        (add_class, 9),
        (lambda: shutil.rmtree(folder / "c"), 8),
    ]
    assert len(open_source(folder, "data.train")) == 7
    for number, (change, count) in enumerate(changes, 1):
        assert len(open_source(folder, "data.train")) == len(open_source(folder, "data.train"))
        assert len(builds) == number
        capsys.readouterr()
        change()
        assert len(open_source(folder, "data.train")) == count
        assert len(builds) == number + 1 and capsys.readouterr().err.count("is stale") == 1
    # one more file without a newer time, as a coarse clock leaves it
    index = (folder / "b").stat()
    (folder / "b" / "unseen.jpg").write_bytes(JPEGS[1])
    os.utime(folder / "b", ns=(index.st_atime_ns, index.st_mtime_ns))
    assert len(open_source(folder, "data.train")) == 9
    assert len(open_source(table, "data.train")) == 2
    write_table(tmp_path, [("t/0.jpg", 0), ("t/1.jpg", 1), ("t/2.jpg", 1)])
    assert len(open_source(table, "data.train")) == 3
    assert "the table has changed" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "pickle"])
def test_a_damaged_index_is_built_again(tmp_path, builds, capsys, damage):
    tar = write_tar(tmp_path / "s.tar", labelled([0, 1, 0]))
    open_source(tar, "data.train")
    (place,) = tmp_path.glob(f".*{SUFFIX}")
    whole = place.read_bytes()
    file = io.BytesIO()
    np.savez(file, head=np.array([{"version": 1}], dtype=object))
    place.write_bytes(
        {"cut": whole[: len(whole) // 2], "text": b"x" * 99, "empty": b"", "pickle": file.getvalue()}[damage]
    )
    assert open_source(tar, "data.train").labels.tolist() == [0, 1, 0]
    assert len(builds) == 2 and "cannot be read" in capsys.readouterr().err
    assert open_source(tar, "data.train").labels.tolist() == [0, 1, 0]
    assert len(builds) == 2


def test_an_index_that_cannot_be_written_leaves_no_file_behind(tmp_path, monkeypatch, capsys):
    tar = write_tar(tmp_path / "s.tar", labelled([0, 1, 0]))
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert len(open_source(tar, "data.train")) == 3
    assert "cannot be kept: No space left on device" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if SUFFIX in path.name]


def _open_in_a_process(where, started, queue):
    original = index_module._store

    def slow(*args):
        queue.put("built")
        time.sleep(0.5)
        original(*args)

    index_module._store = slow
    started.wait()
    queue.put(open_source(where, "data.train").labels.tolist())


def test_two_processes_build_one_index(tmp_path):
    write_tar(tmp_path / "s.tar", labelled([0, 1, 2] * 20))
    context = multiprocessing.get_context("fork")
    started, queue = context.Barrier(2), context.Queue()
    both = [context.Process(target=_open_in_a_process, args=(tmp_path, started, queue)) for _ in range(2)]
    for process in both:
        process.start()
    told = [queue.get(timeout=LIMIT) for _ in range(3)]
    for process in both:
        process.join(LIMIT)
    assert [process.exitcode for process in both] == [0, 0] and queue.empty()
    assert told.count("built") == 1 and told.count([0, 1, 2] * 20) == 2


def test_without_locks_builders_do_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(
        index_module.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available"))
    )
    write_tar(tmp_path / "s.tar", labelled([0, 1, 2] * 20))
    barrier = threading.Barrier(4)

    def opened(_):
        barrier.wait()
        return open_source(tmp_path, "data.train").labels.tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(opened, range(4))) == [[0, 1, 2] * 20] * 4
    assert open_source(tmp_path, "data.train").labels.tolist() == [0, 1, 2] * 20
    assert {path.name for path in tmp_path.iterdir()} == {"s.tar", SUFFIX, ".scalekd_index.lock"}


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(builds, monkeypatch):
    with as_nobody() as (folder, become), as_nobody() as (cache, _):
        write_tar(folder / "s.tar", labelled([0, 1, 0]))
        folder.chmod(0o555)
        cache.chmod(0o777)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        become()
        assert [len(open_source(folder, "data.train")) for _ in range(2)] == [3, 3]
        assert len(builds) == 1
        assert len(list((cache / "scalekd_ds").glob("*.npz"))) == 1
        assert [path.name for path in folder.iterdir()] == ["s.tar"]


def test_what_may_not_be_read_is_named():
    with as_nobody() as (folder, become):
        write_tar(folder / "s.tar", labelled([0, 1, 0])).chmod(0)
        write_table(folder, [("t/0.jpg", 0)]).chmod(0)
        make_folder(folder / "set", {"a": 2, "b": 2})
        (folder / "set" / "b").chmod(0)
        become()
        assert "s.tar' cannot be read: Permission denied" in message(folder / "s.tar")
        assert "table.csv' cannot be read: Permission denied" in message(folder / "table.csv")
        assert "b' cannot be read: Permission denied" in message(folder / "set")


def test_twenty_thousand_files_are_indexed(tmp_path):
    for label in range(20):
        (tmp_path / f"{label:02d}").mkdir()
        for i in range(1000):
            path = tmp_path / f"{label:02d}" / f"{i:04d}.jpg"
            if i < 6:
                path.write_bytes(JPEGS[i])
            else:
                os.link(path.with_name(f"{i % 6:04d}.jpg"), path)
    source = open_source(tmp_path, "data.train")
    assert len(source) == 20_000 and [source.read(i).tobytes() for i in range(6)] == JPEGS


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_alone(tmp_path, monkeypatch, terminal):
    folder = make_folder(tmp_path / "set", {"a": 9, "b": 9})
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    ours, theirs = os.openpty() if terminal else os.pipe()
    with open(theirs, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        open_source(folder, "data.train")
        stderr.write("end")
        stderr.flush()
        shown = b""
        while not shown.endswith(b"end"):
            shown += os.read(ours, 4096)
    os.close(ours)
    assert (b"18/18" in shown) == terminal
    assert terminal or shown == b"end"
