"""What a run found, for users: a table of what they type beside normopt's default. It writes all files of a run too."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from rich.table import Table

from benchmarks.speed import plot, report, share
from benchmarks.speed.candidates import OWN
from benchmarks.speed.records import Case, Entry, Ratio, Results, ratio
from benchmarks.speed.report import digits
from benchmarks.speed.typed import MUON, ours

JSON, USERS, CONTRIBUTORS = "speed.json", "speed.md", "contributing-speed.md"
NO_SLOWER = "No step of normopt in this table is significantly slower than another library's in the same block."
HOW = """\
Milliseconds per step; in brackets, the ratio to normopt's first line of the block: above 1 is slower than that line.
"≈" means not significantly different (the 95 % interval of the ratio contains 1). All backends are the default, except
for torch.optim's `fused=True`. lr changes before every step, as a scheduler does, and p too in LPSGDM with p = 2.7.
Gradients are new tensors at every step, as after `zero_grad()`, and were just written. A model is its list of
parameters, in {dtype}{threads}. Steps of a block are timed in turns, in another order in each of {rounds} rounds. Times
are medians, and ratios are medians of the rounds' ratios. Compilation is not included."""
MEMORY = """\
Bytes of state per parameter, and the peak memory that one step allocates in addition, as a multiple of the weights.
Only allocations by torch's allocator are counted."""
SHARE = """\
The optimizer's step in percent of a training step with forward and backward of a batch of 64; in brackets the 95 %
interval. These models are small; with larger batches the percentage is smaller. lr and p change as above."""
GROWTH = "Milliseconds per step of 10,000,000 parameters in more and more tensors, and of 100 tensors of growing size."
LIMITS = f"[Limits of speed]({CONTRIBUTORS}) compares each backend with the bandwidth of the memory."
MUONS = "Muon steps only matrices, without embeddings; models with few matrices, or with too many, are left out."


def slower(results: Results) -> str:
    """Which steps of normopt's take longer than a peer's of the same block, each with the worst, as a list."""
    found: dict[str, list[tuple[Ratio, Case, Entry]]] = {}
    for case in tables(results):
        for mine in (e for e in case.entries if ours(e.optimizer)):
            for peer in (e for e in case.entries if not ours(e.optimizer)):
                r = ratio(mine, peer)
                if (r.interval[0] if r.interval else r.median) > 1:
                    found.setdefault(mine.optimizer, []).append((r, case, peer))
    told = []
    for code, those in found.items():
        r, case, peer = max(those, key=lambda one: one[0].median)
        models = ", ".join(dict.fromkeys(case.model for _, case, _ in those))
        told.append(f"- `{code}` on {models}: up to {r} times as long as `{peer.optimizer}` (on {case.model}).")
    return "\n".join(["Slower than another library in the same block:\n", *told]) if told else NO_SLOWER


def tables(results: Results) -> list[Case]:
    """The cases of the users' table."""
    return [case for case in results.cases if case.part == "table"]


def rows(cases: Sequence[Case], models: Sequence[str]) -> Iterable[tuple[str, list[str]]]:
    """What is typed, or a family, with its cell for each model."""
    for family in dict.fromkeys(case.group for case in cases):
        mine = [case for case in cases if case.group == family]
        yield family, [""] * len(models)
        for code in dict.fromkeys(e.optimizer for case in mine for e in case.entries):
            found = {case.model: (case, e) for case in mine for e in case.entries if e.optimizer == code}
            yield code, [cell(*found[model]) if model in found else "–" for model in models]


def cell(case: Case, entry: Entry) -> str:
    """Milliseconds, and in brackets how many times the reference's."""
    r = ratio(entry, case.reference)
    unsure = r.interval is not None and r.interval[0] <= 1 <= r.interval[1]
    times = "1" if entry is case.reference else f"{'≈ ' if unsure else ''}{r.median:.2f}"
    return f"{digits(1000 * median(entry.seconds))} ({times})"


def sizes(cases: Sequence[Case]) -> dict[str, str]:
    """The models, each with its size, Muon's share of it aside."""
    whole = {case.model: case for case in cases if case.group != MUON}
    return {model: f"{case.tensors:,} tensors, {case.parameters:,} parameters" for model, case in whole.items()}


def terminal(results: Results) -> Table | None:
    """The users' table for a terminal; None if it was not measured."""
    cases = tables(results)
    models = [*sizes(cases)]
    titles = [("ms per step (× normopt's)", True), *((model, False) for model in models)]
    found = [[name, *cells] for name, cells in rows(cases, models)]
    return report.framed(titles, found, slower(results).replace("`", "")) if cases else None


def markdown(results: Results, pictures: Mapping[str, str]) -> str:
    """The users' page, with the pictures at these addresses."""
    parts = ["# Speed", *_typed(results), *_growth(results, pictures), *_held(results), *_shared(results)]
    return "\n\n".join([*parts, LIMITS]) + "\n"


def _typed(results: Results) -> Iterable[str]:
    cases = tables(results)
    if cases:
        models = [*sizes(cases)]
        first = cases[0]
        threads = f", on {first.threads} thread{'' if first.threads == 1 else 's'}" if first.device == "cpu" else ""
        yield slower(results)
        yield report.table(
            [("ms per step (× normopt's)", True), *((model, False) for model in models)],
            ([f"`{name}`" if any(cells) else f"**{name}**", *cells] for name, cells in rows(cases, models)),
        )
        yield textwrap.fill(HOW.format(dtype=first.dtype, threads=threads, rounds=results.rounds), 120)
        about = "; ".join(f"{model}: {size}" for model, size in sizes(cases).items())
        yield textwrap.fill(f"{about}. {MUONS}", 120)
    yield report.described(results.machine)
    yield from (*report.told(results), *(line for case in cases for line in report.failures(case)))


def _growth(results: Results, pictures: Mapping[str, str]) -> Iterable[str]:
    cases = [case for case in results.cases if case.part == "growth"]
    if cases:
        yield "## How the cost grows"
        yield GROWTH
        for name, address in pictures.items():
            if name.startswith("by-"):
                yield f"![Times of steps {name.replace('-', ' ')}]({address})"
        codes = dict.fromkeys(e.optimizer for case in cases for e in case.entries)
        titles = [("size", True), *((f"`{code}`", False) for code in codes)]
        entries = [(case, {e.optimizer: e for e in case.entries}) for case in cases]
        yield report.table(
            titles,
            (
                [case.model, *(digits(1000 * median(by[code].seconds)) if code in by else "–" for code in codes)]
                for case, by in entries
            ),
        )


def memory(results: Results) -> Table | None:
    """The table of memory for a terminal; None if it was not measured."""
    return report.framed(HELD, _rows_held(results, ""), "Memory") if results.held else None


HELD = (("optimizer", True), ("model", True), ("state, bytes a parameter", False), ("peak, × the weights", False))


def _rows_held(results: Results, quote: str) -> list[list[str]]:
    return [[f"{quote}{h.optimizer}{quote}", h.model, f"{h.state:.2f}", f"{h.peak:.2f}"] for h in results.held]


def _held(results: Results) -> Iterable[str]:
    if results.held:
        yield from ("## Memory", MEMORY, report.table(HELD, _rows_held(results, "`")))
    yield from (f"The memory of {name} was not measured: {why}." for name, why in results.unheld.items())


def shares(results: Results) -> Table | None:
    """The table of shares for a terminal; None if they were not measured."""
    titles, rows = _rows_shared(results, "")
    return report.framed(titles, rows, "Percent of a training step") if rows else None


def _rows_shared(results: Results, quote: str) -> tuple[list[tuple[str, bool]], list[list[str]]]:
    cases = [case for case in results.cases if case.part == "share"]
    codes = dict.fromkeys(e.optimizer for case in cases for e in case.entries if e is not case.reference)
    rows = []
    for code in codes:
        found = [(case, case.entry(code, OWN)) for case in cases]
        rows.append(
            [f"{quote}{code}{quote}", *("–" if e is None else str(share.percent(case, e)) for case, e in found)]
        )
    return [("optimizer", True), *((f"{case.model}, {case.parameters:,} parameters", False) for case in cases)], rows


def _shared(results: Results) -> Iterable[str]:
    titles, rows = _rows_shared(results, "`")
    if rows:
        yield from ("## Share of a training step", SHARE, report.table(titles, rows))
    yield from (line for case in results.cases if case.part == "share" for line in report.failures(case))


def write(results: Results, folder: Path) -> None:
    """Write speed.json, both pages and the pictures into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).write_text(results.model_dump_json(), encoding="utf-8")
    _write(results, folder / USERS, folder)


def publish(results: Results, path: Path) -> None:
    """Write the users' page of the docs, the contributors' beside it, and their pictures into the folder ``assets``."""
    _write(results, path, path.parent / "assets")


def read(folder: Path) -> Results:
    """What `write` wrote."""
    return Results.model_validate_json((folder / JSON).read_text(encoding="utf-8"))


def _write(results: Results, path: Path, pictures: Path) -> None:
    pictures.mkdir(parents=True, exist_ok=True)
    addresses = {}
    for name, svg in plot.pictures(results).items():
        (pictures / f"speed-{name}.svg").write_text(svg, encoding="utf-8")
        addresses[name] = (pictures / f"speed-{name}.svg").relative_to(path.parent).as_posix()
    path.write_text(markdown(results, addresses), encoding="utf-8")
    path.with_name(CONTRIBUTORS).write_text(report.markdown(results, addresses), encoding="utf-8")
