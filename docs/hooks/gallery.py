"""An MkDocs hook: the gallery, in which every registered norm is drawn by its own dual map.

Beside the norms it shows the figures of other pages as thumbnails. It has to run after the hooks that make those.

Your own norms are drawn by the same code, into the current folder: ``python docs/hooks/gallery.py my_module my-norm``
imports my_module, which registers them, and writes ``my-norm.svg``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import posixpath
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from torch import Tensor, nn

import normopt
from normopt.groups.presets import PRESETS
from normopt.norms import Norm, registry

sys.path.insert(0, str(Path(__file__).parent))
from style import COLOURS, GREY, STYLE, svg
from unit_balls import GRADIENT, arrow, ball

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

PAGE = "gallery.md"

# What a norm without a default for a field is drawn with; any other such field is taken to be an order.
DRAWN_AT = {"mixed": {"p_inner": 2.0, "p_outer": 1.5}}
ORDER = 3.0

# ‖x‖ and ‖g‖⋆ in words. Of a norm that is not here, the first line of its docstring is shown.
WORDS = {
    "l1": ("sum of all |x_i|", "largest |g_i|"),
    "l2": ("√ of the sum of all x_i²", "itself"),
    "linf": ("largest |x_i|", "sum of all |g_i|"),
    "lp": ("(Σ|x_i|^p)^(1/p)", "ℓq, with 1/p + 1/q = 1"),
    "nuclear": ("sum of the singular values", "largest singular value"),
    "frobenius": ("√ of the sum of all x_ij²", "itself"),
    "spectral": ("largest singular value", "sum of the singular values"),
    "schatten": ("ℓp of the singular values", "ℓq of the singular values"),
    "row": ("longest row, by ℓ2", "sum of the rows’ ℓ2 norms"),
    "column": ("longest column, by ℓ2", "sum of the columns’ ℓ2 norms"),
    "max-row": ("largest absolute row sum", "sum of the rows’ largest |g_ij|"),
    "max": ("largest |x_ij|", "sum of all |g_ij|"),
    "mixed": ("ℓp along every line, another ℓp over the lines", "the conjugate orders, inside and outside"),
}

ROOTS = torch.tensor((0.8, 1.6), dtype=torch.float64)  # √P of the balls that are drawn

# The other sections: the pages whose figures they show.
SECTIONS = {"tutorials": "tutorials/", "theory": "theory/", "speed": "speed.md"}

_cards: dict[str, list[str]] = {}  # from on_files to on_page_markdown


def example(name: str) -> Norm:
    """The norm of a name, with a value for every field that has no default."""
    entry = registry.lookup(name)
    open_fields = {f for f, default in entry.fields.items() if default is dataclasses.MISSING} - set(entry.fixed)
    return entry.cls(**entry.fixed, **{f: DRAWN_AT.get(name, {}).get(f, ORDER) for f in open_fields})


def is_ours(cls: type[Norm]) -> bool:
    """Whether a norm comes with normopt; a tutorial that the build runs may register one of its own."""
    return cls.__module__.startswith("normopt.")


def ours() -> list[str]:
    """The names of normopt's own norms."""
    return [name for name in normopt.norms.list_norms() if is_ours(registry.lookup(name).cls)]


def matrix() -> Tensor:
    """The matrix that every norm of matrices is shown: 5 × 7, two directions that dominate, and noise."""
    generator = torch.Generator().manual_seed(1)
    u, v, noise = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 2), (2, 7), (5, 7)))
    return u @ v + 0.4 * noise


def sees_the_shape(norm: Norm) -> bool:
    """Whether a matrix is another thing to this norm than the vector of its entries."""
    g = matrix()
    return not torch.allclose(norm.dual_map(g), norm.dual_map(g.flatten()).reshape(g.shape))


def draw(norm: Norm) -> str:
    """A norm as SVG text: its ball in the plane with a gradient and its dual map, or what it makes of a matrix."""
    with plt.rc_context(STYLE):
        return draw_matrices(norm) if sees_the_shape(norm) else draw_ball(norm)


def draw_ball(norm: Norm) -> str:
    """The unit ball, whose outline is what D(g) runs through as g turns: no norm has to be known for it."""
    angles = torch.linspace(0, 2 * math.pi, 241, dtype=torch.float64) + 1e-3  # on no axis, where signs are 0
    outline = torch.stack([norm.dual_map(torch.stack([a.cos(), a.sin()])) for a in angles])
    size = outline.abs().max().item()
    g = torch.tensor(GRADIENT, dtype=torch.float64)
    d = norm.dual_map(g)
    fig, ax = plt.subplots(figsize=(3.2, 2.2))
    along = torch.tensor([-g[1], g[0]], dtype=torch.float64) / g.norm() * size
    line = d + torch.tensor([[-0.8], [0.8]], dtype=torch.float64) * along  # ⟨g, ·⟩ = ‖g‖⋆
    ax.plot(*line.T.tolist(), color=GREY, lw=1, ls=(0, (4, 3)))
    ax.fill(*outline.T.tolist(), facecolor=COLOURS[0], alpha=0.14)
    ax.plot(*outline.T.tolist(), color=COLOURS[0], lw=1.6)
    arrow(ax, (g * size).tolist(), GREY, 1.4)
    arrow(ax, d.tolist(), COLOURS[0], 2.4)
    ax.set(xlim=(-1.2 * size, 1.5 * size), ylim=(-1.15 * size, 1.15 * size), aspect="equal")
    ax.axis("off")
    return svg(fig)


class InMetric(normopt.norms.TensorNorm):
    """A norm in the coordinates of P: ‖x‖_P = ‖P^½ x‖."""

    def __init__(self, norm: Norm, roots: Tensor) -> None:
        self.inner, self.roots = norm, roots

    def norm(self, x: Tensor) -> Tensor:
        return self.inner.norm(self.roots * x)

    def dual_norm(self, x: Tensor) -> Tensor:
        return self.inner.dual_norm(x / self.roots)

    def dual_map(self, x: Tensor) -> Tensor:
        return self.inner.dual_map(x / self.roots) / self.roots


def metrics() -> dict[str, tuple[Norm, str, str]]:
    """Norms in adaptive coordinates by the names of their pictures: the norm, its description and its caption."""
    known = {2.0: "[AdamW](optimizers/adamw.md)’s norm, under “dual”", math.inf: "signs divided by √P"}
    found: dict[str, tuple[Norm, str, str]] = {}
    for p in (1.0, 2.0, 4.0, math.inf):
        order = f"ℓ{p:g}".replace("inf", "∞")
        words = f"The unit ball of {order} stretched by P^−½, a gradient g and its dual map"
        caption = known.get(p, "[AdamW under another norm](tutorials/adaptive_lp.md)")
        found[f"metric-{p:g}"] = InMetric(normopt.norms.Lp(p), ROOTS), words, f"**{order}**<br>\n{caption}"
    for name in ("row", "spectral"):
        words = (
            f"A 5 × 7 matrix G, its dual map under the norm {name} in coordinates of P, and the singular values of both"
        )
        norm = InMetric(example(name), matrix().abs().sqrt())
        found[f"metric-{name}"] = norm, words, f"**“{name}”**<br>\nP = diag(|G|), as in a first step"
    return found


def draw_matrices(norm: Norm) -> str:
    """The matrix G, its dual map D(G), and the singular values of both."""
    g = matrix()
    d = norm.dual_map(g)
    fig, axes = plt.subplots(1, 3, figsize=(4.4, 2.2), width_ratios=(1, 1, 0.7))
    hinton(axes[0], g)
    hinton(axes[1], d)
    for x, colour, shift in ((g, GREY, -0.2), (d, COLOURS[0], 0.2)):
        s = torch.linalg.svdvals(x)
        axes[2].bar([i + shift for i in range(len(s))], (s / s[0]).tolist(), width=0.4, color=colour)
    axes[2].set(xticks=[], yticks=[], ylim=(0, 1.02))
    axes[2].spines["left"].set_visible(False)
    return svg(fig)


def hinton(ax: Axes, x: Tensor) -> None:
    """A matrix as squares: the area is the size of an entry, the colour its sign."""
    rows, columns = x.shape
    for sign, colour in ((1, COLOURS[0]), (-1, COLOURS[1])):
        squares = []
        for i, j in (sign * x > 1e-9 * x.abs().max()).nonzero().tolist():
            half = 0.46 * math.sqrt(abs(x[i, j].item()) / x.abs().max().item())
            corners = [(j - half, i - half), (j + half, i - half), (j + half, i + half), (j - half, i + half)]
            squares.append(Outline([*corners, corners[0]], closed=True))
        if squares:
            ax.add_patch(PathPatch(Outline.make_compound_path(*squares), color=colour, lw=0))
    ax.set(xlim=(-0.6, columns - 0.4), ylim=(rows - 0.4, -0.6), aspect="equal", xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(visible=True, linewidth=0.6)


def draw_playground() -> str:
    """Draw the path of D(g) from a corner of the diamond to a corner of the square, as p goes from 1 to ∞."""
    g = torch.tensor(GRADIENT, dtype=torch.float64)
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(3.2, 2.2))
        for p, colour in zip((1.0, 1.5, 2.0, 4.0, math.inf), COLOURS, strict=False):
            ax.plot(*ball(p), color=colour, lw=1.2)
        way = [
            normopt.norms.Lp(1 / x if x else math.inf).dual_map(g).tolist() for x in torch.linspace(1, 0, 101).tolist()
        ]
        ax.plot(*zip(*way, strict=True), color=GREY, lw=2.4)
        arrow(ax, GRADIENT, GREY, 1.4)
        ax.set(xlim=(-1.2, 1.5), ylim=(-1.15, 1.15), aspect="equal")
        ax.axis("off")
        return svg(fig)


def users() -> dict[str, list[str]]:
    """For every norm the optimizers that come with it, and the presets that give it to some layer."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in normopt.list_optimizers():
        cls = normopt.get_optimizer(name)
        found[cls([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]["norm"]].append(
            f"[{cls.__name__}][normopt.{cls.__name__}]"
        )
    presets: dict[str, list[str]] = defaultdict(list)
    for preset, kinds in PRESETS.items():
        for norm in dict.fromkeys(str(settings["norm"]) for settings in kinds.values()):
            presets[norm].append(f"“{preset}”")
    for norm, names in presets.items():
        found[norm].append(f"preset{'s' * (len(names) > 1)} {', '.join(names)}")
    return found


def norm_card(name: str, used: list[str]) -> str:
    """Return the caption of a norm's picture."""
    norm = example(name)
    made = f"[`{norm!r}`][normopt.norms.{type(norm).__name__}]" if is_ours(type(norm)) else f"`{norm!r}`"
    lines = [f"**“{name}”**", made]
    if name in WORDS:
        lines += [f"‖x‖: {WORDS[name][0]}", f"‖g‖⋆: {WORDS[name][1]}"]
    else:
        lines += [(inspect.getdoc(type(norm)) or "").partition("\n")[0]]
    if used:
        lines += ["In: " + ", ".join(used)]
    if sees_the_shape(norm):
        alt = f"A 5 × 7 matrix G, its dual map under the norm {name}, and the singular values of both"
    else:
        alt = f"The unit ball of the norm {name} in the plane, a gradient g and its dual map D(g)"
    return card(f"![{alt}](gallery/norm-{name}.svg){{ loading=lazy }}", *lines)


def card(*lines: str) -> str:
    """A picture and lines of Markdown below it, as one cell of the grid."""
    text = "<br>\n".join(lines[1:])
    return f'<div class="gallery-card" markdown>\n\n{lines[0]}\n\n{text}\n\n</div>'


def grid(cards: list[str]) -> str:
    """The cells side by side, as many in a line as there is room for."""
    return '<div class="gallery" markdown>\n\n' + "\n\n".join(cards) + "\n\n</div>"


SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
TOO_SMALL = re.compile(r"(text|legend|xtick|ytick)_")  # how matplotlib names what nobody could read on a thumbnail
NUMBER = re.compile(r"-?\d+\.\d+")


def thumbnail(picture: str) -> str:
    """An SVG of matplotlib's without words and ticks, in a third of the bytes: many of them stand on one page."""
    ElementTree.register_namespace("", SVG[1:-1])
    root = ElementTree.fromstring(picture)
    rules: dict[str, str] = {}
    names: dict[str, str] = {}

    def short(name: re.Match[str]) -> str:
        return names.setdefault(name[0], f"i{len(names)}")

    _strip(root)
    for element in root.iter():
        if element.tag == f"{SVG}style":
            continue
        element.text = element.tail = None
        for key in {"d", "x", "y"} & element.attrib.keys():  # tenths of a point are enough
            shorter = NUMBER.sub(lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), element.attrib[key])
            element.attrib[key] = re.sub(r"\s*([A-Za-z])\s*", r"\1", shorter).strip()
        if "style" in element.attrib:
            element.set("class", rules.setdefault(element.attrib.pop("style"), f"s{len(rules)}"))
        if "id" in element.attrib:
            element.set("id", re.sub(".+", short, element.attrib["id"]))
        if LINK in element.attrib:
            element.set("href", element.attrib.pop(LINK))
        for key in {"href", "clip-path"} & element.attrib.keys():
            element.set(key, re.sub(r"(?<=#)[\w-]+", short, element.attrib[key]))
    style = ElementTree.SubElement(root, f"{SVG}style")
    style.text = "".join(f".{name}{{{rule}}}" for rule, name in rules.items())
    return ElementTree.tostring(root, encoding="unicode")


def _strip(parent: ElementTree.Element) -> None:
    """Leave out what is too small to read, and groups that say nothing."""
    kept: list[ElementTree.Element] = []
    for child in list(parent):
        parent.remove(child)
        if child.tag == f"{SVG}metadata" or TOO_SMALL.match(child.get("id", "")):
            continue
        _strip(child)
        if child.tag == f"{SVG}g":
            child.attrib.pop("id", None)
            if not child.attrib:
                kept.extend(child)
                continue
        kept.append(child)
    parent.extend(kept)


def figures(files: Files, where: str) -> list[tuple[str, str, str, str]]:
    """(page, its title, alt, source) of every figure of the pages whose path begins so."""
    found = []
    for file in sorted(files.documentation_pages(), key=lambda f: f.src_uri):
        if file.src_uri.startswith(where):
            text = file.content_string
            title = re.search(r"^# (.+?)(?: *\{.*)?$", text, re.MULTILINE)
            for alt, source in re.findall(r"^!\[([^\]]*)\]\(([^)]+\.svg)\)", text, re.MULTILINE):
                path = posixpath.normpath(posixpath.join(posixpath.dirname(file.src_uri), source))
                found.append((file.src_uri, title[1] if title else file.name, alt, path))
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Draw the norms and make the thumbnails; nothing is written into docs/."""
    from mkdocs.structure.files import File

    def add(name: str, content: str) -> str:
        files.append(File.generated(config, f"gallery/{name}.svg", content=content))
        return f"gallery/{name}.svg"

    used = users()
    for name in ours():
        add(f"norm-{name}", thumbnail(draw(example(name))))
    _cards["norms"] = [norm_card(name, used[name]) for name in ours()]
    _cards["metrics"] = []
    for name, (norm, words, caption) in metrics().items():
        with plt.rc_context(STYLE):
            picture = draw_ball(norm) if words.startswith("The unit ball") else draw_matrices(norm)
        _cards["metrics"].append(card(f"![{words}]({add(name, thumbnail(picture))}){{ loading=lazy }}", caption))
    for section, where in SECTIONS.items():
        _cards[section] = []
        for page, title, alt, path in figures(files, where):
            source = files.get_file_from_path(path)
            if source is None:
                continue  # a dead link, which the build tells of where it stands
            small = add(Path(path).stem, thumbnail(source.content_string))
            _cards[section].append(
                card(f"[![{alt}]({small}){{ loading=lazy }}]({page})", f"**[{title}]({page})**", alt)
            )
    picture = add("playground", thumbnail(draw_playground()))
    said = "The path of D(g) from a corner of the diamond to a corner of the square, as p goes from 1 to ∞"
    _cards["playground"] = [
        card(f"[![{said}]({picture}){{ loading=lazy }}](playground.md)", "**[Playground](playground.md)**", said)
    ]
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Put the cards where the page asks for them: ``<!-- gallery: norms -->``."""
    if page.file.src_uri != PAGE:
        return markdown

    def cards(match: re.Match[str]) -> str:
        return grid([c for section in match[1].split() for c in _cards[section]])

    return re.sub(r"<!-- gallery: ([\w ]+) -->", cards, markdown)


def main(module: str, *names: str) -> None:
    """Draw norms of a module of your own into the current folder: those named, or else all that it registers."""
    before = set(normopt.norms.list_norms())
    sys.path.insert(0, str(Path.cwd()))
    importlib.import_module(module)
    for name in names or sorted(set(normopt.norms.list_norms()) - before):
        Path(f"{name}.svg").write_text(draw(example(name)), encoding="utf-8")
        print(f"{name}.svg")


if __name__ == "__main__":
    main(*sys.argv[1:])
