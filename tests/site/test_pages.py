"""The site in a browser: every page loads, every link holds, the search finds, and no other host is asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlsplit

import pytest

from tests.site.conftest import Visit
from tests.test_docs import PUBLIC

REPORT = "results-report.html"  # not made by MkDocs
# One of every kind: home, the table, an optimizer, a guide, theory, a tutorial, the results, a list of symbols.
KINDS = (
    "",
    "optimizers/",
    "optimizers/lpsgdm/",
    "how-to/compile/",
    "theory/",
    "theory/scales/",
    "tutorials/lp_schedule_on_digits/",
    "results/",
    "api/norms/",
)


def test_the_site_is_whole_and_needs_no_other_host(site: Path) -> None:
    """The strict build: a dead link or an error in a tutorial fails it."""
    html = {p: p.read_text(encoding="utf-8") for p in site.rglob("*.html")}
    host = r"""["']?(?:https?:)?//"""
    loads = rf"<(?:script|img|iframe|source)\b[^>]*\bsrc={host}"
    links = rf"<link\b[^>]*rel=\W?(?:stylesheet|preconnect|icon)\b[^>]*href={host}"
    for path, text in html.items():
        assert re.findall(f"{loads}|{links}", text) == [], path
    everything = "".join(html.values())
    for name in PUBLIC:
        assert f'id="{name}"' in everything, f"no anchor for {name}"
    assert (site / "search/search_index.json").stat().st_size > 10_000
    tutorial = html[site / "tutorials/lp_schedule_on_digits/index.html"]
    pictures = re.findall(r'<img alt="([^"]+)" src="\.\./(\w+\.svg)"', tutorial)
    assert len(pictures) == 4
    for alt, name in pictures:
        assert alt
        assert (site / "tutorials" / name).read_text(encoding="utf-8").rstrip().endswith("</svg>")
    for source in ("hooks", "tutorials/lp_schedule_on_digits.py"):
        assert not (site / source).exists()


def test_a_page_of_every_kind_loads(visit: Any) -> None:
    one = visit()
    drawn = [load(one, path) for path in KINDS]
    assert sum(formulas for formulas, _ in drawn) > 10
    assert sum(diagrams for _, diagrams in drawn) > 0


def load(one: Visit, path: str) -> tuple[int, int]:
    """Go to a page and look at all that it loads: its formulas and diagrams, counted."""
    one.goto(path)
    sent = "[...performance.getEntries()].reduce((sum, e) => sum + (e.encodedBodySize ?? 0), 0)"
    assert 10_000 < one.page.evaluate(sent) <= 1_500_000, path  # with all that it loads, as it was sent
    broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
    assert one.page.evaluate(broken) == [], path
    return set_in_type(one, ".arithmatex", ".katex", path), set_in_type(one, ".diagram", "svg", path)


@pytest.mark.exhaustive
def test_every_page_loads_and_every_link_holds(visit: Any, site: Path) -> None:
    one = visit()
    pages = sorted(str(p.relative_to(site)).removesuffix("index.html") for p in site.rglob("*.html"))
    pages.remove(REPORT)
    assert set(KINDS) < set(pages)
    ids: dict[str, set[str]] = {}
    links: dict[str, set[str]] = {}
    drawn = []
    for path in pages:
        drawn.append(load(one, path))
        url = one.address + path
        ids[url] = set(one.page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
        links[url] = set(one.page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)"))
    assert sum(formulas for formulas, _ in drawn) > 50
    assert sum(diagrams for _, diagrams in drawn) > 0
    dead = set()
    for page, targets in links.items():
        for target in targets:
            url, anchor = urldefrag(target)
            if not url.startswith(one.address):
                continue  # another host's: not asked here
            there = site / urlsplit(url).path.lstrip("/")
            if not (there / "index.html" if url.endswith("/") else there).is_file():
                dead.add(f"{page} → {target}: no such page")
            elif anchor and url in ids and anchor not in ids[url]:
                dead.add(f"{page} → {target}: no such anchor")
    assert dead == set()


def test_the_report_draws_its_figures(visit: Any) -> None:
    one = visit()
    one.page.goto(one.address + REPORT)
    assert one.page.locator(".forest circle").count() > 100
    for width in (390, 1280):
        one.page.set_viewport_size({"width": width, "height": 900})
        assert one.page.evaluate("document.documentElement.scrollWidth") <= width


def set_in_type(one: Visit, source: str, result: str, path: str) -> int:
    """How many formulas or diagrams a page has: each of them drawn, and no formula in error."""
    found = f"[...document.querySelectorAll('{source}')]"
    assert one.page.evaluate(f"{found}.filter(e => !e.querySelector('{result}')).map(e => e.textContent)") == [], path
    assert one.page.locator(".katex-error").all_text_contents() == [], path
    return int(one.page.locator(source).count())


def test_a_failed_formula_is_seen(visit: Any) -> None:
    one = visit()
    one.goto("theory/scales/")
    one.page.evaluate("katex.render('\\\\frac{', document.querySelector('.arithmatex'), {throwOnError: false})")
    with pytest.raises(AssertionError, match="frac"):
        set_in_type(one, ".arithmatex", ".katex", "theory/scales/")


def test_the_search_finds_lpsgdm(visit: Any) -> None:
    one = visit(viewport={"width": 1280, "height": 900})
    one.goto("")
    one.page.click("input.md-search__input")
    one.page.keyboard.type("LPSGDM")
    results = one.page.locator(".md-search-result__item a[href*='optimizers/lpsgdm/']")
    results.first.wait_for(state="visible")
    assert "LPSGDM" in one.page.locator(".md-search-result__list").inner_text()


def test_another_host_is_refused_and_reported(chromium: Any, address: str) -> None:
    page = chromium.new_page()
    one = Visit(page, address)
    one.goto("")
    assert page.evaluate("fetch('https://example.org/').then(() => 'reached', () => 'refused')") == "refused"
    assert "asked another host: https://example.org/" in one.troubles
    page.close()
