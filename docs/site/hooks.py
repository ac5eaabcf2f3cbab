"""What MkDocs is told beyond its settings: how a link that leaves the documents' folder is followed.

The documents link to files of the repository as GitHub follows links, relative to the page. On the site an image from
outside comes along, the benchmarks' page is a page, and every other file is a link into the repository, at the address
that mkdocs.yml gives.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

# place in the repository -> page of the site
PAGES = {"benchmarks/README.md": "benchmarks.md"}
IMAGES = ("png", "svg", "jpg")
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]*)((?:#[^)\s]*)?\))")
CODE = re.compile(r"(```.*?```)", re.S)
# a command below a point of a list: GitHub counts from the text of the point, and Python-Markdown wants eight blanks
COMMAND_IN_LIST = re.compile(r"^ {7}(?=\S)", re.M)

# start of a page's place -> how much its words count in the search: a page that explains comes before one that lists
WORTH = {
    "api/": 0.1,
    "commands.md": 0.15,
    "benchmarks.md": 0.2,
    "contributing.md": 0.2,
    "index.md": 0.2,
    "notebooks.md": 0.3,
}
WORTH |= {
    "data.md": 1.5,
    "training.md": 1.5,
    "questions.md": 0.5,
    "recipes.md": 0.6,
    "tutorial.md": 0.6,
    "inspect.md": 0.7,
}

# mkdocs counts the warnings of its own loggers, and --strict fails on them
log = logging.getLogger("mkdocs.hooks.repository_links")


def _inside(target: str, place: str) -> str | None:
    """The place in the repository of a relative link on the page at `place`; None for links of other kinds."""
    if not target or re.match(r"[a-z]+:|/", target):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), target))


def _place_of(file: File, root: Path) -> str:
    return Path(file.abs_src_path).resolve().relative_to(root).as_posix()


def _root(config: Any) -> Path:
    return Path(config.config_file_path).resolve().parent


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages, and the images that pages show, which lie outside of the documents' folder."""
    root = _root(config)
    for place, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(root / place)))
    for file in list(files.documentation_pages()):
        for _, target, _ in LINK.findall(Path(file.abs_src_path).read_text(encoding="utf-8")):
            place = _inside(target, _place_of(file, root))
            if place is None or place.startswith("docs/") or not place.endswith(IMAGES):
                continue
            if (root / place).is_file() and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(root / place)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links to what lies outside of the documents' folder into links that the site can follow, and weighs the page."""
    worth = [value for start, value in WORTH.items() if page.file.src_uri.startswith(start)]
    page.meta.setdefault("search", {"boost": worth[0] if worth else 1.0})
    root = _root(config)
    here = _place_of(page.file, root)
    folder = posixpath.dirname(page.file.src_uri)

    def follow(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        place = _inside(target, here)
        if place is None:
            return match[0]
        on_site = PAGES.get(place, place.removeprefix("docs/") if place.startswith("docs/") else place)
        if files.get_file_from_path(on_site) is not None:
            return f"{before}{posixpath.relpath(on_site, folder or '.')}{after}"
        if place.startswith("docs/"):
            # mkdocs itself says that there is no such page
            return match[0]
        if not (root / place).exists():
            log.warning("%s links to %s, and there is no %s in the repository", here, target, place)
        kind = "tree" if (root / place).is_dir() else "blob"
        return f"{before}{config.repo_url.rstrip('/')}/{kind}/main/{place}{after}"

    parts = CODE.split(markdown)
    prose = (COMMAND_IN_LIST.sub(" " * 8, LINK.sub(follow, part)) for part in parts[::2])
    return "".join(part if number % 2 else next(prose) for number, part in enumerate(parts))
