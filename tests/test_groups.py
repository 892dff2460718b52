"""param_groups: who gets which norm, what is refused, and whether the modular norm's promise holds."""

from __future__ import annotations

import ast
import io
import math
import re

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import normopt
from normopt.groups.presets import PRESETS
from normopt.groups.sensitivity import sensitivities
from tests.versions import NEEDS_MUON


class Mix(nn.Module):
    """An embedding, a convolution, linear layers, norms of two sorts, biases."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(17, 4)
        self.conv = nn.Conv2d(4, 6, 3)
        self.norm = nn.GroupNorm(2, 6)
        self.hidden = nn.Linear(6 * 36, 20)
        self.norm2 = nn.LayerNorm(20)
        self.head = nn.Linear(20, 10)

    def forward(self, x):
        x = self.embed(x).permute(0, 3, 1, 2)
        x = torch.relu(self.norm(self.conv(x))).flatten(1)
        return self.head(torch.relu(self.norm2(self.hidden(x))))


class Stream(nn.Module):
    """A residual stream of attention and two-layer branches, each multiplied by 1/L."""

    def __init__(self, width=8, blocks=2):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, width), nn.Embedding(5, width)
        self.register_buffer("order", torch.arange(5))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                dict(
                    ln1=nn.LayerNorm(width),
                    qkv=nn.Linear(width, 3 * width),
                    out=nn.Linear(width, width),
                    ln2=nn.LayerNorm(width),
                    up=nn.Linear(width, 2 * width),
                    down=nn.Linear(2 * width, width),
                )
            )
            for _ in range(blocks)
        )
        self.ln, self.head = nn.LayerNorm(width), nn.Linear(width, 11)
        self.depth = 2 * blocks

    def forward(self, x, mask=None):
        h = self.tokens(x) / 2 + 0.5 * self.places(self.order)
        for b in self.blocks:
            q, k, v = b["qkv"](b["ln1"](h)).chunk(3, -1)
            h = (1 - 1 / self.depth) * h + b["out"](scaled_dot_product_attention(q, k, v)) / self.depth
            h = (1 - 1 / self.depth) * h + b["down"](torch.relu(b["up"](b["ln2"](h)))) * (1 / self.depth)
        return self.head(self.ln(h))


def by_name(groups, key):
    return {name: group.get(key) for group in groups for name, _ in group["params"]}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_is_in_one_group_and_learns(preset):
    torch.manual_seed(0)
    model = Mix()
    groups = normopt.param_groups(model, preset)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    lr = {
        "muon-adamw": 0.2,
        "normuon-adamw": 0.2,
        "adamw": 0.01,
        "muon": 0.05,
        "scion": 2e-4,
        "scion-cnn": 1e-3,
        "scion-mlp": 1e-3,
        "scale": 3e-3,
        "modular": 0.2,
    }[preset]
    opt = normopt.SteepestDescent(groups, lr=lr, momentum=0.9, momentum_rule="ema")
    x, y = torch.randint(17, (64, 8, 8)), torch.randint(10, (64,))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(30):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_kinds_of_the_mix():
    kinds = by_name(normopt.param_groups(Mix(), "scion"), "kind")
    assert kinds == {
        "embed.weight": "embedding",
        "conv.weight": "input_conv",  # of four channels
        "hidden.weight": "linear",
        "head.weight": "output",
        **dict.fromkeys(("norm.weight", "norm.bias", "norm2.weight", "norm2.bias"), "norm"),
        **dict.fromkeys(("conv.bias", "hidden.bias", "head.bias"), "bias"),
    }


def test_matrices_are_read_as_their_modules_mean_them():
    model = nn.ModuleDict(
        dict(
            attention=nn.MultiheadAttention(8, 2),
            lstm=nn.LSTM(4, 5, proj_size=3),
            grouped=nn.Conv1d(6, 4, 3, groups=2),
            turned=nn.ConvTranspose2d(3, 4, 2),
            bag=nn.EmbeddingBag(7, 4),
            head=nn.Linear(3, 2),
        )
    )
    groups = normopt.param_groups(model, "modular", residual_depth=1)
    assert by_name(groups, "norm_blocks") | {} == {
        **dict.fromkeys((name for name, _ in model.named_parameters())),
        "attention.in_proj_weight": 6,  # of two heads
        "lstm.weight_ih_l0": 4,
        "lstm.weight_hh_l0": 4,
        "grouped.weight": 2,
    }
    views = {name: view for name, view in by_name(groups, "norm_matrix_view").items() if view is not None}
    assert views == {"turned.weight": "transposed", "bag.weight": "transposed"}
    assert by_name(groups, "kind")["attention.out_proj.weight"] == "linear"
    opt = normopt.SteepestDescent(groups, lr=1.0)
    g = torch.randn(24, 8)
    before = model["attention"].in_proj_weight.detach().clone()
    model["attention"].in_proj_weight.grad = g
    opt.step()
    steps = (before - model["attention"].in_proj_weight.detach()).chunk(6)
    for step in steps:  # each head of q, k and v is orthogonalised by itself
        s = torch.linalg.svdvals(step)
        torch.testing.assert_close(s, s[:1].expand(4))


def test_a_fused_projection_of_grouped_queries():
    class Attention(nn.Module):
        def __init__(self, rows, columns=128, **heads):
            super().__init__()
            self.qkv = nn.Linear(columns, rows, bias=False)
            for name, number in heads.items():
                setattr(self, name, number)

    def read(model, preset="muon", **overrides):
        groups = normopt.param_groups(nn.ModuleDict({"attn": model}), preset, overrides=overrides)
        return by_name(groups, "norm_blocks")["attn.qkv.weight"], "note: attn.qkv.weight: queries, keys" in str(groups)

    for heads, kv_heads in (("num_heads", "num_kv_heads"), ("n_head", "n_kv_head"), ("h", "kv_heads")):
        assert read(Attention((8 + 4 + 4) * 16, **{heads: 8, kv_heads: 4})) == (16, False)  # heads of 16
        assert read(Attention((8 + 2 + 2) * 16, **{heads: 8, kv_heads: 2})) == (12, False)  # not 24 heads of 8
    assert read(Attention(384, nhead=8)) == read(Attention(384, h=8)) == (24, False)
    assert read(Attention(384)) == (3, False)
    assert read(Attention(256)) == (None, True)
    assert read(Attention(256), "adamw") == (None, False)  # which has no matrices
    assert read(Attention(256), **{"attn.qkv.weight": {"norm_blocks": (128, 64, 64)}}) == ((128, 64, 64), False)
    assert read(Attention(256), **{"attn.qkv.weight": {"norm_blocks": 1}}) == (1, False)


def test_the_steps_of_scions_preset_are_the_published_ones():
    torch.manual_seed(0)
    model = Mix().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt = normopt.SteepestDescent(normopt.param_groups(model, "scion-cnn"), lr=1.0)
    opt.step()
    step = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    g = {name: p.grad for name, p in model.named_parameters()}

    def polar(x):
        u, _, vt = torch.linalg.svd(x.flatten(1), full_matrices=False)
        return (u @ vt).reshape(x.shape)

    torch.testing.assert_close(step["hidden.weight"], 8 * math.sqrt(20 / 216) * polar(g["hidden.weight"]))
    torch.testing.assert_close(step["conv.weight"], 8 * math.sqrt(6 / 4) / 9 * polar(g["conv.weight"]))
    torch.testing.assert_close(step["head.weight"], 128 / 20 * g["head.weight"].sign())
    rms = g["embed.weight"].square().mean(1, keepdim=True).sqrt()  # a column of theirs is one of 17 rows here
    torch.testing.assert_close(step["embed.weight"], 8 * g["embed.weight"] / rms)
    for name in ("norm.weight", "hidden.bias"):
        torch.testing.assert_close(step[name], 8 * g[name] / g[name].square().mean().sqrt())


def split(model, groups):
    """The hidden matrices by Muon and the rest by AdamW, as torch has them, and the names of the former."""
    hidden = {n for group in groups for n, _ in group["params"] if group["kind"] in ("linear", "qkv")}
    muon = [p for n, p in model.named_parameters() if n in hidden]
    rest = [(n, p) for n, p in model.named_parameters() if n not in hidden]
    vectors = {"params": [p for _, p in rest if p.dim() == 1], "weight_decay": 0.0}
    tables = {"params": [p for _, p in rest if p.dim() > 1]}
    adamw = torch.optim.AdamW([tables, vectors], lr=0.008, weight_decay=0.1)
    two = torch.optim.Muon(muon, lr=0.02, weight_decay=0.1), adamw
    return two, hidden


@NEEDS_MUON
def test_muon_adamw_is_torchs_muon_and_torchs_adamw_with_a_learning_rate_each():
    """50 steps by one optimizer under one schedule, from torch's gradients; saved and loaded on the way."""
    torch.manual_seed(0)
    theirs, ours = Stream(), Stream()
    ours.load_state_dict(theirs.state_dict())
    whole = {"kind:qkv": {"norm_blocks": 1}}  # as torch's Muon takes it
    groups = normopt.param_groups(ours, preset="muon-adamw", overrides=whole)
    two, hidden = split(theirs, groups)
    assert len(hidden) == 8

    def one():
        groups = normopt.param_groups(ours, preset="muon-adamw", overrides=whole)
        opt = normopt.Muon(groups, lr=0.02, weight_decay=0.1)
        return opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 50)

    opt, schedule = one()
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(other, 50) for other in two]
    walked = dict.fromkeys(hidden, 0.0)
    for i in range(50):
        x = torch.randint(11, (4, 5))
        for other in two:
            other.zero_grad()
        nn.functional.cross_entropy(theirs(x).flatten(0, 1), x.flatten()).backward()
        before = {n: p.detach().clone() for n, p in theirs.named_parameters()}
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = q.grad.clone()
        for thing in (opt, *two, schedule, *schedules):
            thing.step()
        for (n, q), p in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            if n in hidden:  # both iterate in bfloat16
                walked[n] += float((q.detach() - before[n]).norm())
                assert float((p - q).detach().norm()) <= 2**-7 * walked[n]
            else:
                torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
        if i == 20:
            saved = io.BytesIO()
            torch.save([opt.state_dict(), schedule.state_dict()], saved)
            saved.seek(0)
            opt, schedule = one()
            for thing, state in zip((opt, schedule), torch.load(saved, weights_only=True), strict=True):
                thing.load_state_dict(state)
    assert {len(opt.state[p]) for n, p in ours.named_parameters() if n in hidden} == {1}
    assert {len(opt.state[p]) for n, p in ours.named_parameters() if n not in hidden} == {3}


def test_the_rule_of_adamw_in_a_preset():
    groups = normopt.param_groups(Mix(), "normuon-adamw", lr_ratio=0.1)
    opt = normopt.NorMuon(groups, lr=0.02, weight_decay=0.1, row_beta=0.95)
    found = {tuple(g[k] for k in ("norm", "row_beta", "lr_ratio", "lr", "weight_decay")) for g in opt.param_groups}
    rules = {("spectral", 0.95, 1.0, 0.02, 0.1), ("l2", 0.0, 0.1, 0.02, 0.1)}
    assert found == rules | {("l2", 0.0, 0.1, 0.02, 0.0)}  # vectors do not decay
    for group in normopt.AdamW(normopt.param_groups(Mix(), "adamw"), betas=(0.8, 0.95)).param_groups:
        assert [group[k] for k in ("metric", "momentum", "metric_beta", "lr_ratio")] == ["diagonal", 0.8, 0.95, 1.0]
    opt.add_param_group({"params": [("late", nn.Parameter(torch.ones(2, 2)))]})
    assert opt.param_groups[-1]["lr_ratio"] == 1
    # A norm of the user's replaces the whole rule; other settings are laid over it.
    overrides = {
        "head.weight": {"norm": "linf", "scale": "unit"},
        nn.LayerNorm: {"betas": (0.9, 0.95), "lr_ratio": 0.5},
    }
    groups = normopt.param_groups(Mix(), "muon-adamw", overrides=overrides)
    assert by_name(groups, "metric")["head.weight"] is None
    assert by_name(groups, "betas")["head.weight"] is None
    assert by_name(groups, "lr_ratio") | {} == {
        "hidden.weight": None,
        "head.weight": None,
        "norm2.weight": 0.5,
        "norm2.bias": 0.5,
        **dict.fromkeys(("embed.weight", "conv.weight", "norm.weight", "norm.bias"), 0.4),
        **dict.fromkeys(("conv.bias", "hidden.bias", "head.bias"), 0.4),
    }
    groups[-1]["betas"], groups[-1]["eps"] = (0.8, 0.9), 1e-10  # as of any groups, before an optimizer has them
    last = normopt.Muon(groups).param_groups[-1]
    assert [last[k] for k in ("momentum", "metric_beta", "metric_eps", "eps")] == [0.8, 0.9, 1e-10, 0.0]
    # The presets set rules whole, whatever the optimizer's own is.
    assert {g["metric"] for g in normopt.Muon(list(normopt.param_groups(Mix(), "adamw"))).param_groups} == {"diagonal"}
    mixed = normopt.AdamW(list(normopt.param_groups(Mix(), "muon-adamw"))).param_groups
    assert {(g["norm"], g["metric"], g["bias_correction"]) for g in mixed} == {
        ("spectral", "none", False),
        ("l2", "diagonal", True),
    }
    assert "betas (0.9, 0.95)" in str(groups)


def test_the_step_of_scales_preset_is_the_published_one():
    model = Mix().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt = normopt.SCALE(normopt.param_groups(model, "scale"), lr=1.0)
    opt.step()
    for name, p in model.named_parameters():
        step = before[name] - p.detach()
        if p.dim() == 1:
            torch.testing.assert_close(step, p.grad.sign())
        else:
            lines = p.grad.T if name.startswith("embed") else p.grad.flatten(1)
            expected = lines / lines.square().mean(1, keepdim=True).sqrt()
            torch.testing.assert_close(step.T if name.startswith("embed") else step.flatten(1), expected)
    assert {name for name, p in model.named_parameters() if p in opt.state} == {"head.weight"}


def test_a_group_takes_the_fields_of_the_optimizers_own_norm_and_of_no_other():
    groups = normopt.param_groups(Mix(), "muon")
    opt = normopt.Muon(groups, method="polar-express", steps=7, aspect="match_rms_adamw")
    norms = {name: group for group in opt.param_groups for name in group["param_names"]}
    assert norms["hidden.weight"]["norm_method"] == "polar-express"
    assert norms["hidden.weight"]["norm_steps"] == 7
    assert "match_rms_adamw" in opt.backend()
    assert "Lp(p=inf) unit, radius 0.1" in opt.backend()
    opt = normopt.Muon(list(normopt.param_groups(Mix(), "scion")), steps=7)
    fields = [(g["norm"], g["norm_aspect"], g["norm_steps"]) for g in opt.param_groups]
    assert ("spectral", "rms", 7) in fields
    assert all(line.count("method") == line.count("p=inf, method") for line in opt.backend().splitlines())


def test_overrides_are_laid_over_the_preset_in_their_order():
    groups = normopt.param_groups(
        Mix(),
        "scion",
        overrides={
            nn.Linear: {"radius": 3.0, "lr": 0.5},
            "head": {"radius": 7.0},
            "hidden.*": {"norm": "nuclear"},
            "norm2": {"weight_decay": 0.0},
        },
    )
    assert by_name(groups, "radius")["head.weight"] == 7.0
    assert by_name(groups, "lr")["head.weight"] == 0.5
    assert by_name(groups, "norm")["hidden.weight"] == "nuclear"
    assert by_name(groups, "radius")["hidden.weight"] is None  # the preset's was of the preset's norm
    assert by_name(groups, "norm_aspect")["hidden.weight"] is None
    assert by_name(groups, "lr")["hidden.weight"] == 0.5
    assert by_name(groups, "weight_decay")["norm2.weight"] == 0.0
    normopt.Scion(groups)


def test_blocks_go_to_matrices_alone_and_other_values_are_left_to_the_optimizer():
    for preset in ("muon-adamw", "scion"):
        groups = normopt.param_groups(Mix(), preset, overrides={"*": {"norm_blocks": 2}})
        blocks = by_name(groups, "norm_blocks")
        scion = {"embed.weight", "conv.weight", "hidden.weight", "head.weight"}
        assert {name for name, n in blocks.items() if n == 2} == (scion if preset == "scion" else {"hidden.weight"})
        assert len({id(group) for group in groups if group["kind"] == "bias"}) == 1
    lp = {"hidden.weight": {"norm": "lp"}}  # whose p is the optimizer's
    opt = normopt.LPSGDM(list(normopt.param_groups(Mix(), "modular", overrides=lp)), p=3.0)
    assert {3.0} == {g["p"] for g in opt.param_groups if g["norm"] == "lp"}
    given = {"head": {"lr": torch.tensor(0.1), "weight_decay": torch.tensor([0.1])}}
    assert torch.equal(by_name(normopt.param_groups(Mix(), overrides=given), "lr")["head.weight"], torch.tensor(0.1))
    power = {"head.weight": {"norm": "lp", "p": 3.0, "scale": "power", "eps": 0.0}}
    normopt.Muon(normopt.param_groups(Mix(), overrides=power))


class Net(nn.Module):
    """Modules and parameters by name."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def outputs(model):
    return [n for n, kind in by_name(normopt.param_groups(model), "kind").items() if kind == "output"]


def test_a_layer_of_torchs_decides_what_its_parameter_is_whatever_other_names_it_has():
    embed, layer, head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
    model = Net(first=embed.weight, second=layer.weight, third=head.weight, embed=embed, layer=layer, lm_head=head)
    kinds = by_name(normopt.param_groups(model), "kind")
    assert kinds == {"first": "embedding", "second": "linear", "third": "output", "layer.bias": "bias"}
    # A module with two names.
    aliased = Net(model=Net(a=nn.Linear(4, 4), last=nn.Linear(4, 9)))
    aliased.head = aliased.model.last
    assert outputs(aliased) == ["model.last.weight"]
    kinds = by_name(normopt.param_groups(aliased, output="head"), "kind")
    assert [name for name, kind in kinds.items() if kind == "output"] == ["model.last.weight"]
    for key in ("head*", "head.weight", "head", "model.last.weight"):
        given = normopt.param_groups(aliased, overrides={key: {"lr": 0.5}})
        assert by_name(given, "lr")["model.last.weight"] == 0.5
    layer = nn.Linear(4, 4)
    shared = Net(layers=nn.ModuleList([layer] * 3), head=nn.Linear(4, 2))
    given = normopt.param_groups(shared, overrides={"layers.2.weight": {"lr": 0.5}})
    assert by_name(given, "lr")["layers.0.weight"] == 0.5
    assert "layers.0.weight (= layers.1.weight, …)" in str(given)


def test_what_follows_a_name_like_an_output_layers_is_asked_for():
    def layer(n=8):
        return nn.Linear(8, n)

    for names in (("fc1", "fc2", "fc_mean", "fc_logstd"), ("fc1", "value", "advantage"), ("fc", "gru", "linear")):
        model = Net(**{name: nn.GRU(8, 8) if name == "gru" else layer() for name in names})
        assert outputs(model) == []
        assert f"note: no output layer was found: pass output='{names[-1]}' if it is one" in str(
            normopt.param_groups(model)
        )
        getattr(model, names[-1]).requires_grad_(False)
        trained = [name for name in names[:-1] if name != "gru"][-1]
        assert f"note: no output layer was found: pass output='{trained}'" in str(normopt.param_groups(model))
        assert "no output" not in str(normopt.param_groups(model.requires_grad_(False)))
    groups = normopt.param_groups(Net(fc1=layer(), out=layer(), fc2=layer()))
    assert "note: fc2, out look like output layers, and fc2 was taken for it" in str(groups)
    # A part of the model has what it takes for an output; the model's own is a container.
    encoder = type("Encoder", (Net,), {"get_classifier": lambda self: self.fc})(body=layer(), fc=layer())
    head = nn.Sequential(layer(), nn.ReLU(), layer(3))
    assert outputs(Net(encoder=encoder, mlp_head=head)) == ["mlp_head.2.weight"]
    assert outputs(Net(encoder=encoder, other=head)) == ["encoder.fc.weight"]
    # What holds a chain of layers alone is as the chain.
    chain = nn.Sequential(layer(), nn.ReLU(), layer(3))
    assert outputs(chain) == ["2.weight"]
    assert outputs(nn.DataParallel(chain)) == ["module.2.weight"]
    assert outputs(Net(main=chain)) == ["main.2.weight"]
    # Heads of a shape that could be a chain's.
    heads = nn.ModuleList([layer(), layer(3)])
    assert outputs(Net(body=layer(), heads=heads)) == ["heads.0.weight", "heads.1.weight"]
    assert outputs(Net(body=layer(), classifier=heads)) == ["classifier.1.weight"]


def test_how_a_module_stores_its_matrices_survives_another_kind():
    class Conv1D(nn.Module):  # transformers', in × out
        def __init__(self, rows, columns):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(columns, rows))

    def read(model, preset="muon", **kinds):
        overrides = {name: {"kind": kind} for name, kind in kinds.items()}
        group = normopt.param_groups(model, preset, overrides=overrides, output=None)[0]
        return group.get("norm_matrix_view"), group.get("norm_blocks")

    fused = Net(c_attn=Conv1D(24, 8))
    assert read(fused) == ("transposed", 3)
    assert read(fused, c_attn="linear") == read(fused, "scion", c_attn="output") == ("transposed", None)
    plain = Net(layer=nn.Linear(8, 24), num_heads=4)
    assert read(plain, layer="qkv") == (None, 12)
    assert read(Net(layer=nn.Linear(8, 24)), layer="qkv") == (None, 3)
    assert read(Net(layer=nn.Linear(8, 24)), layer="gate_up") == (None, 2)
    assert read(Net(layer=Conv1D(24, 8)), layer="qkv") == ("transposed", 3)
    assert read(Net(embed=nn.Embedding(9, 4)), embed="linear") == (None, None)
    experts = type("Experts", (Net,), {"is_transposed": True})(w1=nn.Parameter(torch.ones(3, 8, 4)))
    assert read(experts) == read(experts, w1="router") == ("batch-transposed", None)
    assert "experts " in str(normopt.param_groups(experts))
    assert "experts? " in str(normopt.param_groups(type("Experts", (Net,), {})(w1=nn.Parameter(torch.ones(3, 8, 4)))))


def test_parametrized_weights_of_any_name_do_not_decay_and_broken_properties_do_not_matter():
    with pytest.warns(FutureWarning, match="deprecated"):
        lstm = nn.utils.weight_norm(nn.LSTM(8, 8), "weight_hh_l0")
    groups = normopt.param_groups(lstm)
    decays, kinds = by_name(groups, "weight_decay"), by_name(groups, "kind")
    assert (kinds["weight_hh_l0_v"], kinds["weight_hh_l0_g"]) == ("recurrent", "vector")
    assert decays["weight_hh_l0_v"] == decays["weight_hh_l0_g"] == 0
    assert decays["weight_ih_l0"] is None

    def fail(self):
        raise RuntimeError("call setup() first")

    broken = type("Attention", (Net,), {"head_dim": property(fail), "experts": property(fail)})(
        qkv=nn.Linear(8, 24), gate=nn.Linear(8, 8)
    )
    assert by_name(normopt.param_groups(broken, "muon"), "norm_blocks")["qkv.weight"] == 3


def test_factors_of_lora_are_of_one_kind_in_any_form():
    for rank, kind in ((8, "linear"), (2, "gate"), (1, "gate")):
        bare = Net(lora_A=nn.Parameter(torch.ones(rank, 16)), lora_B=nn.Parameter(torch.ones(16, rank)))
        parts = {"lora_A": nn.Linear(16, rank, bias=False), "lora_B": nn.Linear(rank, 16, bias=False)}
        for model in (bare, Net(**{name: nn.ModuleDict({"default": part}) for name, part in parts.items()})):
            assert set(by_name(normopt.param_groups(model, output=None), "kind").values()) == {kind}
    factor = nn.ParameterDict({"default": nn.Parameter(torch.ones(8, 16))})
    groups = normopt.param_groups(Net(lora_embedding_A=factor))
    assert by_name(groups, "kind") == {"lora_embedding_A.default": "embedding"}


class Bare(nn.Module):
    """Parameters that no layer of torch's owns: a table by its name, a matrix and a stack of unknown kind."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(3, 4))
        self.mixing = nn.ParameterList(nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.stack = nn.Parameter(torch.randn(2, 4, 4))
        self.head = nn.Linear(4, 5)


def test_a_parameter_that_nobody_claims_is_refused_with_the_override_that_claims_it():
    with pytest.raises(
        ValueError, match=r"Bare: stack \(2, 4, 4\); ParameterList: mixing\.\* \(4, 4\), 2 of them\."
    ) as error:
        normopt.param_groups(Bare(), "muon")
    written = re.search(r"overrides=(\{.*?\}\})", str(error.value))[1]
    overrides = ast.literal_eval(written)
    assert overrides == {
        "mixing.*": {"kind": "vector"},
        "stack": {"kind": "experts"},
    }
    for preset in PRESETS:
        depth = {"residual_depth": 1} if preset == "modular" else {}
        groups = normopt.param_groups(Bare(), preset, overrides=overrides, **depth)
        assert by_name(groups, "kind")["mixing.1"] == "vector"
    assert by_name(groups, "norm_matrix_view") | {} == {
        "tokens": "transposed",
        "stack": "batch",
        **dict.fromkeys(("mixing.0", "mixing.1", "head.weight", "head.bias")),
    }
    given = overrides | {"mixing.*": {"norm": "l2", "scale": "dual"}}
    groups = normopt.param_groups(Bare(), "scion", overrides=given)
    assert by_name(groups, "kind")["mixing.0"] == "other"
    assert by_name(groups, "norm")["mixing.0"] == "l2"
    normopt.Scion(groups)
    # A pattern that fits a parameter of known kind, too, is written out.
    model = nn.ModuleDict({"a": Bare(), "b": nn.ModuleList([Bare()])})
    with pytest.raises(ValueError, match=r'"a\.mixing\.\*": .*"b\.\*\.mixing\.\*": '):
        normopt.param_groups(model)


def test_a_refusal_offers_what_a_parameter_may_be():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.places = nn.Parameter(torch.ones(4, 16, 24)), nn.Parameter(torch.ones(7, 8))

    for preset in PRESETS:
        with pytest.raises(ValueError, match="which, by overrides") as error:
            normopt.param_groups(Net(), preset)
        said = re.findall(r'^  ("\w+": \{.*?\})  +(.*)$', str(error.value), re.MULTILINE)
        offers = [(ast.literal_eval(f"{{{entry}}}"), words) for entry, words in said]
        assert [next(iter(entry)) for entry, _ in offers] == ["mix"] * 5 + ["places"] * 4
        depth = {"residual_depth": 1} if preset == "modular" else {}
        for entry, words in offers:
            rest = {"places": {"kind": "vector"}, "mix": {"kind": "vector"}}
            groups = normopt.param_groups(Net(), preset, overrides=rest | entry, **depth)
            (name,) = entry
            rule = "AdamW" if by_name(groups, "metric")[name] == "diagonal" else by_name(groups, "norm")[name]
            assert words.startswith(rule)
            assert ("no decay" in words) == (by_name(groups, "weight_decay")[name] == 0)
            opt = normopt.SteepestDescent(groups)  # whose matrices are as many, of the shape that the words say
            if name == "mix" and (shape := re.search(r"(\w+) matri.* (\d+) × (\d+)", words)) and rule != "AdamW":
                group = next(group for group in opt.param_groups if name in group["param_names"])
                view = group.get("norm_matrix_view") or "flatten"
                if group["norm"] == "spectral":
                    y = normopt.norms.matrices.to_matrices(group["params"][0], view, 1)[0]
                    count = 1 if shape[1] == "one" else int(shape[1])
                    assert y.shape == (count, int(shape[2]), int(shape[3]))


@pytest.mark.parametrize(
    "name", ["pos", "positions", "pe", "wpe", "cls", "registers", "latent_array", "rel_pos", "pos_emb", "tokens"]
)
def test_names_of_bare_tables(name):
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_parameter(name, nn.Parameter(torch.ones(7, 4)))
    model.register_parameter("of_one", nn.Parameter(torch.ones(1, 7, 4)))
    groups = normopt.param_groups(model, overrides={"of_one": {"kind": "table"}})
    assert by_name(groups, "kind")[name] == "table"
    assert by_name(groups, "weight_decay")[name] == 0


def test_tied_parameters_have_all_their_names():
    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.body = nn.Embedding(9, 4), nn.Linear(4, 4)
            self.lm_head = nn.Linear(4, 9, bias=False)
            self.lm_head.weight = self.wte.weight

    groups = normopt.param_groups(GPT())
    line = next(line for line in str(groups).splitlines() if line.startswith("output"))
    assert line.startswith("output ")  # not guessed
    assert line.endswith("wte.weight (= lm_head.weight)")
    assert "?" not in str(groups)
    for key in ("wte.weight", "lm_head.weight", "wte", "lm_head", "kind:output", nn.Embedding):
        given = normopt.param_groups(GPT(), overrides={key: {"weight_decay": 0.5}})
        assert by_name(given, "weight_decay")["wte.weight"] == 0.5
    given = normopt.param_groups(GPT(), overrides={nn.Linear: {"weight_decay": 0.5}})
    assert set(by_name(given, "weight_decay").values()) == {0.5}
    message = (
        r"no parameter is of the kind 'embedding', only of linear, output, bias; "
        r"wte\.weight \(= lm_head\.weight\) is of the kind 'output'"
    )
    with pytest.raises(ValueError, match=message):
        normopt.param_groups(GPT(), overrides={"kind:embedding": {"weight_decay": 0.5}})
    with pytest.raises(ValueError, match="frozen parameters are in no group"):
        normopt.param_groups(GPT(), overrides={"kind:frozen": {"lr": 0.5}})
    with pytest.raises(ValueError, match="did you mean 'router'"):
        normopt.param_groups(GPT(), overrides={"kind:rooter": {"lr": 0.5}})


def test_entries_of_a_kind_see_the_kinds_that_earlier_entries_give():
    first, then = {"hidden": {"kind": "gate"}}, {"kind:gate": {"lr": 0.5}}
    assert by_name(normopt.param_groups(Mix(), overrides=first | then), "lr")["hidden.weight"] == 0.5
    with pytest.raises(ValueError, match="no parameter is of the kind 'gate'"):
        normopt.param_groups(Mix(), overrides=then | first)
    both = {"kind:linear": {"kind": "gate"}} | then
    assert by_name(normopt.param_groups(Mix(), overrides=both), "lr")["hidden.weight"] == 0.5


def test_a_modules_bias_keeps_its_kind_and_fields_go_by_their_settings_name():
    groups = normopt.param_groups(Mix(), "muon", overrides={"hidden": {"kind": "output"}})
    assert by_name(groups, "kind")["hidden.weight"] == "output"
    assert by_name(groups, "kind")["hidden.bias"] == "bias"
    named = normopt.param_groups(Mix(), "muon", overrides={"hidden.bias": {"kind": "embedding"}})
    assert by_name(named, "kind")["hidden.bias"] == "embedding"


def test_the_output_layer():
    tied = nn.ModuleDict(dict(head=nn.Linear(4, 9, bias=False), body=nn.Linear(4, 4), embed=nn.Embedding(9, 4)))
    assert by_name(normopt.param_groups(tied, "muon", output="last"), "kind")["body.weight"] == "output"
    assert by_name(normopt.param_groups(tied, "muon"), "kind")["body.weight"] == "linear"
    headless = normopt.param_groups(nn.ModuleDict(dict(tied.items() - {("head", tied["head"])})))
    assert "output" not in by_name(headless, "kind").values()
    assert "pass output='body' if" in str(headless) or "pass output='body'" in str(headless)
    both = normopt.param_groups(Mix(), output=["head", "hidden"])
    assert by_name(both, "kind")["hidden.weight"] == by_name(both, "kind")["head.weight"] == "output"
    tied["embed"].weight = tied["head"].weight
    kinds = by_name(normopt.param_groups(tied, "scion"), "kind")
    assert kinds == {"head.weight": "output", "body.weight": "linear", "body.bias": "bias"}
    first = nn.ModuleDict(dict(embed=nn.Embedding(9, 4), body=nn.Linear(4, 4), head=nn.Linear(4, 9, bias=False)))
    first["head"].weight = first["embed"].weight
    groups = normopt.param_groups(first, "scion")
    assert by_name(groups, "kind") == {"embed.weight": "output", "body.weight": "linear", "body.bias": "bias"}
    assert by_name(groups, "norm_matrix_view")["embed.weight"] is None
    assert by_name(normopt.param_groups(Mix(), "muon", output="hidden"), "kind")["hidden.weight"] == "output"
    assert "output" not in by_name(normopt.param_groups(Mix(), "muon", output=None), "kind").values()


REFUSED = [
    (dict(preset="moun"), ValueError, "preset must be one of .*did you mean 'muon'"),
    (dict(output="heed"), ValueError, "no module of the model is called 'heed'.*'head'"),
    (dict(output="norm2"), ValueError, "has no weight matrix"),
    (dict(overrides={"hiden.*": {}}), ValueError, "matches no parameter; did you mean"),
    (dict(overrides={nn.LSTM: {}}), ValueError, "matches no parameter"),
    (dict(overrides={nn.Sequential: {}}), ValueError, "no module of this type has parameters of its own"),
    (dict(overrides=[("head", {})]), TypeError, "overrides must be a dict such as"),
    (dict(output=1), TypeError, "output must be the name of a module, a list of names"),
    (dict(output=nn.Linear(1, 1)), TypeError, "output must be the name of a module"),
    (dict(overrides={"head": 3}), TypeError, "must be a dict of settings"),
    (dict(overrides={3: {}}), TypeError, "a pattern or a module type"),
    (dict(overrides={"head": {"kind": "haed"}}), ValueError, "kind must be one of"),
    (dict(overrides={"head": {"mass": 1}}), ValueError, '"mass" is only for preset="modular"'),
    (dict(preset="modular", overrides={"head": {"mass": 0}}), ValueError, "mass must be in"),
    (dict(preset="modular", overrides={"head": {"sensitivity": 2}}), ValueError, "sensitivity is computed"),
    (dict(overrides={"hidden.weight": {"method": "svd"}}), ValueError, "'method': as a setting .* 'norm_method'"),
    (dict(overrides={"embed": {"blocks": 3}}), ValueError, "'blocks': as a setting it is called 'norm_blocks'"),
    (dict(overrides={"hidden": {"norm_blocks": (8, 4, 4)}}), ValueError, "hidden.weight: .* adds up to 16, not to"),
    (dict(overrides={"hidden": {"norm_blocks": 3}}), ValueError, "hidden.weight: blocks = 3 does not divide the 20"),
    (dict(overrides={"hidden": {"norm_aspect": "rsm"}}), ValueError, "hidden.weight: aspect must be one of"),
    (
        dict(overrides={"hidden": {"norm_block": 4}}),
        ValueError,
        "hidden'.: 'norm_block' is not a setting; .*'norm_blocks'",
    ),
    *(
        (dict(overrides={"head": {key: 0.5}}), ValueError, f"'{key}' is not a setting; lr_ratio")
        for key in ("lr_mult", "lr_scale")
    ),
    (
        dict(overrides={"head": {"optimizer": "adamw"}}),
        ValueError,
        "'optimizer' is not a setting; .*\"gate\"} is AdamW's",
    ),
    (dict(overrides={"head": {"colour": "red"}}), ValueError, "'colour' is not a setting"),
    (
        dict(overrides={"head": {"wd": 0.1}}),
        ValueError,
        "'wd' is not a setting; the strength of the decay is weight_decay",
    ),
    (dict(overrides={"output": {"lr": 0.1}}), ValueError, "matches no parameter; did you mean 'kind:output'"),
    (
        dict(overrides={"hid": {"lr": 0.1}}),
        ValueError,
        r"did you mean 'hidden\.weight' or 'hidden\.bias', or a pattern",
    ),
    (dict(overrides={"head": {"weigth_decay": 0.1}}), ValueError, "head'.: .*did you mean 'weight_decay'"),
    (
        dict(overrides={"head": {"weight_decay": None}}),
        TypeError,
        r"overrides\['head'\]: weight_decay must be a number",
    ),
    (dict(overrides={nn.Linear: {"lr": "1e-3"}}), TypeError, r"overrides\[Linear\]: lr must be a number"),
    (dict(overrides={"head": {"lr_ratio": -1.0}}), ValueError, r"overrides\['head'\]: lr_ratio must be in"),
    (dict(overrides={"head": {"radius": 0}}), ValueError, r"overrides\['head'\]: radius must be in"),
    (dict(overrides={"head": {"betas": (0.9,)}}), ValueError, r"overrides\['head'\]: betas must be 2 numbers"),
    (dict(overrides={"head": {"scale": "unti"}}), ValueError, r"overrides\['head'\]: .*did you mean 'unit'"),
    (dict(overrides={"head": {"norm": 3}}), TypeError, "head.weight.*: norm must be a registered name"),
    (dict(overrides={"head": {"params": []}}), ValueError, "params is of a group"),
    (dict(residual_depth=3), ValueError, 'residual_depth is only for preset="modular"'),
    (dict(preset="modular", residual_depth=0), ValueError, "residual_depth must be in"),
    (dict(preset="modular", residual_depth=2.5), TypeError, "residual_depth must be an integer"),
    (dict(overrides={"head": {"norm": "spectrall"}}), ValueError, "did you mean 'spectral'"),
    (dict(preset="muon", lr_ratio=0.1), ValueError, "lr_ratio is for the presets with two rules"),
    (dict(preset="muon-adamw", lr_ratio=0), ValueError, "lr_ratio must be in"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_what_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        normopt.param_groups(Mix(), **arguments)


def test_groups_of_a_preset_go_to_its_optimizer_only():
    class Own(normopt.Scion):
        pass

    class Engine(normopt.SteepestDescent):
        pass

    zoo = (normopt.Muon, normopt.NorMuon, normopt.AdamW, normopt.Adam, normopt.Scion, normopt.SCALE, normopt.Lion)
    right = {
        "muon-adamw": (normopt.Muon, normopt.NorMuon),
        "normuon-adamw": (normopt.NorMuon,),
        "adamw": (normopt.AdamW,),
        "muon": (normopt.Muon, normopt.NorMuon),
        **dict.fromkeys(("scion", "scion-cnn", "scion-mlp"), (normopt.Scion, Own)),
        "scale": (normopt.SCALE,),
    }
    for preset, classes in right.items():
        for cls in (*zoo, Own, Engine, normopt.SteepestDescent):
            groups = normopt.param_groups(Mix(), preset)
            if cls in (*classes, Engine, normopt.SteepestDescent):
                cls(groups)
                continue
            given = f"of preset '{preset}', for normopt.{classes[0].__name__}, but were given to {cls.__name__}: "
            with pytest.raises(ValueError, match=given):
                cls(groups)
    for cls in zoo:
        cls(normopt.param_groups(Mix(), "modular"))


def test_names_with_brackets_and_groups_of_the_users_own():
    odd = nn.ModuleDict({"layers[0]": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    groups = normopt.param_groups(odd, overrides={"layers[0].weight": {"lr": 0.5}})
    assert by_name(groups, "lr")["layers[0].weight"] == 0.5
    groups.append({"params": [nn.Parameter(torch.ones(3))], "lr": 0.1})
    assert "(no name)" in str(groups)


def test_what_is_no_model_or_not_ready_is_refused():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, but was given generator"):
        normopt.param_groups(Mix().parameters(), "muon")
    with pytest.raises(TypeError, match=r"given list: give the model, and settings of some .* by overrides=\{"):
        normopt.param_groups([{"params": Mix().parameters(), "weight_decay": 0.0}])
    with pytest.raises(ValueError, match="run a batch through the model first"):
        normopt.param_groups(nn.LazyLinear(3), "muon")


# Frozen parameters.


def frozen(model, *trained):
    """All that is not of the modules ``trained``."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(trained))
    return model


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("trained", [("head",), ("hidden.bias", "conv"), ("embed", "norm2")])
def test_frozen_parameters_are_in_no_group_and_change_nothing_of_the_others(preset, trained):
    whole = normopt.param_groups(Mix(), preset)
    groups = normopt.param_groups(frozen(Mix(), *trained), preset)
    names = {name for group in groups for name, _ in group["params"]}
    assert names == {name for name, _ in Mix().named_parameters() if name.startswith(trained)}
    for key in {key for group in whole for key in group} - {"params", "radius", "share"}:
        before = by_name(whole, key)
        assert by_name(groups, key) == {name: before[name] for name in names}
    if preset != "modular":
        assert by_name(groups, "radius") == {name: by_name(whole, "radius")[name] for name in names}
    assert str(groups).startswith(f"preset {preset!r}: ")
    model = frozen(Mix(), *trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = normopt.SteepestDescent(normopt.param_groups(model, preset), lr=0.1)
    nn.functional.cross_entropy(model(torch.randint(17, (64, 8, 8))), torch.randint(10, (64,))).backward()
    opt.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == names


def test_frozen_layers_have_no_mass():
    """A head gets what it gets alone, whatever is frozen before it."""
    alone = by_name(normopt.param_groups(nn.Linear(20, 10), "modular"), "share")
    shares = by_name(normopt.param_groups(frozen(Mix(), "head"), "modular"), "share")
    assert shares == {"head.weight": alone["weight"], "head.bias": alone["bias"]} == dict.fromkeys(shares, 0.5)
    # By hand: hidden layers 5, of which the conv is all that is left, and vectors 1, of which there are two.
    groups = normopt.param_groups(frozen(Mix(), "hidden.bias", "conv"), "modular")
    assert by_name(groups, "share") == pytest.approx({"conv.weight": 5 / 6, "conv.bias": 1 / 12, "hidden.bias": 1 / 12})
    for given in ({"hidden.weight": {"mass": 7.0}}, {nn.Embedding: {"mass": 7.0}}, {"embed.*": {"kind": "linear"}}):
        groups = normopt.param_groups(frozen(Mix(), "head"), "modular", overrides=given)
        assert by_name(groups, "share") == shares
    given = {"head.*": {"mass": 3.0}, "conv.*": {"mass": 9.0}}
    groups = normopt.param_groups(frozen(Mix(), "head.weight", "norm2"), "modular", overrides=given)
    assert by_name(groups, "share") == {"head.weight": 0.75, "norm2.weight": 0.125, "norm2.bias": 0.125}


def test_the_output_layer_is_the_last_one_frozen_or_not():
    assert by_name(normopt.param_groups(frozen(Mix(), "hidden"), "muon"), "kind")["hidden.weight"] == "linear"
    assert not normopt.param_groups(frozen(Mix(), "nothing"), "muon", output="head")
    assert "0 parameters in 0 tensors" in str(normopt.param_groups(frozen(Mix(), "nothing"), "modular"))
    assert "note: all parameters are frozen" in str(normopt.param_groups(frozen(Mix(), "nothing")))


def test_frozen_modules_need_no_claim_and_are_not_looked_into():
    class Codes(nn.Module):
        """Of no known kind, and of a graph that the modular norm cannot see through."""

        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randint(9, (4, 4)), requires_grad=False)

        def forward(self, x):
            return (x @ self.table.to(x).mT).exp()

    model = nn.Sequential(nn.Linear(4, 4), Codes(), nn.Linear(4, 2))
    for preset in PRESETS:
        names = by_name(normopt.param_groups(model, preset), "kind")
        assert names.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert by_name(normopt.param_groups(model, "modular"), "sensitivity") == dict.fromkeys(names, 1.0)


def test_a_declared_depth_is_that_of_frozen_branches_too():
    before = by_name(normopt.param_groups(Stream(), "modular", residual_depth=4), "sensitivity")
    found = by_name(normopt.param_groups(frozen(Stream(), "ln", "head"), "modular", residual_depth=4), "sensitivity")
    assert found == {name: before[name] for name in ("ln.weight", "ln.bias", "head.weight", "head.bias")}
    assert set(found.values()) == {1.0}
    traced = by_name(normopt.param_groups(Stream(), "modular"), "sensitivity")
    found = by_name(normopt.param_groups(frozen(Stream(), "blocks.0.up"), "modular"), "sensitivity")
    assert found == {name: traced[name] for name in ("blocks.0.up.weight", "blocks.0.up.bias")}


def test_the_table_says_who_got_what():
    lines = str(normopt.param_groups(Stream(), "scion")).splitlines()
    assert lines[0] == "preset 'scion': 1,443 parameters in 30 tensors"
    columns = [
        "kind",
        "optimizer",
        "norm",
        "view",
        "blocks",
        "step",
        "decay",
        "other",
        "settings",
        "parameters",
        "names",
    ]
    assert lines[1].split() == columns
    hidden = next(line for line in lines if line.startswith("linear"))
    assert "blocks.*.out.weight, blocks.*.up.weight" in hidden
    assert "aspect rms" in hidden
    assert any(line.startswith("qkv? ") and " 3 " in line for line in lines)
    assert lines[-1].startswith("?: read from a name alone")
    lines = str(normopt.param_groups(frozen(Mix(), "hidden"))).splitlines()
    assert lines[-1].split()[:2] == ["frozen", "(552)"]
    assert "0.4 lr" in lines[3]
    assert repr(normopt.param_groups(nn.Linear(2, 3), "muon")).count("0.1") == 2


def test_the_table_says_which_blocks_are_frozen_and_what_a_step_and_a_decay_are():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))
    lines = str(normopt.param_groups(frozen(model, "0", "2", "3", "4", "7"), output=None)).splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert rows["linear"].endswith(" {0,2-4,7}.weight")
    assert rows["frozen"].endswith(" {1,5,6}.weight, {1,5,6}.bias")
    assert rows["linear"].split()[3:5] == ["lr", "λ"]
    assert rows["bias"].split()[3:6] == ["0.4", "lr", "0"]
    whole = str(normopt.param_groups(nn.Sequential(*(nn.Linear(4, 4) for _ in range(8))), output=None))
    assert " *.weight\n" in whole
    given = {"0.weight": {"radius": 3.0, "lr_ratio": 0.5, "weight_decay": 0.25}}
    assert "1.5 lr   0.25 " in str(normopt.param_groups(nn.Linear(4, 4), overrides={"weight": given["0.weight"]}))


def test_names_and_settings_are_saved_and_loaded():
    model = Stream()
    opt = normopt.Scion(normopt.param_groups(model, "scion"))
    model(torch.randint(11, (3, 5))).square().mean().backward()
    opt.step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = normopt.Scion(normopt.param_groups(model, "scion"))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert [g["param_names"] for g in other.param_groups] == [g["param_names"] for g in opt.param_groups]
    assert [g["radius"] for g in other.param_groups] == [g["radius"] for g in opt.param_groups]


def test_layers_of_one_shape_are_not_exchanged_by_a_checkpoint():
    def trained(*names):
        model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
        opt = normopt.Muon(normopt.param_groups(model, output=None))
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, i + 1.0)
        opt.step()
        return opt

    saved = trained("a", "b").state_dict()
    other = trained("b", "a")
    before = [x.clone() for state in other.state.values() for x in state.values()]
    with pytest.raises(ValueError, match=r"the checkpoint has 'a\.weight' in the place of 'b\.weight'"):
        other.load_state_dict(saved)
    assert all(map(torch.equal, before, [x for state in other.state.values() for x in state.values()]))
    trained("a", "b").load_state_dict(saved)
    trained("c", "d").load_state_dict(saved)  # renamed
    for group in saved["param_groups"]:
        del group["param_names"]
    other.load_state_dict(saved)  # by position, as it says


# The modular norm.


def test_sensitivities_of_a_chain_and_of_a_damped_stream():
    chain = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 5), nn.Dropout(), nn.ReLU(), nn.Linear(5, 2))
    assert sensitivities(chain, ["0", "2", "5"]) | {} == {"5": 1, "4": 1, "3": 1, "2": 1, "1": 1, "0": 1.1290}
    model = Stream(blocks=1)
    found = sensitivities(
        model, [n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    )
    mlp = 0.5 + 0.5  # through the second branch's addition: the stream's half and the branch's half
    expected = {
        "head": 1,
        "ln": 1,
        "blocks.0.down": 0.5,
        "blocks.0.up": 0.5,
        "blocks.0.ln2": 0.5,
        "blocks.0.out": 0.5 * mlp,
        "blocks.0.qkv": 3 * 0.5 * mlp,  # queries, keys and values
        "tokens": 0.5 * (0.5 + 3 * 0.5) * mlp,
        "places": 0.5 * (0.5 + 3 * 0.5) * mlp,
    }
    assert {k: found[k] for k in expected} == pytest.approx(expected)


def test_a_layer_that_is_used_twice_and_a_bare_parameter():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            x = torch.relu(self.layer(x)) + self.shift
            return self.head(self.layer(x) - 3 * x)

    found = sensitivities(Twice(), ["layer", "head"])
    assert found["layer"] == 1 + (1 + 3)
    assert found["shift"] == 1 + 3
    groups = normopt.param_groups(Twice(), "modular", overrides={"shift": {"kind": "bias"}})
    assert by_name(groups, "sensitivity")["layer.weight"] == 5
    assert by_name(groups, "radius")["layer.weight"] == pytest.approx(5 / 7 / 5)  # masses 5, 1 and 1


def test_attention_that_is_a_layer_of_torchs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(0.25 * self.attention(x, x, x)[0])

    groups = normopt.param_groups(Net(), "modular")
    assert by_name(groups, "sensitivity")["attention.out_proj.weight"] == 0.25
    shares = by_name(groups, "share")
    assert shares["attention.in_proj_weight"] == pytest.approx(3 * shares["attention.out_proj.weight"])


def test_masses_add_up_and_can_be_given():
    for overrides in ({}, {"head.weight": {"mass": 3.0}}):
        groups = normopt.param_groups(Mix(), "modular", overrides=overrides)
        shares = by_name(groups, "share")
        assert sum(shares.values()) == pytest.approx(1)
        head = overrides["head.weight"]["mass"] if overrides else 1.0
        assert shares["head.weight"] == pytest.approx(head / (7 + head))
        assert shares["hidden.weight"] == pytest.approx(2.5 / (7 + head))
    given = normopt.param_groups(Mix(), "modular", overrides={"head.weight": {"radius": 10.0}})
    assert by_name(given, "radius")["head.weight"] == pytest.approx(10 / 8)


def test_a_declared_depth_stands_for_a_trace():
    model = Stream(blocks=3)
    groups = normopt.param_groups(model, "modular", residual_depth=6)
    sensitivity = by_name(groups, "sensitivity")
    assert sensitivity["blocks.1.up.weight"] == pytest.approx(1 / 6)
    assert sensitivity["tokens.weight"] == sensitivity["head.weight"] == sensitivity["ln.weight"] == 1
    radii = by_name(groups, "radius")
    deep = by_name(normopt.param_groups(Stream(blocks=12), "modular", residual_depth=24), "radius")
    assert deep["blocks.1.up.weight"] == pytest.approx(radii["blocks.1.up.weight"])  # whatever the depth
    assert deep["head.weight"] == pytest.approx(radii["head.weight"])


UNTRACEABLE = {
    "cannot trace": lambda self, x: self.head(x) if x.sum() > 0 else x,
    "is a mul of two values": lambda self, x: self.head(x) * x,
    "is a truediv of two values": lambda self, x: 1 / self.head(x),
    "the sensitivity of 'exp'": lambda self, x: self.head(x).exp(),
    "the sensitivity of 'matmul'": lambda self, x: self.head(x) @ x.mT,
    "the sensitivity of .real": lambda self, x: self.head(torch.fft.fft(x).real),
}


@pytest.mark.parametrize("reason", UNTRACEABLE)
def test_what_modular_cannot_see_through_says_so(reason):
    model = type("Net", (nn.Module,), {"forward": UNTRACEABLE[reason]})()
    model.head = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=f"{reason}.*residual_depth=L"):
        normopt.param_groups(model, "modular")
    normopt.param_groups(model, "modular", residual_depth=1)


def test_modular_names_the_model_in_a_wrapper():
    chain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"does not look into a DataParallel: pass the model in it, model\.module"):
        normopt.param_groups(nn.DataParallel(chain), "modular")
    with pytest.raises(ValueError, match=r"pass the model in it, model\._orig_mod"):
        normopt.param_groups(torch.compile(chain), "modular")
    normopt.param_groups(nn.DataParallel(chain), "modular", residual_depth=1)


def test_a_step_moves_the_output_by_no_more_than_the_learning_rate():
    """The modular norm's promise, to first order, on models of the kind that it is proved for: well-normed layers."""
    torch.manual_seed(0)

    class Averaged(nn.Module):
        def __init__(self, damped):
            super().__init__()
            self.first, self.head = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)
            self.blocks = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(4))
            self.damped = damped

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = 0.75 * x + 0.25 * torch.relu(block(x)) if self.damped else torch.relu(block(x))
            return self.head(x)

    for damped in (False, True):
        model = Averaged(damped)
        with torch.no_grad():
            for p in model.parameters():  # of RMS → RMS norm 1
                nn.init.orthogonal_(p)
                p *= math.sqrt(p.shape[0] / p.shape[1])
        x = torch.randn(256, 8)
        x = x / x.square().mean(1, keepdim=True).sqrt()
        largest = 0.0
        for lr in (1e-3, 1e-2):
            for _ in range(20):
                for p in model.parameters():
                    p.grad = torch.randn_like(p)
                start = [p.detach().clone() for p in model.parameters()]
                before = model(x)
                normopt.SteepestDescent(normopt.param_groups(model, "modular"), lr=lr).step()
                moved = (model(x) - before).detach().square().mean(1).sqrt().max()
                largest = max(largest, float(moved) / lr)
                with torch.no_grad():
                    for p, old in zip(model.parameters(), start, strict=True):
                        p.copy_(old)
        assert largest <= 1 + 1e-2
        assert largest > 0.05  # a bound, and not an empty one


@pytest.mark.parametrize("backend", [dict(foreach=False), dict(foreach=True)], ids=str)
@pytest.mark.parametrize("norm", [0.5, 1.0, 2.0])
def test_the_bound_is_reached_at_norms_of_1_and_broken_beyond(norm, backend):
    """A chain of multiples of the identity, all steps along it: the output moves by norm² · lr, to first order."""
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3))).double()
    for layer in model:
        layer.weight.data = norm * torch.eye(6, dtype=torch.float64)
        layer.weight.grad = -torch.eye(6, dtype=torch.float64)
    x = torch.randn(8, 6, dtype=torch.float64)
    x /= x.square().mean(1, keepdim=True).sqrt()
    lr, before = 1e-6, model(x)
    opt = normopt.SteepestDescent(normopt.param_groups(model, "modular"), lr=lr, **backend)
    opt.step()
    moved = (model(x) - before).square().mean(1).sqrt() / lr
    assert moved.detach().numpy() == pytest.approx(norm**2, rel=1e-4)


def test_a_decay_of_the_radius_keeps_norms_and_the_bound():
    def trained(decay):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Linear(n, m, bias=False) for n, m in ((8, 16), (16, 16), (16, 16), (16, 8)))
        ).double()
        for p in model.parameters():  # of RMS → RMS norm 1
            nn.init.orthogonal_(p)
            p.data *= math.sqrt(p.shape[0] / p.shape[1])
        groups = normopt.param_groups(model, "modular")
        for group in groups:
            group["weight_decay"] = group["radius"] if decay else 0.0
        lr, norms, moves = 0.05, [], []
        opt = normopt.SteepestDescent(groups, lr=lr, momentum=0.9, momentum_rule="ema")
        x = torch.randn(64, 8, dtype=torch.float64)
        x /= x.square().mean(1, keepdim=True).sqrt()
        for _ in range(200):
            opt.zero_grad()
            before = model(x)
            (before - 3 * x.flip(1)).square().mean().backward()
            opt.step()
            moves.append(float((model(x) - before).detach().square().mean(1).sqrt().max()) / lr)
            weights = [p.detach() for p in model.parameters()]
            norms += [float(torch.linalg.matrix_norm(w, 2)) * math.sqrt(w.shape[1] / w.shape[0]) for w in weights]
        return max(norms), max(moves)

    norm, move = trained(decay=True)
    assert norm <= 1 + 1e-12
    # Step and decay each move a weight by radius · lr at most: twice the bound of the steps alone.
    assert 0.5 < move <= 2 * 1.03
    norm, move = trained(decay=False)
    assert norm > 1.2
    assert move > 1.5


def test_names_of_own_layers_and_odd_names():
    assert outputs(Net(fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 8), fc3=nn.Linear(8, 4))) == ["fc3.weight"]
    assert outputs(Net(emb=nn.Embedding(9, 8), rnn=nn.LSTM(8, 8), decoder=nn.Linear(8, 9))) == ["decoder.weight"]
    hidden, last = nn.Linear(8, 8), nn.Linear(8, 9)
    for name in ("lm_head", "head", "classifier", "cls"):  # weak names, and hidden layers
        groups = normopt.param_groups(Net(emb=nn.Embedding(9, 8), fc=hidden, **{name: last}))
        assert [n for n, kind in by_name(groups, "kind").items() if kind == "output"] == [f"{name}.weight"]
        assert f"note: {name}, fc look like output layers, and {name} was taken for it" in str(groups)
    assert outputs(Net(classifier_pre=hidden, cls=last)) == ["cls.weight"]
    groups = normopt.param_groups(Net(head=hidden, fc=last))
    assert list(by_name(groups, "kind").values()).count("output") == 2
    assert "note: head, fc look like output layers, and head, fc was taken for it: pass output=" in str(groups)
    assert "note" not in str(normopt.param_groups(Net(body=hidden, fc=last)))
    attention = nn.ModuleList(Net(key=hidden, query=nn.Linear(8, 8), value=nn.Linear(8, 8)) for _ in range(2))
    assert outputs(Net(emb=nn.Embedding(9, 8), sa_heads=Net(heads=attention), lm_head=last)) == ["lm_head.weight"]
    assert outputs(Net(encoder=nn.Sequential(nn.Linear(8, 4)), decoder=nn.Sequential(nn.Linear(4, 8)))) == []
    heads = nn.ModuleDict(dict(a=nn.Linear(8, 4), b=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5))))
    for model in (Net(body=nn.Linear(8, 8), heads=heads), Net(module=Net(body=nn.Linear(8, 8), heads=heads))):
        assert [n.rpartition("heads.")[2] for n in outputs(model)] == ["a.weight", "b.1.weight"]
    odd = nn.ModuleDict({"a[0]": nn.Linear(4, 4), "layer*1": nn.Linear(4, 4)})
    assert "a[0].weight, layer*1.weight" in str(normopt.param_groups(odd))
    odd["a[0]"].mixing = nn.Parameter(torch.ones(4, 4))  # no weight of the layer that holds it
    with pytest.raises(ValueError, match=r"Linear: a\[0\]\.mixing") as error:
        normopt.param_groups(odd)
    overrides = ast.literal_eval(re.search(r"overrides=(\{.*?\}\})", str(error.value))[1])
    assert by_name(normopt.param_groups(odd, overrides=overrides), "kind")["a[0].mixing"] == "vector"
