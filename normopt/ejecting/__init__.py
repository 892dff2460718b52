"""An optimizer as one file that needs torch alone: ``python -m normopt eject "lpsgdm p=8 agr=true"``."""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

import normopt
from normopt._checks import near
from normopt.ejecting import parts
from normopt.ejecting.steps import Step, code
from normopt.engine import SteepestDescent
from normopt.groups.classify import GATE_UP, QKV
from normopt.groups.presets import OPTIMIZERS, PRESETS
from normopt.norms import lanczos, matrices, polar
from normopt.recipe import Recipe
from normopt.stages import Coupling, Metric, RowAverage, Sphere, decay, momentum
from normopt.stages.base import owners
from normopt.zoo import ZOO

# The kinds of layers in a file, and one of `param_groups` for each.
KINDS = {"hidden": "linear", "small": "gate", "embedding": "embedding", "output": "output", "vector": "bias"}
FUNCTIONS = {
    name: function
    for module in (parts, matrices, lanczos)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and function.__module__ == module.__name__
}
STEP = '''
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step every weight that has a gradient, and return what the closure returns, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                if w.dtype not in (torch.float32, torch.float64):
                    raise TypeError(f"this optimizer takes float32 and float64 weights, but one is {w.dtype}")
                @@(w, w.grad, self.state[w], group)
        return loss
'''


def eject(text: str) -> str:
    """Return the source of one file with an optimizer that needs torch alone.

    Its class makes the same steps as normopt's with ``foreach=False``, bit for bit, on float32 and float64 weights.

    Args:
        text: the name of an optimizer of `normopt.list_optimizers()`, "steepestdescent", or a preset of `param_groups`;
            then settings as KEY=VALUE, as in "lpsgdm p=8 agr=true". ``preset=NAME`` gives an optimizer the groups of a
            preset, and ``ratio`` replaces the preset's lr_ratio or radius. Of a preset the class takes a model and the
            name of its output layer.

    Raises:
        ValueError: the name is unknown, a setting is out of range or contradicts another, or no file can do this step.
        TypeError: a setting does not exist, or is of the wrong type.
    """
    name, settings = _parse(text)
    known = {**ZOO, "steepestdescent": SteepestDescent}
    preset, ratio = settings.pop("preset", None if name in known else name), settings.pop("ratio", None)
    if preset not in (None, *PRESETS):
        raise ValueError(f"unknown optimizer or preset {preset!r}{near(preset, [*known, *PRESETS])}")
    if preset == "modular":
        raise ValueError("modular cannot be ejected, because its radii are computed from the graph of a model")
    if preset is None and ratio is not None:
        raise ValueError("ratio replaces the lr_ratio or radius of a preset: give one, or leave ratio out")
    cls = known[name if name in known else str(OPTIMIZERS[preset]).lower()]
    if preset and OPTIMIZERS[preset] != cls.__name__:
        raise ValueError(f"preset {preset!r} is for {OPTIMIZERS[preset]}, not for {cls.__name__}")
    if preset is None:
        optimizer = _made(cls, [nn.Parameter(torch.ones(4, 4))], settings)
        step = Step(_recipe(optimizer, optimizer.param_groups[0]))
        body = _class(cls.__name__, step.numbers, "update") + _update("update", step)
    else:
        layers = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 3), "c": nn.Embedding(8, 8), "d": nn.Linear(8, 8)}
        groups = normopt.param_groups(nn.ModuleDict(layers), preset, output="d")
        for group in groups if ratio is not None else ():
            group |= {key: ratio for key in ("lr_ratio", "radius") if key in group}
        body = _with_layers(_made(cls, groups, settings), preset)
    body += _functions(body)
    return _head(cls, text, body, settings) + body


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the settings of "lpsgdm p=8 agr=true"."""
    name, *words = text.split() or [""]
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise ValueError(f"a setting is KEY=VALUE, but {word!r} of {text!r} is not")
        settings[key] = value == "true" if value in ("true", "false") else value
        for kind in (float, int) if isinstance(settings[key], str) else ():
            with contextlib.suppress(ValueError):
                settings[key] = kind(value)
    return name.lower(), settings


def _made(cls: type[SteepestDescent], params: Any, settings: Mapping[str, Any]) -> SteepestDescent:
    """Return an optimizer of the settings, of which beta1, beta2 and beta3 may be those of its ``betas``."""
    given = {"foreach": False, **settings}
    usual = getattr(inspect.signature(cls).parameters.get("betas"), "default", ())
    betas = {f"beta{i}": beta for i, beta in enumerate(usual, 1)}
    if betas.keys() & given.keys():
        given["betas"] = tuple(given.pop(key, beta) for key, beta in betas.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the shapes of the parameters, which are ours
        return cls(params, **given)


def _recipe(optimizer: SteepestDescent, group: Mapping[str, Any]) -> Recipe:
    return optimizer._make_recipe(group, group["params"])


def _with_layers(optimizer: SteepestDescent, preset: str) -> str:
    """Return the classes and functions of a preset."""
    groups = {group["kind"]: group for group in optimizer.param_groups}
    decay = optimizer.defaults["weight_decay"]
    names: dict[str, str] = {}  # of functions, by their lines
    updates, table, rules, defaults = "", "", "", dict[str, Any]()
    for kind, theirs in KINDS.items():
        group = groups[theirs]
        recipe = _recipe(optimizer, group | {"weight_decay": decay})
        step = Step(recipe, 'group["blocks"]' * (kind in ("hidden", "small")), vectors=kind == "vector")
        lines = "\n".join(step.lines)
        if lines not in names:
            rule = "adamw" if recipe.metric.runs() else recipe.direction.norm
            names[lines] = f"{rule}_step" + (f"_{len(names)}" if f"{rule}_step" in names.values() else "")
            updates += _update(names[lines], step)
        usual = {"lr": group["lr"], "weight_decay": decay}
        own = {key: group[key] for key in step.numbers if key != "lr" and group[key] != usual.get(key)}
        defaults |= {key: value for key, value in usual.items() if key in step.numbers}
        entries = [f'"{key}": {code(value)}' for key, value in own.items()]
        line = f'    "{kind}": {{{", ".join(entries)}}},\n'
        broken = "".join(f"        {entry},\n" for entry in entries)  # as ruff breaks it
        table += line if len(line) <= 121 else f'    "{kind}": {{\n{broken}    }},\n'
        rules += f'    "{kind}": {names[lines]},\n'
    called = type(optimizer).__name__
    called += "" if preset == called.lower() else "".join(x.title() for x in preset.split("-")[1:])
    tables = f"\n\n# The step and the settings of each kind of layer.\nRULES = {{\n{rules}}}\n"
    tables += f"KINDS: dict[str, dict[str, Any]] = {{\n{table}}}\n"
    tables += "# Names of layers that are several in one.\n"
    for name, pattern in (("QKV", QKV), ("GATE_UP", GATE_UP)):
        tables += f'{name} = re.compile(r"{"(?i)" * bool(pattern.flags & re.I)}{pattern.pattern}")\n'
    return _class(called.replace("Adamw", "AdamW"), defaults, 'RULES[group["kind"]]', layers=True) + updates + tables


def _class(name: str, numbers: Mapping[str, Any], call: str, layers: bool = False) -> str:
    """Return the class, whose constructor takes the numbers; with ``layers`` it takes a model."""
    numbers = {key: numbers[key] for key in sorted(numbers, key=lambda key: key != "lr")}
    arguments = [f"{key}: float = {code(value)}" for key, value in numbers.items()]
    docs = [f"{key}: {_words(key)}. Default {code(value)}." for key, value in numbers.items()]
    params, own = ["params: ParamsT"], ["params: parameters, or param groups, which may have settings of their own."]
    if layers:
        params = ["model: nn.Module", "output: str | None"]
        own = ["model: the model.", "output: the name of the output layer; None if there is none."]
        arguments.append("blocks: Mapping[str, int] | None = None")
        docs.append("blocks: how many matrices a weight holds, by the name of its module: see groups_of.")
    what = "groups_of(model, output, blocks or {}, KINDS)" if layers else "params"
    defaults = _wrapped("        defaults = dict(", [f"{key}={key}" for key in numbers], ")")
    lines = "".join(f"        {line}\n" for line in own + docs)
    signature = _wrapped("    def __init__(", ["self", *params, *arguments], ") -> None:")
    text = (
        f'\n\nclass {name}(Optimizer):\n    """See the head of this file.\n\n    Args:\n{lines}    """\n\n{signature}'
    )
    return f"{text}{defaults}        super().__init__({what}, defaults)\n" + STEP.replace("@@", call)


def _words(key: str) -> str:
    """Return what a setting is: the beginning of its line."""
    return re.split(r"[,;] ", owners()[key].settings[key].doc)[0]


def _wrapped(start: str, items: Iterable[str], end: str) -> str:
    """Return a call or signature in one line, or its items on one or more of their own, as ruff breaks them."""
    inside, indent = ", ".join(items), " " * (len(start) - len(start.lstrip()))
    if len(f"{start}{inside}{end}") <= 120:
        return f"{start}{inside}{end}\n"
    if len(inside) + len(indent) + 4 <= 120:
        return f"{start}\n{indent}    {inside}\n{indent}{end}\n"
    return f"{start}\n" + "".join(f"{indent}    {item},\n" for item in items) + f"{indent}{end}\n"


def _update(name: str, step: Step) -> str:
    """Return the function of a weight's step."""
    signature = _wrapped(
        f"def {name}(", ["w: Tensor", "g: Tensor", "state: dict[str, Any]", "group: dict[str, Any]"], ") -> None:"
    )
    read = f"{', '.join(step.numbers)} = " + ", ".join(f'group["{key}"]' for key in step.numbers)
    numbers = [read] if len(read) <= 116 else [f'{key} = group["{key}"]' for key in step.numbers]
    lines = "".join(f"    {line}\n" for line in numbers + step.lines)
    return f'\n\n{signature}    """Step the weight w along its gradient g."""\n{lines}'


def _functions(text: str) -> str:
    """Return the functions that a text calls, and that these call."""
    found: dict[str, str] = {}
    while new := [x for x in re.findall(r"\b(\w+)\(", text) if x in FUNCTIONS and x not in found]:
        source = inspect.getsource(FUNCTIONS[new[0]])
        if FUNCTIONS[new[0]].__module__ != parts.__name__:  # its first paragraph, and where it is from
            doc = FUNCTIONS[new[0]].__doc__ or ""
            kept = [x for i, x in enumerate(doc.split("\n\n")) if i == 0 or x.lstrip().startswith("Source:")]
            source = source.replace(
                f'"""{doc}"""',
                '"""'
                + "\n\n".join(x.rstrip() for x in kept)
                + ('\n    """' if len(kept) > 1 or "\n" in kept[0] else '"""'),
            )
        if 'group["blocks"]' not in text:
            source = re.sub(r"    x = x\[0\] if len.*\n    addmm = .*\n", "    x = x[0]\n", source)
            source = re.sub(r"\baddmm\(", "torch.addmm(", source)
        if ".shape[2:]" not in text:  # the number of taps counts for nothing
            source = re.sub(r" +if patches:\n.*\n", "", source)
        found[new[0]] = source
        text += source
    constants = "".join(line for name, line in _constants(polar) if re.search(rf"\b{name}\b", text))
    return (f"\n\n{constants}" if constants else "") + "".join(f"\n\n{source}" for source in found.values())


def _constants(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Yield the constants of a module, each with the line that makes it, without its type."""
    source = inspect.getsource(module)
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and node.value is not None:
            yield target.id, f"{target.id} = {ast.get_source_segment(source, node.value)}\n"


def _head(cls: type[SteepestDescent], text: str, body: str, settings: Mapping[str, Any]) -> str:
    """Return what is above the class: the rule with its source, where the file is from, and the imports."""
    summary, *paragraphs = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    rule = paragraphs[1] if cls is not SteepestDescent else ""  # below "::"
    source = next(x for x in paragraphs if x.startswith("Source:"))
    docs = {
        "agr": parts.regularize.__doc__,
        "decay": decay.RULES[settings["decay"]].__doc__ if "decay" in settings else "",
        "momentum_rule": momentum.RULES[settings["momentum_rule"]].__doc__ if "momentum_rule" in settings else "",
        "metric": Metric.__doc__,
        "constraint": Sphere.__doc__,
        "coupling": Coupling.__doc__,
        "row_beta": RowAverage.__doc__,
    }
    options = [f"{key}: " + " ".join(inspect.cleandoc(docs[key] or "").split()) for key in settings if docs.get(key)]
    options = [re.sub(r"; see `\w+`", "", x).replace("agr: Return ", "agr: ") for x in options]
    if "def adamw_step(" in body:
        adamw = inspect.cleandoc(normopt.AdamW.__doc__ or "").split("\n\n")
        options.append("adamw_step: " + " ".join(next(x for x in adamw if x.startswith("Source:")).split()))
    made = (
        f"Made from normopt {normopt.__version__} by `python -m normopt eject {text!r}`. It needs torch alone, and on "
        f"float32 and float64 weights makes the same steps as normopt.{cls.__name__} with foreach=False, bit for bit. "
        "State and settings have the same names."
    )
    rule = f"::\n\n{rule}" if rule else ""
    blocks = [rule, *(textwrap.fill(x, 120) for x in (source.replace("\n", " "), *options, made))]
    head = "\n\n".join([summary.replace("\n", " "), *filter(None, blocks), "SPDX-License-Identifier: Apache-2.0"])
    used = {"math": "import math\n", "re": "import re\n", "Mapping": "from collections.abc import Mapping\n"}
    imports = "".join(line for word, line in used.items() if re.search(rf"\b{word}[.\[]", body))
    torchs = "from torch import Tensor, nn\nfrom torch.optim import Optimizer\n"
    if "nn." not in body:
        torchs = "from torch import Tensor\nfrom torch.optim.optimizer import Optimizer, ParamsT\n"
    imports = f"from __future__ import annotations\n\n{imports}from typing import Any\n\nimport torch\n{torchs}"
    return f'"""{head}\n"""\n\n{imports}'
