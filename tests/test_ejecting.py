"""Ejected files make the same steps as the package, bit for bit, need torch alone, and pass ruff and mypy."""

from __future__ import annotations

import copy
import io
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normopt
from normopt.__main__ import main
from normopt.ejecting import _made, _parse, eject
from tests.patience import patience

ROOT = Path(__file__).parents[1]
SHAPES = ((6, 10), (12, 5), (4, 3, 3, 2), (7,), (1,), (5, 1))
# What ablations vary, and each branch of what is written.
OPTIONS = [
    *(
        f"sgd {x}"
        for x in ("momentum=0.9", "momentum=0.9 nesterov=true weight_decay=0.1", "momentum=0.9 dampening=0.5")
    ),
    *(f"sgd weight_decay=0.1 decay={kind}" for kind in ("decoupled", "proximal", "lp", "cautious", "cautious-lp")),
    *(f"lpsgdm agr=true weight_decay=0.1 decay=lp decay_p={p}" for p in (0.8, 1, 2, 3)),
    *(f"lpsgdm {x}" for x in ("p=1.5", "p=2", "p=11", "p=inf", "p=3 eps=1e-4", "p=inf eps=1e-4", "maximize=true")),
    "lpsgd scale=matched p=4 agr=true",
    *(
        f"steepestdescent norm=lp p={p} scale={scale}"
        for p in (1, 1.1, 2, 3, "inf")
        for scale in ("dual", "unit", "matched", "relative")
    ),
    *(f"steepestdescent norm={n} scale=unit momentum=0.9 momentum_rule=ema" for n in ("l1", "l2", "linf")),
    *(f"steepestdescent norm=lp scale=power metric=diagonal p={x}" for x in (2, 4, "inf", "4 eps=1e-3")),
    *(
        f"steepestdescent norm=lp p=4 scale={scale} metric=diagonal metric_rule={rule} momentum=0.9 momentum_rule=ema "
        "bias_correction=true"
        for scale in ("dual", "unit", "matched")
        for rule in ("average", "max", "sum")
    ),
    *(f"steepestdescent momentum=0.9 bias_correction=true momentum_rule={x}" for x in ("lion", "ema nesterov=true")),
    *("adamw amsgrad=true beta1=0.8 beta2=0.95", "adam weight_decay=0.1", "adan weight_decay=0.1 decay=lp"),
    *("adamw constraint=sphere weight_decay=0", "muon constraint=sphere weight_decay=0.1 decay=lp"),
    *("lamb agr=true", "lars weight_decay=0.1", "lion weight_decay=0.1 lr_ratio=0.5 radius=2", "stacey decay=lp"),
    *(f"muon aspect={a} weight_decay=0.1" for a in ("match_rms_adamw", "rms", "none")),
    *(f"muon {x}" for x in ("dtype=float32 nesterov=false", "method=svd", "method=polar-express steps=9")),
    *("normuon aspect=match_rms_adamw", "scion method=polar-express", "spectralsgd momentum=0.9 agr=true"),
    *("nucgd method=svd", "freon c=0.4375", "freon c=0", "freon c=0.7", "freon c=0 scale=power"),
    *("freon c=0.25 scale=power", "freon c=0.7 scale=power", "rownormsgd agr=true"),
    *(
        f"steepestdescent norm={n} scale={scale}"
        for n in ("nuclear", "frobenius", "spectral", "schatten p=3")
        for scale in ("dual", "matched")
    ),
    *(
        f"steepestdescent norm=spectral scale=dual norm_aspect={a}"
        for a in ("rms", "rows", "columns", "entries", "fan-in")
    ),
    *(f"steepestdescent norm={n} scale=matched metric=diagonal norm_aspect=rows" for n in ("row", "column", "max")),
    *("steepestdescent norm=schatten p=3 scale=power", "steepestdescent norm=spectral scale=power"),
]
PRESETS = [
    *("muon-adamw lr=0.02 agr=true", "muon-adamw weight_decay=0.1", "normuon-adamw weight_decay=0.1 decay=cautious"),
    *(
        "adamw preset=adamw",
        "muon preset=muon weight_decay=0.1 decay=lp",
        "scion preset=scion",
        "scion-mlp",
        "scion-cnn",
    ),
    *("scale preset=scale weight_decay=0.1", "muon-adamw ratio=0.1 weight_decay=0.1 decay=cautious-lp"),
]


def loaded(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {"__name__": "ejected"}
    exec(compile(eject(text), text, "exec"), found)
    return found


def optimizer_class(text: str) -> Callable[..., torch.optim.Optimizer]:
    (cls,) = (x for x in loaded(text).values() if isinstance(x, type) and x.__module__ == "ejected")
    return cls


def same_bits(x: Tensor, y: Tensor) -> bool:
    kind = {torch.float32: torch.int32, torch.float64: torch.int64}[x.dtype]
    nan = x.isnan() & y.isnan()
    return bool(((x.view(kind) == y.view(kind)) | nan).all())


def gradient(step: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Of all sizes, with zeros, and in some steps all zero, or tiny, or huge."""
    g = torch.randn(shape, dtype=dtype) * torch.randn(shape, dtype=dtype).exp()
    g = torch.where(torch.rand(shape) < 0.2, 0, g)
    return g * {2: 0.0, 3: 1e-39, 4: 1e18}.get(step, 1.0)


def walk(ours: list[nn.Parameter], theirs: list[nn.Parameter], *optimizers: Any, steps: int = 7) -> None:
    """Step both optimizers by the same gradients, and compare all weights to the bit."""
    for step in range(steps):
        for w, v in zip(ours, theirs, strict=True):
            w.grad = gradient(step, w.shape, w.dtype)
            v.grad = w.grad.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * (0.0 if step == 5 else 0.9) + (step == 6) * 0.01
            optimizer.step()
        for w, v in zip(ours, theirs, strict=True):
            assert same_bits(w.detach(), v.detach()), f"step {step}, shape {tuple(w.shape)}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("text", normopt.list_optimizers() + OPTIONS)
def test_makes_the_same_steps(text: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    name, settings = _parse(text)
    cls = normopt.SteepestDescent if name == "steepestdescent" else normopt.get_optimizer(name)
    ours = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    theirs = copy.deepcopy(ours)
    walk(ours, theirs, _made(cls, ours, settings), optimizer_class(text)(theirs))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
        self.deep, self.norm = nn.Conv2d(8, 8, 3, groups=8), nn.LayerNorm((2, 8))
        self.tokens, self.cls = nn.Embedding(9, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.attention, self.c_attn = nn.MultiheadAttention(8, 2), nn.Linear(8, 24)
        self.up, self.narrow, self.head = nn.Linear(8, 12), nn.Linear(12, 2), nn.Linear(8, 10)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("text", PRESETS)
def test_gives_each_layer_its_step(text: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    name, settings = _parse(text)
    preset, ratio = settings.pop("preset", name), settings.pop("ratio", None)
    model = Model().to(dtype)
    other = copy.deepcopy(model)
    groups = normopt.param_groups(model, preset, output="head", lr_ratio=ratio)
    optimizer = _made(normopt.get_optimizer(str(groups.optimizer)), groups, settings)
    ejected: Any = optimizer_class(text)
    trained = [[p for p in x.parameters() if p.requires_grad] for x in (model, other)]
    walk(*trained, optimizer, ejected(other, "head", blocks={"c_attn": 3}), steps=4)


def test_steps_patches_and_tied_tables() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"patches": nn.Conv2d(3, 8, 2, stride=2), "in": nn.Embedding(9, 8), "out": nn.Linear(8, 9)})
    model["out"].weight = model["in"].weight  # type: ignore[assignment]
    other = copy.deepcopy(model)
    optimizer = normopt.Muon(normopt.param_groups(model, output="out"), foreach=False)
    walk([*model.parameters()], [*other.parameters()], optimizer, optimizer_class("muon-adamw")(other, None))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="patches is a convolution of patches"):
        optimizer_class("scion-mlp")(other, None)  # type: ignore[call-arg]


def test_asks_what_it_cannot_tell() -> None:
    ejected: Any = optimizer_class("muon-adamw")
    with pytest.raises(ValueError, match=r"c_attn looks like several layers in one: give blocks"):
        ejected(Model(), "head")
    with pytest.raises(ValueError, match="no module of the model is called 'heads'"):
        ejected(Model(), "heads")
    with pytest.raises(ValueError, match="'frozen' has no weight"):
        ejected(nn.ModuleDict({"frozen": nn.ReLU()}), "frozen")
    with pytest.raises(ValueError, match=r"weight_hh_l0|weight_ih_l0 is of a LSTM"):
        ejected(nn.LSTM(4, 4), None)


def test_resumes_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, ejected = Model(), optimizer_class("muon-adamw lr=0.02 agr=true")
    made: Any = lambda x: ejected(x, "head", blocks={"c_attn": 3})  # type: ignore[call-arg]  # noqa: E731
    optimizer = made(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    walk(trained, trained, optimizer, steps=2)
    other = copy.deepcopy(model)
    resumed = made(other)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    walk(trained, [p for p in other.parameters() if p.requires_grad], optimizer, resumed, steps=4)


def test_p_may_be_scheduled() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = copy.deepcopy(ours)
    optimizers: Any = [normopt.LPSGDM(ours, foreach=False), optimizer_class("lpsgdm")(theirs)]
    for p in (8.0, 4.0, 3.0, 2.0, math.inf):
        for optimizer in optimizers:
            optimizer.param_groups[0]["p"] = p
        walk(ours, theirs, *optimizers, steps=2)


def test_takes_a_closure_and_refuses_16_bits() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = optimizer_class("sgd lr=0.5")([w])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0  # type: ignore[arg-type, func-returns-value]
    assert torch.equal(w.detach(), torch.full((2,), 0.5))
    half = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    half.grad = torch.ones_like(half)
    with pytest.raises(TypeError, match=r"float32 and float64 weights, but one is torch\.bfloat16"):
        optimizer_class("sgd")([half]).step()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sgd fused=true", "fused=True"),
        ("sgd foreach=true", "multi-tensor"),
        ("sgd agr=true agr_scope=group", "needs all tensors"),
        ("steepestdescent scope=group", "needs all tensors"),
        ("sgd rounding=kahan", "16-bit"),
        ("sgd momentum=0.9 state_dtype=bfloat16", "state_dtype"),
        ("steepestdescent norm=max-row scale=unit", "unit rows"),
        ("muon norm_matrix_view=batch", "one matrix"),
        ("spectralsgd method=newton-schulz", "svd"),
        ("modular", "graph of a model"),
        ("muo", "did you mean 'muon'"),
        ("muon preset=scion", "is for Scion"),
        ("muon ratio=2", "give one"),
        ("sgd p", "KEY=VALUE"),
        ("sgd lr=-1", "lr must be"),
        ("", "unknown optimizer"),
    ],
)
def test_says_why_it_cannot(text: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=reason):
        eject(text)
    with pytest.raises(SystemExit):
        main(["eject", text])
    assert reason in capsys.readouterr().err


def test_refuses_a_norm_of_ones_own() -> None:
    @normopt.norms.register("ejected-own")
    class Own(normopt.norms.TensorNorm):
        pass

    with pytest.raises(ValueError, match="the norm 'ejected-own' is your own"):
        eject("steepestdescent norm=ejected-own scale=unit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every optimizer and option as a file."""
    path = tmp_path_factory.mktemp("ejected")
    for i, text in enumerate(dict.fromkeys(normopt.list_optimizers() + OPTIONS + PRESETS)):
        main(["eject", text, "-o", str(path / f"optimizer_{i}.py")])
    return path


def test_passes_ruff(folder: Path) -> None:
    pytest.importorskip("ruff")
    config = ROOT / "pyproject.toml"
    for command in (["ruff", "check", "--config", str(config)], ["ruff", "format", "--check", "--config", str(config)]):
        ruff = [sys.executable, "-m", *command, "."]
        done = subprocess.run(ruff, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.exhaustive
def test_passes_mypy(folder: Path) -> None:
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(folder / "cache"), "."]
    done = subprocess.run(mypy, cwd=folder, capture_output=True, text=True, timeout=patience(200), check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_needs_torch_alone(folder: Path) -> None:
    allowed = {"__future__", "collections", "math", "re", "torch", "typing"}
    for file in folder.glob("*.py"):
        imported = re.findall(r"^(?:from|import) (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(imported) <= allowed, file.read_text(encoding="utf-8")
        assert "Source: " in file.read_text(encoding="utf-8").split('"""')[1]
