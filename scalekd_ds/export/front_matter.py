"""The metadata at the top of a model card, which the hub reads: library, task, data, origin and measured accuracy."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from scalekd_ds.export.origin import data_name, datasets, origin_of, teacher_origin
from scalekd_ds.names import escape

TASK = "image-classification"
# whoever publishes the model has to choose it
_NO_LICENSE = "# license: (yours to fill in, such as apache-2.0)"


def _results(card: dict[str, Any], config: dict[str, Any] | None) -> list[EvalResult]:
    """The accuracies of a card; none where it is not known on what data they were measured."""
    if config is None:
        return []
    name = escape(data_name(config)) or "images"
    # a name on the hub, or in the form of one
    kind = next(iter(datasets(card, config)), re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "images")
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=kind,
            dataset_name=name,
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=f"top-{k}",
            metric_value=round(card[f"top{k}"], 3),
        )
        for k in (1, 5)
        if card.get(f"top{k}") is not None
    ]


def front_matter(card: dict[str, Any], config: dict[str, Any] | None, library: str) -> str:
    """The metadata as YAML between its two lines.

    `base_model` is what the student's own weights started from. A teacher is no base model, whose weights the student has
    none of, and stands under `teacher`.

    Args:
        card: The student's card.
        config: The configuration of its run, or None if unknown.
        library: The library that loads the model.
    """
    teacher = teacher_origin(card, config)
    start = origin_of(config["student"], config["student_weights"]) if config else None
    more = {"teacher": teacher.hub_id} if teacher and teacher.hub_id else {}
    results = _results(card, config)
    data = ModelCardData(
        library_name=library,
        pipeline_tag=TASK,
        tags=[TASK, "timm", "scalekd", *(["knowledge-distillation"] if card.get("teacher", "none") != "none" else [])],
        datasets=datasets(card, config) or None,
        base_model=start.hub_id if start else None,
        # the library asks for a name only where there are results
        model_name=card["architecture"] if results else None,
        eval_results=results or None,
        **more,
    )
    return f"---\n{_NO_LICENSE}\n{data.to_yaml()}\n---"
