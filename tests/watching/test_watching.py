"""A run as a person watches it: TensorBoard in a real browser, .csv files, the terminal, JSON lines, Weights & Biases."""

import csv
import io
import json
import shlex
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import browser
import numpy as np
import pytest
import tiny_run
from forking import forked_ranks, forked_with
from launching import LIMIT, ROOT, alone, environment, free_port
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scalekd_ds.watching.timing import PARTS

TRAIN = ROOT / "launch" / "train.py"
VIEWS = ("spatial_s3", "frequency_s3", "spatial_s4", "frequency_s4")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.images(tmp_path_factory.mktemp("data"))


def arguments(data, run_dir, *more):
    """An evaluation after each of the two epochs."""
    return tiny_run.arguments(data, run_dir, "--run.eval_every", 1, *more)


@pytest.fixture(scope="module")
def watched(data, tmp_path_factory):
    """(folder, standard output) of a run on two ranks whose weights ZeRO-3 shards, with an average beside them."""
    run_dir = tmp_path_factory.mktemp("runs") / "watched"
    more = ("--run.log_every", 2, "--run.monitors", "tensorboard,csv", "--run.ds_config", "zero3", "--ema.decay", 0.5)
    more += ("--run.baseline_top1", 20, "--run.peak_tflops", 0.1, "--ema.evaluate", "false")
    done = forked_ranks(TRAIN, *arguments(data, run_dir, *more))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return run_dir, done.stdout


@pytest.fixture(scope="module")
def events(watched):
    found = EventAccumulator(str(watched[0] / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    found.Reload()
    return found


def values(events, name):
    return {event.step: event.value for event in events.Scalars(name)}


def test_scalars_come_in_groups_and_shares_add_up(events):
    names = set(events.Tags()["scalars"])
    groups = {name.split("/")[0] for name in names}
    assert groups == {"loss", "teacher", "data", "system", "val", "optim", "progress", "weight"}
    assert sorted(values(events, "loss/total")) == [2, 4, 6, 8, 10]
    # one part after the other, and what none of them covers: the whole of the step
    for step in (2, 10):
        shares = {part: values(events, f"system/share_{part}")[step] for part in (*PARTS, "other")}
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-5) and all(v >= 0 for v in shares.values())
        for part in ("teacher", "student", "projectors", "backward", "optimizer"):
            assert shares[part] > 0, shares
    # within the others: two ranks that reduce gradients and gather weights on every step
    communication = values(events, "system/share_communication")
    assert all(0 < share < 1 for share in communication.values()), communication
    speed, seconds = values(events, "system/images_per_s"), values(events, "system/step_s")
    for step in speed:
        assert speed[step] * seconds[step] == pytest.approx(8.0, rel=1e-4)
    assert all(v > 0 for v in values(events, "system/mfu").values())
    assert 0.1 < values(events, "system/host_rss_gib")[10] < 20
    assert values(events, "data/images_seen")[10] == 80 and values(events, "data/bad_files")[10] == 0
    assert values(events, "optim/skipped_steps")[10] == 0 and values(events, "data/wait_s")[10] > 0


def test_cosines_follow_from_the_losses_and_grow(events):
    agreement, kl = values(events, "teacher/agreement_top1"), values(events, "teacher/kl")
    assert all(0 <= v <= 100 for v in agreement.values()) and all(v > 0 for v in kl.values())
    for view in VIEWS:
        cosine, loss = values(events, f"teacher/cosine_{view}"), values(events, f"loss/{view}")
        weight = values(events, f"weight/{view}")[2]
        for step in cosine:
            # 16 tokens
            assert loss[step] == pytest.approx(weight * 2 * 16 * (1 - cosine[step]), rel=1e-4)
    assert values(events, "teacher/cosine_spatial_s4")[10] > values(events, "teacher/cosine_spatial_s4")[2] + 0.05


def test_pictures_are_logged_at_every_evaluation(events, data):
    assert set(events.Tags()["images"]) == {"pictures/maps", "pictures/attention", "pictures/spectrum"}
    pictures = {}
    for name in events.Tags()["images"]:
        shown = events.Images(name)
        assert [image.step for image in shown] == [5, 10]
        before, after = (np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) for image in shown)
        # the student has learned in between
        assert before.shape == after.shape and not np.array_equal(before, after)
        pictures[name] = before, after
    side, gap = 160, 2
    before, after = pictures["pictures/maps"]
    assert after.shape == (4 * side + 3 * gap, 3 * side + 2 * gap, 3)
    # image and teacher are what they were; the first image is the first of the folder
    assert np.array_equal(before[:, : 2 * side + gap], after[:, : 2 * side + gap])
    assert not np.array_equal(before[:, 2 * (side + gap) :], after[:, 2 * (side + gap) :])
    first = np.asarray(Image.open(sorted((data / "val").rglob("*.jpg"))[0]).resize((side, side), Image.NEAREST))
    assert np.abs(after[:side, :side].astype(int) - first.astype(int)).mean() < 3.0
    # the teacher's and the student's columns hold colours, not one
    for column in (1, 2):
        cells = after[side // 8 : side : side // 4, column * (side + gap) + side // 8 :: side // 4][:4, :4]
        assert len(np.unique(cells.reshape(-1, 3), axis=0)) > 8
    assert pictures["pictures/attention"][1].shape == (4 * side + 3 * gap, 5 * side + 4 * gap, 3)
    assert pictures["pictures/spectrum"][1].shape == (side, 2 * side + gap, 3)


def test_the_summary_and_the_table_of_runs_are_logged(watched, events):
    text = events.Tensors("run/summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "--recipe fashion-scalekd" in text and "before last stage" in text and '"teacher_image_size": null' in text
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert commit.returncode != 0 or commit.stdout.strip() in text
    # runs are compared by hyperparameters and by the very scalars; all in one file, so that it is one run
    assert len(list((watched[0] / "tensorboard").iterdir())) == 1
    table = events.PluginTagToContent("hparams")
    assert set(table) == {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"}
    assert b"distill.kd_weight" in table["_hparams_/session_start_info"]
    assert b"val/best_top1" in table["_hparams_/experiment"]


def test_csv_files_hold_the_same_numbers(watched, events):
    for name in ("loss/total", "teacher/kl", "val/top1"):
        rows = list(csv.reader(io.StringIO((watched[0] / "csv" / f"{name.replace('/', '_')}.csv").read_text())))
        assert rows[0] == ["step", name.split("/")[1]]
        assert {int(step): float(value) for step, value in rows[1:]} == pytest.approx(values(events, name), rel=1e-5)


def test_lines_tables_and_the_report_card_tell_the_results(watched, events):
    run_dir, stdout = watched
    results = json.loads((run_dir / "results.json").read_text())
    best = values(events, "val/best_top1")
    assert best[10] == pytest.approx(results["best"]["top1"], rel=1e-5)
    assert best[10] == pytest.approx(max(values(events, "val/top1").values()), rel=1e-5)
    lines = stdout.splitlines()
    steps = [line for line in lines if line.startswith("step 10/10  loss ")]
    # rank 0 alone speaks
    assert len(steps) == 1 and "left" in steps[0] and "data wait" in steps[0] and "spatial_s3 " in steps[0]
    table = lines.index(next(line for line in lines if line.startswith("step 5: validation")))
    assert [line.split("  ")[2] for line in lines[table + 1 : table + 5]] == [
        "student",
        "average",
        "teacher",
        "best so far",
    ]
    report = dict(line.split(None, 1) for line in lines[-12:] if line and not line.startswith(" "))
    assert report["gain"].startswith(f"{results['top1'] - 20:+.2f} over the baseline's 20.00%")
    assert report["images"] == "80" and Path(report["weights"]).is_file() and Path(report["results"]).is_file()
    command, verb, weights, *_ = shlex.split(report["next"])
    assert command == "scalekd" and find_spec(f"scalekd_ds.commands.{verb}") and weights == report["weights"]
    assert results["seconds"] > 1 and f"{results['best']['top1']:.2f}%" in report["best"]


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
def test_charts_and_pictures_are_on_the_page(watched, tmp_path):
    """TensorBoard itself, in Chromium: what a person sees."""
    from selenium.webdriver.support.ui import WebDriverWait

    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(watched[0]), "--host", "127.0.0.1"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, env=environment())
    page = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.time() + LIMIT
        while True:
            try:
                tags = json.load(urllib.request.urlopen(f"{page}data/plugin/scalars/tags", timeout=60))
                if any("val/top1" in run for run in tags.values()):
                    break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.time() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        with browser.browser(tmp_path / "profile") as driver:

            def cards(group: str, kind: str, drawn: str) -> set[str]:
                """Titles of the group's cards that have something drawn in them."""
                titles = driver.execute_script(
                    "return [...document.querySelectorAll(arguments[0])].filter(card => card.querySelector(arguments[1]))"
                    ".map(card => card.querySelector('.tag, .tag-path, [class*=tag]').textContent.replace(/\\\\s+/g, ''))",
                    kind,
                    drawn,
                )
                return {title for title in titles if title.startswith(group)}

            def seen(group: str, kind: str, drawn: str, wanted: set[str]) -> None:
                driver.get("about:blank")
                driver.get(f"{page}?tagFilter=^{group}#timeseries")
                WebDriverWait(driver, LIMIT, 0.2).until(lambda _: wanted <= cards(group, kind, drawn))

            # a line chart draws its axes as SVG once it has data, and its lines on a canvas or as paths
            line = "line-chart .series-view path, line-chart canvas, line-chart svg path"
            terms = {f"loss/{term}" for term in ("total", "ce", "kd", *VIEWS)}
            seen("loss/", "scalar-card", line, terms)
            seen("val/", "scalar-card", line, {"val/top1", "val/ema_top1", "val/teacher_top1", "val/best_top1"})
            seen("teacher/", "scalar-card", line, {"teacher/kl", "teacher/agreement_top1"})
            pictures = {f"pictures/{name}" for name in ("maps", "attention", "spectrum")}
            seen("pictures/", "image-card", "img", pictures)
            # the browser has decoded them
            loaded = "return [...document.querySelectorAll('image-card img')].filter(i => i.naturalWidth > 100).length"
            WebDriverWait(driver, LIMIT, 0.2).until(lambda _: driver.execute_script(loaded) == 3)
            driver.save_screenshot(str(tmp_path / "page.png"))
            assert len(np.unique(np.asarray(Image.open(tmp_path / "page.png")).reshape(-1, 4), axis=0)) > 100
    finally:
        server.terminate()
        server.wait(LIMIT)


def test_standard_output_is_json_lines_and_nothing_else(data, tmp_path):
    """One process; Weights & Biases, where it is installed, keeps its run on this machine."""
    monitors = "wandb" if find_spec("wandb") else "csv"
    more = ("--run.progress", "json", "--run.log_every", 5, "--run.monitors", monitors, "--micro_batch_size", 8)
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    done = forked_with([offline], TRAIN, *arguments(data, tmp_path / "run", *more))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["kind"] for line in lines] == ["step", "evaluation", "step", "evaluation", "report"]
    # what others print is on the other stream
    assert "before last stage" in done.stderr
    step, evaluation, report = lines[2:]
    assert step["step"] == step["total"] == 10 and step["seconds_left"] == 0
    assert {"loss/total", "teacher/kl", "system/images_per_s_mean"} <= set(step["scalars"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {row["name"]: row["top1"] for row in evaluation["rows"]}["student"] == results["top1"] == report["top1"]
    assert report["images"] == 80 and len(report["next"]) == 2
    # TensorBoard was not named
    assert not (tmp_path / "run" / "tensorboard").exists()
    if monitors == "wandb":
        (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
        assert b"teacher/agreement_top1" in kept.read_bytes()


@pytest.mark.slow
def test_watching_costs_at_most_two_percent(data):
    """At the default interval, in turn with steps that nobody watches."""
    more = ("--global_batch_size", 32, "--micro_batch_size", 32, "--run.log_every", 20, "--schedule.epochs", 1000)
    done = alone(ROOT / "benchmarks" / "monitoring.py", "--rounds", 25, *arguments(data, "unused", *more))
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("processor: ")]
    cost = float(line.split(" s: ")[1].split("%")[0])
    assert cost <= 2.0, line
