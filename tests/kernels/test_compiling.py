"""What happens round a first compile: the lock, and a cache that cannot be written."""

from __future__ import annotations

import errno
import os
import runpy
import signal
import tempfile
import time
from typing import ClassVar

import numba
import pytest
from numba.core import caching

from normopt.kernels import compiling
from tests.forked import run, run_file

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


def compile_and_fork(folder, how):
    """Compile in a process that forks meanwhile; the child, like a DataLoader's worker, inherits its open files."""
    tempfile.tempdir = str(folder)

    def compiles():
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)

    compiling.call_with_jit_lock(compiles, compiled=Uncompiled())
    os._exit(0)


def compile_next(folder):
    tempfile.tempdir = str(folder)
    os._exit(compiling.call_with_jit_lock(lambda: 7, compiled=Uncompiled()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked on Windows")
@pytest.mark.parametrize(("parent", "code"), [("done", 0), ("killed", -signal.SIGKILL)])
def test_a_child_forked_during_a_compile_does_not_keep_the_lock(parent, code, tmp_path):
    assert run(compile_and_fork, tmp_path, parent, seconds=20) == code
    assert len(list(tmp_path.glob("normopt-*.lock"))) == 1
    assert run(compile_next, tmp_path, seconds=13) == 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked on Windows")
def test_a_child_forked_during_a_compile_goes_on_without_the_lock():
    """It leaves the block that its parent is in, and compiles itself."""
    parent = os.getpid()

    def fork():
        return os.fork()

    child = compiling.call_with_jit_lock(fork, compiled=Uncompiled())
    if os.getpid() != parent:
        os._exit(compiling.call_with_jit_lock(lambda: 7, compiled=Uncompiled()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_the_lock_is_free_again_after_an_error():
    uncompiled = Uncompiled()

    def fails():
        raise KeyError("in the compiler")

    for _ in range(2):
        with pytest.raises(KeyError, match="in the compiler"):
            compiling.call_with_jit_lock(fails, compiled=uncompiled)
    assert compiling.call_with_jit_lock(lambda: 3, compiled=uncompiled) == 3


@pytest.fixture
def said(monkeypatch, caplog):
    """The log, with all one-time warnings still to come, as in a new process."""
    monkeypatch.setattr(compiling, "ANNOUNCED", set())
    return caplog


def open_files():
    return sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else []


@pytest.mark.parametrize("fault", ["no folder", "another user's file", "somebody's link", "no locks", "no fcntl"])
def test_without_a_lock_the_function_is_called_all_the_same(fault, tmp_path, monkeypatch, said):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing" if fault == "no folder" else tmp_path))
    if fault == "another user's file":
        (tmp_path / f"normopt-{os.getuid()}.lock").mkdir()  # which cannot be opened to write, even by root
    if fault == "somebody's link":
        (tmp_path / f"normopt-{os.getuid()}.lock").symlink_to(tmp_path / "another file")
    if fault == "no locks":

        def flock(*_):
            raise OSError(95, "not supported")

        monkeypatch.setattr(compiling.fcntl, "flock", flock)
    if fault == "no fcntl":
        monkeypatch.setattr(compiling, "fcntl", None)
    before = open_files()
    for _ in range(2):
        assert compiling.call_with_jit_lock(lambda x: x + 1, 2, compiled=Uncompiled()) == 3
    assert open_files() == before
    assert not (tmp_path / "another file").exists()
    told = [record.getMessage() for record in said.records]
    assert len(told) == (fault != "no fcntl")  # that is Windows
    assert all("TMPDIR" in text for text in told)


def cached(folder, monkeypatch):
    """A new function that Numba compiles, with its cache in a folder."""
    source = folder / "kernel.py"
    if not source.exists():
        source.write_text("def double(x):\n    return 2 * x\n")
    names = runpy.run_path(str(source))
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder / "cache"))
    return compiling.compiled(cache=True)(names["double"])


def fails_to_write(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fault", ["cut off", "unreadable", "full disk", "no lock"])
def test_a_cache_that_cannot_be_used_does_not_fail_the_call(fault, tmp_path, monkeypatch, said):
    if fault != "full disk":
        assert compiling.call_with_jit_lock(cached(tmp_path, monkeypatch), 3) == 6
        assert list(tmp_path.rglob("*.nbi"))
        again = cached(tmp_path, monkeypatch)
        assert compiling.call_with_jit_lock(again, 3) == 6
        assert again.stats.cache_hits
    (said.clear(), compiling.ANNOUNCED.clear())
    index = next(tmp_path.rglob("*.nbi"), None)
    if fault == "cut off":
        index.write_bytes(index.read_bytes()[:-9])
    if fault == "unreadable":
        index.unlink()
        index.mkdir()  # even root cannot read that
    if fault == "full disk":
        monkeypatch.setattr(caching.IndexDataCacheFile, "save", fails_to_write)
    if fault == "no lock":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    for _ in range(2):
        function = cached(tmp_path, monkeypatch)
        assert compiling.call_with_jit_lock(function, 3) == 6
        assert not function.stats.cache_hits or fault == "cut off"  # which is written anew
    told = [r.getMessage() for r in said.records if "compiling kernels" not in r.getMessage()]
    assert len(told) == 1
    assert ("TMPDIR" if fault == "no lock" else "NUMBA_CACHE_DIR") in told[0]


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


def test_a_numba_that_cannot_be_imported_is_a_reason_not_to_fuse(tmp_path):
    """As Numba does beside a NumPy that is newer than it knows: said at construction, not in step()."""
    (tmp_path / "numba.py").write_text('raise ImportError("Numba needs NumPy 2.0 or less. Got NumPy 2.4.")')
    code = tmp_path / "step.py"
    code.write_text(
        f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch, normopt
w = torch.nn.Parameter(torch.ones(200, 200))
w.grad = torch.ones(200, 200)
opt = normopt.SGD([w], lr=0.25)
print(opt.backend())
opt.step()
assert torch.equal(w, torch.full((200, 200), 0.75))
try:
    normopt.SGD([w], lr=0.25, fused=True)
except ValueError as error:
    print(error)
"""
    )
    said = run_file(code, tmp_path)
    assert "on for-loop (the default on cpu)" in said
    assert "numba is installed, but importing it fails: Numba needs NumPy 2.0 or less. Got NumPy 2.4." in said
