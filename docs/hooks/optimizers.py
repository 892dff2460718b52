"""An MkDocs hook: what the pages in docs/optimizers/ say of settings, state and use is read off the code.

``<!-- facts -->`` becomes the table of facts, ``<!-- standing -->`` what the committed study found, and
``<!-- used in -->`` the list of tutorials and guides that make one. In docs/api/ ``<!-- classes -->`` becomes a table
of all classes.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import normopt

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

SCALES = {"unit": "unit, κ = 0", "dual": "dual, κ = 1", "power": "power, κ = 1/(p−1)", "relative": "relative, ‖w‖₂"}
RULES = {"heavy": "heavy ball", "ema": "moving average", "lion": "Lion's"}
NOT_SHOWN = {"self", "params", "settings", "norm_fields"}


def optimizer(name: str) -> type[normopt.SteepestDescent]:
    """The class of a page."""
    return normopt.SteepestDescent if name == "steepestdescent" else normopt.get_optimizer(name)


def state_bytes(cls: type[normopt.SteepestDescent], **settings: object) -> float:
    """Bytes of state for each float32 weight of a matrix, counted after two steps."""
    weight = torch.nn.Parameter(torch.ones(8, 4))
    opt = cls([weight], **settings)  # type: ignore[arg-type]
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        opt.step()
    kept = (value for value in opt.state[weight].values() if value.dim())  # not the count of steps
    return sum(value.numel() * value.element_size() for value in kept) / weight.numel()


def facts(name: str) -> str:
    """The table: what the class fixes, what it defaults to, and what it keeps."""
    cls = optimizer(name)
    group = cls([torch.nn.Parameter(torch.ones(8, 4))]).param_groups[0]
    order = "" if group["p"] is None or group["norm"] != "lp" else f", p = {group['p']:g}"
    chosen = {k.removeprefix("norm_"): v for k, v in group.items() if k.startswith("norm_") and v not in (None, "")}
    fields = [f"{field} {value}" for field, value in chosen.items()]
    rule = RULES[group["momentum_rule"]]
    momentum = f"{rule}, μ = {group['momentum']:g}" if group["momentum"] else f"none by default ({rule})"
    coordinates = {}
    if group["metric"] != "none":
        averaged = "sum" if group["metric_rule"] == "sum" else f"average (β = {group['metric_beta']:g})"
        coordinates["coordinates"] = f"{group['metric']}, the {averaged} of g², ε = {group['metric_eps']:g}"
    given = inspect.signature(cls).parameters
    own = (
        cls.__init__.__code__.co_varnames if cls is not normopt.SteepestDescent else given
    )  # what all take is elsewhere
    defaults = [f"`{k}={v.default!r}`" for k, v in given.items() if k in own and k not in NOT_SHOWN]
    rows = {
        "norm": f"`{group['norm']}`{order}" + (f" ({', '.join(fields)})" if fields else ""),
        **coordinates,
        "scale": SCALES[group["scale"]],
        "momentum": momentum,
        "state": f"{state_bytes(cls):g} bytes for a float32 weight",
        "defaults": ", ".join(defaults),
        "by name": "it is the engine itself"
        if cls is normopt.SteepestDescent
        else f'`normopt.get_optimizer("{name}")`',
    }
    return "\n".join(
        ["| | defaults, from the code |", "|---|---|", *(f"| **{key}** | {value} |" for key, value in rows.items())]
    )


def standing(name: str, docs: Path) -> str:
    """How the optimizer stands against AdamW in the study of docs/results.md, of which it must be an arm."""
    row = rf"^\| {optimizer(name).__name__} \| AdamW \| (\d)–(\d)–(\d) \| (.+?) \|"
    found = re.search(row, (docs / "results.md").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f"docs/results.md has no arm {optimizer(name).__name__} held against AdamW")
    better, worse, ties, improvement = found.groups()
    return (
        f"In [our study](../results.md) of small tasks it is significantly better than AdamW on {better} and worse on "
        f"{worse}; {ties} are ties. Its probability of improvement over AdamW, with its 95\u00a0% interval, is "
        f"{improvement}."
    )


def used_in(name: str, docs: Path) -> str:
    """Links to the pages that make one."""
    call = re.compile(rf"\b(?:normopt\.|optim=){optimizer(name).__name__}\(")
    found = []
    for path in [docs / "get-started.md", *sorted(docs.glob("tutorials/*.py")), *sorted(docs.glob("how-to/*.md"))]:
        text = path.read_text(encoding="utf-8")
        if call.search(text):
            heading = r"^# # (.+)$" if path.suffix == ".py" else r"^# (.+)$"
            title = re.search(heading, text, re.MULTILINE)
            page = path.relative_to(docs).with_suffix(".md")
            found.append(f"- [{title[1] if title else page.stem}](../{page.as_posix()})")
    return "\n".join(found or ["No tutorial or guide uses it yet."])


def classes() -> str:
    """A table of all optimizers: a link to each and the first line of its docstring."""
    every = [normopt.SteepestDescent, *(normopt.get_optimizer(name) for name in normopt.list_optimizers())]
    lines = ((cls.__name__, (inspect.getdoc(cls) or "").splitlines()[0].replace("|", "\\|")) for cls in every)
    return "\n".join(
        ["| class | what it is |", "|---|---|", *(f"| [`{n}`][normopt.{n}] | {line} |" for n, line in lines)]
    )


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is read off the code."""
    path = Path(page.file.src_uri)
    if path.as_posix() == "api/optimizers.md":
        return markdown.replace("<!-- classes -->", classes())
    if path.parent.as_posix() != "optimizers" or path.stem == "index":
        return markdown
    page.meta["search"] = {"boost": 2}  # who types a name looks for its page
    markdown = markdown.replace("<!-- facts -->", facts(path.stem))
    if "<!-- standing -->" in markdown:
        markdown = markdown.replace("<!-- standing -->", standing(path.stem, Path(config.docs_dir)))
    return markdown.replace("<!-- used in -->", used_in(path.stem, Path(config.docs_dir)))
