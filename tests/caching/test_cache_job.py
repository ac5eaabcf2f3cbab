"""The job of `scalekd cache`: what it writes, whatever ended it before, on however many ranks."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import tiny_run
from forking import forked_in_background, forked_ranks
from launching import ROOT, WORKERS, alone

from scalekd_ds.caching.folder import agreed, check_room, make_folder
from scalekd_ds.caching.job import make_cache
from scalekd_ds.caching.options import CacheOptions
from scalekd_ds.caching.prepare import build, with_views
from scalekd_ds.commands.cache import main
from scalekd_ds.data.run_sources import read_sources
from scalekd_ds.errors import UserError
from scalekd_ds.recipes.command_line import parse_run
from scalekd_ds.teacher_cache.manifest import read_manifest

AUGMENTED = ("--data.hflip", 0.5, "--data.random_crop", "true", "--data.mixup", 0.8, "--data.cutmix", 1.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.images(tmp_path_factory.mktemp("images") / "data")


def job(data, out, *more, **options):
    run = tiny_run.arguments(data, out.parent / "none", *AUGMENTED, *more)
    return {"cache": {"views": 2, "store": "int8", **options, "out": str(out)}, "run": [str(word) for word in run]}


def listed(tmp_path, *jobs):
    path = tmp_path / f"jobs{len(list(tmp_path.glob('jobs*.json')))}.json"
    path.write_text(json.dumps(jobs))
    return path


def make(tmp_path, *jobs, ranks=1):
    return forked_ranks(WORKERS / "cache_many.py", listed(tmp_path, *jobs), ranks=ranks)


def content(folder):
    """Path -> bytes of a cache's files, without those that a job leaves only while it runs."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A cache that nothing interrupted, on one rank."""
    tmp_path = tmp_path_factory.mktemp("whole")
    done = make(tmp_path, job(data, tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path / "cache"


def kill_again_and_again(data, tmp_path, whole, kills, ranks):
    """Kills the job at places that differ, on numbers of ranks that differ, and lets it end at last."""
    out, rng = tmp_path / "cache", np.random.default_rng(0)
    for number in range(kills):
        before = sum(path.stat().st_size for path in out.rglob("*.npy*")) if out.exists() else 0
        log = tmp_path / f"log{number}"
        words = listed(tmp_path, job(data, out))
        with forked_in_background(
            WORKERS / "cache_many.py", words, log=log, ranks=ranks[number % len(ranks)]
        ) as all_ranks:
            deadline = time.monotonic() + 300

            def grown(before=before):
                return sum(path.stat().st_size for path in out.rglob("*.npy*")) > before

            # a kill before any entry is written, as while models are built, says nothing
            while not grown() and time.monotonic() < deadline and all(p.is_alive() for p in all_ranks):
                time.sleep(0.01)
            time.sleep(float(rng.uniform(0.0, 0.05)))
            for process in all_ranks:
                process.kill()
            for process in all_ranks:
                process.join()
        shards = {name: data for name, data in content(out).items() if name.endswith(".npy") and "partial" not in name}
        # what has its name is whole already
        assert all(bytes_ == content(whole)[name] for name, bytes_ in shards.items())
    done = make(tmp_path, job(data, out), ranks=ranks[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert content(out) == content(whole)


def test_a_cache_that_is_killed_goes_on_and_is_the_same_bytes(data, tmp_path, whole):
    kill_again_and_again(data, tmp_path, whole, kills=2, ranks=[2, 1])


@pytest.mark.slow
def test_twenty_kills(data, tmp_path, whole):
    kill_again_and_again(data, tmp_path, whole, kills=20, ranks=[1, 2, 3])


def test_the_same_command_has_nothing_to_do_and_more_views_are_added(data, tmp_path, whole):
    out = tmp_path / "cache"
    shutil.copytree(whole, out)
    removed = out / "view0001" / "shard00003.npy"
    removed.unlink()
    done = make(
        tmp_path,
        job(data, out),
        job(data, out),
        job(data, out, views=3),
        job(data, out, views=1),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if str(out) in line]
    assert "4 entries are to be made" in said[0] and "2 views" in said[1]
    assert said[2].endswith("in all") and "is complete: 2 views" in said[2]
    assert (
        "40 entries are to be made" in said[3]
        and "is complete: 3 views" in said[4]
        and "is complete: 3 views" in said[5]
    )
    # the shard that was removed came back as it was, and the others are untouched
    found = content(out)
    assert all(found[name] == data for name, data in content(whole).items() if name != "manifest.json")
    assert read_manifest(out).views == 3


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        (("--seed", 9), {}, "holds a cache whose view_seed is 0, and this command has 9"),
        (("--data.hflip", 0.1), {}, r"whose data.hflip is 0.5, and this command has 0.1"),
        (("--micro_batch_size", 4), {}, "whose batch is 2, and this command has 4"),
        ((), {"store": "bf16"}, "whose store is int8, and this command has bf16"),
    ],
)
def test_another_cache_is_not_gone_on_with(data, tmp_path, whole, more, options, message):
    cfg, _ = parse_run([str(w) for w in tiny_run.arguments(data, tmp_path / "run", *AUGMENTED, *more)])
    options = CacheOptions(**{"out": whole, "views": 2, **options})
    cfg = with_views(cfg, options)
    train, _ = read_sources(cfg)
    with pytest.raises(UserError, match=message):
        agreed(build(cfg, options, train), options)


def test_bad_images_have_no_entries_and_are_listed(data, tmp_path):
    """Training replaces them by the same images as without a cache; the losses are those of a run with its teacher."""
    bad = tmp_path / "data"
    shutil.copytree(data, bad)
    files = sorted((bad / "train").rglob("*.jpg"))
    files[5].write_bytes(b"not an image at all")
    files[17].write_bytes(files[17].read_bytes()[:100])
    common = ("--data.max_bad_share", 0.1, "--run.pictures", 0, "--run.eval_every", 0, "--schedule.epochs", 2)
    out = tmp_path / "cache"
    live = tiny_run.arguments(bad, tmp_path / "live", *AUGMENTED, *common, "--data.mix_by", "view", "--data.views", 2)
    cached = tiny_run.arguments(bad, tmp_path / "cached", *AUGMENTED, *common, "--teacher_cache", out)
    done = make(
        tmp_path,
        job(bad, out, *common, store="fp32", logits="all"),
        {"cache": None, "run": [str(word) for word in live]},
        {"cache": None, "run": [str(word) for word in cached]},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = read_manifest(out)
    assert len(manifest.bad) == 2 and any("is no image" in reason for reason in manifest.bad.values())
    a, b = (tiny_run.scalars(tmp_path / name) for name in ("live", "cached"))
    assert a["loss/total"] == b["loss/total"]


def test_a_disk_without_room_is_refused_beforehand(data, tmp_path, monkeypatch):
    class Disk:
        f_bavail, f_frsize, f_blocks = 10, 100, 1000

    monkeypatch.setattr(os, "statvfs", lambda folder: Disk)
    with pytest.raises(UserError, match=r"1\.0 kB free, and the cache takes 2\.0 MB more"):
        check_room(tmp_path, 2_000_000)


def test_the_verb_makes_a_cache_over_ranks_and_looks_at_it(data, tmp_path, capsys):
    """As a user types it, through the launcher where there are ranks."""
    out = tmp_path / "a cache"
    words = [*tiny_run.arguments(data, tmp_path / "none", *AUGMENTED), "--views", 2, "--out", out]
    done = alone(ROOT / "launch" / "cache.py", *words, "--gpus", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"--teacher_cache '{out}'" in done.stdout
    assert main(["--info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "complete" in shown and "--data.hflip" in shown and "16 tokens of 48 channels, int8" in shown
    assert main(["--verify", str(out)]) == 0
    assert capsys.readouterr().out.endswith("0 of 21 files are damaged\n")
    path = out / "view0001" / "shard00002.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (out / "view0000" / "shard00001.npy").unlink()
    assert main(["--verify", str(out)]) == 1
    found = capsys.readouterr().out
    assert "shard00002.npy is damaged" in found and "shard00001.npy cannot be read" in found
    assert "2 of 21 files are damaged; remove them, and go on" in found


def test_a_dry_run_says_sizes_and_makes_nothing(data, tmp_path, capsys, monkeypatch):
    # what another test of this process may have left
    monkeypatch.delenv("RANK", raising=False)
    options = CacheOptions(tmp_path / "cache", 3, dry_run=True)
    cfg, _ = parse_run([str(word) for word in tiny_run.arguments(data, tmp_path / "none", *AUGMENTED)])
    make_cache(cfg, options)
    assert (
        "would hold 3 views of 40 images, 42.4 kB a view, 127.2 kB in all, 996 bytes an entry"
        in capsys.readouterr().out
    )
    assert not options.out.exists()
    # it is no rank of a job
    assert "RANK" not in os.environ


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--views", 2], "--out is missing"),
        (["--out", "x"], "--views is missing"),
        (["--out", "x", "--views", 0], "--views is 0: it must be at least 1"),
        (["--out", "x", "--views", 1, "--logits", "many"], "--logits is 'many'"),
        (["--out", "x", "--views", 1, "--logits", 0], "--logits is 0"),
        (["--out", "x", "--views", 1, "--teacher", "none"], "--teacher is none"),
        (["--out", "x", "--views", 1, "--teacher_cache", "y"], "--teacher_cache is given to scalekd cache"),
        (["--out", "x", "--views", 1, "--as_published.teacher_in_train_mode", "true"], "answers otherwise each time"),
    ],
)
def test_what_no_cache_can_be_made_of(words, message):
    with pytest.raises(UserError, match=message) as error:
        main([str(word) for word in ["--recipe", "fashion-scalekd", *words]])
    assert "\n" not in str(error.value)


def test_a_folder_with_other_things_is_not_written_into(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="holds 'photos' and no cache"):
        make_folder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        make_folder(tmp_path / "file" / "cache")
