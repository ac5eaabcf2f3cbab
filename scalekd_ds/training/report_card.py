"""Makes the report that the terminal shows at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalekd_ds.config import RunConfig
from scalekd_ds.data.run_sources import where_of
from scalekd_ds.names import shell_word
from scalekd_ds.recipes.imagenet import published_baseline
from scalekd_ds.watching.terminal.report import ReportCard


def report_card(cfg: RunConfig, results: dict[str, Any], num_classes: int) -> ReportCard:
    """The report at the end of a run.

    Args:
        cfg: The run.
        results: Contents of its `results.json`.
        num_classes: Number of classes of the data; a published baseline is only shown for the same number.
    """
    run_dir = Path(cfg.run.dir)
    weights = run_dir / "student.safetensors"
    files = {"weights": weights, "results": run_dir / "results.json", "checkpoints": run_dir / "checkpoints"}
    evaluate = ["scalekd", "evaluate", _argument(str(weights)), "--data", _argument(_validation_images(cfg))]
    commands = [
        [*evaluate, *(["--allow-missing-classes"] if cfg.data.allow_missing_classes else [])],
        ["tensorboard", "--logdir", _argument(cfg.run.dir)],
    ]
    baseline = cfg.run.baseline_top1
    if baseline is None:
        baseline = published_baseline(cfg.recipe, num_classes)
    return ReportCard(
        top1=results["top1"],
        best_top1=results["best"]["top1"],
        best_step=results["best"]["step"],
        weights=results["weights"],
        baseline_top1=baseline,
        teacher_top1=results["teacher_top1"],
        steps=results["step"],
        seconds=results["seconds"],
        images=results["images"],
        joules=results["joules"],
        files={name: str(path) for name, path in files.items()},
        next=[" ".join(map(shell_word, command)) for command in commands],
    )


def _argument(path: str) -> str:
    """A path that no parser takes for an option."""
    return f"./{path}" if path.startswith("-") else path


def _validation_images(cfg: RunConfig) -> str:
    """What `scalekd evaluate` takes as the run's validation images."""
    return cfg.data.root if cfg.data.val == "val" else str(where_of(cfg.data.root, cfg.data.val))
