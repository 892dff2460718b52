"""Preset "modular" in its own words: what stops its trace, which depth it takes from a config, and its masses."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import normopt
from normopt.groups.classify import ParamInfo
from normopt.groups.modular import budgets


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)


class Branching(Net):
    def forward(self, x):
        if x.sum() > 0:
            x = self.head(x)
        return x


class Looping(Net):
    def forward(self, x):
        for row in x:
            x = x + self.head(row)
        return x


class Counting(Net):
    def forward(self, x):
        for _ in range(x.shape[0]):
            x = self.head(x)
        return x


class Measuring(Net):
    def forward(self, x):
        return self.head(x) * len(x)


class Writing(Net):
    def forward(self, x):
        x[0] = 0
        return self.head(x)


class Making(Net):
    def forward(self, x):
        return self.head(x + torch.zeros(x.shape[0], 3))


class Optional(Net):
    def forward(self, x, mask=None):
        return self.head(x * mask.to(x.dtype))


class Demanding(Net):
    def forward(self, x, mask=None):
        if mask is None:
            raise ValueError("a mask must be given")
        return self.head(x)


class Gating(Net):
    def forward(self, x):
        return self.head(x) * x


class Unknown(Net):
    def forward(self, x):
        return torch.cumsum(self.head(x), 0)


class Holding(nn.Module):
    """One of them, inside."""

    def __init__(self, inner):
        super().__init__()
        self.first, self.inner = nn.Linear(3, 3), inner

    def forward(self, x):
        return self.inner(self.first(x))


STOPS = {
    Branching: "branches on the value or the size of a tensor, at `if x.sum() > 0:` (test_modular.py, line ",
    Looping: "loops over a tensor or unpacks it, at `for row in x:`",
    Counting: "needs a number that is in a tensor, or its size, at `for _ in range(x.shape[0]):`",
    Measuring: "takes the length of a tensor, at `return self.head(x) * len(x)`",
    Writing: "writes into a part of a tensor, at `x[0] = 0`",
    Making: "makes a call that takes actual tensors and numbers only, at `return self.head(x + torch.zeros(",
    Optional: "needs an argument that is None by default, and such arguments are left out, at `return self.head(",
    Demanding: "raises ValueError: 'a mask must be given' (arguments that are None by default are left out)",
    Net: "is not defined",
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("cls", STOPS)
def test_what_stops_the_trace_is_said_in_words_with_its_module_and_place(cls, inside):
    of = f"'inner' ({cls.__name__})" if inside else f"the model ({cls.__name__})"
    with pytest.raises(ValueError, match="Set the depth instead") as found:
        normopt.param_groups(Holding(cls()) if inside else cls(), "modular")
    said = str(found.value)
    assert f"cannot trace it: the forward pass of {of} {STOPS[cls]}" in said
    assert not any(word in said for word in ("symbolically", "Proxy", "torch.fx", "co_varnames"))
    # What was raised is the cause, of whatever type.
    assert found.value.__cause__.__traceback__ is not None
    assert "normopt" not in type(found.value.__cause__).__module__


def test_operations_of_unknown_effect_are_named_with_their_module():
    for cls, words in (
        (Gating, "there is a mul of two values in 'inner' (Gating), not by a constant"),
        (Unknown, "the sensitivity of 'cumsum' in 'inner' (Unknown) is not known"),
        (nn.Softmin, "the sensitivity of 'Softmin' in 'inner' (Softmin) is not known"),
    ):
        with pytest.raises(ValueError) as found:  # noqa: PT011
            normopt.param_groups(Holding(cls()), "modular")
        assert words in str(found.value)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


class GPT(nn.Module):
    """As nanoGPT has it: a config of its own, in dataclass's manner."""

    def __init__(self, layers=3, more=0, **config):
        super().__init__()
        self.config = SimpleNamespace(**({"n_layer": layers, "n_head": 2} | config))
        self.wte, self.ln_f, self.lm_head = nn.Embedding(10, 4), nn.LayerNorm(4), nn.Linear(4, 10)
        self.convs = nn.ModuleList(nn.Conv1d(4, 4, 3) for _ in range(2))
        self.h = nn.ModuleList(Block() for _ in range(3))
        self.decoder = nn.ModuleList(Block() for _ in range(more))

    def forward(self, x=None):
        raise ValueError("ids must be given")


def test_a_depth_is_taken_from_a_plain_config_and_said_so():
    model = GPT()
    groups = normopt.param_groups(model, "modular")
    declared = normopt.param_groups(model, "modular", residual_depth=6)
    sensitivity = {name: g["sensitivity"] for g in groups for name, _ in g["params"]}
    assert sensitivity["h.1.up.weight"] == sensitivity["h.0.qkv.bias"] == pytest.approx(1 / 6)
    # Outside of the layers all is an end, numbered or not.
    assert {sensitivity[f"{name}.weight"] for name in ("wte", "ln_f", "lm_head", "convs.1")} == {1.0}
    (note,) = groups.notes
    assert "residual_depth=6 is from the model's config (n_layer = 3" in note
    assert "raises ValueError: 'ids must be given'" in note
    assert f"note: {note}" in str(groups)
    assert list(declared.notes) == []
    assert "note" not in str(declared)
    assert list(normopt.param_groups(nn.Linear(3, 2), "modular").notes) == []


@pytest.mark.parametrize(
    "how",
    [
        dict(is_encoder_decoder=True),
        dict(depths=[1, 2]),
        dict(sub_configs={"text_config": object}),
        dict(n_head=None),
        dict(n_layer="3"),
        dict(layers=2, n_layer=5),  # layers that share their weights
        dict(more=2),  # layers of the same class elsewhere
        dict(more=3),
    ],
    ids=str,
)
def test_no_depth_is_taken_from_a_config_that_is_not_plain(how):
    with pytest.raises(ValueError, match="residual_depth=L"):
        normopt.param_groups(GPT(**how), "modular")


@pytest.mark.exhaustive
def test_depths_of_transformers():
    transformers = pytest.importorskip("transformers")
    for name, depth in {
        "GPT2LMHeadModel": 24,
        "LlamaForCausalLM": 64,
        "BertForMaskedLM": 24,
        "T5EncoderModel": 12,
    }.items():
        cls = getattr(transformers, name)
        with torch.device("meta"):
            model = cls(cls.config_class())
        infos = [ParamInfo([n], p, [], [model], "linear") for n, p in model.named_parameters()]
        assert f"residual_depth={depth} is" in budgets(model, infos, {}, None)[1][0]
    for name in ("T5ForConditionalGeneration", "CLIPModel", "MambaForCausalLM", "AlbertForMaskedLM", "SwinModel"):
        cls = getattr(transformers, name)
        with torch.device("meta"):
            model = cls(cls.config_class())
        infos = [ParamInfo([n], p, [], [model], "linear") for n, p in model.named_parameters()]
        with pytest.raises(ValueError, match="residual_depth=L"):
            budgets(model, infos, {}, None)


def test_masses_of_every_kind():
    """Hidden kinds share 5, fused layers counted each; the ends and the vectors have 1 for each part."""
    kinds = {
        "a": ("linear", {}, 1),
        "b": ("qkv", {"blocks": 3}, 3),
        "c": ("qkv", {"blocks": (64, 16, 16)}, 3),
        "d": ("qkv", {"blocks": 32}, 3),  # heads
        "e": ("gate_up", {"blocks": 2}, 2),
        "f": ("experts", {"matrix_view": "batch"}, 1),
        "g": ("recurrent", {"blocks": 4}, 4),
        "h": ("conv", {"blocks": 8}, 1),  # groups
        "i": ("depthwise", {}, 1),
        "j": ("input_conv", {}, 1),
        "k": ("gate", {}, 1),
        "l": ("router", {}, 1),
    }
    ends = {"m": "embedding", "n": "table", "o": "output", "p": "norm", "q": "bias", "r": "vector", "s": "state"}
    model = nn.Module()
    infos = [
        ParamInfo([n], nn.Parameter(torch.ones(1)), [""], [model], kind, matrix)
        for n, (kind, matrix, _) in kinds.items()
    ]
    infos += [ParamInfo([n], nn.Parameter(torch.ones(1)), ["x"], [model], kind, {}) for n, kind in ends.items()]
    found, notes = budgets(model, infos, {}, 4)
    shares = {name: 8 * share for name, (share, _) in found.items()}
    total = sum(count for *_, count in kinds.values())
    for name, (*_, count) in kinds.items():
        assert shares[name] == pytest.approx(5 * count / total)
    assert [shares[n] for n in "mnopqrs"] == pytest.approx([0.5, 0.5, 1, 0.25, 0.25, 0.25, 0.25])
    assert math.fsum(shares.values()) == pytest.approx(8)
    assert notes == []


def test_a_table_outside_of_the_blocks_is_an_end():
    """It may be the whole model's; what else is the model's is not one by that."""
    model = nn.Module()
    names = {"pos": "table", "scale": "vector", "h.0.pos": "table", "h.0.w": "linear"}
    for blocks in (True, False):
        infos = [
            ParamInfo([n], nn.Parameter(torch.ones(1)), [n.rpartition(".")[0]], [model], kind, {})
            for n, kind in names.items()
            if blocks or n[0] != "h"
        ]
        sensitivity = {name: s for name, (_, s) in budgets(model, infos, {}, 4)[0].items()}
        expected = {"pos": 1, "scale": 1, "h.0.pos": 0.25, "h.0.w": 0.25} if blocks else {"pos": 1, "scale": 0.25}
        assert sensitivity == expected
