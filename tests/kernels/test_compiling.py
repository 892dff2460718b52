"""What happens round a first compile: the lock, and a cache that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import ClassVar

import pytest

from normopt.kernels import compiling
from tests.forked import run_file
from tests.patience import patience

STEP = """
import torch, normopt
w = torch.nn.Parameter(torch.ones(5))
w.grad = torch.ones(5)
normopt.SGD([w], lr=0.25, fused=True).step()
assert torch.equal(w, torch.full((5,), 0.75)), w
"""


class Uncompiled:
    """A kernel of Numba's that has not been called."""

    overloads: ClassVar[dict] = {}


def run(code, *, timeout=40, **environment):
    given = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=given, capture_output=True, text=True, timeout=patience(timeout)
    )


FORKING = """
import os, time
from normopt.kernels.compiling import call_with_jit_lock

def compile_and_fork():
    if os.fork() == 0:  # as a DataLoader's worker is: it has what its parent has open
        os.close(1)
        time.sleep(60)
        os._exit(0)

call_with_jit_lock(compile_and_fork, compiled=type('Kernel', (), {'overloads': {}})())
print("compiled", flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked on Windows")
def test_a_child_forked_during_a_compile_does_not_keep_the_lock(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", FORKING], env=environment, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "compiled\n"
        assert first.wait(60) == 0
        first.stdout.close()
    waiting = "from normopt.kernels.compiling import call_with_jit_lock\n"
    waiting += "call_with_jit_lock(print, 'mine', compiled=type('Kernel', (), {'overloads': {}})())"
    assert run(waiting, TMPDIR=str(tmp_path), timeout=13).stdout == "mine\n"


def test_the_lock_is_free_again_after_an_error():
    uncompiled = Uncompiled()

    def fails():
        raise KeyError("in the compiler")

    for _ in range(2):
        with pytest.raises(KeyError, match="in the compiler"):
            compiling.call_with_jit_lock(fails, compiled=uncompiled)
    assert compiling.call_with_jit_lock(lambda: 3, compiled=uncompiled) == 3


@pytest.mark.parametrize("fault", ["no folder", "another user's file", "no locks", "no fcntl"])
def test_without_a_lock_the_function_is_called_all_the_same(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing" if fault == "no folder" else tmp_path))
    if fault == "another user's file":
        (tmp_path / f"normopt-{os.getuid()}.lock").mkdir()  # which cannot be opened to write, even by root
    if fault == "no locks":

        def flock(*_):
            raise OSError(95, "not supported")

        monkeypatch.setattr(compiling.fcntl, "flock", flock)
    if fault == "no fcntl":
        monkeypatch.setattr(compiling, "fcntl", None)
    assert compiling.call_with_jit_lock(lambda x: x + 1, 2, compiled=Uncompiled()) == 3


def test_without_a_folder_for_the_cache_kernels_are_compiled_in_memory(tmp_path):
    code = tmp_path / "step.py"
    code.write_text("from numba.core import caching\ncaching.CacheImpl._locator_classes = []\n" + STEP)
    said = run_file(code, tmp_path, "default")
    assert said.count("Numba cannot cache compiled kernels on disk") == 1
    assert "NUMBA_CACHE_DIR" in said


@pytest.mark.parametrize("first", ["", "import numba\n"])
def test_a_disabled_compiler_is_a_reason_not_to_fuse(first, tmp_path):
    code = tmp_path / "step.py"
    code.write_text(
        first
        + """
import torch, normopt
w = torch.nn.Parameter(torch.ones(5))
w.grad = torch.ones(5)
normopt.SGD([w], lr=0.25).step()
try:
    normopt.SGD([w], lr=0.25, fused=True)
except ValueError as error:
    print(error)
"""
    )
    assert "NUMBA_DISABLE_JIT is set" in run_file(code, tmp_path, "default", NUMBA_DISABLE_JIT="1")
