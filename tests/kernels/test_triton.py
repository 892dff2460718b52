"""The Triton kernels: their results, in triton_cases.py, and what they are compiled to, for which no GPU is needed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.versions import NEEDS_TRITON

pytestmark = NEEDS_TRITON

CASES = Path(__file__).with_name("triton_cases.py")
# Only a 16-byte load or store moves 128 bits at once.
VECTOR = re.compile(r"\b(ld|st)\.global(?:\.\w+)*\.(?:v4\.[bfu]32|v2\.[bfu]64|v8\.b16)")
POINTERS = dict(table="*i64", chunks="*i64", numbers="*fp64", unscale="*fp32", found_inf="*fp32", seed="*i64")
POINTERS |= dict(radii="*fp64", regularizers="*fp32", measured="*fp64", shares="*fp64", sums="*fp64", spans="*i64")


def pytest_generate_tests(metafunc):
    """With --all, the results are in two halves, which two workers can share; without, one process has them all."""
    if "half" in metafunc.fixturenames:
        first = "every_momentum or launches"
        metafunc.parametrize("half", [first, f"not ({first})"] if metafunc.config.getoption("--all") else [""])


def test_results(half, request):
    """In a process of their own: triton has to be imported as an interpreter, or not."""
    every = ["--all"] if request.config.getoption("--all") else []
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *every,
        str(CASES),
        "-k",
        half,
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))} | interpret
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CASES.parents[2])
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def compile_kernel(tmp_path_factory):
    """Compile a kernel for a GPU that is not there; returns its PTX."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("triton is an interpreter here")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from normopt.kernels.triton import OPTIONS

    def ptx(kernel, capability, absent=(), **constants):
        names = kernel.arg_names
        constants = constants | dict.fromkeys(absent)
        signature = {n: "constexpr" if n in constants else POINTERS[n] for n in names}
        source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()})
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS).asm["ptx"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield ptx


def flags(dtype=torch.float32, **changes):
    from normopt.kernels.flags import GENERAL, LINEAR, SIGN, Flags

    mode = {"sign": SIGN, "linear": LINEAR, "general": GENERAL}[changes.pop("mode", "linear")]
    return Flags(**(dict(mode=mode, weight=dtype, gradient=dtype, state=dtype) | changes))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["sign", "general"])
@pytest.mark.parametrize("kept", ["nothing", "momentum", "momentum and squares"])
def test_aligned_chunks_are_read_and_written_128_bits_at_a_time(mode, kept, dtype, capability, compile_kernel):
    from normopt.kernels.flags import NEW, RUNS, SAME, STRAIGHT
    from normopt.kernels.tables import CHUNK
    from normopt.kernels.triton import OPTIONS, constants_of, step_kernel

    absent = ("unscale", "found_inf", "seed", "regularizers", "measured", "sums")
    momentum, metric = RUNS | NEW | SAME if "momentum" in kept else 0, STRAIGHT if "squares" in kept else 0
    step = flags(dtype, mode=mode, momentum=momentum, metric=metric, corrected=bool(metric))
    found = {}
    for aligned in (True, False):
        text = compile_kernel(step_kernel, capability, absent, **constants_of(step, aligned))
        assert not re.search(r"\b(atom|red)\.", text)
        found[aligned] = [VECTOR.findall(text).count(way) for way in ("ld", "st")]
    entries = CHUNK // (32 * OPTIONS["num_warps"])  # of each thread
    vectors, squares = entries * dtype.itemsize // 16, entries * 4 // 16 if metric else 0
    states = 1 if momentum else 0
    assert found == {True: [(2 + states) * vectors + squares, (1 + states) * vectors + squares], False: [0, 0]}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("what", ["scaled", "smoothed", "stochastic", "kahan", "float16", "stacey", "coordinates"])
def test_every_step_compiles_without_atomics(what, capability, compile_kernel):
    from normopt.kernels import flags as f
    from normopt.kernels import triton as kernels

    low = dict(weight=torch.bfloat16, gradient=torch.bfloat16, state=torch.float32)
    scaled = dict(mode="general", scaled=True, matched=True, agr=True, coupled=True, maximize=True)
    heavy = dict(momentum=f.RUNS | f.GRADIENT | f.NEW)
    lion = dict(momentum=f.RUNS | f.OLD | f.GRADIENT)
    changes, absent = {
        "scaled": (scaled | heavy, ()),
        "smoothed": (
            lion | dict(mode="general", smoothed=True, decay=True, decay_mode=f.GENERAL),
            ("seed", "measured"),
        ),
        "stochastic": (low | dict(rounding=f.STOCHASTIC, scales_weight=True), ("unscale",)),
        "kahan": (
            low | heavy | dict(rounding=f.KAHAN, decay=True, decay_wide=False, decay_mode=f.LINEAR, decay_inverse=True),
            ("found_inf",),
        ),
        "float16": (dict.fromkeys(("weight", "gradient", "state"), torch.float16) | heavy, ()),
        "stacey": (
            low | heavy | dict(mode="general", coupling=True, scales_weight=True, cautious=True),
            ("shares", "measured"),
        ),
        "coordinates": (scaled | heavy | dict(metric=f.BOTH_SIDES, metric_max=True, corrected=True, differs=True), ()),
    }[what]
    step = flags(**changes)
    for measuring in {False, step.scaled}:
        constants = kernels.constants_of(step, True, measuring)
        text = compile_kernel(kernels.step_kernel, capability, absent, **constants)
        assert not re.search(r"\b(atom|red)\.", text)
        assert VECTOR.search(text)


@pytest.mark.parametrize("capability", [80, 90])
def test_every_other_kernel_compiles_without_atomics(capability, compile_kernel):
    from normopt.kernels import triton as kernels

    how = dict.fromkeys((name for name in kernels.measure.arg_names if name.startswith("IS_")), False)
    for kernel, constants in (
        (kernels.gradient_sums, dict(DTYPE=kernels.TYPES[torch.float32], FLAGS=kernels.ALIGNED.value)),
        (kernels.regularizer, {}),
        (kernels.measure, how | dict(IS_MATCHED=True)),
        (kernels.measure, how | dict(IS_POWER=True, IS_SPHERE=True, IS_INSIDE=True)),
    ):
        assert not re.search(r"\b(atom|red)\.", compile_kernel(kernel, capability, **constants))
