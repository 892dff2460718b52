"""Write what follows from the declared settings: `normopt/settings.py` and SteepestDescent's documented arguments.

``python docs/hooks/generate.py``, which is ``make generate``, after a setting or a field of a norm has changed.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

from normopt import recipe  # noqa: F401 (declares settings, too)
from normopt.norms import registry
from normopt.stages.base import Setting, owners

ROOT = Path(__file__).resolve().parents[2]
TYPES, ENGINE = ROOT / "normopt/settings.py", ROOT / "normopt/engine.py"
# Settings that a named optimizer gives or fixes itself, and those that the smaller types have one after another.
OWN = (
    "lr",
    "norm",
    "p",
    "scale",
    "scope",
    "eps",
    "radius",
    "momentum",
    "momentum_rule",
    "beta2",
    "dampening",
    "nesterov",
    "row_beta",
    "coupling",
    "coupling_rate",
)
DECAY = ("weight_decay", "decay")
COORDINATES = ("bias_correction", "difference_beta", "metric", "metric_beta", "metric_eps", "metric_rule")

HEAD = '''"""Types of the settings that optimizers take as ``**settings``.

Made by ``make generate`` from what the stages declare: change it there.
"""

from __future__ import annotations

from typing import Literal, TypedDict

import torch
from torch import Tensor

from normopt.norms.base import Norm

'''


def all_settings() -> dict[str, Setting]:
    """Every setting that normopt's own stages declare: lr, and the others in the order of the stages."""
    ours = [name for name, stage in owners().items() if stage.__module__.startswith("normopt.")]
    return {name: owners()[name].settings[name] for name in ("lr", *(n for n in ours if n != "lr"))}


def norm_fields() -> dict[str, str]:
    """The settings that are fields of normopt's own norms, with their types."""
    found: dict[str, str] = {}
    for name in registry.list_norms():
        cls = registry.lookup(name).cls
        if cls.__module__.startswith("normopt."):
            for field in registry.lookup(name).fields:
                kind = str(inspect.get_annotations(cls).get(field) or getattr(cls, "__annotations__", {}).get(field))
                found[registry.setting_key(field)] = kind
    return {key: kind for key, kind in sorted(found.items()) if key != "p"}


def shown(value: object) -> str:
    """A default value as docstrings write it."""
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:g}" if isinstance(value, float) and (value == 0 or abs(value) >= 1e-2) else repr(value)


def told(name: str, setting: Setting, indent: int) -> str:
    """A setting's lines in an Args or Attributes section."""
    text = f"{name}: {setting.doc}. Default {shown(setting.default)}."
    lines = textwrap.wrap(text, 120 - indent - 4, break_long_words=False)
    return "\n".join(" " * (indent + 4 * (i > 0)) + line for i, line in enumerate(lines))


def typed(name: str, base: str, summary: str, settings: dict[str, Setting], more: dict[str, str] | None = None) -> str:
    """A TypedDict of settings."""
    docs = "\n".join(told(key, s, 8) for key, s in settings.items())
    docs = "" if more else f"\n\n    Attributes:\n{docs}\n    "
    lines = [f"    {key}: {s.type}" for key, s in settings.items()]
    lines += [f"    {key}: {kind}" for key, kind in (more or {}).items()]
    head = f"\nclass {name}({base}, total=False):\n"
    return f'{head}    """{summary}{docs}"""\n\n' + "\n".join(lines) + "\n\n"


def types() -> str:
    """The text of `normopt/settings.py`."""
    every = all_settings()
    common = {k: s for k, s in every.items() if k not in (*OWN, *DECAY, *COORDINATES)}
    coordinates, decay, own = ({k: every[k] for k in keys if k != "lr"} for keys in (COORDINATES, DECAY, OWN))
    parts = [
        HEAD,
        typed("Common", "TypedDict", "Settings that every optimizer accepts as ``**settings``.", common),
        typed(
            "Coordinates",
            "Common",
            "`Common` and adaptive coordinates, which Adam and similar optimizers fix.",
            coordinates,
        ),
        typed("Settings", "Coordinates", "`Coordinates` and weight decay, where that is no own argument.", decay),
        typed(
            "Arguments",
            "Settings",
            "All settings of `SteepestDescent`, which documents them, and the fields of norms.",
            own,
            norm_fields(),
        ),
    ]
    return "".join(parts).rstrip() + "\n"


def engine() -> str:
    """The text of `normopt/engine.py`, with the arguments of SteepestDescent's docstring made anew."""
    lines = "\n".join(told(name, s, 8) for name, s in all_settings().items())
    begin = "        params: parameters, named parameters or param-group dicts, as for torch.optim.\n"
    end = "        **settings: "
    text = ENGINE.read_text(encoding="utf-8")
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}{lines}\n{end}", text, flags=re.DOTALL)


if __name__ == "__main__":
    for path, text in ((TYPES, types()), (ENGINE, engine())):
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
