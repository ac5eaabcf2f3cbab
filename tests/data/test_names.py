"""Names are bytes: every list that is written and read back, of every kind of source, keeps each name as it is."""

import csv
import io
import json
import os
import pty
import random
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from odd_names import ABOVE, ODD, path, stem
from PIL import Image
from source_fixtures import example, needs_datasets, needs_pyarrow, write_records, write_tar

from scalekd_ds.class_names import positions_in
from scalekd_ds.data.bad_files import BadFiles
from scalekd_ds.data.sources.open import open_source
from scalekd_ds.data.sources.source import with_classes
from scalekd_ds.data.verify import QUARANTINE, find_flaws, read_quarantine, without_quarantined, write_quarantine
from scalekd_ds.errors import UserError, run_cli, say
from scalekd_ds.names import escape, is_unicode, one_line, path_of, shell_word, text_of, unescape, utf8_path

NAMES = [os.fsdecode(name) for name in ODD]


def encoded(kind: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (kind, 0, 0)).save(file, "PNG")
    return file.getvalue()


def kind_of(source, i: int) -> int:
    return Image.open(io.BytesIO(source.read(i).tobytes())).getpixel((0, 0))[0]


# -- the one way to write a name --------------------------------------------------------------------------------------


def test_every_name_is_escaped_in_one_line_and_back():
    draw = random.Random(0)
    anything = [bytes(draw.randrange(1, 256) for _ in range(draw.randrange(1, 40))) for _ in range(3000)]
    # near what an escape looks like
    anything += [bytes(draw.choice(b"\\\\xntr04fF \n\t\xff") for _ in range(6)) for _ in range(3000)]
    anything += [chr(code).encode("utf-8", "surrogatepass") for code in range(1, 0x3000)]
    for name in [*ODD, ABOVE, *anything]:
        text = os.fsdecode(name)
        shown = escape(text)
        assert os.fsencode(unescape(shown)) == name
        assert shown.isprintable() and shown == shown.strip() and is_unicode(shown), name
        assert one_line(f"error: {shown} is odd") == f"error: {shown} is odd"
        assert one_line(text).isprintable()
        # what no list breaks is as it is, so that lists of plain names are those of earlier versions
        if name.isalnum():
            assert shown == text


def test_a_shell_reads_the_words_that_a_run_prints(tmp_path):
    names = [name for name in [*NAMES, os.fsdecode(ABOVE)] if name]
    words = [shell_word(name) for name in names]
    assert all(word.isprintable() for word in words)
    done = subprocess.run(["bash", "-c", "printf '%s\\0' " + " ".join(words)], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(name) for name in names]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_libraries_that_take_only_utf8_get_such_a_path(tmp_path, name):
    folder = path(tmp_path, name)
    folder.mkdir()
    (folder / "x").write_text("content")
    for place in (folder, folder / "x"):
        with utf8_path(place) as alias:
            alias.encode()
            assert os.path.samefile(alias, place)
    with utf8_path(folder) as alias:
        path(alias, "made").write_text("")
    assert (folder / "made").exists()


# -- the list of bad images -------------------------------------------------------------------------------------------


def folders(place, odd=ODD, per_class=2):
    """A class for each odd name, with odd names of files in it."""
    for kind, name in enumerate(odd):
        path(place, name).mkdir(parents=True)
        for i in range(per_class):
            other = stem(odd[(kind + 7 * i) % len(odd)]) + (b"%d.png" % i)
            path(place, name, other).write_bytes(encoded(kind))
    return place


def rows_of(place, odd):
    """(path, label) of the files that `folders` writes."""
    folders(place / "files", odd)
    found = sorted((place / "files").rglob("*.png"))
    return [(os.path.relpath(file, place), file.parent.name) for file in found if not file.is_dir()]


def delimited(place, odd, suffix, delimiter):
    rows = rows_of(place, odd)
    with open(place / f"t{suffix}", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, delimiter=delimiter).writerows([("path", "label"), *rows])
    return place / f"t{suffix}"


def parquet(place, odd):
    import pyarrow
    from pyarrow import parquet

    columns = zip(*rows_of(place, odd), strict=True)
    # columns of bytes, since one of texts has no name that is no UTF-8
    values = {name: [os.fsencode(v) for v in column] for name, column in zip(("path", "label"), columns, strict=True)}
    with open(place / "t.parquet", "wb") as file:
        parquet.write_table(pyarrow.table(values), file)
    return place / "t.parquet"


def tar_of_folders(place, odd):
    place.mkdir(parents=True)
    members = []
    for kind, name in enumerate(odd):
        members += [(os.fsdecode(b"%b/%b%d.png" % (name, stem(name), i)), encoded(kind)) for i in range(2)]
    return write_tar(place / "t {3..5}.tar", members)


def tar_of_labels(place, odd, labels=None):
    place.mkdir(parents=True)
    members = []
    for kind, name in enumerate(labels or odd):
        members += [(f"{kind:03}.png", encoded(kind)), (f"{kind:03}.cls", name + b"\n")]
    return write_tar(place / "t.tar", members)


def tar_with_list(place, odd):
    where = tar_of_labels(place, odd, [b"%d" % kind for kind in range(len(odd))])
    (place / "classes.txt").write_text("".join(f"{escape(os.fsdecode(name))}\n" for name in odd), encoding="utf-8")
    return where


def records(place, odd):
    place.mkdir(parents=True)
    made = [example(image__encoded=encoded(kind), image__class__synset=name) for kind, name in enumerate(odd)]
    return write_records(place / "t.tfrecord", made)


def folders_with_list(place, odd):
    folders(place, odd)
    lines = [f"{escape(os.fsdecode(name))}\n" for name in reversed(odd)]
    (place / "classes.txt").write_text("".join(lines), encoding="utf-8")
    return place


KINDS = {
    "folders": folders,
    "folders with classes.txt": folders_with_list,
    "csv": lambda place, odd: delimited(place, odd, ".csv", ","),
    "tsv": lambda place, odd: delimited(place, odd, ".tsv", "\t"),
    "parquet": parquet,
    "tar of folders": tar_of_folders,
    "tar of labels": tar_of_labels,
    "tar with classes.txt": tar_with_list,
    "TFRecord": records,
}
# in text, blanks around a label are not the label's
STRIPPED = {"csv": b" \t", "tsv": b" \t", "tar of labels": b" \t\r\n"}
kinds = [pytest.param(kind, marks=needs_pyarrow if kind == "parquet" else ()) for kind in KINDS]


def odd_for(kind):
    """The odd names that a kind of source can have."""
    return [name for name in ODD if name == name.strip(STRIPPED.get(kind, b""))]


@pytest.mark.parametrize("kind", kinds)
def test_sources_keep_the_names_of_classes_and_images(tmp_path, kind):
    odd = odd_for(kind)
    names = list(map(os.fsdecode, odd))
    path(tmp_path, ABOVE).mkdir()
    where = KINDS[kind](path(tmp_path, ABOVE, "{0..3}"), odd)
    # built, and read from where it was kept
    first, second = open_source(where, "data.train"), open_source(where, "data.train")
    assert [first.name(i) for i in range(len(first))] == [second.name(i) for i in range(len(second))]
    assert first.classes == second.classes and first.labels.tolist() == second.labels.tolist()
    assert kind == "tar with classes.txt" or set(first.classes) == set(names)
    if kind == "folders with classes.txt":
        assert first.classes == names[::-1]
    place = dict(zip(names, positions_in(names, first.classes), strict=True))
    assert sorted(place.values()) == list(range(len(names)))
    for i, label in enumerate(first.labels.tolist()):
        assert label == place[names[kind_of(first, i)]]
    # the names of training are those of validation, in whatever order
    order = names[5:] + names[:5]
    again = open_source(where, "data.val", order)
    if again.classes != order:
        again = with_classes(again, positions_in(again.classes, order), order)
    assert all(order[label] == names[kind_of(again, i)] for i, label in enumerate(again.labels.tolist()))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".tar"])
def test_a_table_or_shard_may_have_any_name(tmp_path, suffix, capfd, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    row = "\t" if suffix == ".tsv" else ","
    for name in ODD:
        where = path(tmp_path, stem(name, 4) + suffix.encode())
        if suffix == ".tar":
            write_tar(where, [("a/x.png", encoded(0)), ("b/x.png", encoded(1))])
        else:
            (tmp_path / "x.png").write_bytes(encoded(0))
            (tmp_path / "y.png").write_bytes(encoded(1))
            where.write_text(f"path{row}label\nx.png{row}a\ny.png{row}b\n")
        for source in (open_source(where, "data.train"), open_source(where, "data.train")):
            assert [kind_of(source, i) for i in range(2)] == [0, 1] and source.classes == ["a", "b"]
        # of a name without room for more the index is in the user's cache
        assert (where.with_name(f".{where.name}.scalekd_index.npz").name in os.listdir(tmp_path)) == (len(name) < 200)
        assert not capfd.readouterr().err
        where.unlink()


@needs_datasets
@pytest.mark.parametrize("kind", ["saved", "imagefolder"])
def test_a_data_set_of_hugging_face_may_be_in_any_folder(tmp_path, kind, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if kind == "saved":
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a\nb", " x"])})
        rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(2)], "label": [0, 1]}
        datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "plain")
    else:
        for i, name in enumerate(("a", "b c")):
            (tmp_path / "plain" / name).mkdir(parents=True)
            (tmp_path / "plain" / name / "x.png").write_bytes(encoded(i))
    for name in [*ODD, ABOVE] if kind == "saved" else [b"\xff", b"p\xc3\xaache", b"a{0..1}"]:
        where = path(tmp_path, b"of", name)
        shutil.copytree(tmp_path / "plain", where)
        if kind == "imagefolder" and not is_unicode(str(where)):
            # the library keeps the path of each image in a column of texts
            with pytest.raises(UserError, match=r"cannot be loaded: .*wants names of UTF-8: rename the folder"):
                open_source(f"hf:{where}", "data.train")
            continue
        source = open_source(f"hf:{where}", "data.train")
        assert [kind_of(source, i) for i in range(2)] == [0, 1] and len(source.classes) == 2


@pytest.mark.parametrize("damaged", range(2), ids=["first", "second"])
@pytest.mark.parametrize("kind", ["folders", "csv", "tar of folders"])
def test_what_verify_lists_is_what_training_leaves_out(tmp_path, kind, damaged):
    root = path(tmp_path, ABOVE)
    root.mkdir()
    where = KINDS[kind](root / "train", odd_for(kind))
    source = open_source(where, "data.train")
    # of each class the first image or the second
    flaws = {source.name(i): f"is no\timage\n{i} \x1b[31m\udcff" for i in range(damaged, len(source), 2)}
    if kind == "folders":
        # as verify finds them
        for name in flaws:
            with open(name, "wb") as file:
                file.write(b"junk")
        flaws = find_flaws(open_source(where, "data.train"), 2)
        assert len(flaws) == len(source) // 2
    folder = root if kind != "csv" else where.parent
    listed = write_quarantine(folder, flaws)
    lines = listed.read_bytes().decode().split("\n")
    assert len(lines) == len(flaws) + 2 and not lines[-1] and lines[0].startswith("#\t")
    assert all(line.replace("\t", "").isprintable() and line.count("\t") == 1 for line in lines[:-1])
    assert set(read_quarantine(folder)) == set(flaws)
    left = without_quarantined(source, folder)
    assert {left.name(i) for i in range(len(left))} == {source.name(i) for i in range(len(source))} - set(flaws)


@pytest.mark.parametrize("where", ["", ".", "./", "relative", "a/../relative", "absolute"])
def test_the_list_knows_an_image_however_the_folder_is_written(tmp_path, where, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders(tmp_path / "relative" / "train")
    (tmp_path / "a").mkdir()
    if where in ("", ".", "./"):
        monkeypatch.chdir(tmp_path / "relative")
    root = tmp_path / "relative" if where == "absolute" else type(tmp_path)(where)
    source = open_source(root / "train", "data.train")
    # every second image is of another class
    bad = [source.name(i) for i in range(0, len(source), 2)]
    write_quarantine(root, dict.fromkeys(bad, "is no image"))
    for other in (root, tmp_path / "relative", type(tmp_path)(os.path.relpath(tmp_path / "relative"))):
        left = without_quarantined(open_source(other / "train", "data.train"), other)
        assert len(left) == len(source) - len(bad)


def test_members_of_a_tar_may_have_any_name(tmp_path):
    members = [
        "../../x.png",
        "./c/x.png",
        "c//y.png",
        "c/../d/y.png",
        "/abs/x.png",
        "p..q/x.png",
        "c/x\n.png",
        "c/is\tno.png",
    ]
    where = write_tar(
        tmp_path / "t.tar", [(name, encoded(i)) for i, name in enumerate(members)] + [("d/x.png", encoded(9))]
    )
    source = open_source(where, "data.train", sorted({"c", "d", "..", "abs", "p..q", ".", ""}))
    assert len(source) == len(members) + 1
    for i in range(len(members)):
        write_quarantine(tmp_path, {source.name(i): "is damaged"})
        assert len(read_quarantine(tmp_path)) == 1
        left = [without_quarantined(source, tmp_path)] if source.labels.tolist().count(source.labels[i]) > 1 else []
        for kept in left:
            assert len(kept) == len(source) - 1 and source.name(i) not in {kept.name(j) for j in range(len(kept))}


def test_lists_of_earlier_versions_are_read(tmp_path):
    plain = [name for name in NAMES if "\n" not in name and is_unicode(name) and name == name.strip("\r")]
    folder = tmp_path / "train"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    for i, name in enumerate(plain):
        path(folder, "a", stem(os.fsencode(name)) + b".png").write_bytes(encoded(i))
    for name in ("a", "b"):
        (folder / name / "good.png").write_bytes(encoded(0))
    source = open_source(folder, "data.train")
    bad = [source.name(i) for i in range(len(source)) if not source.name(i).endswith("good.png")]
    for end, reason in (("\n", "is no image"), ("\r\n", "my own\treason")):
        # what 0.1 wrote: names as they are
        text = "".join(f"{os.path.relpath(name, tmp_path)}\t{reason}{end}" for name in bad)
        (tmp_path / QUARANTINE).write_bytes(text.encode())
        left = without_quarantined(source, tmp_path)
        assert [os.path.basename(left.name(i)) for i in range(len(left))] == ["good.png", "good.png"]
    # and one of which a line was broken by a name is refused, with what to do
    (tmp_path / QUARANTINE).write_text("train/a/x\ny.png\tis no image\n")
    with pytest.raises(UserError, match=r"line 1, is 'train/a/x'.*verify` writes the list again"):
        without_quarantined(source, tmp_path)


def test_a_list_of_plain_names_is_that_of_earlier_versions(tmp_path):
    flaws = {
        str(tmp_path / name): "is no image" for name in ("a 1.jpg", "#b.jpg", "pêche.jpg", "桃.jpg", "a:b,c%d.jpg")
    }
    text = write_quarantine(tmp_path, flaws).read_text(encoding="utf-8")
    assert text == "".join(f"{name}\tis no image\n" for name in sorted(os.path.relpath(n, tmp_path) for n in flaws))


# -- classes ----------------------------------------------------------------------------------------------------------


def test_two_names_are_never_taken_for_one():
    for names in (NAMES, [name for name in NAMES if is_unicode(name)]):
        twins = [*names, *(escape(name) for name in names if escape(name) not in names)]
        assert positions_in(twins, twins).tolist() == list(range(len(twins)))
        # one side has fewer: what is left over finds no other's place
        assert sorted(positions_in(twins, names))[-len(names) :] == list(range(len(names)))
        assert positions_in([escape(name) for name in names], names).tolist() == list(range(len(names)))
        assert positions_in(names, [escape(name) for name in names]).tolist() == list(range(len(names)))
    forms = [unicodedata.normalize(form, "pêche") for form in ("NFC", "NFD")]
    assert positions_in(forms, forms).tolist() == [0, 1]
    assert positions_in(forms[1:], forms[:1]).tolist() == [0]
    assert positions_in(forms, forms[:1]).tolist() == [0, -1]


def test_a_list_of_another_encoding_is_not_taken(tmp_path, capsys):
    folders(tmp_path / "d")
    (tmp_path / "d" / "classes.txt").write_bytes("\n".join(map(escape, NAMES)).encode("utf-16"))
    with pytest.raises(UserError, match=r"classes.txt' cannot be read: it is no text of UTF-8"):
        open_source(tmp_path / "d", "data.train")


def test_a_table_of_another_encoding_is_refused(tmp_path):
    for kind in ("pêche", "apple"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "x.png").write_bytes(encoded(0))
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "t.csv").write_bytes("path,label\npêche/x.png,1\napple/x.png,0\n".encode(encoding))
        with pytest.raises(UserError, match="is no text of UTF-8"):
            open_source(tmp_path / "t.csv", "data.train")


# -- messages ---------------------------------------------------------------------------------------------------------


def test_messages_about_names_are_one_line_that_moves_no_terminal(tmp_path, capfd):
    folders(tmp_path / "train")
    source = open_source(tmp_path / "train", "data.train")
    bad = BadFiles(source, 0, 0.5)
    for i in range(0, len(source), 3):
        bad.add(i, "is no image")
    said = capfd.readouterr().err
    assert len(said.splitlines()) == len(range(0, len(source), 3)) and said.replace("\n", "").isprintable()
    for name in NAMES:
        say(f"{name} was found")
        out = capfd.readouterr().out
        assert out.endswith("\n") and out[:-1].isprintable(), ascii(out)

        def fail(name=name):
            raise UserError(f"{name} is odd, as is {name!r}")

        child = os.fork()
        if not child:
            run_cli(fail)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == UserError.status
        err = capfd.readouterr().err
        assert err.startswith("error: ") and err.endswith("\n") and err[:-1].isprintable(), ascii(err)
    few = BadFiles(source, 0, 0.0)
    with pytest.raises(UserError) as error:
        few.add(int(np.flatnonzero(source.labels == source.classes.index("new\nline"))[0]), "is no image")
    assert "new\\nline" in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("above", ["a[/b]", "[red]", "[/]", os.fsdecode(ABOVE), "{task.fields}"])
def test_progress_on_a_terminal_shows_a_name_as_it_is(tmp_path, above):
    folders(tmp_path / above / "train")
    screen, terminal = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-c", LOOK, tmp_path / above, "train"], stdout=subprocess.PIPE, stderr=terminal
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(screen, 4096)
        # the end of a terminal
        except OSError:
            break
    os.close(screen)
    out = done.communicate()[0]
    assert done.returncode == 0, shown.decode(errors="replace")
    assert len(json.loads(out)["train"][0]) == len(ODD)
    # the name's own, since the bar has colours
    assert b"Traceback" not in shown and b"\x1b[31m'" not in shown


# -- locales ----------------------------------------------------------------------------------------------------------

LOCALES = {
    "UTF-8": {"LC_ALL": "C.UTF-8"},
    "C": {"LC_ALL": "C"},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII output": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"},
    "all ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
}
LOOK = """
import json, sys, types
from importlib.util import find_spec
# the package's own imports, of torch and DALI, take seconds
sys.modules["scalekd_ds.data"] = package = types.ModuleType("scalekd_ds.data")
package.__path__ = [find_spec("scalekd_ds").submodule_search_locations[0] + "/data"]
from scalekd_ds.data.sources.open import open_source
from scalekd_ds.data.sources.source import with_classes
from scalekd_ds.data.verify import without_quarantined, write_quarantine
from scalekd_ds.names import escape
from pathlib import Path
root = Path(sys.argv[1])
found = {}
for name in sys.argv[2:]:
    source = open_source(root / name, "data.train")
    if not (root / "quarantine.tsv").exists():
        write_quarantine(root, {source.name(i): "is no image" for i in range(0, len(source), 2)})
    left = without_quarantined(source, root)
    for each in (source, left):
        list(map(each.read, range(len(each))))
    names = [[escape(each.name(i)) for i in range(len(each))] for each in (source, left)]
    found[name] = [list(map(escape, source.classes)), source.labels.tolist(), names]
print(json.dumps(found))
"""


def test_every_locale_finds_the_same_names_in_the_same_order(tmp_path):
    root = path(tmp_path, ABOVE)
    folders(root / "train")
    write_tar(root / "t.tar", [(f"{n}/{i}.png", encoded(k)) for k, n in enumerate(NAMES) for i in range(2)])
    with open(root / "t.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = [(os.path.relpath(p, root), k % 3) for k, p in enumerate(sorted((root / "train").rglob("*.png")))]
        csv.writer(file).writerows([("path", "label"), *rows])
    found = {}
    # each locale reads what each of the others has kept, and keeps its own
    for number, (title, variables) in enumerate([*LOCALES.items(), *reversed(LOCALES.items())]):
        if number in (0, 2, 4, 7):
            for kept in [root / QUARANTINE, *root.rglob(".*scalekd_index*")]:
                kept.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", LOOK, root, "train", "t.tar", "t.csv"],
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith(("LC_", "PYTHONUTF8", "PYTHONIO"))},
                **variables,
            },
            capture_output=True,
        )
        assert done.returncode == 0 and b"stale" not in done.stderr, (title, done.stderr.decode(errors="replace"))
        found[number, title] = json.loads(done.stdout)
    first = found[0, "UTF-8"]
    assert first["train"][0] == [escape(name) for name in sorted(NAMES)]
    for title, other in found.items():
        assert other == first, title


def test_paths_of_a_json_are_those_of_the_locale():
    code = (
        "from scalekd_ds.names import *; import sys, os\n"
        "for name in ('p\\u00eache', 'p\\udcc3\\udcaache', '\\udcff', 'a'):\n"
        "    print(ascii(os.fsencode(path_of(name))), ascii(text_of(path_of(name))), ascii(paths_in({'x': [name, 1]})['x'][1]))"
    )
    outs = set()
    for variables in LOCALES.values():
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, check=True
        )
        outs.add(done.stdout)
    assert outs == {
        b"b'p\\xc3\\xaache' 'p\\xeache' 1\nb'p\\xc3\\xaache' 'p\\xeache' 1\nb'\\xff' '\\udcff' 1\nb'a' 'a' 1\n"
    }
    assert path_of(text_of("pêche")) == "pêche"
