"""The documentation's site: it builds without a warning, asks no other host, and its search finds what strangers look for."""

import importlib.util
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import browser
import pytest
from launching import LIMIT, ROOT

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


# every request that a page makes, and what it says as an error, noted before its own scripts run
WITNESS = """
window.seenErrors = [];
addEventListener("error", e => seenErrors.push(e.message || (e.target && (e.target.src || e.target.href)) || "?"), true);
addEventListener("unhandledrejection", e => seenErrors.push(String(e.reason)));
const tellError = console.error; console.error = (...a) => { seenErrors.push(a.join(" ")); tellError(...a); };
"""
REQUESTS = 'return performance.getEntriesByType("resource").map(e => e.name)'
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
    for page in pages:
        driver.get(f"{address}/{page}")
        assert driver.execute_script("return seenErrors") == [], page
        asked = driver.execute_script(REQUESTS)
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == [], page
        broken = driver.execute_script(
            "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        )
        assert broken == [], page
        wide = driver.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wide <= 0, page


@needs_mkdocs
@needs_browser
def test_the_search_answers_a_strangers_questions_with_its_first_result(address, driver):
    driver.get(f"{address}/index.html")
    driver.set_script_timeout(40)
    found = {question: driver.execute_async_script(SEARCH, question) for question in QUESTIONS}
    first = {question: (links[0] if links else "").split("?")[0].split("#")[0] for question, links in found.items()}
    wrong = {q: found[q] for q, page in QUESTIONS.items() if not first[q].endswith(f"/{page}") and first[q] != page}
    assert not wrong
