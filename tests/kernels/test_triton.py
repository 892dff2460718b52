"""The Triton kernels: their results, in triton_cases.py, and what they are compiled to, for which no GPU is needed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
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
POINTERS |= dict(merged="*fp64")


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
def compile_kernel(tmp_path_factory, pytestconfig):
    """Compile a kernel for a GPU that is not there; returns its PTX.

    Triton's cache is kept between runs, in pytest's own, as long as no kernel is edited.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("triton is an interpreter here")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import ASTSource

    from normopt.kernels.compiling import SOURCES
    from normopt.kernels.triton import OPTIONS

    if pytestconfig.pluginmanager.has_plugin("cacheprovider"):
        kept = pytestconfig.cache.mkdir("triton") / SOURCES
        for old in kept.parent.iterdir():
            if old != kept:
                shutil.rmtree(old, ignore_errors=True)  # another worker may do so, too
    else:
        kept = tmp_path_factory.mktemp("triton")

    def ptx(kernel, capability, absent=(), options=OPTIONS, **constants):
        names = kernel.arg_names
        constants = constants | dict.fromkeys(absent)
        signature = {n: "constexpr" if n in constants else POINTERS[n] for n in names}
        source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()})
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(kept))
        patch.setattr(CUDABackend, "make_cubin", lambda *_, **__: b"")  # of which `spills` asks where it is looked at
        yield ptx


def vectors(text):
    """How many loads and stores of 128 bits a thread does."""
    return [VECTOR.findall(text).count(way) for way in ("ld", "st")]


def spills(text, capability):
    """The bytes that ptxas, called as Triton does, keeps in local memory, and the registers of a thread."""
    from triton.backends.nvidia import compiler

    command = [compiler.get_ptxas(capability).path, "-v", "--regAllocOptLevel=2", "-o", os.devnull]
    command += [f"--gpu-name={compiler.sm_arch_from_capability(capability)}"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    kept = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    return sum(map(int, kept.groups())), int(re.search(r"Used (\d+) registers", done.stderr)[1])


def check_compiled(text, capability, per_entry):
    """Return the registers of a thread, with no atomics and no spills, nor float64 for entries if ``per_entry``."""
    from normopt.kernels.tables import CHUNK

    assert not re.search(r"\b(atom|red)\.", text)
    spilled, registers = spills(text, capability)
    assert spilled == 0, registers
    if per_entry:  # twice the same code, of which each thread has some entries
        threads = int(re.search(r"\.reqntid (\d+)", text)[1])
        wide = re.findall(r"^\s*(?:@!?%p\d+ )?(?:add|sub|mul|fma|div|sqrt|max|min)(?:\.\w+)*\.f64\s", text, re.M)
        assert len(wide) < 2 * CHUNK // threads, wide
    return registers


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
        check_compiled(text, capability, True)
        found[aligned] = vectors(text)
    entries = CHUNK // (32 * OPTIONS["num_warps"])  # of each thread
    each, squares = entries * dtype.itemsize // 16, entries * 4 // 16 if metric else 0
    states = 1 if momentum else 0
    assert found == {True: [(2 + states) * each + squares, (1 + states) * each + squares], False: [0, 0]}


@pytest.mark.parametrize(
    ("what", "moved"),
    [
        ("power", 20),  # w, g and m are read, w and m written
        pytest.param("dual", 24, marks=pytest.mark.exhaustive),  # g and m read, m written; m and w read, w written
        ("agr dual", 28),
        pytest.param("matched coupled", 28, marks=pytest.mark.exhaustive),  # which reads w for c
        ("sphere", 28),  # and for its length
        pytest.param("dual without momentum", 16, marks=pytest.mark.exhaustive),
        ("dual lion", 28),  # c is not the momentum: g and m are read twice
        ("dual bfloat16", 14),  # nor is it where the momentum has been rounded
        pytest.param("dual float32 momentum", 18, marks=pytest.mark.exhaustive),
        ("dual coordinates", 36),  # v as m
    ],
)
def test_bytes_that_a_step_moves_for_each_entry(what, moved, compile_kernel):
    """On sm_90, of whole chunks and of all launches; AGR's and the norm's are those that read tensors."""
    from normopt.kernels import flags as f
    from normopt.kernels import triton as kernels
    from normopt.kernels.tables import CHUNK

    half = torch.bfloat16
    ema = dict(momentum=f.RUNS | f.NEW | f.SAME)
    dual = ema | dict(mode="general", scaled=True, dual=True)
    step = flags(
        **{
            "power": ema | dict(mode="general"),
            "dual": dual,
            "agr dual": dual | dict(agr=True),
            "matched coupled": dual | dict(dual=False, matched=True, coupled=True),
            "sphere": dual | dict(sphere=True),
            "dual without momentum": dual | dict(momentum=0),
            "dual lion": dual | dict(momentum=f.RUNS | f.OLD | f.GRADIENT),
            "dual bfloat16": dual | dict(dtype=half),
            "dual float32 momentum": dual | dict(weight=half, gradient=half),
            "dual coordinates": dual | dict(metric=f.BOTH_SIDES),
        }[what]
    )
    types = dict(DTYPE=kernels.TYPES[step.gradient], FLAGS=kernels.ALIGNED.value)
    texts = [compile_kernel(kernels.gradient_sums, 90, **types)] if step.agr else []
    for measuring in [True, False] if step.sums else [False]:
        texts.append(compile_kernel(kernels.step_kernel, 90, **kernels.constants_of(step, True, measuring)))
    counts = [sum(vectors(text)) for text in texts]
    assert sum(counts) * 16 * 32 * kernels.OPTIONS["num_warps"] / CHUNK == moved


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "what", ["dual", "scaled", "smoothed", "stochastic", "kahan", "float16", "stacey", "coordinates", "sphere", "lamb"]
)
def test_every_step_compiles_without_atomics_spills_and_float64(what, capability, compile_kernel):
    from normopt.kernels import flags as f
    from normopt.kernels import triton as kernels

    low = dict(weight=torch.bfloat16, gradient=torch.bfloat16, state=torch.float32)
    scaled = dict(mode="general", scaled=True, matched=True, agr=True, coupled=True, maximize=True)
    heavy = dict(momentum=f.RUNS | f.GRADIENT | f.NEW)
    lion = dict(momentum=f.RUNS | f.OLD | f.GRADIENT)
    changes, absent = {
        "dual": (dict(mode="general", scaled=True, dual=True, momentum=f.RUNS | f.NEW | f.SAME, agr=True), ()),
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
        "sphere": (heavy | dict(mode="general", scaled=True, sphere=True, inside=True), ()),
        "lamb": (heavy | dict(relative=True, inside=True, metric=f.BOTH_SIDES, corrected=True), ()),
    }[what]
    step = flags(**changes)
    for measuring in {False, step.sums}:
        constants = kernels.constants_of(step, True, measuring)
        text = compile_kernel(kernels.step_kernel, capability, absent, kernels.options_of(step), **constants)
        assert check_compiled(text, capability, True) <= 128  # two programs of 256 threads fit on a multiprocessor
        assert VECTOR.search(text)


@pytest.mark.parametrize("capability", [80, 90])
def test_every_other_kernel_compiles_without_atomics_and_spills(capability, compile_kernel):
    from normopt.kernels import triton as kernels

    how = dict.fromkeys((name for name in kernels.measure.arg_names if name.startswith("IS_")), False)
    for kernel, constants in (
        (kernels.regularizer, {}),
        (kernels.merge_gradients, {}),
        (kernels.merge_norms, dict(MORE=True)),
        (kernels.measure, how | dict(IS_MATCHED=True)),
        (kernels.measure, how | dict(IS_POWER=True, IS_SPHERE=True, IS_INSIDE=True)),
    ):
        check_compiled(compile_kernel(kernel, capability, options=kernels.FEW, **constants), capability, False)
    for dtype in kernels.TYPES.values():
        text = compile_kernel(kernels.gradient_sums, capability, DTYPE=dtype, FLAGS=kernels.ALIGNED.value)
        check_compiled(text, capability, True)
        # As the docstring says, 23 additions in a row at most: a thread does no more for a chunk.
        assert len(re.findall(r"\badd(?:\.rn)?\.f32\s", text)) <= 2 * 23
