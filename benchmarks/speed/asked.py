"""The goals of speed, beside what was measured: a line for each goal whose cases were run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import NamedTuple

from benchmarks.speed.candidates import (
    ADAMW,
    ADAMW_L1,
    ADAMW_LP,
    DRESSED,
    DUAL,
    GENERAL,
    OWN,
    PLAIN,
    TORCH_ADAMW,
    TORCH_MUON,
    TORCH_SGD,
)
from benchmarks.speed.limit import STREAMS
from benchmarks.speed.models import MATRICES, TINY
from benchmarks.speed.records import Case, Entry, Ratio, Results, ratio
from benchmarks.speed.typed import PACKAGES

ELEMENTWISE = (*PLAIN, GENERAL)


class Line(NamedTuple):
    """One promise."""

    what: str
    asked: str
    measured: str
    met: str


def lines(results: Results) -> list[Line]:
    """Every promise that the results have the numbers for."""
    found = [line for case in results.cases if case.part == "limits" for line in _of_case(case)]
    for s in results.startup:
        if s.device == "cpu":
            beside = f" (import {s.compiler}: {s.importing:.2f} s)"
            for name, seconds, most in (("cold", s.cold, 5), ("from the cache", s.cached, 0.5)):
                measured = f"{seconds:.2f} s{beside}"
                found.append(Line(f"first step, {name}: {s.rule}", f"≤ {most} s", measured, _yes(seconds <= most)))
    return found


def _of_case(case: Case) -> Iterator[Line]:
    if case.dtype != "float32":
        return
    if case.model == MATRICES:
        yield from _worst(case, ["normopt Muon"], "bfloat16", case.entry(TORCH_MUON, OWN), 1)
    elif case.device == "cuda":
        yield from _on_cuda(case)
    elif case.model == TINY:
        for those in (PLAIN, (GENERAL,)):
            yield from _worst(case, those, "fused", case.entry(TORCH_SGD, "fused"), 0.8 if case.fresh else 0.4)
    else:
        for names, most in ((PLAIN, 1.15), ((GENERAL,), 1.6), (DUAL, 2), ((DRESSED,), 2)):
            yield from _worst(case, names, "fused", case.reference, most)
        for name, most in ((ADAMW, 1.1), (ADAMW_L1, 1.5), (ADAMW_LP, 1.9)) if case.threads == 1 else ():
            yield from _worst(case, [name], "fused", case.entry(TORCH_ADAMW, "fused"), most)


def _on_cuda(case: Case) -> Iterator[Line]:
    fused = [e for e in case.entries if e.optimizer.startswith("normopt") and e.backend == "fused"]
    if case.model == "gpt2":
        for names, least in ((PLAIN, 85), (DUAL, 75)):
            shares = [(_share(case, e), e) for e in fused if e.optimizer in names]
            for share, entry in sorted(shares, key=lambda found: found[0].median)[:1]:
                what = f"{case.title}: {_worst_of(shares, entry)}, of a copy's bandwidth"
                percent = share.times(100)
                yield Line(what, f"≥ {least} %", f"{percent} %", _met(percent, least=least))
    for backend in ("fused", "foreach"):
        yield from _worst(case, ELEMENTWISE, "fused", case.entry(TORCH_SGD, backend), 1)
    if case.model == TINY:
        for peer in case.entries:
            if peer.optimizer.startswith(tuple(PACKAGES)):
                yield from _worst(case, ELEMENTWISE, "fused", peer, 0.5)
    counted = [(e.launches, e) for e in fused if e.launches is not None]
    for n, entry in sorted(counted, key=lambda found: -found[0])[:1]:
        yield Line(f"{case.title}: {entry.optimizer}, launches a step", "≤ 5", str(n), _yes(n <= 5))


def _worst(case: Case, names: Sequence[str], backend: str, than: Entry | None, most: float) -> Iterator[Line]:
    """The slowest of some candidates, against another entry of the case."""
    entries = [case.entry(name, backend) for name in names]
    ratios = [(ratio(e, than), e) for e in entries if e is not None and than is not None]
    for r, entry in sorted(ratios, key=lambda found: -found[0].median)[:1]:
        assert than is not None
        other = f"{than.optimizer}, {than.backend}" if than.optimizer != "limit" else "the limit"
        yield Line(f"{case.title}: {_worst_of(ratios, entry)}", f"≤ {most:g} × {other}", str(r), _met(r, most=most))


def _share(case: Case, entry: Entry) -> Ratio:
    """Of the bandwidth of the reference, which a step reaches with the bytes that it has to move."""
    return ratio(entry, case.reference).inverse().times(entry.streams / STREAMS)


def _worst_of(among: Sized, entry: Entry) -> str:
    return f"{entry.optimizer}, {entry.backend}" + (f", slowest of {len(among)}" if len(among) > 1 else "")


def _met(r: Ratio, *, most: float | None = None, least: float | None = None) -> str:
    """By the median; uncertain if the bound is within its interval."""
    bound = most if least is None else least
    assert bound is not None
    met = r.median <= bound if least is None else r.median >= bound
    unsure = r.interval is None or r.interval[0] <= bound <= r.interval[1]
    return _yes(met) + (", uncertain" if unsure else "")


def _yes(met: bool) -> str:
    return "yes" if met else "no"
