"""One site for every test of a run, and a browser that reaches nothing but it."""

from __future__ import annotations

import functools
import gzip
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.patience import patience

ROOT = Path(__file__).parents[2]
SOURCES = ("docs/**/*", "normopt/**/*.py", "benchmarks/**/*", "mkdocs.yml")


def is_fresh(site: Path) -> bool:
    """Whether the site exists and all its pages are newer than their sources."""
    pages = list(site.rglob("*.html"))
    sources = (path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file() and path.suffix != ".pyc")
    return bool(pages) and min(p.stat().st_mtime for p in pages) > max(s.stat().st_mtime for s in sources)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """The site: what `make docs` left in site/, or a run before this one in pytest's cache; else it is built.

    With the tutorials run short, or with one of them run if not everything is tested. Once, whatever the number of
    workers.
    """
    everything = pytestconfig.getoption("--all")
    kept = None
    if pytestconfig.pluginmanager.has_plugin("cacheprovider"):
        kept = pytestconfig.cache.mkdir("site") / ("all" if everything else "some")
    for made in (ROOT / "site", kept):
        if made is not None and is_fresh(made):
            return made
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "site"
    some = {} if everything else {"NORMOPT_TUTORIALS": "lp_schedule_on_digits"}
    with FileLock(shared / "site.lock"):
        if not (folder / "sitemap.xml").exists():  # the last that a build writes
            done = subprocess.run(
                [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
                cwd=ROOT,
                env={**os.environ, **some, "NORMOPT_DOCS_FAST": "1", "NO_MKDOCS_2_WARNING": "1"},
                capture_output=True,
                text=True,
                timeout=patience(100),
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            if kept is not None:
                copy = shutil.copytree(folder, kept.with_suffix(".new"), dirs_exist_ok=True)
                shutil.rmtree(kept, ignore_errors=True)
                copy.rename(kept)
    return folder


class Server(http.server.SimpleHTTPRequestHandler):
    """As the hosts of static sites do, it sends text compressed."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.is_dir() and self.path.split("?")[0].endswith("/"):
            path /= "index.html"
        if path.suffix not in {".html", ".css", ".js", ".mjs", ".json", ".svg"} or not path.is_file():
            return super().do_GET()
        body = gzip.compress(path.read_bytes(), compresslevel=6)
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """Where the site is served: http://127.0.0.1:port/."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium: the system's own, because Playwright's would have to be downloaded."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page of the browser, and whatever went wrong on it.

    Args:
        page: of Playwright.
        address: where the site is.
        search: whether the page gets the index of the search, of which it makes a table at once; else an empty one.
    """

    def __init__(self, page: Any, address: str, search: bool = False) -> None:
        self.page, self.address, self.search = page, address, search
        page.set_default_timeout(1000 * patience(10))
        self.troubles: list[str] = []
        self.listeners = {
            "console": lambda m: self.troubles.append(f"console: {m.text}") if m.type == "error" else None,
            "pageerror": lambda error: self.troubles.append(f"error: {error}"),
            "response": lambda r: self.troubles.append(f"{r.status}: {r.url}") if r.status >= 400 else None,
        }
        for event, listener in self.listeners.items():
            page.on(event, listener)
        page.route("**/*", self.route)

    def leave(self) -> None:
        """Leave the page as a new one is."""
        if self.page.url.startswith(self.address):
            self.page.evaluate("() => { localStorage.clear(); sessionStorage.clear(); }")
        self.page.goto("about:blank")
        self.page.unroute_all()
        for event, listener in self.listeners.items():
            self.page.remove_listener(event, listener)

    def route(self, route: Any) -> None:
        if route.request.url.endswith("/search_index.json") and not self.search:
            route.fulfill(json={"config": {"lang": ["en"], "separator": " ", "pipeline": [], "fields": {}}, "docs": []})
        elif route.request.url.startswith(self.address):
            route.continue_()
        else:
            self.troubles.append(f"asked another host: {route.request.url}")
            route.abort()

    def goto(self, path: str) -> None:
        self.page.goto(self.address + path)
        self.page.wait_for_selector("html[data-formulas=done]", state="attached")
        if path.startswith("playground"):
            self.page.wait_for_selector(".pg-ready")
            self.frame()

    def frame(self) -> None:
        """Wait until what was asked for has been drawn."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


@pytest.fixture(scope="session")
def shared_page(chromium: Any) -> Any:
    """A page for all tests: a new one is a new process, which compiles the site's scripts anew."""
    return chromium.new_context().new_page()


@pytest.fixture
def visit(shared_page: Any, address: str) -> Iterator[Any]:
    """visit(): a new Visit, one in a test. What troubled it fails the test at its end.

    Args:
        viewport: its size; 1280 × 720 by default.
        search: as for Visit.
        media: arguments of ``page.emulate_media``.
    """
    visits: list[Visit] = []

    def new(viewport: tuple[int, int] = (1280, 720), search: bool = False, **media: str) -> Visit:
        assert not visits
        shared_page.set_viewport_size(dict(zip(("width", "height"), viewport, strict=True)))
        shared_page.emulate_media(**{"color_scheme": "light", "reduced_motion": "no-preference", **media})
        visits.append(Visit(shared_page, address, search))
        return visits[0]

    yield new
    for one in visits:
        one.leave()
        assert one.troubles == []
