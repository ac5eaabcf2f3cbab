"""The documentation's site: it builds without a warning, asks no other host, and its search finds what strangers look for."""

import importlib.util
import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import browser
import pytest
from launching import LIMIT, ROOT, make_errors

DIAGRAMS = ROOT / "docs" / "diagrams"
ABSENT = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]
needs_mkdocs = pytest.mark.skipif(bool(ABSENT), reason="needs the extra docs: pip install -e '.[docs]'")
needs_browser = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "a browser is there")

# what a stranger types -> the page that answers it
QUESTIONS = {
    "how do I resume a run": "training.html",
    "where is CAP": "method.html",
    "cross attention projector": "method.html",
    "use my own images": "data.html",
    "which teachers are supported": "own_loop.html",
    "several nodes hosts file": "cluster.html",
    "export to ONNX": "export.html",
    "out of memory": "failures.html",
    "what does DFM mean": "method.html",
    "dual-view": "method.html",
    "use without labels": "own_loop.html",
    "load weights into timm": "export.html",
    "register_family": "own_loop.html",
    "what is TPP": "method.html",
    "tensorboard": "watching.html",
    "install cuda 12": "install.html",
}


def build(config, target):
    """`mkdocs build` with warnings as errors; returns the process, with its output."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", target]
    return subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    # below the folder that its address on the web names, which the page for what is not found relies on
    target = tmp_path_factory.mktemp("site") / "scalekd_ds"
    done = build(ROOT / "mkdocs.yml", target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return target


@pytest.fixture(scope="module")
def address(site):
    """The site on a port of this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{site.name}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser.browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def test_the_diagrams_show_the_shapes_and_parts_that_the_package_has(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DIAGRAMS)
    import draw
    import step_figure

    from scalekd_ds.watching.timing import PARTS

    assert step_figure.PARTS == PARTS
    draw.main(tmp_path)
    for name in draw.FIGURES:
        assert (tmp_path / name).read_text() == (DIAGRAMS / name).read_text(), f"{name} is out of date: make diagrams"


def test_the_reference_of_the_command_line_is_that_of_the_parsers():
    spec = importlib.util.spec_from_file_location("commands_page", ROOT / "docs" / "site" / "commands.py")
    commands = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(commands)
    page = commands.page()
    assert {"`--optim.lr`", "`--data`", "`--hostfile`"} <= set(re.findall(r"^\| (`--[\w.-]+`)", page, re.M))
    assert page == (ROOT / "docs" / "commands.md").read_text(), "docs/commands.md is out of date: make commands"


@needs_mkdocs
def test_links_out_of_the_documents_lead_into_the_repository_and_broken_ones_end_the_build(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "README.md").write_text("[back](../docs/index.md)\n")
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "train.py").write_text("")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "index.md"
    config = tmp_path / "mkdocs.yml"
    config.write_text(
        "site_name: links\nrepo_url: https://example.org/a/b/\ntheme: mkdocs\nuse_directory_urls: false\n"
        f"plugins: []\nhooks: [{ROOT / 'docs' / 'site' / 'hooks.py'}]\n"
    )
    page.write_text("[`train`](../launch/train.py#L3) [all](../launch) [figures](../benchmarks/README.md)\n")
    done = build(config, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "site" / "index.html").read_text()
    for link in ("https://example.org/a/b/blob/main/launch/train.py#L3", "https://example.org/a/b/tree/main/launch"):
        assert f'href="{link}"' in html
    assert 'href="benchmarks.html"' in html
    assert 'href="index.html"' in (tmp_path / "site" / "benchmarks.html").read_text()

    page.write_text("[gone](../launch/no.py) [missing](missing.md)\n")
    done = build(config, tmp_path / "site")
    assert done.returncode != 0
    assert "docs/index.md links to ../launch/no.py, and there is no launch/no.py in the repository" in done.stderr
    assert "'missing.md'" in done.stderr


def test_make_docs_without_the_extra_and_without_a_network(tmp_path):
    (line,) = make_errors("docs", "STAMP=", f"BIN={tmp_path}")
    assert line == (
        f"error: the site needs the extra docs, which pip could not install: {tmp_path}/pip install -e '.[docs]' says why"
    )


# every request that a page makes, and what it says as an error, noted before its own scripts run
WITNESS = """
window.seenErrors = [];
addEventListener("error", e => seenErrors.push(e.message || (e.target && (e.target.src || e.target.href)) || "?"), true);
addEventListener("unhandledrejection", e => seenErrors.push(String(e.reason)));
const tellError = console.error; console.error = (...a) => { seenErrors.push(a.join(" ")); tellError(...a); };
"""
# `loose` are commands that Markdown took for prose
SEEN = r"""
const page = document.documentElement, prose = [...document.querySelectorAll("article p")];
return {
  errors: seenErrors,
  asked: performance.getEntriesByType("resource").map(e => e.name),
  broken: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
  loose: prose.map(p => p.firstChild && p.firstChild.nodeValue || "")
    .filter(t => /^(python|scalekd|deepspeed|pip|make) \S/.test(t)),
  too_wide: page.scrollWidth > page.clientWidth,
};
"""
# a word, then the first result as the page shows it
SEARCH = """
const [query, tell] = arguments;
const box = document.querySelector("[data-md-component=search-query]");
const list = document.querySelector(".md-search-result__list");
list.replaceChildren();
box.focus(); box.value = query; box.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}));
box.dispatchEvent(new Event("input", {bubbles: true}));
const started = Date.now();
(function look() {
  const links = [...list.querySelectorAll(".md-search-result__item > .md-search-result__link, .md-search-result__item > a")];
  if (links.length || Date.now() - started > 20000) tell(links.slice(0, 3).map(a => a.getAttribute("href")));
  else setTimeout(look, 50);
})();
"""


@needs_mkdocs
@needs_browser
def test_every_page_loads_without_an_error_and_asks_no_other_host(site, address, driver):
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WITNESS})
    pages = sorted(str(page.relative_to(site)) for page in site.rglob("*.html"))
    assert {"index.html", "tutorial.html", "benchmarks.html", "api/scalekd.html", "commands.html"} <= set(pages)
    driver.set_window_size(1000, 800)
    for page in pages:
        driver.get(f"{address}/{page}")
        seen = driver.execute_script(SEEN)
        seen["asked"] = [url for url in seen["asked"] if not url.startswith((f"{address}/", "data:", "blob:"))]
        assert seen == {"errors": [], "asked": [], "broken": [], "loose": [], "too_wide": False}, page


@needs_mkdocs
@needs_browser
def test_the_search_answers_a_strangers_questions_with_its_first_result(address, driver):
    driver.get(f"{address}/index.html")
    driver.set_script_timeout(40)
    found = {question: driver.execute_async_script(SEARCH, question) for question in QUESTIONS}
    first = {question: (links[0] if links else "").split("?")[0].split("#")[0] for question, links in found.items()}
    wrong = {q: found[q] for q, page in QUESTIONS.items() if not first[q].endswith(f"/{page}") and first[q] != page}
    assert not wrong
