"""Which device a worker process has."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter

import pytest
import torch

from benchmarks.study import clusters
from benchmarks.study.clusters import Died, Local, devices, each


def seen(seconds: float) -> tuple[int, str | None]:
    time.sleep(seconds)
    return os.getpid(), os.environ.get(clusters.VISIBLE)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("named", "there", "expected"),
    [
        (None, 0, []),
        (None, 3, ["0", "1", "2"]),
        ("", 0, []),
        ("4,2", 2, ["4", "2"]),
        ("GPU-a,GPU-b,none", 2, ["GPU-a", "GPU-b"]),
    ],
)
def test_the_devices_are_those_that_the_program_may_use(monkeypatch, named, there, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.delenv(clusters.VISIBLE, raising=False)
    if named is not None:
        monkeypatch.setenv(clusters.VISIBLE, named)
    assert devices() == expected


@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill −9")
def test_processes_share_the_devices_evenly_and_one_that_died_is_replaced_on_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv(clusters.VISIBLE, "7,5")
    local = Local(4)

    def all_at_once() -> dict[int, str | None]:
        return dict(future.result() for future in [local.submit(seen, 0.5) for _ in range(4)])

    try:
        before = all_at_once()
        assert Counter(before.values()) == {"7": 2, "5": 2}
        with pytest.raises(Died):
            local.submit(die).result()
        after = all_at_once()
    finally:
        local.close()
    assert Counter(after.values()) == {"7": 2, "5": 2}
    assert len(before.keys() & after.keys()) == 3


def test_without_devices_the_environment_is_as_it_was(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv(clusters.VISIBLE, raising=False)
    local = Local(1)
    try:
        assert local.submit(seen, 0.0).result()[1] is None
    finally:
        local.close()


def halved(n: int) -> tuple[int, torch.Tensor]:
    if n < 0:
        raise ValueError(f"{n} is negative")
    time.sleep(0.1 * (n == 0))  # the first is the last to be ready
    return os.getpid(), torch.full((2,), n / 2)


@pytest.mark.parametrize("processes", [1, 2])
def test_each_call_is_made_once_and_given_in_order(processes):
    pids, tensors = zip(*each(processes, halved, [(n,) for n in range(6)]), strict=True)
    assert [tensor.tolist() for tensor in tensors] == [[n / 2, n / 2] for n in range(6)]
    assert (os.getpid() in pids) == (processes == 1)
    assert not any(tensor.is_shared() for tensor in tensors)
    with pytest.raises(ValueError, match="-1 is negative"):
        [*each(processes, halved, [(1,), (-1,)])]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_killed_program_has_kept_is_not_made_again(processes, tmp_path):
    calls = [(1,), (2,), (-1,)]
    with pytest.raises(ValueError, match="-1 is negative"):
        [*each(processes, halved, calls, tmp_path)]
    (tmp_path / "0123456789abcdef.part").write_bytes(b"half")  # killed while it wrote
    first, second, third = each(1, halved, [(1,), (2,), (3,)], tmp_path)
    assert (first[0] == os.getpid()) == (processes == 1)
    assert third[0] == os.getpid()
    assert [pair[1].tolist() for pair in (first, second, third)] == [[n / 2, n / 2] for n in (1, 2, 3)]
