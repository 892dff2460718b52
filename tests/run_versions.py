"""Run the tests of the core with the oldest versions that pyproject.toml allows, or the newest that the index has.

``python tests/run_versions.py oldest`` makes the environment .venv-oldest if it is not there, with the Python that runs
this, and passes further arguments to pytest. The core is what needs no trainer, model library or site.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("bench", "cpu", "plots")
TOOLS = ("build", "expecttest", "filelock", "hypothesis>=6.100", "pytest>=8", "pytest-xdist>=3.6", "setuptools>=77")
NOT_CORE = ("architectures", "benchmarks", "site", "test_bibliography.py", "test_dcp.py", "test_docs.py")
NOT_CORE += ("test_docstrings.py", "test_frameworks.py", "test_gallery.py", "test_packaging.py", "test_trainers.py")
NOT_CORE += ("test_typing.py",)


def requirements(which: str) -> list[str]:
    """Return the requirements of the core and of `EXTRAS`, each as its lower bound for "oldest"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    every = [*project["dependencies"], *(r for extra in EXTRAS for r in project["optional-dependencies"][extra])]
    return [r.replace(">=", "==") if which == "oldest" else r for r in every]


def core() -> list[str]:
    """Return the folders and files of the core's tests."""
    found = sorted(p.parent.name if p.name == "__init__.py" else p.name for p in ROOT.glob("tests/*/__init__.py"))
    found += sorted(p.name for p in ROOT.glob("tests/test_*.py"))
    return [f"tests/{name}" for name in found if name not in NOT_CORE]


def main(which: str, *more: str) -> int:
    """Make the environment, and return pytest's exit code."""
    if which not in ("oldest", "newest"):
        raise SystemExit(f"which versions? oldest or newest, not {which!r}")
    folder = ROOT / f".venv-{which}"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    wanted, written = "\n".join([*requirements(which), *TOOLS]) + "\n", folder / "requirements.txt"
    if not written.exists() or written.read_text(encoding="utf-8") != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", *wanted.split()], check=True)
        written.write_text(wanted, encoding="utf-8")
    # Old packages warn of what newer ones deprecate.
    how = ("-n", "2", "--dist", "loadgroup", "-W", "ignore::DeprecationWarning", *(more or core()))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([python, "-m", "pytest", *how], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
