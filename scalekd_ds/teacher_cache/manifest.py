"""The manifest of a teacher cache: what was asked of which teacher about which views of which images."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scalekd_ds.errors import UserError, problem_of
from scalekd_ds.files.durable import write_json
from scalekd_ds.names import escape
from scalekd_ds.teacher_cache.records import Layout

NAME = "manifest.json"
LAST_STAGE = "last_stage.safetensors"
# raised whenever a reader of before would misread a cache
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a cache is of.

    Attributes:
        release: Release of this package that has written it.
        complete: Whether every entry is there.
        samples: Images in a view.
        views: Number of views K.
        view_seed: Seed of the views.
        order_seed: Seed of the order that the entries of a view lie in, the order of its epoch in a run of that seed.
        subset_seed: Seed of the draw of a part of the images.
        batch: Images that the teacher has seen at a time.
        shard_entries: Entries of a shard; the last one of a view may have fewer.
        layout: What an entry holds.
        settings: Options of the run by name that a view or an answer depends on.
        mean: (3,) mean of the pixels, by which the views are normalised.
        std: (3,) standard deviation.
        data: What `images_record` says of the images.
        teacher: How to build the teacher's last stage.
        digests: Digests of the teacher's weights and statistics.
        last_stage: Digest of the file of its last stage's weights.
        packages: Versions of the packages that the answers may depend on.
        gate: What a lower precision of the teacher has changed, as it was measured.
        bad: Sample -> reason of the images that could not be used.
        shards: Digest of each shard of each view.
        format: Version of this format.
    """

    release: str
    samples: int
    views: int
    view_seed: int
    order_seed: int
    subset_seed: int
    batch: int
    shard_entries: int
    layout: Layout
    settings: dict[str, Any]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    data: dict[str, Any]
    teacher: dict[str, Any]
    digests: dict[str, str | None]
    last_stage: str
    packages: dict[str, str]
    gate: dict[str, float] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)
    shards: list[list[str]] = field(default_factory=list)
    complete: bool = False
    format: int = FORMAT

    @property
    def shards_of_a_view(self) -> int:
        """Number of shards of each view."""
        return -(-self.samples // self.shard_entries)

    def entries_of(self, shard: int) -> int:
        """Number of entries of a view's shard."""
        return min(self.shard_entries, self.samples - shard * self.shard_entries)

    def key(self, view: int) -> int:
        """Start of the checksums of a view's entries."""
        identity = [
            self.settings,
            self.view_seed,
            self.order_seed,
            self.data["digest"],
            self.digests,
            self.layout.as_dict(),
        ]
        return zlib.crc32(json.dumps([identity, view], sort_keys=True).encode())

    def write(self, folder: Path) -> None:
        """Writes the manifest into the folder of its cache.

        Raises:
            OSError: It cannot be written.
        """
        values = asdict(self) | {"layout": self.layout.as_dict()}
        write_json(folder / NAME, {"format": values.pop("format"), **values})


def read_manifest(folder: str | Path, unfinished: bool = False) -> Manifest:
    """The manifest in a cache's folder.

    Args:
        folder: The folder.
        unfinished: Takes one of a cache that is not complete, too.

    Raises:
        UserError: There is none that can be read, it is of a newer release, or its cache is not complete.
    """
    folder = Path(folder)
    try:
        values = json.loads((folder / NAME).read_text(encoding="utf-8"))
        version, release = int(values["format"]), str(values["release"])
    except FileNotFoundError:
        raise UserError(
            f"teacher_cache is {escape(folder)}, which holds no teacher cache (no {NAME}): `scalekd cache --out` makes one."
        ) from None
    except OSError as error:
        raise UserError(f"teacher_cache is {escape(folder)}, which cannot be read: {problem_of(error)}.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(_damaged(folder)) from None
    if version > FORMAT:
        raise UserError(
            f"the teacher cache {escape(folder)} has format {version}, of scalekd_ds {release}, and this release reads "
            f"formats up to {FORMAT}: update scalekd_ds, or make the cache with this release."
        )
    try:
        layout = Layout.of(values.pop("layout"))
        bad = {int(sample): str(reason) for sample, reason in values.pop("bad").items()}
        mean, std = tuple(values.pop("mean")), tuple(values.pop("std"))
        manifest = Manifest(layout=layout, bad=bad, mean=mean, std=std, **values)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(_damaged(folder)) from None
    if not manifest.complete and not unfinished:
        raise UserError(
            f"the teacher cache {escape(folder)} is unfinished: the `scalekd cache` command that began it goes on where it "
            "ended."
        )
    return manifest


def _damaged(folder: Path) -> str:
    where = escape(folder)
    return (
        f"the manifest of the teacher cache {where} is damaged: bring {NAME} back from a copy, or make the cache anew."
    )
