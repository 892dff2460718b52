"""The formulas of an ejected file: the source of these functions is copied into it, as far as its step calls them.

Each computes, for one tensor, what the stages and norms compute for lists, shards and every setting: bit for bit, which
`tests/test_ejecting.py` compares. They call each other, and functions of `normopt.norms` that are copied likewise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normopt.groups.classify import GATE_UP, QKV
from normopt.norms.matrices import max_abs, mul_pow2, normalize_exponent
from normopt.norms.polar import CPU_MULTIPLIES_BFLOAT16, LIMIT, NEWTON_SCHULZ, POLAR_EXPRESS, SAFETY


def regularize(g: Tensor) -> Tensor:
    """Return g·(1 − |g|/Σ|g|), computed as g·r/Σ|g| with r the sum of the other magnitudes; AGR, arXiv:2407.16944."""
    if g.numel() == 1:  # the formula would erase it
        return g
    limits = torch.finfo(g.dtype)
    size = g.abs().reshape(-1)
    first = size.argmax(0, keepdim=True)
    largest = size[first]
    top = largest.clamp(limits.tiny, limits.max)
    others = size.div_(top).index_fill_(0, first, 0).sum()
    largest = largest / top
    total = others + largest
    r = (largest - g.abs() / top).add_(others)
    return r.div_(torch.where(total == 0, 1, total)).mul_(g)


def sign(x: Tensor) -> Tensor:
    """Return the signs; a NaN stays one."""
    return torch.where((x == 0) | x.isnan(), x, x.sign())


def signed_power(x: Tensor, exponent: float) -> Tensor:
    """Return sign(x)·|x|^exponent."""
    return sign(x) if exponent == 0 else x.abs().pow_(exponent).copysign_(x)


def norm(x: Tensor, q: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return n = ‖x‖_q along the last dim, n·s and s, a power of two for which n·s is a normal number.

    The sum is relative to the largest entry, so that it neither over- nor underflows.
    """
    a = x.abs()
    limits = torch.finfo(a.dtype)
    top = a.amax(-1).clamp(0 if q > 4 else limits.tiny, limits.max)
    root = a.div_((top + (top == 0))[..., None]).pow_(q).sum(-1).pow(1 / q)
    s = shift(top * root)
    return top * root, top * s * root, s


def shift(n: Tensor) -> Tensor:
    """Return 1 where n is a normal number of float32, else a power of two that makes it one."""
    limits = torch.finfo(torch.float32)
    return torch.ones_like(n).masked_fill_(n < limits.tiny, 2.0**64).masked_fill_(n > limits.max, 2.0**-64)


def length(x: Tensor) -> Tensor:
    """Return ‖x‖₂."""
    return norm(x.reshape(-1))[0]


def unit(x: Tensor) -> Tensor:
    """Return x/‖x‖₂, 0 where x = 0."""
    _, n, s = norm(x.reshape(-1))
    return x / n.clamp_min(torch.finfo(x.dtype).tiny) * s


def unit_rows(y: Tensor) -> Tensor:
    """Divide every row of a matrix by its ℓ2 norm; 0 stays 0."""
    _, n, s = norm(y)
    return y / n.clamp_min(torch.finfo(y.dtype).tiny)[..., None] * s[..., None]


def with_length_of(c: Tensor, u: Tensor) -> Tensor:
    """Return u·‖c‖₂/‖u‖₂, 0 where u = 0."""
    _, target, s = norm(c.reshape(-1))
    own = norm(u.reshape(-1))[0] * s
    return u / own.clamp_min(torch.finfo(u.dtype).tiny) * target


def lp_map(c: Tensor, p: float) -> Tensor:
    """Return D(c) = sign(c)·(|c|/‖c‖_q)^(q−1), 1/p + 1/q = 1: the steepest direction of ℓp."""
    _, n, s = norm(c.reshape(-1), 1 + 1 / (p - 1))
    return signed_power(c / n.clamp_min(torch.finfo(c.dtype).tiny) * s, 1 / (p - 1))


def times_dual_norm(d: Tensor, c: Tensor, p: float) -> Tensor:
    """Return d·‖c‖_q, 1/p + 1/q = 1."""
    _, n, s = norm(c.reshape(-1), 1 + 1 / (p - 1))
    return d * n / s


def largest_entry(c: Tensor) -> Tensor:
    """Return the sign of the first of the largest |c_i| at its place, and 0 elsewhere."""
    flat = c.reshape(-1)
    first = flat.abs().argmax(keepdim=True)
    return torch.zeros_like(flat).scatter(0, first, sign(flat[first])).reshape(c.shape)


def times_inner(u: Tensor, c: Tensor, n: Tensor | None = None) -> Tensor:
    """Return u·‖c‖⋆ for the dual map u of c: n = ‖c‖⋆, which is ⟨c, u⟩, too."""
    n = torch.dot(c.reshape(-1), u.reshape(-1)) if n is None else n
    s = shift(n.nan_to_num(math.inf, math.inf))
    inner = torch.dot((c * s).reshape(-1), u.reshape(-1))
    return u * torch.where((s == 1) | inner.isnan(), n, inner) / s


def as_matrix(c: Tensor) -> Tensor:
    """Return a stack of one matrix: dim 0 × the rest; a vector is one column."""
    return c.flatten(1)[None] if c.dim() > 1 else c.reshape(1, -1, 1)


def fast_dtype(y: Tensor) -> torch.dtype:
    """Return bfloat16, but float32 on a CPU without instructions for it."""
    return torch.bfloat16 if y.device.type != "cpu" or CPU_MULTIPLIES_BFLOAT16 else torch.float32


def newton_schulz(y: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Approximate UVᵀ of matrices UΣVᵀ by Keller Jordan's polynomial; a power of two, which is exact, scales them."""
    x = mul_pow2(y, -torch.frexp(max_abs(y)).exponent).to(dtype)
    tall = y.shape[-2] > y.shape[-1]
    x = x.mT if tall else x
    x = x[0] if len(x) == 1 else x
    addmm = torch.addmm if len(y) == 1 else torch.baddbmm
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = addmm(x, addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(y.shape).to(y.dtype)


def polar_express(y: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Approximate UVᵀ of matrices UΣVᵀ: Amsel et al., "The Polar Express", arXiv:2505.16932, Algorithm 1."""
    safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS]
    x = mul_pow2(y, -torch.frexp(max_abs(y)).exponent).to(dtype)
    tall = y.shape[-2] > y.shape[-1]
    x = x.mT if tall else x
    x = x[0] if len(x) == 1 else x
    addmm = torch.addmm if len(y) == 1 else torch.baddbmm
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) * SAFETY + 1e-7)
    for a, b, c in (safe + [LIMIT] * steps)[:steps]:
        gram = x @ x.mT
        x = addmm(x, addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(y.shape).to(y.dtype)


def singular(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return U, σ·2^−e, Vᵀ and e of matrices, all NaN if not finite; σ below the rounding error are 0."""
    x, power, finite = normalize_exponent(y)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = torch.where(s > torch.finfo(s.dtype).eps * max(y.shape[-2:]) * s[:, :1], s, 0)
    s = torch.where(finite[:, 0], s, math.nan)
    return torch.where(finite, u, math.nan), s, torch.where(finite, vt, math.nan), power[:, 0]


def schatten_map(y: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """Return ‖σ‖_q and U diag((σ/‖σ‖_q)^exponent) Vᵀ of each matrix, q = 1 + exponent."""
    u, s, vt, power = singular(y)
    n = norm(s, 1 + exponent)[0][:, None]
    r = torch.where(s == 0, 0, (s / (n + (n == 0))).pow(exponent))
    return mul_pow2(n, power)[:, 0], (u * r[:, None]) @ vt


def top_singular(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return σ₁ and u₁v₁ᵀ of each matrix."""
    u, s, vt, power = singular(y)
    top = (s[:, :1] > 0).to(s)[:, :, None]
    return mul_pow2(s, power)[:, 0], u[:, :, :1] * top * vt[:, :1]


def singular_powers(y: Tensor, exponent: float) -> Tensor:
    """Return U diag(σ^exponent) Vᵀ of each matrix, 0 where σ is 0."""
    u, s, vt, power = singular(y)
    t = shift(mul_pow2(s, power)[:, :1])  # σ₁ may over- or underflow although its power does not
    s = mul_pow2(s, power + torch.frexp(t).exponent - 1)
    return (u * torch.where(s == 0, 0, s.pow(exponent))[:, None]) @ vt * t.pow(-exponent)[:, None]


def even_rows(u: Tensor, v: Tensor, f: float, beta: float, blocks: int) -> Tensor:
    """Divide each row of u by the root of an average v of its mean squares, at the same Frobenius norm; update v."""
    others = list(range(1, u.dim()))
    rows = u.square().sum(others, keepdim=True) if others else u.square()
    v.lerp_(rows * (v.numel() / u.numel() / f**2), 1 - beta)
    scale = (1 / (v.sqrt() + 1e-8)).reshape(blocks, -1, 1)
    rows = rows.reshape(blocks, -1, 1)
    new = (rows * scale**2).sum(1, keepdim=True)
    ratio = torch.where(new > 0, rows.sum(1, keepdim=True) / new, new).sqrt()
    return u * (scale * ratio).reshape(v.shape)


def lp_factor(w: Tensor, p: float, k: float) -> Tensor:
    """Return X/(X + k) with X = |w|^(2−p), k = pηλ: the factor of ℓp decay; 1 where k underflows."""
    if k < torch.finfo(w.dtype).tiny:
        return torch.ones_like(w)
    size = w.abs().pow_(abs(2 - p))
    if p >= 2:
        return size.mul_(k).add_(1).reciprocal_()
    size.clamp_(max=torch.finfo(w.dtype).max)
    return size.div_(size + k)


def where_aligned(u: Tensor, w: Tensor, factor: Tensor | float) -> Tensor:
    """Return the factor where u·w ≥ 0, else 1; by signs, because the product may underflow."""
    return torch.where(u.sign() * w.sign() < 0, 1, w.new_ones(()) * factor)


def to_sphere(w: Tensor, radius: Tensor) -> None:
    """Bring w to the ℓ2 norm ``radius``; within the rounding of a norm it is there."""
    _, n, s = norm(w.reshape(-1))
    factor = radius * s / n.clamp_min(torch.finfo(n.dtype).tiny)
    w.mul_(torch.where((factor - 1).abs() <= 2 * torch.finfo(factor.dtype).eps, 1, factor))


def groups_of(
    model: nn.Module, output: str | None, blocks: Mapping[str, int], kinds: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return param groups, one for each kind of parameter and number of blocks, with the settings of ``kinds``.

    A kind is "vector" (biases and gains), "embedding", "output", "small" (convolutions of the input and depthwise ones,
    matrices with fewer than 4 rows or columns), or "hidden" (other linear layers and convolutions). Frozen parameters
    are in no group.

    Args:
        model: the model.
        output: the name of the output layer; None if there is none.
        blocks: how many matrices a weight holds one upon the other, by the name of its module: of fused queries, keys
            and values 3 for each head, or 3.
        kinds: the settings of each kind.

    Raises:
        ValueError: a parameter is of no known layer, a fused one has no ``blocks``, or there is no such output layer.
    """
    modules = dict(model.named_modules())
    if output is not None and output not in modules:
        raise ValueError(f"no module of the model is called {output!r}")
    found: dict[int, tuple[str, int, Tensor]] = {}
    for path, module in modules.items():
        above, _, last = path.rpartition(".")
        for attribute, p in module.named_parameters(recurse=False):
            kind, n = "hidden", blocks.get(path, 1)
            wide = sum(size > 1 for size in p.shape)
            layer = isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d))
            weight = layer and attribute == "weight"
            if (
                isinstance(module, (nn.LayerNorm, nn.RMSNorm))
                or "bias" in attribute
                or (wide <= 1 and not (weight and p.dim() > 1))
            ):
                kind, n = "vector", 1
            elif weight and isinstance(module, nn.Embedding):
                kind = "output" if path == output else "embedding"
            elif path == output:
                kind, n = "output", 1
            elif weight and isinstance(module, nn.Linear):
                siblings = [x.in_features for x in modules[above].children() if isinstance(x, nn.Linear)]
                halved = p.shape[0] // 2 in siblings and p.shape[0] not in siblings
                fused = QKV.fullmatch(last) or (halved and GATE_UP.fullmatch(last))
                kind = "small" if min(p.shape) < 4 else "hidden"
                if fused and kind == "hidden" and path not in blocks:
                    raise ValueError(f"{path} looks like several layers in one: give blocks={{{path!r}: how many}}")
            elif weight:
                n = blocks.get(path, module.groups)
                patches = module.kernel_size == module.stride and p[0, 0].numel() > 1
                if patches:
                    raise ValueError(f"{path} is a convolution of patches, which this optimizer does not know")
                few = module.in_channels <= 4 and not patches
                depthwise = 1 < module.groups == module.in_channels
                narrow = min(len(p) // module.groups, p[0].numel()) < 4
                kind = "small" if few or depthwise or narrow else "hidden"
            elif isinstance(module, nn.MultiheadAttention):
                n = 3 * module.num_heads if attribute == "in_proj_weight" else 1
            else:
                raise ValueError(f"{path}.{attribute} is of a {type(module).__name__}: say in groups_of what that is")
            tied = id(p) in found and found[id(p)][0] != kind
            found[id(p)] = ("output", 1, p) if tied else (kind, n, p)
    if output is not None and not any(kind == "output" for kind, _, _ in found.values()):
        raise ValueError(f"the module {output!r} has no weight of its own")
    groups: dict[tuple[str, int], list[Tensor]] = {}
    for kind, n, p in found.values():
        if p.requires_grad:
            groups.setdefault((kind, n), []).append(p)
    return [{"params": params, **kinds[kind], "kind": kind, "blocks": n} for (kind, n), params in groups.items()]
