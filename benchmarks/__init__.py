"""Programs that measure normopt: ``python -m benchmarks`` from the root of the repository.

``study/`` is what an ablation is and how it runs, ``tasks/``, ``optimizers`` and ``training`` what a run is, ``store``
where results go, ``results``, ``stats`` and ``report/`` what they say. ``speed/`` times steps, ``programs/`` has a file
for each smaller measurement, and ``grid`` is the tables of all of them.

Imports run one way: cli → report → results → stats, store, study.lanes → training → optimizers, tasks → study.spec.
Nothing imports upward, and normopt imports nothing from here.
"""

from importlib.util import find_spec

REQUIRED = ("jinja2", "optuna", "pyarrow", "pydantic", "rich", "scipy", "sklearn", "typer")


def require() -> None:
    """Raise a ModuleNotFoundError that says what to install, if a package of the bench extra is missing."""
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'the benchmarks need {", ".join(missing)}, which this Python does not have: pip install -e ".[bench]"'
        )


require()
