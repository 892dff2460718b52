"""The machinery of the speed program. Nothing here asserts how fast anything is."""

from __future__ import annotations

import gc
import importlib
import math
from itertools import pairwise
from statistics import median

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import normopt
from benchmarks.cli import app
from benchmarks.speed import asked, candidates, measure, memory, page, plot, records, report, run, share, startup, typed
from benchmarks.speed.limit import Copy, Loop
from benchmarks.speed.measure import Entrant, take_turns
from benchmarks.speed.models import MODELS, SWEEP, TINY, Model, Tensors, fits, resnet18, vit
from benchmarks.speed.records import Case, Entry, Held, Machine, Ratio, Results, Startup, ratio
from benchmarks.tasks import TASKS
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
    about = dict(part="limits", model="resnet18", tensors=62, parameters=1000, dtype="float32", device="cpu", threads=1)
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
        ("mlp", 6, 26_122),
        ("resnet18", 62, 11_689_512),
        ("vit-s", 152, 22_050_664),
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


def test_the_mlp_is_the_digits():
    assert [tuple(p.shape) for p in TASKS["digits"].build().parameters()] == [*MODELS["mlp"].shapes]


def test_the_vit_is_timms():
    allow_torchvision_import()
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224")
    assert [*vit()] == [tuple(p.shape) for p in model.parameters()]


def test_matrices_leave_embeddings_and_all_else_out():
    assert Model("m", ((50, 4), (4, 4), (4,), (2, 2, 3, 3), (4, 8)), embeddings=1).matrices.shapes == ((4, 4), (4, 8))
    assert MODELS["gpt2"].matrices.shapes == ((768, 2304), (768, 768), (768, 3072), (3072, 768)) * 12


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
    entrants = [Entrant(entry(name, []), lambda name=name: ran.append(name)) for name in "abc"]

    def clock(step):
        step()
        return float(len(ran))

    take_turns(entrants, 4, clock, before=lambda: ran.append("|"))
    assert "".join(ran) == "".join(f"|{name}" for name in "abcbaccabacb")
    assert [len(e.entry.seconds) for e in entrants] == [4, 4, 4]
    assert entrants[0].entry.seconds == [2, 10, 16, 20]


@pytest.mark.parametrize("n", [1, 2, 6, 7])
def test_nobody_always_follows_the_same(n):
    ran: list[int] = []
    take_turns([Entrant(entry(str(i), []), lambda i=i: ran.append(i)) for i in range(n)], 4 * n, measure.on_cpu)
    rounds = [ran[i : i + n] for i in range(0, len(ran), n)]
    assert all(sorted(order) == [*range(n)] for order in rounds)
    assert {order[0] for order in rounds} == {*range(n)}
    if n > 2:
        pairs = {pair for order in rounds for pair in pairwise(order)}
        assert all(len({a for a, b in pairs if b == i}) > 1 for i in range(n))


def test_no_garbage_is_collected_in_a_round():
    seen = []
    take_turns([Entrant(entry("a", []), lambda: seen.append(gc.isenabled()))], 2, measure.on_cpu)
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


def test_a_reference_must_not_fail():
    def refuse(params):
        raise ValueError("not today")

    who = [candidates.Candidate(name, candidates.OWN, refuse) for name in "ab"]
    with pytest.raises(ValueError, match="not today"):
        measure.measure(SMALL, who, rounds=1, dtype=torch.float32, device=CPU, part="table")


class Spoiling(torch.optim.SGD):
    """Changes the gradients or takes them away, and counts the steps that had some."""

    had = 0

    def __init__(self, params, take):
        super().__init__(params, lr=1e-8)
        self.take = take

    def step(self):
        super().step()
        for w in self.param_groups[0]["params"]:
            if w.grad is not None:
                self.had += 1
                w.grad.zero_()
                if self.take:
                    w.grad = None


@pytest.mark.parametrize("take", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_step_that_spoils_the_gradients_is_timed_with_new_ones_or_not_at_all(fresh, take):
    made, seen = [], []

    def make(params):
        made.append(Spoiling(params, take))
        return made[0]

    class Watching(torch.optim.SGD):
        def step(self):
            seen.append(all((w.grad != 0).any() for w in self.param_groups[0]["params"]))

    watching = [
        candidates.Candidate(name, candidates.OWN, lambda params: Watching(params, lr=1e-8)) for name in ("a", "b")
    ]
    who = [watching[0], candidates.Candidate("spoiling", candidates.OWN, make), watching[1]]
    case = measure.measure(SMALL, who, rounds=3, dtype=torch.float32, device=CPU, fresh=fresh, part="table")
    if fresh:
        assert case.failed == {}
        assert made[0].had == SMALL.tensors * (measure.WARM + 3)
    else:
        (why,) = case.failed.values()
        assert "takes the gradients away" in why
    assert len(seen) >= 2 * (measure.WARM + 3)
    assert all(seen)  # the others have gradients, as they were drawn


def test_a_scheduled_step_finds_another_lr_and_p():
    seen = []

    class Watching(torch.optim.SGD):
        def step(self):
            seen.append((self.param_groups[0]["lr"], self.param_groups[0].get("p")))

    optimizer = Watching(Tensors(SMALL, torch.float32, CPU).weights, lr=1.0)
    measure.repeat(measure.scheduled(optimizer, (2.7, 2.8)), 3)
    assert [p for _, p in seen] == [2.7, 2.8, 2.7]
    assert len({lr for lr, _ in seen}) == 3
    measure.scheduled(optimizer, ())()
    assert seen[-1][1] == 2.7  # nobody gave it another


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


# Goals


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
        ("≤ 1 × torch Muon, default", "0.50", "yes"),
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
            entry(peer, [2.0] * ROUNDS, candidates.OWN),
        ]
        return made_up(entries, model=model, device="cuda")

    found = asked.lines(results_of(of("gpt2", "optimi.Lion()"), of(TINY, "optimi.Lion()")))
    assert [(line.asked, line.measured.partition(" ")[0], line.met) for line in found] == [
        ("≥ 85 %", "90.91", "yes"),
        ("≥ 75 %", "80.00", "yes"),
        ("≤ 1 × torch SGD, fused", "0.92", "yes"),
        ("≤ 1 × torch SGD, foreach", "0.37", "yes"),
        ("≤ 5", "3", "yes"),
        ("≤ 1 × torch SGD, fused", "0.92", "yes"),
        ("≤ 1 × torch SGD, foreach", "0.37", "yes"),
        ("≤ 0.5 × optimi.Lion(), default", "0.55", "no"),
        ("≤ 5", "3", "yes"),
    ]


def test_no_promise_is_told_of_what_was_not_run():
    limit = entry("limit", [1.0] * ROUNDS, "loop")
    step = entry("normopt p = 3", [1.0] * ROUNDS)
    assert asked.lines(results_of(made_up([limit]), made_up([limit, step], dtype="bfloat16"))) == []
    assert asked.lines(results_of(made_up([limit, step], part="growth"))) == []
    assert report.goals(results_of()).rows == []
    assert [*run.summaries(results_of())] == []


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


def test_absent_peers_are_told(monkeypatch):
    missing = typed.Typed("a_module_that_nobody_has", "SGD")
    monkeypatch.setattr(typed, "PACKAGES", {missing.module: "nobodys-package"})
    monkeypatch.setitem(typed.FAMILIES, typed.SIGNS, (typed.Typed("normopt", "Lion"), missing))
    assert typed.absent() == ["nobodys-package"]
    assert [c.optimizer for c in typed.installed(typed.SIGNS)] == ["normopt.Lion()"]
    assert typed.peers() == []
    assert report.told(results_of(absent=typed.absent())) == ["Not installed, and so not measured: nobodys-package."]


TYPED = [one for family in typed.FAMILIES.values() for one in family]


@pytest.mark.parametrize("one", TYPED, ids=lambda one: one.code)
def test_what_is_shown_as_typed_is_what_is_made(one):
    if one.module == "torch.optim" and not hasattr(torch.optim, one.name):
        pytest.skip("this torch lacks it")
    if not one.installed:
        pytest.skip("is not installed")
    params = Tensors(SMALL.matrices if one.name == "Muon" else SMALL, torch.float32, CPU).weights
    made = one.make(params)
    package = one.module.partition(".")[0]
    groups = [{"params": params, **one.group}]
    told = eval(
        one.code.replace("(", "(groups, lr=0.5, ", 1), {"groups": groups, package: importlib.import_module(package)}
    )
    assert type(made) is type(told)
    mine, theirs = made.param_groups[0], told.param_groups[0]
    assert {k for k, v in theirs.items() if k != "params" and mine[k] != v} <= {"lr", "base_lr", "initial_lr"}
    assert (mine["lr"], theirs["lr"]) == (candidates.LR, 0.5)


def test_normopts_default_is_the_reference_of_every_family():
    for first, *others in typed.FAMILIES.values():
        assert typed.ours(first.code)
        assert any(not typed.ours(other.code) for other in others)
    assert not [one for one in TYPED if typed.ours(one.code) and {"fused", "foreach"} & {*one.settings}]
    assert all(bool(one.orders) == ("p" in one.settings) for one in TYPED)
    assert all(one.orders[0] == one.settings["p"] for one in TYPED if one.orders)


# Memory


def test_the_peak_is_what_is_alive_at_once_of_what_a_step_allocates():
    kept = []

    def step():
        torch.empty(3000)
        kept.append(torch.empty(1000))
        torch.empty(2000)

    assert memory.peak_on_cpu(step) == 4 * 3000
    kept.clear()
    gone = [torch.empty(5000)]

    def frees():
        gone.clear()
        torch.empty(1000)

    assert memory.peak_on_cpu(frees) == 4 * 1000  # what was there before is not in it


@pytest.mark.parametrize(
    ("make", "state", "least"),
    [
        (lambda params, **lr: torch.optim.SGD(params, lr=0.1), 0, 0),
        (lambda params, **lr: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=True), 4, 0),
        (lambda params, **lr: torch.optim.Adagrad(params, lr=0.1, foreach=True), 4, 1),
    ],
)
def test_what_an_optimizer_holds(make, state, least):
    model = Model("two", ((1000, 100), (1000, 100)))
    found = memory.held(model, candidates.Candidate("a", candidates.OWN, make), torch.float32, CPU)
    assert found.state == pytest.approx(state, abs=0.01)
    assert least <= found.peak <= least + 1.1


def test_a_state_is_found_wherever_it_is_nested():
    a, b = torch.zeros(1), torch.ones(1)
    assert [*memory.tensors_in({"w": {0: {"m": [a, 1.0]}, "v": (b,)}, "n": None})] == [a, b]


def test_memory_is_on_the_users_page_and_what_failed_too():
    one = Held(optimizer=MINE, model="vit-s", state=4.0, peak=0.123)
    text = page.markdown(results_of(held=[one], unheld={"a, vit-s": "ValueError: no"}), {})
    assert f"| `{MINE}` | vit-s | 4.00 | 0.12 |" in text
    assert "The memory of a, vit-s was not measured: ValueError: no." in text
    assert "## Memory" not in page.markdown(results_of(), {})


# The share of a training step


def test_the_page_says_the_batch_of_the_tasks():
    assert {TASKS[name].batch_size for name in share.TRAININGS} == {64}
    assert "a batch of 64" in page.SHARE


def test_a_share_is_of_forward_backward_and_step_together():
    whole = entry(share.WHOLE, [3.0] * ROUNDS, "", 0)
    step = entry(MINE, [1.0] * ROUNDS, candidates.OWN, 0)
    case = made_up([whole, step], part="share", model="digits", fresh=True)
    assert str(share.percent(case, step)) == "25.00 (25.00–25.00)"
    text = page.markdown(results_of(case), {})
    assert f"| `{MINE}` | 25.00 (25.00–25.00) |" in text
    assert "Share of a training step" not in page.markdown(results_of(), {})


@pytest.mark.parametrize("name", share.TRAININGS)
def test_a_training_steps_new_gradients_at_every_turn(name):
    seen: list[list[int]] = []

    class Watching(torch.optim.SGD):
        def step(self):
            seen.append([w.grad.data_ptr() for w in self.param_groups[0]["params"]])
            for w in self.param_groups[0]["params"]:
                w.grad = None

    def refuse(params):
        raise ValueError("not today")

    who = [candidates.Candidate("w", candidates.OWN, lambda params: Watching(params, lr=1e-8), orders=())]
    case = share.share(
        name,
        [*who, candidates.Candidate("r", candidates.OWN, refuse)],
        rounds=2,
        device=CPU,
        threads=1,
        dtype=torch.float32,
    )
    assert [e.optimizer for e in case.entries] == [share.WHOLE, "w"]
    assert case.failed == {"r, default": "ValueError: not today"}
    assert len(seen) == measure.WARM + 2
    assert all(len(s) == case.tensors for s in seen)


# The users' page

MINE, THEIRS = "normopt.SGD(momentum=0.9)", "torch.optim.SGD(momentum=0.9, fused=True)"


def in_table(mine: list[float], theirs: list[float], **more) -> Case:
    entries = [entry(MINE, mine, candidates.OWN, 0), entry(THEIRS, theirs, candidates.OWN, 0)]
    return made_up(entries, **{"part": "table", "group": typed.SGD, **more})


def test_what_is_slower_is_said_with_the_worst():
    ones = [1.0] * ROUNDS
    fast = in_table([0.7] * ROUNDS, ones, model="gpt2")
    found = results_of(in_table([1.3] * ROUNDS, ones, model="mlp"), in_table([1.5] * ROUNDS, ones), fast)
    assert page.slower(found) == (
        "Slower than another library in the same block:\n\n"
        f"- `{MINE}` on mlp, resnet18: up to 1.50 (1.50–1.50) times as long as `{THEIRS}` (on resnet18)."
    )
    assert page.slower(results_of(fast)) == page.NO_SLOWER


def test_what_cannot_be_told_from_equal_is_not_called_slower():
    unsure = in_table([0.5, 1.1, 1.2, 1.3, 1.1, 1.2, 0.6, 1.4], [1.0] * ROUNDS)
    assert page.slower(results_of(unsure)) == page.NO_SLOWER
    assert page.cell(unsure, unsure.entries[1]).endswith("(≈ 0.87)")
    assert page.cell(unsure, unsure.entries[0]).endswith(" (1)")
    few = in_table([1.1] * 3, [1.0] * 3, model="mlp")  # too few for an interval
    assert "(on mlp)" in page.slower(results_of(few))


def test_the_users_table_comes_first_below_what_is_slower():
    cases = [
        in_table([0.002] * ROUNDS, [0.001] * ROUNDS, model="mlp"),
        in_table([0.004] * ROUNDS, [0.006] * ROUNDS, failed={"heavyball.SGD(), default": "ValueError: no"}),
        made_up([entry("normopt.Lion()", [0.5] * ROUNDS, candidates.OWN)], part="table", group=typed.SIGNS),
    ]
    text = page.markdown(results_of(*cases, absent=["heavyball"]), {})
    title, told, slower, table, *_ = text.split("\n\n")
    assert (title, f"{told}\n\n{slower}") == ("# Speed", page.slower(results_of(*cases)))
    assert table.splitlines() == [
        "| ms per step (× normopt's) | mlp | resnet18 |",
        "|:--|--:|--:|",
        f"| **{typed.SGD}** |  |  |",
        f"| `{MINE}` | 2.00 (1) | 4.00 (1) |",
        f"| `{THEIRS}` | 1.00 (0.50) | 6.00 (1.50) |",
        f"| **{typed.SIGNS}** |  |  |",
        "| `normopt.Lion()` | – | 500 (1) |",
    ]
    assert "Not installed, and so not measured: heavyball." in text
    assert "heavyball.SGD(), default failed: ValueError: no" in text
    assert f"]({page.CONTRIBUTORS})" in text


def test_muon_steps_matrices_where_they_are_most_and_not_too_many():
    asked_for = [*run.asked({"table": [MODELS[name] for name in run.DEFAULT["table"]]}, [1, 2], False)]
    assert all(typed.ours(who[0].optimizer) for _, who, _ in asked_for)
    muon = [(model.name, model.parameters) for model, _, how in asked_for if how["group"] == typed.MUON]
    assert muon == [("mlp", 25_856), ("vit-s", 21_617_664)]
    assert {how["threads"] for *_, how in asked_for} == {2}


# What is written


def test_results_survive_json_and_pages_are_made_of_them(case, tmp_path):
    results = results_of(case, in_table([1.0] * ROUNDS, [2.0] * ROUNDS), absent=["a-peer"], too_large=["gpt2"])
    page.write(results, tmp_path)
    assert page.read(tmp_path) == results
    page.publish(page.read(tmp_path), tmp_path / "docs" / "speed.md")
    for folder, picture in ((tmp_path, "speed-small.svg"), (tmp_path / "docs", "assets/speed-small.svg")):
        users = (folder / "speed.md").read_text(encoding="utf-8")
        limits = (folder / "contributing-speed.md").read_text(encoding="utf-8")
        assert f"]({picture})" in limits
        assert (folder / picture).read_text(encoding="utf-8").startswith("<?xml")
        assert "Not installed, and so not measured: a-peer." in users
        assert "Too large for the memory that was free: gpt2." in users
        assert "for-loop" not in users
        assert THEIRS not in limits
        shown = report.digits(1000 * median(case.entries[1].seconds))
        assert f"| normopt p = 3 | for-loop | {shown} (" in limits
    assert case.moved(case.entry("torch AdamW", "foreach")) == 28


@pytest.mark.parametrize(
    ("x", "text"), [(0.012345, "0.0123"), (1.0, "1.00"), (18.04, "18.0"), (287.4, "287"), (1680.0, "1,680"), (0.0, "0")]
)
def test_numbers_have_three_digits(x, text):
    assert report.digits(x) == text


def test_a_sweep_has_a_picture_and_a_row_for_each_size():
    entries = [entry(MINE, [0.001] * ROUNDS), entry(THEIRS, [0.002] * ROUNDS)]
    cases = [
        made_up(entries, part="growth", group=m.sweep, model=m.name, tensors=m.tensors, parameters=m.parameters)
        for m in SWEEP
    ]
    assert [*plot.pictures(results_of(*cases))] == ["by-tensors", "by-parameters"]
    text = page.markdown(results_of(*cases), {"by-tensors": "a.svg", "small": "b.svg"})
    assert "a.svg" in text
    assert "b.svg" not in text
    assert text.count("| 1.00 | 2.00 |") == len(SWEEP)


@pytest.fixture
def small_default(monkeypatch):
    monkeypatch.setitem(MODELS, "small", SMALL)
    first = dict(compiler="numba", importing=0.3, cold=2.0, cached=0.4)
    monkeypatch.setattr(run, "startup", lambda rule, device: Startup(rule=rule, device=device.type, **first))


@pytest.mark.exhaustive
def test_the_command_from_end_to_end(small_default, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "SWEEP", SWEEP[:1])
    out = tmp_path / "speed"
    arguments = ["speed", "--model", "small", "--threads", "1", "--rounds", "2", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for said in ("small, 1 thread", "Goals", "ms per step"):
        assert said in done.output
    found = page.read(out)
    assert {case.part for case in found.cases} == {"table", "growth", "limits", "share"}
    assert {h.model for h in found.held} == {"small"}
    assert {len(e.seconds) for case in found.cases for e in case.entries} == {2}
    done = CliRunner().invoke(app, ["speed", "--out", str(out), "--page", str(tmp_path / "speed.md")])
    assert done.exit_code == 0, done.output
    for name in (page.USERS, page.CONTRIBUTORS):
        written = (out / name).read_text(encoding="utf-8").replace("(speed-", "(assets/speed-")
        assert (tmp_path / name).read_text(encoding="utf-8") == written


@pytest.mark.exhaustive
def test_a_part_alone(small_default, tmp_path):
    arguments = ["speed", "--part", "table", "--model", "small", "--rounds", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = page.read(tmp_path)
    assert {case.part for case in found.cases} == {"table"}
    assert found.startup == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "resnet19"], "resnet19"),
        (["--part", "promises"], "promises"),
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
