"""What a run found, for users: a table of what they type beside normopt's default. It writes all files of a run too."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.grid import Grid
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


def users(results: Results) -> Grid:
    """The users' table: under each family what is typed, with a cell for each model."""
    cases = tables(results)
    models = [*sizes(cases)]
    rows = []
    for family in dict.fromkeys(case.group for case in cases):
        mine = [case for case in cases if case.group == family]
        rows.append([f"**{family}**", *("" for _ in models)])
        for code in dict.fromkeys(e.optimizer for case in mine for e in case.entries):
            cells = {case.model: cell(case, e) for case in mine for e in case.entries if e.optimizer == code}
            rows.append([f"`{code}`", *(cells.get(model, "–") for model in models)])
    return Grid(["ms per step (× normopt's)", *models], rows)


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


def memory(results: Results) -> Grid:
    """The table of memory."""
    titles = ("optimizer", "model", "state, bytes a parameter", "peak, × the weights")
    rows = [(f"`{h.optimizer}`", h.model, f"{h.state:.2f}", f"{h.peak:.2f}") for h in results.held]
    return Grid(titles, rows, left=2)


def shares(results: Results) -> Grid:
    """The table of what part of a training step the optimizer's is."""
    cases = [case for case in results.cases if case.part == "share"]
    rows = []
    for code in dict.fromkeys(e.optimizer for case in cases for e in case.entries if e is not case.reference):
        found = [(case, case.entry(code, OWN)) for case in cases]
        rows.append([f"`{code}`", *("–" if e is None else str(share.percent(case, e)) for case, e in found)])
    return Grid(["optimizer", *(f"{case.model}, {case.parameters:,} parameters" for case in cases)], rows)


def growth(results: Results) -> Grid:
    """The table of how the time grows with the number and with the size of tensors."""
    cases = [case for case in results.cases if case.part == "growth"]
    codes = dict.fromkeys(e.optimizer for case in cases for e in case.entries)
    rows = []
    for case in cases:
        seconds = {e.optimizer: median(e.seconds) for e in case.entries}
        rows.append([case.model, *(digits(1000 * seconds[code]) if code in seconds else "–" for code in codes)])
    return Grid(["size", *(f"`{code}`" for code in codes)], rows)


def markdown(results: Results, pictures: Mapping[str, str]) -> str:
    """The users' page, with the pictures at these addresses."""
    parts, cases = ["# Speed"], tables(results)
    if cases:
        first = cases[0]
        threads = f", on {first.threads} thread{'' if first.threads == 1 else 's'}" if first.device == "cpu" else ""
        how = HOW.format(dtype=first.dtype, threads=threads, rounds=results.rounds)
        about = "; ".join(f"{model}: {size}" for model, size in sizes(cases).items())
        parts += [slower(results), users(results).markdown]
        parts += [textwrap.fill(text, 120) for text in (how, f"{about}. {MUONS}")]
    parts += [report.described(results.machine), *report.told(results)]
    parts += [line for case in cases for line in report.failures(case)]
    if (grown := growth(results)).rows:
        drawn = {name.replace("-", " "): address for name, address in pictures.items() if name.startswith("by-")}
        parts += ["## How the cost grows", GROWTH]
        parts += [f"![Times of steps {name}]({address})" for name, address in drawn.items()]
        parts.append(grown.markdown)
    if (held := memory(results)).rows:
        parts += ["## Memory", MEMORY, held.markdown]
    parts += [f"The memory of {name} was not measured: {why}." for name, why in results.unheld.items()]
    if (shared := shares(results)).rows:
        parts += ["## Share of a training step", SHARE, shared.markdown]
    parts += [line for case in results.cases if case.part == "share" for line in report.failures(case)]
    return "\n\n".join([*parts, LIMITS]) + "\n"


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
