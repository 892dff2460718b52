"""The expectations notice what is wrong, and a plain model's follow from torch's own modules."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.architectures import models
from tests.architectures.examine import examine, override_in
from tests.architectures.expected import Expected, Given, expected_of, of_timm, of_transformers
from tests.architectures.models import Built

LINEAR = Given("linear", "spectral", "rows", 1, None)
ADAMW = Given("output", "l2", "rows", 1, None)


def problems(expected: dict[str, Expected], name: str, *given: Given | None) -> list[str]:
    return [expected[name].problem(one) for one in given]


def test_what_is_wrong_is_noticed_in_transformers():
    models.allow_torchvision_import()
    pytest.importorskip("transformers")
    gpt = of_transformers(models.build_transformers("GPT2LMHeadModel", "gpt2").model)
    fused = dataclasses.replace(LINEAR, kind="qkv", view="turned", blocks=36)
    name = "transformer.h.0.attn.c_attn.weight"
    wrong = [dataclasses.replace(fused, view="rows"), dataclasses.replace(fused, blocks=3), ADAMW, None]
    assert problems(gpt, name, fused) == [""]
    assert all(problems(gpt, name, *wrong))
    assert problems(gpt, "transformer.wte.weight", ADAMW) == [""]
    assert all(problems(gpt, "transformer.wte.weight", LINEAR, dataclasses.replace(ADAMW, kind="embedding")))
    norm = Given("norm", "l2", "rows", 1, 0.0)
    assert problems(gpt, "transformer.ln_f.weight", norm) == [""]
    assert all(problems(gpt, "transformer.ln_f.weight", dataclasses.replace(norm, decay=None), LINEAR))

    experts = of_transformers(models.build_transformers("GptOssForCausalLM", "gpt_oss").model)
    up = dataclasses.replace(LINEAR, kind="experts", view="batch-transposed")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert problems(experts, name, up) == [""]
    assert all(problems(experts, name, *[dataclasses.replace(up, view="batch"), dataclasses.replace(up, blocks=2)]))

    headless = of_transformers(models.build_transformers("LlamaModel", "llama").model)
    assert not any(e.may_be_output or "output" in e.kinds - {"embedding"} for n, e in headless.items() if "proj" in n)


def test_what_is_wrong_is_noticed_in_timm():
    models.allow_torchvision_import()
    pytest.importorskip("timm")
    vit = of_timm(models.build_timm("test_vit").model)
    table = Given("table", "l2", "batch", 1, 0.0)
    assert problems(vit, "pos_embed", table) == [""]
    assert all(problems(vit, "pos_embed", LINEAR, dataclasses.replace(table, decay=None)))
    patches = Given("conv", "spectral", "patches", 1, None)
    assert problems(vit, "patch_embed.proj.weight", patches) == [""]
    assert all(problems(vit, "patch_embed.proj.weight", dataclasses.replace(patches, view="flatten")))
    assert all(problems(vit, "head.weight", LINEAR))


class Plain(nn.Module):
    """Of torch's own modules: tied, frozen, parametrized and recurrent weights, with no head among known names."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 30, bias=False)
        self.embed = nn.Embedding(30, 16)
        self.last.weight = self.embed.weight
        self.attention = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 1, enable_nested_tensor=False)
        self.normed = parametrizations.weight_norm(nn.Linear(16, 24))
        self.bounded = parametrizations.spectral_norm(nn.Linear(16, 24))
        self.normed_conv = parametrizations.weight_norm(nn.Conv1d(16, 32, 3, groups=4))
        self.cell, self.lstm = nn.GRUCell(16, 16), nn.LSTM(16, 16)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.fixed = nn.Linear(16, 16).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(16, 1, 1))


def test_a_model_of_torchs_own_modules_is_read_right():
    def expected(model: nn.Module) -> dict[str, Any]:
        return expected_of(model, [])

    verdict = examine(Built("Plain", "", Plain()), expected)
    assert verdict.status == "right", verdict


def test_an_override_is_read_from_a_message():
    assert override_in('say overrides={"a.*": {"kind": "linear"}, "b": {"norm_blocks": (1, 2)}}, {or} not') == {
        "a.*": {"kind": "linear"},
        "b": {"norm_blocks": (1, 2)},
    }
