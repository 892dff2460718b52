"""The gallery: what it says of every norm is so, and a norm of your own is drawn, checked and run like ours."""

from __future__ import annotations

import inspect
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import normopt
from benchmarks.optimizers import check as check_settings
from benchmarks.optimizers import find
from normopt.norms import Lp, TensorNorm, list_norms
from tests.test_docs import python_of

ROOT = Path(__file__).parents[1]
# ‖x‖ and ‖g‖⋆ as the cards have them in words, of a matrix.
IN_WORDS = {
    "l1": (lambda x: x.abs().sum(), lambda g: g.abs().max()),
    "l2": (lambda x: x.norm(), lambda g: g.norm()),
    "linf": (lambda x: x.abs().max(), lambda g: g.abs().sum()),
    "lp": (lambda x: x.norm(p=3), lambda g: g.norm(p=1.5)),
    "nuclear": (lambda x: svd(x).sum(), lambda g: svd(g).max()),
    "frobenius": (lambda x: x.norm(), lambda g: g.norm()),
    "spectral": (lambda x: svd(x).max(), lambda g: svd(g).sum()),
    "schatten": (lambda x: svd(x).norm(p=3), lambda g: svd(g).norm(p=1.5)),
    "row": (lambda x: x.norm(dim=1).max(), lambda g: g.norm(dim=1).sum()),
    "column": (lambda x: x.norm(dim=0).max(), lambda g: g.norm(dim=0).sum()),
    "max-row": (lambda x: x.abs().sum(1).max(), lambda g: g.abs().amax(1).sum()),
    "max": (lambda x: x.abs().max(), lambda g: g.abs().sum()),
    "mixed": (lambda x: x.norm(dim=1).norm(p=1.5), lambda g: g.norm(dim=1).norm(p=3)),
}


def svd(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(x)


@pytest.fixture
def gallery(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "docs/hooks"))
    import gallery

    return gallery


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, registries: None) -> dict[str, Any]:
    """Run the code blocks of docs/contributing.md and return their names; what they register is removed afterwards."""
    module = ModuleType("my_norms")
    monkeypatch.setitem(sys.modules, "my_norms", module)  # dataclasses look their module up, and so does the ablation
    exec(compile(python_of(ROOT / "docs/contributing.md"), "contributing.md", "exec"), module.__dict__)
    return module.__dict__


def test_the_words_of_the_cards(gallery):
    assert set(gallery.WORDS) == set(gallery.ours()) == set(IN_WORDS)
    x = gallery.matrix()
    for name, (size, dual) in IN_WORDS.items():
        norm = gallery.example(name)
        torch.testing.assert_close(norm.norm(x), size(x), msg=name)
        torch.testing.assert_close(norm.dual_norm(x), dual(x), msg=name)


def test_a_vector_is_shown_a_ball_and_a_matrix_its_map(gallery):
    seen = {name for name in gallery.ours() if gallery.sees_the_shape(gallery.example(name))}
    assert seen == {"column", "max-row", "mixed", "nuclear", "row", "schatten", "spectral"}


def test_the_metrics_are_drawn_by_a_norm_and_its_dual_map(gallery):
    metrics = gallery.metrics()
    assert list(metrics) == ["metric-1", "metric-2", "metric-4", "metric-inf", "metric-row", "metric-spectral"]
    for norm, words, _ in metrics.values():
        ball = words.startswith("The unit ball")
        for g in torch.randn(20, *((2,) if ball else (5, 7)), dtype=torch.float64):
            d = norm.dual_map(g)
            torch.testing.assert_close(norm.norm(d), torch.ones_like(norm.norm(d)))
            torch.testing.assert_close((g * d).sum(), norm.dual_norm(g))
        # P = |g| at β = 0
        g = torch.tensor([0.64, -2.56], dtype=torch.float64) if ball else gallery.matrix()
        torch.testing.assert_close(g.abs().sqrt(), norm.roots)
        w = torch.nn.Parameter(torch.zeros_like(g))
        w.grad = g.clone()
        rule = {"metric": "diagonal", "metric_beta": 0.0, "metric_eps": 1e-30}
        normopt.SteepestDescent([w], lr=1.0, norm=norm.inner, scale="unit", **rule).step()
        torch.testing.assert_close(0 - w.detach(), norm.dual_map(g))


def test_cards_say_who_uses_a_norm(gallery):
    used = gallery.users()
    assert "[LPSGDM][normopt.LPSGDM]" in used["lp"]
    assert "[Muon][normopt.Muon]" in used["spectral"]
    assert any("“scion”" in line for line in used["max"])
    assert set(used) <= set(list_norms())
    every = " ".join(name for names in used.values() for name in names)
    for name in normopt.list_optimizers():
        assert f"[normopt.{normopt.get_optimizer(name).__name__}]" in every
    card = gallery.norm_card("spectral", used["spectral"])
    assert "(gallery/norm-spectral.svg)" in card
    assert "sum of the singular values" in card


def test_every_norm_is_drawn_and_light(gallery):
    total = 0
    for name in gallery.ours():
        small = gallery.thumbnail(gallery.draw(gallery.example(name)))
        ElementTree.fromstring(small)
        total += len(small.encode())
    assert total < 100_000


def test_a_thumbnail_keeps_the_lines_and_drops_the_words(gallery):
    import matplotlib.pyplot as plt

    with plt.rc_context(gallery.STYLE):
        fig, ax = plt.subplots()
        ax.plot([0, 1, 2], [0, 2, 1], "o-", label="a line")
        ax.legend()
        ax.set_title("a title")
        picture = gallery.svg(fig)
    small = gallery.thumbnail(picture)
    assert len(small) < len(picture) / 3
    root = ElementTree.fromstring(small)
    ids = {e.get("id") for e in root.iter()} - {None}
    links = re.findall(r'(?:href="|url\()#([\w-]+)', small)
    assert len(links) >= 4  # three markers, and what clips the line
    assert set(links) <= ids
    assert "DejaVu" not in small
    assert root.get("viewBox") == ElementTree.fromstring(picture).get("viewBox")


def test_every_norm_of_ours_passes_the_check_that_the_page_offers(gallery, page):
    for name in gallery.ours():
        page["check_duality"](gallery.example(name))


def test_the_check_finds_what_is_wrong(page):
    right = Lp(3.0)

    class Wrong(TensorNorm):
        def __init__(self, dual_norm=right.dual_norm, dual_map=right.dual_map):
            self.dual_norm, self.dual_map = dual_norm, dual_map

        def norm(self, x):
            return right.norm(x)

    def not_the_best(x):  # consistent with itself, which is not enough
        d = Lp(2.0).dual_map(x)
        return d / right.norm(d) if d.any() else d

    page["check_duality"](Wrong())
    for wrong, message in [
        (Wrong(dual_norm=lambda x: 1.01 * right.dual_norm(x)), "not close"),
        (Wrong(dual_map=lambda x: 1.01 * right.dual_map(x)), "not close"),
        (Wrong(dual_norm=lambda x: (x * not_the_best(x)).sum(), dual_map=not_the_best), "⟨g, x⟩ >"),
        (Wrong(dual_map=lambda x: x.div_(right.dual_norm(x))), "written to"),
        (Wrong(dual_map=lambda x: x), "shares memory"),
        (Wrong(dual_map=lambda x: right.dual_map(x).flatten()[None]), "another shape"),
    ]:
        with pytest.raises(AssertionError, match=message):
            page["check_duality"](wrong)


def test_the_norm_of_the_page_has_at_most_twenty_lines_and_is_right(page):
    source = re.search(r"```python\n(from dataclasses.*?)```", (ROOT / "docs/contributing.md").read_text(), re.DOTALL)
    assert source is not None
    assert sum(bool(line.strip()) for line in source[1].splitlines()) <= 20
    x = torch.tensor([5.0, -4.0, 3.0, -2.0, 1.0])
    top = page["TopK"](share=0.5)  # k = 2.5
    assert top.dual_norm(x) == 5 + 4 + 3 / 2
    assert top.dual_map(x).tolist() == [1, -1, 0.5, 0, 0]
    assert top.norm(torch.ones(5)) == 2
    assert top.dual_map(torch.tensor([1.0, math.nan])).isnan().any()


@pytest.mark.parametrize("scale", ["unit", "dual", "matched"])
def test_the_norm_of_the_page_in_the_engine(page, scale):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(3, 4))
    w.grad = torch.randn(3, 4)
    normopt.SteepestDescent([w], lr=1.0, norm="top-k", scale=scale).step()
    norm = page["TopK"]()
    d = norm.dual_map(w.grad)
    factor = {"unit": 1.0, "dual": norm.dual_norm(w.grad), "matched": w.grad.norm() / d.norm()}[scale]
    torch.testing.assert_close(-w.detach(), factor * d)


def test_the_norm_of_the_page_is_drawn_by_the_same_code(gallery, page):
    assert not gallery.sees_the_shape(gallery.example("top-k"))
    assert gallery.draw(gallery.example("top-k")).rstrip().endswith("</svg>")
    card = gallery.norm_card("top-k", [])
    assert inspect.getdoc(page["TopK"]) in card


def test_the_norm_of_the_page_enters_an_ablation(page):
    arms = re.findall(r'--arm "([\w:-]+)( [^"]*)?"', (ROOT / "docs/contributing.md").read_text())
    assert [name for name, _ in arms] == ["signum", "my_norms:TopKDescent", "my_norms:TopKDescent"]
    for name, settings in arms:
        check_settings(name, dict.fromkeys(re.findall(r"(\w+)=", settings), 0.1))
    cls = find("my_norms:TopKDescent").cls
    ours, theirs = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    pairs = [(cls([ours], norm_share=1.0), ours), (normopt.Signum([theirs], lr=1e-3), theirs)]
    for opt, w in pairs:
        for i in range(3):
            w.grad = torch.arange(6.0).reshape(2, 3) - 2.5 + i
            opt.step()
    torch.testing.assert_close(ours, theirs)
