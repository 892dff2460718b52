"""The machinery of the speed program. Nothing here asserts how fast anything is."""

from __future__ import annotations

import gc
import math
from itertools import pairwise
from statistics import median

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import normopt
from benchmarks.cli import app
from benchmarks.speed import asked, candidates, measure, plot, records, report, run, startup
from benchmarks.speed.limit import Copy, Loop
from benchmarks.speed.measure import Entrant, take_turns
from benchmarks.speed.models import MODELS, SWEEP, TINY, Model, Tensors, fits, resnet18
from benchmarks.speed.records import Case, Entry, Machine, Ratio, Results, Startup, ratio
from benchmarks.vision import allow_torchvision_import

CPU = torch.device("cpu")
SMALL = Model("small", ((30, 20), (20,), (7,)))
ROUNDS = 8


@pytest.fixture(scope="module")
def case() -> Case:
    """A very small model, stepped by some of each kind."""
    names = {
        ("normopt p = 3", "for-loop"),
        ("normopt p = 3", "fused"),
        ("torch SGD", "fused"),
        ("torch AdamW", "foreach"),
    }
    some = [c for c in candidates.candidates(SMALL) if (c.optimizer, c.backend) in names]
    return measure.measure(SMALL, some, rounds=ROUNDS, dtype=torch.float32, device=CPU)


def entry(optimizer: str, seconds: list[float], backend: str = "fused", streams: float = 5, **more) -> Entry:
    return Entry(optimizer=optimizer, backend=backend, streams=streams, first=0.5, seconds=seconds, **more)


def made_up(entries: list[Entry], **more) -> Case:
    about = dict(model="resnet18", sweep=None, tensors=62, parameters=1000, dtype="float32", device="cpu", threads=1)
    return Case(**{**about, "fresh": False, "entries": entries, "failed": {}, **more})


def results_of(*cases: Case, **more) -> Results:
    machine = Machine(cpu="a CPU", cores=2, system="Linux", python="3.11", packages={"torch": "2.13"}, device="cpu")
    return Results(
        **{"machine": machine, "rounds": ROUNDS, "absent": [], "too_large": [], "startup": [], **more}, cases=cases
    )


# Models


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("resnet18", 62, 11_689_512),
        ("gpt2", 148, 124_439_808),
        ("tiny1000", 1000, 1_000_000),
        ("one100m", 1, 100_000_000),
        ("polar", 72, 24 * 256**2 + 48 * 128 * 512),
    ],
)
def test_models_have_their_sizes(name, tensors, parameters):
    assert (MODELS[name].tensors, MODELS[name].parameters) == (tensors, parameters)


def test_resnet18_is_torchvisions():
    allow_torchvision_import()
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    assert [*resnet18()] == [tuple(p.shape) for p in model.parameters()]


def test_sweeps_vary_one_thing():
    by_tensors = [m for m in SWEEP if m.sweep == "tensors"]
    assert [m.tensors for m in by_tensors] == [10, 30, 100, 300, 1000, 3000, 10_000]
    assert all(0.99 * 10_000_000 <= m.parameters <= 10_000_000 for m in by_tensors)
    by_size = [m for m in SWEEP if m.sweep == "parameters"]
    assert [m.parameters for m in by_size] == [n * 1_000_000 for n in (1, 3, 10, 30, 100, 300, 500)]
    assert {m.tensors for m in by_size} == {100}


def test_a_model_larger_than_the_memory_does_not_fit():
    assert fits(SMALL, torch.float32, CPU)
    assert not fits(Model("huge", ((10**9, 10**9),)), torch.float32, CPU) or not records.Path("/proc/meminfo").exists()


def test_renewed_gradients_are_equal_and_elsewhere():
    tensors = Tensors(SMALL, torch.float32, CPU)
    before = [(w.grad.data_ptr(), w.grad) for w in tensors.weights]
    tensors.renew()
    for w, (address, gradient) in zip(tensors.weights, before, strict=True):
        assert w.grad.data_ptr() != address
        assert torch.equal(w.grad, gradient)


def test_all_optimizers_share_one_state():
    tensors = Tensors(SMALL, torch.float32, CPU)
    for optimizer, key in (
        (torch.optim.SGD(tensors.weights, momentum=0.9), "momentum_buffer"),
        (normopt.LPSGDM(tensors.weights, fused=True), "momentum_buffer"),
        (torch.optim.AdamW(tensors.weights), "exp_avg"),
    ):
        optimizer.step()
        tensors.adopt(optimizer)
        for buffer in tensors.buffers[0]:
            buffer.zero_()
        optimizer.step()
        assert all((buffer != 0).all() for buffer in tensors.buffers[0])
        assert [optimizer.state[w][key].data_ptr() for w in tensors.weights] == [
            b.data_ptr() for b in tensors.buffers[0]
        ]
    assert optimizer.state[tensors.weights[0]]["exp_avg_sq"] is tensors.buffers[1][0]


# The limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_loop_is_sgd_of_a_moving_average(dtype):
    tensors = Tensors(Model("uneven", ((5000,), (3, 3), (1,))), dtype, CPU)
    loop = Loop(tensors)
    loop.step()
    for g, m in zip(tensors.gradients, tensors.buffers[0], strict=True):
        torch.testing.assert_close(m, 0.1 * g)
    tensors.renew()
    loop.refresh()
    tensors.gradients[0].zero_()
    loop.step()
    torch.testing.assert_close(tensors.buffers[0][1], 0.19 * tensors.gradients[1])
    assert (tensors.buffers[0][0].abs() <= 0.1).all()


def test_the_copy_moves_as_many_bytes_as_five_streams():
    tensors = Tensors(SMALL, torch.float32, CPU)
    copy = Copy(tensors)
    copy.step()
    assert 2 * copy.source.numel() == 5 * 4 * SMALL.parameters
    assert torch.equal(copy.source, copy.target)


# Turns


def test_every_round_runs_each_once_in_another_order():
    ran: list[str] = []
    entrants = [Entrant(name, "", lambda name=name: ran.append(name), 5, 0.0) for name in "abc"]

    def clock(step):
        step()
        return float(len(ran))

    take_turns(entrants, 4, clock, before=lambda: ran.append("|"))
    assert "".join(ran) == "|abc|bac|cab|acb"
    assert [len(e.seconds) for e in entrants] == [4, 4, 4]
    assert entrants[0].seconds == [2, 7, 11, 14]


@pytest.mark.parametrize("n", [1, 2, 6, 7])
def test_nobody_always_follows_the_same(n):
    ran: list[int] = []
    take_turns([Entrant(str(i), "", lambda i=i: ran.append(i), 5, 0.0) for i in range(n)], 4 * n, measure.on_cpu)
    rounds = [ran[i : i + n] for i in range(0, len(ran), n)]
    assert all(sorted(order) == [*range(n)] for order in rounds)
    assert {order[0] for order in rounds} == {*range(n)}
    if n > 2:
        pairs = {pair for order in rounds for pair in pairwise(order)}
        assert all(len({a for a, b in pairs if b == i}) > 1 for i in range(n))


def test_no_garbage_is_collected_in_a_round():
    seen = []
    take_turns([Entrant("a", "", lambda: seen.append(gc.isenabled()), 5, 0.0)], 2, measure.on_cpu)
    assert seen == [False, False]
    assert gc.isenabled()


def test_a_measured_case(case):
    assert case.reference.optimizer == "limit"
    assert [(e.optimizer, e.backend) for e in case.entries[1:]] == [
        ("normopt p = 3", "for-loop"),
        ("normopt p = 3", "fused"),
        ("torch AdamW", "foreach"),
        ("torch SGD", "fused"),
    ]
    assert all(len(e.seconds) == ROUNDS and min(e.seconds) > 0 and e.first > 0 for e in case.entries)
    assert case.failed == {}


def test_threads_are_set_and_set_back():
    before = torch.get_num_threads()
    with measure.threads_set(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_candidate_that_fails_is_told_and_left_out():
    def refuse(params):
        raise ValueError("not today\nnor tomorrow")

    case = measure.measure(
        SMALL, [candidates.Candidate("bad", "fused", refuse)], rounds=1, dtype=torch.float32, device=CPU, fresh=True
    )
    assert case.failed == {"bad, fused": "ValueError: not today"}
    assert [e.optimizer for e in case.entries] == ["limit"]
    assert report.failures(case) == ["small, fresh gradients, 1 thread: bad, fused failed: ValueError: not today"]


def test_matrices_are_paired_with_torchs_muon():
    small = Model("polar", ((8, 8), (4, 16)))
    case = measure.measure(small, candidates.candidates(small), rounds=2, dtype=torch.float32, device=CPU)
    assert [(e.optimizer, e.backend) for e in case.entries[-2:]] == [
        ("normopt Muon", "bfloat16"),
        ("normopt Muon", "float32"),
    ]
    if hasattr(torch.optim, "Muon"):
        assert case.reference.optimizer == candidates.TORCH_MUON


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_without_cuda_a_graph_is_refused_and_nothing_is_launched():
    with pytest.raises((RuntimeError, AssertionError)):
        measure.graph_of(lambda: None)
    assert measure.launches(lambda: torch.ones(3).add_(1)) == 0


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("cudaLaunchKernel", True),
        ("cudaLaunchKernelExC", True),
        ("cuLaunchKernelEx", True),
        ("cudaMemcpyAsync", True),
        ("cudaMemsetAsync", True),
        ("cudaGraphLaunch", True),
        ("cudaStreamSynchronize", False),
        ("Memcpy DtoD (Device -> Device)", False),  # what the call did on the device, counted already
        ("aten::add_", False),
    ],
)
def test_what_counts_as_a_launch(name, counts):
    assert bool(measure.LAUNCH.fullmatch(name)) == counts


def test_a_copys_bandwidth_is_in_bytes_per_second():
    assert 1e6 < measure.copied(CPU, size=1 << 20, times=3) < 1e13


# Ratios


def test_a_ratio_is_paired_round_by_round():
    drift = np.geomspace(1, 50, 41)
    noise = np.random.default_rng(0).lognormal(sigma=0.01, size=41)
    r = ratio(entry("a", list(1.2 * drift * noise)), entry("b", list(drift)))
    assert r.median == pytest.approx(1.2, rel=0.01)  # the machine slowed down fifty times, and it does not show
    low, high = r.interval
    assert 1.19 < low < r.median < high < 1.21


def test_the_interval_is_of_order_statistics():
    seconds = [float(i) for i in range(1, 31)]
    r = ratio(entry("a", seconds), entry("b", [1.0] * 30))
    assert (r.median, r.interval) == (15.5, (10.0, 21.0))  # the textbook's ranks for n = 30
    assert ratio(entry("a", seconds[:6]), entry("b", [1.0] * 6)).interval == (1, 6)
    assert ratio(entry("a", seconds[:5]), entry("b", [1.0] * 5)).interval is None


def test_the_interval_covers_the_true_median():
    rng = np.random.default_rng(1)
    one = entry("b", [1.0] * 20)
    intervals = [ratio(entry("a", list(rng.exponential(size=20))), one).interval for _ in range(500)]
    covered = np.mean([low <= math.log(2) <= high for low, high in intervals])
    assert 0.94 < covered <= 1


def test_ratios_turn_and_scale_with_their_interval():
    r = Ratio(2.0, (1.0, 4.0))
    assert r.inverse() == Ratio(0.5, (0.25, 1.0))
    assert r.times(3) == Ratio(6.0, (3.0, 12.0))
    assert str(r) == "2.00 (1.00–4.00)"
    assert str(Ratio(2.0, None).times(2).inverse()) == "0.25"


def test_quartiles():
    assert records.quartiles(entry("a", [5.0, 1.0, 4.0, 2.0, 3.0])) == (2, 3, 4)


# What was asked


def test_promises_on_a_cpu():
    ones = [1.0] * ROUNDS
    fused = {"normopt p = 2": 1.0, "normopt p = 3": 1.1, "normopt p = ∞": 1.2, "normopt p = 2.7": 1.6}
    fused |= {"normopt dual p = 2.7": 1.9, "normopt dual p = ∞": 1.8, candidates.DRESSED: 2.1}
    fused |= {candidates.ADAMW: 1.3, candidates.ADAMW_L1: 1.9, candidates.ADAMW_LP: 2.5, "torch AdamW": 1.25}
    large = made_up([entry("limit", ones, "loop"), *(entry(n, [x] * ROUNDS) for n, x in fused.items())])
    tiny = made_up(
        [entry("limit", ones, "loop"), entry("normopt p = 2", [3.0] * ROUNDS), entry("torch SGD", [8.0] * ROUNDS)],
        model=TINY,
    )
    muon = made_up(
        [entry("torch Muon", ones, candidates.OWN), entry("normopt Muon", [0.5] * ROUNDS, "bfloat16")], model="polar"
    )
    first = Startup(rule="normopt p = 3", device="cpu", compiler="numba", importing=0.3, cold=2.0, cached=0.6)
    found = asked.lines(results_of(large, tiny, tiny.model_copy(update={"fresh": True}), muon, startup=[first]))
    assert [(line.asked, line.measured.partition(" ")[0], line.met) for line in found] == [
        ("≤ 1.15 × the limit", "1.20", "no"),
        ("≤ 1.6 × the limit", "1.60", "yes, uncertain"),
        ("≤ 2 × the limit", "1.90", "yes"),
        ("≤ 2 × the limit", "2.10", "no"),
        ("≤ 1.1 × torch AdamW, fused", "1.04", "yes"),
        ("≤ 1.5 × torch AdamW, fused", "1.52", "no"),
        ("≤ 1.9 × torch AdamW, fused", "2.00", "no"),
        ("≤ 0.4 × torch SGD, fused", "0.38", "yes"),
        ("≤ 0.8 × torch SGD, fused", "0.38", "yes"),
        ("≤ 1 × torch Muon, as it comes", "0.50", "yes"),
        ("≤ 5 s", "2.00", "yes"),
        ("≤ 0.5 s", "0.60", "no"),
    ]
    assert found[0].what == "resnet18, 1 thread: normopt p = ∞, fused, slowest of 3"
    assert "import numba: 0.30 s" in found[-1].measured


def test_promises_on_cuda():
    def of(model, peer):
        entries = [
            entry("limit", [1.0] * ROUNDS, "copy"),
            entry("normopt p = 3", [1.1] * ROUNDS, launches=1),
            entry("normopt dual p = ∞", [1.5] * ROUNDS, streams=6, launches=3),
            entry("torch SGD", [1.2] * ROUNDS),
            entry("torch SGD", [3.0] * ROUNDS, "foreach"),
            entry(f"{peer} Lion", [2.0] * ROUNDS, candidates.OWN),
        ]
        return made_up(entries, model=model, device="cuda")

    found = asked.lines(results_of(of("gpt2", "torch-optimi"), of(TINY, "torch-optimi")))
    assert [(line.asked, line.measured.partition(" ")[0], line.met) for line in found] == [
        ("≥ 85 %", "90.91", "yes"),
        ("≥ 75 %", "80.00", "yes"),
        ("≤ 1 × torch SGD, fused", "0.92", "yes"),
        ("≤ 1 × torch SGD, foreach", "0.37", "yes"),
        ("≤ 5", "3", "yes"),
        ("≤ 1 × torch SGD, fused", "0.92", "yes"),
        ("≤ 1 × torch SGD, foreach", "0.37", "yes"),
        ("≤ 0.5 × torch-optimi Lion, as it comes", "0.55", "no"),
        ("≤ 5", "3", "yes"),
    ]


def test_no_promise_is_told_of_what_was_not_run():
    limit = entry("limit", [1.0] * ROUNDS, "loop")
    step = entry("normopt p = 3", [1.0] * ROUNDS)
    assert asked.lines(results_of(made_up([limit]), made_up([limit, step], dtype="bfloat16"))) == []
    assert asked.lines(results_of(made_up([limit, step], sweep="tensors"))) == []
    assert report.promises(results_of()) is None


# Candidates


def test_candidates_are_on_the_backends_that_they_name():
    params = Tensors(SMALL, torch.float32, CPU).weights
    everyone = candidates.candidates(SMALL, compiled=True)
    assert len({c.name for c in everyone}) == len(everyone)
    for c in everyone:
        if c.optimizer.startswith("normopt"):
            assert f"on {c.backend} (" in c.make(params).backend()
        if c.optimizer.startswith("torch ") and c.backend == "fused":
            assert c.make(params).param_groups[0]["fused"]
    assert [c.optimizer for c in everyone if c.backend == "compiled"] == ["torch SGD", "torch AdamW"]
    swept = candidates.candidates(SWEEP[0])
    assert {(c.optimizer, c.backend) for c in swept} == candidates.SWEPT


def test_absent_peers_are_told(monkeypatch):
    missing = {"nobodys-package": ("a_module_that_nobody_has", {"SGD": {}})}
    monkeypatch.setattr(candidates, "PEERS", missing)
    assert candidates.absent() == ["nobodys-package"]
    assert not [c for c in candidates.candidates(SMALL) if c.backend == candidates.OWN]
    assert report.told(results_of(absent=candidates.absent())) == [
        "Not installed, and so not measured: nobodys-package."
    ]


# What is written


def test_results_survive_json_and_a_page_is_made_of_them(case, tmp_path):
    results = results_of(case, absent=["a-peer"], too_large=["gpt2"])
    path = report.write(results, tmp_path)
    assert report.read(tmp_path) == results
    page = report.page(report.read(tmp_path), tmp_path / "docs" / "speed.md")
    for written, picture in ((path, "speed-small.svg"), (page, "assets/speed-small.svg")):
        text = written.read_text(encoding="utf-8")
        assert f"]({picture})" in text
        assert (written.parent / picture).read_text(encoding="utf-8").startswith("<?xml")
        assert "Not installed, and so not measured: a-peer." in text
        assert "Too large for the memory that was free: gpt2." in text
        shown = report.digits(1000 * median(case.entries[1].seconds))
        assert f"| normopt p = 3 | for-loop | {shown} (" in text
        assert case.moved(case.entry("torch AdamW", "foreach")) == 28


@pytest.mark.parametrize(
    ("x", "text"), [(0.012345, "0.0123"), (1.0, "1.00"), (18.04, "18.0"), (287.4, "287"), (1680.0, "1,680"), (0.0, "0")]
)
def test_numbers_have_three_digits(x, text):
    assert report.digits(x) == text


def test_a_picture_of_a_sweep_has_a_line_for_each_candidate():
    entries = [entry("limit", [1.0] * ROUNDS, "loop"), entry("normopt p = 3", [2.0] * ROUNDS)]
    cases = [made_up(entries, model=m.name, sweep=m.sweep, tensors=m.tensors, parameters=m.parameters) for m in SWEEP]
    assert [*plot.pictures(results_of(*cases))] == ["by-tensors", "by-parameters"]


@pytest.fixture
def small_default(monkeypatch):
    monkeypatch.setitem(MODELS, "small", SMALL)
    monkeypatch.setattr(run, "startup", lambda rule, device: pytest.fail("no first steps were asked for"))


@pytest.mark.exhaustive
def test_the_command_from_end_to_end(small_default, tmp_path):
    out = tmp_path / "speed"
    arguments = ["speed", "--model", "small", "--threads", "1", "--rounds", "2", "--out", str(out), "--no-startup"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "small, 1 thread" in done.output
    assert "What was asked" in done.output
    (only,) = report.read(out).cases
    assert len(only.entries) > 30
    assert {len(e.seconds) for e in only.entries} == {2}
    done = CliRunner().invoke(app, ["speed", "--out", str(out), "--page", str(tmp_path / "page.md")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == (out / "speed.md").read_text(encoding="utf-8").replace(
        "(speed-small.svg)", "(assets/speed-small.svg)"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "resnet19"], "resnet19"),
        (["--dtype", "int8"], "int8"),
        (["--device", "abacus"], "abacus"),
        (["--page", "page.md"], "speed.json"),
    ],
)
def test_the_command_refuses(arguments, said, tmp_path):
    done = CliRunner().invoke(app, ["speed", "--out", str(tmp_path), *arguments])
    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.exhaustive
def test_a_first_step_of_a_fresh_process():
    found = startup.startup("normopt p = 3", CPU)
    assert (found.rule, found.compiler) == ("normopt p = 3", "numba")
    assert found.cold > 0
    assert found.cached > 0
    with pytest.raises(RuntimeError, match="no rule of that name"):
        startup.startup("no rule of that name", CPU)
