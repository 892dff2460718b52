"""Every public symbol is documented: what it takes, gives, raises and comes from. Its examples give what they show."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import doctest
import importlib.util
import inspect
import pydoc
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch

import normopt
from normopt.addons.attach import AddOn
from normopt.norms import Norm, registry
from normopt.schedules import PSchedule
from normopt.settings import Arguments, Common, Coordinates, Settings
from tests.test_docs import PUBLIC

HEADS = ("Args", "Attributes", "Returns", "Raises", "Warns", "Example", "Source", "State", "Memory", "Cost")
KINDS = [Common, Coordinates, Settings]  # each has the settings of those before it
CHECKS = {"check_number": {"TypeError", "ValueError"}, "check_choice": {"ValueError"}, "check_bool": {"TypeError"}}
# What only looks as if it could be raised, because what is called is given nothing that it would refuse.
CANNOT = {
    "normopt.integrations.timm.register": {"TypeError", "ValueError"},  # names that list_optimizers() gave
    "normopt.diagnostics.curvature.Spectrum.plot": {"TypeError", "ValueError"},  # a width that is a number above 0
    "normopt.norms.lp.Lp.on": {"TypeError", "ValueError"},  # a p that was checked when the norm was made
    "normopt.engine.SteepestDescent.state_dict": {"TypeError", "ValueError"},  # which it suppresses
    "normopt.schedules.adaptive.AdaptiveP.step": {"TypeError", "ValueError"},  # gradients are floats; so are starts
}
# How a summary starts that says what a method returns, so that it needs no Returns section.
NAMES_IT = re.compile(r"(Return|Reduce|The|An?|Every|Everything|Whether|What|This norm|One step|‖|D\(|``|\(|p |f )")


def thing_of(name: str) -> Any:
    thing: Any = normopt
    for part in name.split(".")[1:]:
        thing = getattr(thing, part)
    return thing


def function_of(member: object) -> Callable[..., Any] | None:
    """The plain function behind a method, a property, a class method or a decorated function."""
    if isinstance(member, property):
        member = member.fget
    if isinstance(member, (classmethod, staticmethod)):
        member = member.__func__
    found = inspect.unwrap(member) if callable(member) else None
    return found if inspect.isfunction(found) else None


def is_ours(thing: Any) -> bool:
    return bool(thing.__module__.startswith("normopt"))


def members_of(cls: type) -> Iterator[tuple[str, type]]:
    """The public methods and properties that normopt gives a class, with the class that each is written in."""
    for name in sorted(dir(cls)):
        owner = next((c for c in cls.__mro__ if name in vars(c)), object)
        if not name.startswith("_") and is_ours(owner) and function_of(vars(owner)[name]):
            yield name, owner


SYMBOLS = {name: thing_of(name) for name in PUBLIC if not inspect.ismodule(thing_of(name))}
CLASSES = {name: thing for name, thing in SYMBOLS.items() if inspect.isclass(thing)}
FUNCTIONS = {name: thing for name, thing in SYMBOLS.items() if inspect.isfunction(thing)}
# One entry for each method as it is written, however many public classes inherit it.
METHODS = {
    f"{owner.__module__}.{owner.__qualname__}.{name}": (owner, name)
    for cls in CLASSES.values()
    for name, owner in members_of(cls)
}


class Doc:
    """A docstring, cut at its sections. Of a method it is its own and those of the methods that it overrides."""

    def __init__(self, *texts: str | None) -> None:
        self.texts = [inspect.cleandoc(t) for t in texts if t]
        self.sections: dict[str, str] = {}
        for text in self.texts:
            parts = re.split(rf"^({'|'.join(HEADS)})[^:\n]*:", text, flags=re.MULTILINE)
            for head, body in zip(parts[1::2], parts[2::2], strict=True):
                self.sections[head] = f"{self.sections.get(head, '')}\n{body}"
        self.text = "\n".join(self.texts)
        self.summary = re.split(r"\n\n|\.\s", self.text)[0]

    def items(self, *heads: str) -> dict[str, str]:
        """Names to descriptions of sections that are lists. One name each: of "a, b" the site makes b a type."""
        item = re.compile(r"^    \**(\w+): ?(.*(?:\n(?:        .*|$))*)", flags=re.MULTILINE)
        return {name: text for head in heads for name, text in item.findall(self.sections.get(head, ""))}


def doc_of_method(owner: type, name: str) -> Doc:
    return Doc(*(getattr(vars(c).get(name), "__doc__", None) for c in owner.__mro__ if is_ours(c)))


@cache
def tree_of(function: Callable[..., Any]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def raises(function: Callable[..., Any], cls: type | None, seen: set[object]) -> set[str]:
    """The built-in exceptions that a function raises, itself or in the functions of normopt that it calls by name.

    What is called on other objects is not looked into, and what is caught on the way is not taken out.
    """
    if function in seen:
        return set()
    seen.add(function)
    found = set()
    for node in ast.walk(tree_of(function)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found |= {node.exc.func.id} & set(dir(builtins))
        if not isinstance(node, ast.Call):
            continue
        called: object = None
        if isinstance(node.func, ast.Name):
            found |= CHECKS.get(node.func.id, set())
            called = function.__globals__.get(node.func.id)
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            place = function.__globals__.get(node.func.value.id)
            if node.func.value.id == "self" and cls is not None:
                called = inspect.getattr_static(cls, node.func.attr, None)
            elif isinstance(place, types.ModuleType) and place.__name__.startswith("normopt"):
                called = getattr(place, node.func.attr, None)
        elif isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "super()" and cls is not None:
            bases = cls.__mro__[1:] if node.func.attr in vars(cls) else cls.__mro__
            called = next((vars(b)[node.func.attr] for b in bases if node.func.attr in vars(b)), None)
        inner = constructors(called) if inspect.isclass(called) else [(cls, function_of(called))]
        for owner, g in inner:
            if g is not None and g.__module__.startswith("normopt") and g.__name__ not in CHECKS:
                found |= raises(g, owner, seen)
    return found


def constructors(cls: type) -> list[tuple[type, Callable[..., Any] | None]]:
    """What runs when an object of a class is made, of normopt's."""
    if not cls.__module__.startswith("normopt"):
        return []
    made = [(c, function_of(vars(c).get(n))) for n in ("__init__", "__post_init__") for c in cls.__mro__]
    return [(cls, f) for c, f in made if f is not None and c.__module__.startswith("normopt") and has_source(f)]


def has_source(function: Callable[..., Any]) -> bool:
    return not function.__code__.co_filename.startswith("<")  # the __init__ that dataclass writes has none


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    given = inspect.signature(function).parameters.values()
    return [p for p in given if p.name not in ("self", "cls") and not p.name.startswith("_")]


def check_raises(doc: Doc, found: set[str]) -> None:
    assert found <= doc.items("Raises").keys()


def check_defaults(doc: Doc, given: list[inspect.Parameter]) -> None:
    """Each default that is a number or a word is told, and where one is told it is the signature's."""
    told = doc.items("Args", "Attributes")
    for p in given:
        if p.default is p.empty or p.default is None or isinstance(p.default, bool):
            continue
        text = told[p.name].replace("2⁻¹²", repr(2**-12)).replace("2/π", repr(2 / torch.pi))
        if isinstance(p.default, str):
            word = re.search(r'Default\s+"([^"]*)"', text) or re.search(f'"({re.escape(p.default)})"', text)
            assert word is not None, p.name
            assert word[1] == p.default, p.name
        elif isinstance(p.default, (int, float)):
            number = re.search(r"Default (-?[\d.]+(?:e-?\d+)?)", text)
            assert number is not None, p.name
            assert float(number[1].rstrip(".")) == p.default, p.name


@pytest.mark.parametrize("name", FUNCTIONS)
class TestFunctions:
    def test_takes_gives_and_raises_what_it_says(self, name: str) -> None:
        function = function_of(FUNCTIONS[name])
        assert function is not None
        doc = Doc(function.__doc__)
        assert {p.name for p in parameters(function)} == doc.items("Args").keys()
        check_defaults(doc, parameters(function))
        assert "Returns" in doc.sections or (NAMES_IT.match(doc.summary) and not parameters(function))
        check_raises(doc, raises(function, None, set()) - CANNOT.get(name, set()))


@pytest.mark.parametrize("name", METHODS)
class TestMethods:
    def test_takes_gives_and_raises_what_it_says(self, name: str) -> None:
        owner, own = METHODS[name]
        member = vars(owner)[own]
        function = function_of(member)
        assert function is not None
        doc = doc_of_method(owner, own)
        assert doc.summary
        assert {p.name for p in parameters(function)} <= doc.items("Args").keys()
        check_defaults(doc, parameters(function))
        if not isinstance(member, property) and inspect.signature(function).return_annotation != "None":
            assert "Returns" in doc.sections or NAMES_IT.match(doc.summary), doc.summary
        check_raises(doc, raises(function, owner, set()) - CANNOT.get(name, set()))


@pytest.mark.parametrize("name", CLASSES)
class TestClasses:
    def test_takes_has_and_raises_what_it_says(self, name: str) -> None:
        """A class's docstring is of its constructor too. Of attributes those of a base class may be told there."""
        cls = CLASSES[name]
        own = Doc(cls.__doc__)
        bases = [*cls.__mro__, *(KINDS[: KINDS.index(cls)] if cls in KINDS else [])]  # a TypedDict's order has no bases
        everything = Doc(*(c.__doc__ for c in bases if is_ours(c)))
        made = [f for _, f in constructors(cls)]
        given = parameters(cls) if made or dataclasses.is_dataclass(cls) else []
        if cls is not normopt.SteepestDescent:  # what others pass on to it is told there
            behind = Arguments.__annotations__.keys() if "settings" in {p.name for p in given} else set()
            given = [p for p in given if p.name not in behind or p.name in cls.__init__.__code__.co_varnames]
        assert {p.name for p in given} <= own.items("Args", "Attributes").keys()
        check_defaults(own, given)
        public = {n for c in cls.__mro__ if is_ours(c) for n in inspect.get_annotations(c)}
        for f in made:
            public |= set(re.findall(r"self\.(\w+)\b(?=[^=\n]*=[^=])", inspect.getsource(f)))
        public = {n for n in public if not n.startswith("_") and n not in dir(object)}
        assert {n for n in public if not function_of(inspect.getattr_static(cls, n, None))} <= (
            everything.items("Args", "Attributes").keys()
        )
        found = set()
        for owner, f in constructors(cls):
            found |= raises(f, owner, set())
        check_raises(own, found)


RULES = {
    n: c
    for n, c in CLASSES.items()
    if issubclass(c, (torch.optim.Optimizer, Norm, PSchedule, AddOn)) or n.endswith(("Monitor", "Trajectory"))
}
OPTIMIZERS = {n: c for n, c in CLASSES.items() if issubclass(c, torch.optim.Optimizer)}
# The methods of norms that take or give tensors, or may give one in a number's place.
OF_TENSORS = {
    n: (owner, own)
    for n, (owner, own) in METHODS.items()
    if issubclass(owner, Norm) and "Tensor" in str(inspect.signature(function_of(vars(owner)[own]) or print))
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_where_it_comes_from(name: str) -> None:
    assert "Source" in Doc(RULES[name].__doc__).sections


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_says_what_it_keeps_and_what_it_fixes(name: str) -> None:
    doc = Doc(OPTIMIZERS[name].__doc__)
    assert "State" in doc.sections
    source = inspect.getsource(OPTIMIZERS[name].__init__)  # type: ignore[misc]
    for fixed in re.findall(r"fixed_kwargs\((.*)\)", source):
        for key in re.findall(r"(\w+)=", fixed):
            assert re.search(rf"\b{key}\b", doc.sections["Raises"]), key


@pytest.mark.parametrize("name", OF_TENSORS)
def test_a_norm_says_the_shapes_of_its_tensors(name: str) -> None:
    assert re.search(r"shape|0-d", doc_of_method(*OF_TENSORS[name]).text)


def examples() -> dict[str, str]:
    """Every docstring of the public symbols that has examples."""
    texts = {name: thing.__doc__ for name, thing in SYMBOLS.items()}
    texts |= {name: vars(owner)[own].__doc__ for name, (owner, own) in METHODS.items()}
    return {name: text for name, text in texts.items() if text and ">>>" in text}


def surroundings() -> dict[str, Any]:
    """What examples that show a line of a training take for granted: a model, its optimizers, data, a loss."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    opt = normopt.LPSGDM(model.parameters(), p=8.0, scale="dual")
    data = [(torch.randn(5, 3), torch.randn(5, 2)) for _ in range(3)]
    loss = torch.nn.functional.mse_loss

    def train(model: torch.nn.Module, opt: torch.optim.Optimizer) -> None:
        for x, y in data:
            opt.zero_grad()
            loss(model(x), y).backward()
            opt.step()

    train(model, opt)
    with normopt.TrajectoryMonitor(opt) as monitor:
        for x, y in data:
            monitor.record(loss(model(x), y))
            train(model, opt)
    given = {"torch": torch, "normopt": normopt, "model": model, "opt": opt, "optimizer": opt, "train": train}
    return {**given, "monitor": monitor, "data": data, "batches": data, "loss_of": loss, "loss": loss}


class Shown(doctest.OutputChecker):
    """An example that shows no output has only to run."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", examples())
def test_examples_give_what_they_show(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if ".timm." in name and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))  # what an example registers, it alone sees
    monkeypatch.setitem(mpl.rcParams, "backend", "agg")
    test = doctest.DocTestParser().get_doctest(examples()[name], surroundings(), name, None, 0)
    told: list[str] = []
    found = doctest.DocTestRunner(Shown(), verbose=False).run(test, out=told.append)
    assert found.attempted > 0
    assert found.failed == 0, "".join(told)


def test_what_is_generated_from_the_declared_settings_is_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", Path(__file__).parents[1] / "docs/hooks/generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.types() == generate.TYPES.read_text(encoding="utf-8"), "run `make generate`"
    assert generate.engine() == generate.ENGINE.read_text(encoding="utf-8"), "run `make generate`"


@pytest.mark.parametrize("name", normopt.list_optimizers())
def test_every_constructor_shows_its_keyword_arguments(name: str) -> None:
    cls = normopt.get_optimizer(name)
    shown = inspect.signature(cls).parameters
    assert {"weight_decay", "agr", "decay", "decay_p", "fused", "foreach", "rounding", "state_dtype"} <= shown.keys()
    assert all(p.annotation is not p.empty for p in shown.values())
    assert f"{cls.__name__}(params" in inspect.cleandoc(pydoc.render_doc(cls, renderer=pydoc.plaintext))
