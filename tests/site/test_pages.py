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
    one = visit(search=True)
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
    one = visit(search=True)
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


FINDS = {
    "LPSGDM": "optimizers/lpsgdm/",
    "bf16": "how-to/mixed-precision/",
    "lr scheduler": "how-to/schedules-of-p/",
    "gradient clipping": "how-to/clip-gradients/",
    "Shampoo": "optimizers/muon/",
    "AdamW": "optimizers/adamw/",
    "weight decay": "how-to/weight-decay/",
    "Muon": "optimizers/muon/",
    "FSDP": "how-to/sharded-training/",
    "checkpoint": "how-to/checkpoints/",
    "sparsity": "api/sparsity/",
}


def test_the_search_finds_what_users_type(visit: Any) -> None:
    one = visit(search=True)
    warnings: list[str] = []
    one.page.on("console", lambda message: warnings.append(message.text) if message.type == "warning" else None)
    one.goto("")
    one.page.click("input.md-search__input")
    for words, page in FINDS.items():
        one.page.fill("input.md-search__input", "")
        one.page.keyboard.type(words)
        among_the_first = f".md-search-result__item:nth-child(-n+3) > a[href*='{page}']"
        one.page.locator(among_the_first).first.wait_for(state="visible")
    assert not [warning for warning in warnings if "Invalid query" in warning]  # as after an error in the search


def test_the_text_is_in_the_sites_own_font(visit: Any) -> None:
    one = visit()
    one.goto("theory/")
    session = one.page.context.new_cdp_session(one.page)
    for domain in ("DOM", "CSS"):
        session.send(f"{domain}.enable")
    root = session.send("DOM.getDocument")["root"]["nodeId"]
    node = session.send("DOM.querySelector", {"nodeId": root, "selector": ".md-content p"})["nodeId"]
    fonts = session.send("CSS.getPlatformFontsForNode", {"nodeId": node})["fonts"]
    glyphs = {font["familyName"]: font["glyphCount"] for font in fonts if font["isCustomFont"]}
    assert glyphs["Inter"] > 0.9 * sum(font["glyphCount"] for font in fonts)


def scrolling(one: Visit, path: str) -> list[str]:
    """What is wider than its place: the page, tables, and code with a line that can be broken."""
    one.goto(path)
    return list(
        one.page.evaluate(
            """() => [
              ...(document.documentElement.scrollWidth > innerWidth ? ["the page"] : []),
              ...[...document.querySelectorAll(".md-typeset__table")]
                .filter(e => e.scrollWidth > e.parentElement.clientWidth + 1)
                .map(e => "table: " + e.innerText.slice(0, 60)),
              ...[...document.querySelectorAll(".md-typeset pre > code")]
                .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => "code: " + e.innerText.slice(0, 60)),
            ]"""
        )
    )


def test_nothing_scrolls_sideways(visit: Any) -> None:
    one = visit(viewport=(1280, 900))
    paths = ["", "api/norms/", "how-to/which-parameter/", "results/", "theory/adaptive-coordinates/"]
    assert {path: found for path in paths if (found := scrolling(one, path))} == {}
    one.page.set_viewport_size({"width": 390, "height": 844})
    assert [path for path in ("", "results/") if "the page" in scrolling(one, path)] == []


def test_another_host_is_refused_and_reported(chromium: Any, address: str) -> None:
    page = chromium.new_page()
    one = Visit(page, address)
    one.goto("")
    assert page.evaluate("fetch('https://example.org/').then(() => 'reached', () => 'refused')") == "refused"
    assert "asked another host: https://example.org/" in one.troubles
    page.close()
