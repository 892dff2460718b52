"""The lines of one weight's step, from the stages of a recipe."""

from __future__ import annotations

import math
import re
from typing import Any, cast

from normopt.norms.lp import Lp
from normopt.norms.matrices import MatrixNorm
from normopt.norms.operator import Mixed
from normopt.norms.schatten import Schatten
from normopt.recipe import Recipe
from normopt.stages import Regularization, Rescale, RowAverage, Stage

# The factor of a matrix's shape.
ASPECTS = {
    "rms": "math.sqrt(rows / (columns * math.prod(c.shape[2:])))",
    "rows": "math.sqrt(rows)",
    "columns": "math.sqrt(columns)",
    "entries": "math.sqrt(rows * columns)",
    "fan-in": "(1 / columns)",
    "original": "math.sqrt(max(1.0, rows / columns))",
    "match_rms_adamw": "(0.2 * math.sqrt(max(rows, columns)))",
}


class Step:
    """The step of a recipe, as lines of code on w, g, state and group.

    Args:
        recipe: the recipe.
        blocks: how many matrices a tensor holds, as code; "" asks the norm.
        vectors: whether tensors of less than 2 dims may come.

    Attributes:
        lines: the lines.
        numbers: the settings that they read from the group.

    Raises:
        ValueError: no file can do this step.
    """

    def __init__(self, recipe: Recipe, blocks: str = "", vectors: bool = True) -> None:
        self.recipe, self.blocks, self.vectors = recipe, blocks, vectors
        self.lines: list[str] = []
        self.numbers: dict[str, float] = {}
        self._refuse()
        self._gradient()
        self._state()
        self._momentum()
        self._direction()
        self._length()
        self._write()
        self.lines = without_aliases(self.lines)

    def number(self, stage: Stage, name: str) -> str:
        """Return a setting's name, to be read from the group."""
        self.numbers[name] = getattr(stage, name)
        return name

    def add(self, *lines: str) -> None:
        self.lines += lines

    def _refuse(self) -> None:
        r, run = self.recipe, self.recipe.run
        regularization = cast(Regularization, r.every[Regularization])
        cases = {
            "fused=True is of kernels": run.fused,
            "foreach=True is of multi-tensor operations, and a file takes one tensor after another": run.foreach,
            "differentiable=True is left out": run.differentiable,
            'scope="group" needs all tensors at once': r.direction.whole_group,
            'agr_scope="group" needs all tensors at once': regularization.whole_group,
            f'rounding="{r.round.rounding}" is for 16-bit weights, which the file does not take': r.round.rounding
            != "nearest",
            "state_dtype is left out: the momentum has the dtype of the weight": r.momentum.state_dtype,
            f"momentum_rule={r.momentum.momentum_rule!r} is your own": r.momentum.momentum_rule
            not in ("heavy", "ema", "lion"),
            f"decay={r.decay.decay!r} is your own": type(r.decay.rule).__module__ != "normopt.stages.decay",
        }
        cases |= {
            f"the stage {type(s).__name__} is your own": True
            for s in r.stages
            if not type(s).__module__.startswith("normopt.")
        }
        for reason, found in cases.items():
            if found:
                raise ValueError(f"this cannot be ejected, because {reason}")

    def _gradient(self) -> None:
        kinds = {type(s).__name__ for s in self.recipe.stages}
        if "Maximize" in kinds:
            self.add("g = -g")
        if "Regularization" in kinds:
            self.add("g = regularize(g)")
        if self.recipe.decay.rule.before_momentum:
            self.add(f"g = g.add(w, alpha={self.number(self.recipe.decay, 'weight_decay')})")

    def _state(self) -> None:
        r = self.recipe
        zeros, first = "torch.zeros_like(w)", {}
        if r.count.runs():
            first["step"] = "0"
        if r.momentum.runs() and r.momentum.momentum_rule != "heavy":
            first["momentum_buffer"] = zeros
        if r.difference.runs():
            first |= {"exp_avg_diff": zeros, "previous_grad": "g.clone()"}
        for slot in r.metric.slots():
            first[slot.name] = zeros
        if cast(RowAverage, r.every[RowAverage]).runs():
            first["row_avg_sq"] = "w.new_zeros([len(w)] + [1] * (w.dim() - 1))"
        if r.coupling.runs():
            first["dual_iterate"] = "w.clone()"
        if r.sphere.runs():
            first["sphere_radius"] = "length(w)"
        if first:
            self.add("if not state:", *(f'    state["{name}"] = {value}' for name, value in first.items()))
        if r.count.runs():
            self.add('t = state["step"] = int(state["step"]) + 1')

    def _momentum(self) -> None:
        r, s = self.recipe, self.recipe.momentum
        c = "g"
        if s.runs():
            mu = self.number(s, "momentum")
            buffer = 'state["momentum_buffer"]'
            weight = f"1 - {mu}**t"
            if s.momentum_rule == "heavy":
                scale = f", alpha=1 - {self.number(s, 'dampening')}" if s.dampening != 0 else ""
                self.add('if "momentum_buffer" in state:', f"    {buffer}.mul_({mu}).add_(g{scale})")
                self.add("else:", f"    {buffer} = g.clone()", f"m = {buffer}")
                c = f"g.add(m, alpha={mu})" if s.nesterov else "m"
            elif s.momentum_rule == "ema":
                self.add(f"m = {buffer}", f"m.lerp_(g, 1 - {mu})")
                c = f"g.lerp(m, {mu})" if s.nesterov else "m"
                weight = f"(1 - {mu}) + {mu} * ({weight})" if s.nesterov else weight
            else:
                beta = self.number(s, "beta2")
                self.add(f"m = {buffer}", f"c = m.lerp(g, 1 - {mu})", f"m.lerp_(g, 1 - {beta})")
                c = "c"
                weight = f"{mu} * (1 - {beta} ** (t - 1)) + (1 - {mu})"
            if r.count.runs():
                c = f"{c} / ({weight})"
        if c != "c":
            self.add(f"c = {c}")
        if r.difference.runs():
            beta = self.number(r.difference, "difference_beta")
            self.add('difference = g - state["previous_grad"]', 'state["previous_grad"].copy_(g)')
            self.add('d = state["exp_avg_diff"]', f"d.lerp_(difference, 1 - {beta})")
            self.add(f"c = c.add({f'd / (1 - {beta}**t)' if r.count.runs() else 'd'}, alpha={beta})")
            self.add(f"g = g.add(difference, alpha={beta})")
        if r.metric.runs():
            self._metric()

    def _metric(self) -> None:
        r, s = self.recipe, self.recipe.metric
        self.add('v = state["exp_avg_sq"]')
        if s.metric_rule == "sum":
            self.add("v.addcmul_(g, g)")
        else:
            beta = self.number(s, "metric_beta")
            self.add(f"v.mul_({beta}).addcmul_(g, g, value=1 - {beta})")
        if s.metric_rule == "max":
            self.add('v = torch.maximum(state["max_exp_avg_sq"], v, out=state["max_exp_avg_sq"])')
        corrected = f".div_((1 - {beta}**t) ** 0.5)" if r.count.runs() and s.metric_rule != "sum" else ""
        self.add(f"root = v.sqrt(){corrected}.add_({self.number(s, 'metric_eps')})")
        if not r.norm.is_identity(r.direction.base):
            self.add("root.sqrt_()", "c = c / root")

    def _direction(self) -> None:
        r, d = self.recipe, self.recipe.direction
        identity = r.norm.is_identity(d.base)
        if type(r.norm) is Lp:
            self.add(f"u = {self._lp(r.norm, identity)}")
        elif isinstance(r.norm, Schatten | Mixed):
            self._matrix(r.norm)
        else:
            raise ValueError(f"this cannot be ejected, because the norm {d.norm!r} is your own")
        if r.metric.runs():
            if d.scale == "matched" and not identity:
                self.add("c = c / root")
            self.add("u = u / root")
        rows = cast(RowAverage, r.every[RowAverage])
        if rows.runs():
            f = ASPECTS.get(cast(MatrixNorm, r.norm).aspect, "1.0")
            beta = self.number(rows, "row_beta")
            self.add(f'u = even_rows(u, state["row_avg_sq"], {f}, {beta}, {self._count()})')

    def _lp(self, norm: Lp, identity: bool) -> str:
        d, p = self.recipe.direction, cast(float, norm.p)
        if d.base == "power":
            # A schedule may move it, but for a metric's, of which p = 2 is another rule.
            name = self.number(d, "p") if d.p is not None and not self.recipe.metric.runs() else code(p)
            if d.eps != 0:
                return f"c * (c.abs() + {self.number(d, 'eps')}).pow(1 / ({name} - 1) - 1)"
            if name == "p":
                return "signed_power(c, 1 / (p - 1))"
        if identity:
            return "c"
        if p == math.inf and d.base != "dual":
            return "sign(c)"
        if d.base == "power":
            return f"signed_power(c, {1 / (p - 1)!r})"
        unit = {1.0: "largest_entry(c)", 2.0: "unit(c)", math.inf: "sign(c)"}.get(p, f"lp_map(c, {p!r})")
        if d.base != "dual":
            return unit
        return f"{unit} * c.abs().amax()" if p == 1 else f"times_dual_norm({unit}, c, {code(p)})"

    def _count(self) -> str:
        """Return how many matrices a tensor holds, as code."""
        return self.blocks or str(cast(MatrixNorm, self.recipe.norm).blocks)

    def _matrix(self, norm: Schatten | Mixed) -> None:
        d, count = self.recipe.direction, self._count()
        if norm.matrix_view not in ("flatten", "transposed") or isinstance(norm.blocks, tuple):
            raise ValueError(
                f"this cannot be ejected, because a file reads a tensor as one matrix or equal blocks, but {norm!r} "
                "reads it otherwise"
            )
        if norm.matrix_view == "transposed":
            self.add("y = c.mT[None]")
        else:
            self.add("y = as_matrix(c)" if count == "1" else f"y = c.reshape({count}, len(c) // {count}, -1)")
        f = ASPECTS.get(norm.aspect, "")
        sizes = [name for name in ("rows", "columns") if name in f]
        if sizes:
            self.add(f"{', '.join(sizes)} = y.shape[{'1:' if len(sizes) == 2 else 1 + (sizes == ['columns'])}]")
        n, u = self._mixed(norm) if isinstance(norm, Mixed) else self._schatten(norm)
        back = "[0].mT" if norm.matrix_view == "transposed" else ".reshape(c.shape)"
        self.add(f"{'n, u' if n else 'u'} = {u}", f"u = (u * {f}){back}" if f else f"u = u{back}")
        if d.base == "dual":
            total = "" if n == "" else f", {f'{f} * ' if f else ''}n.sum()"
            self.add(f"u = times_inner(u, c{total})")

    def _mixed(self, norm: Mixed) -> tuple[str, str]:
        if self.recipe.direction.base == "dual" or norm.p_outer != math.inf or norm.p_inner not in (2, math.inf):
            raise ValueError(
                f"this cannot be ejected, because of the mixed norms a file has unit rows, unit columns and signs, but "
                f"the norm is {norm!r} with the scale {self.recipe.direction.scale!r}"
            )
        if norm.p_inner == math.inf:
            return "", "sign(y)"
        return "", "unit_rows(y)" if norm.lines == "rows" else "unit_rows(y.mT).mT"

    def _schatten(self, norm: Schatten) -> tuple[str, str]:
        """Return whether the code gives the dual norms, too, and the code."""
        e, base = norm.power_exponent, self.recipe.direction.base
        wants, linear = base == "dual", e == 1
        if base == "power" and linear:
            return "", "y"
        if base == "power" and not (e == 0 and norm.exponent is None):
            return "", f"singular_powers(y, {e!r})"
        vector = "length(y), unit(y)" if wants else "unit(y)"
        dtype = "fast_dtype(y)" if norm.dtype == "auto" else f"torch.{norm.dtype}"
        if linear:
            return "n" * wants, vector
        if norm.method in ("newton-schulz", "polar-express"):
            found = f"{norm.method.replace('-', '_')}(y, {norm.steps}, {dtype})"
            if wants and self.vectors:
                raise ValueError(
                    f'this cannot be ejected, because under scale="dual" a file has norm_method="svd" only, not '
                    f'"{norm.method}"'
                )
            return "", f"{found} if c.dim() > 1 else unit(y)" if self.vectors else found
        found = f"top_pair(y, {norm.steps})" if norm.method == "lanczos" else "top_singular(y)"
        if norm.method == "svd" and e is not None:
            found = f"schatten_map(y, {e!r})"
        found = found if wants else f"{found}[1]"
        vector = f"({vector})" if wants else vector
        return "n" * wants, f"{found} if c.dim() > 1 else {vector}" if self.vectors else found

    def _length(self) -> None:
        r = self.recipe
        if r.decay.rule.in_direction:
            self.add(f"u = u.add(w, alpha={self.number(r.decay, 'weight_decay')})")
        to = cast(Rescale, r.every[Rescale]).to
        if to == "matched":
            self.add("u = with_length_of(c, u)")
        elif to == "relative":
            self.add("size = length(w)", "u = unit(u) * torch.where(size == 0, length(u), size)")
        elif to == "sphere":
            self.add('u = unit(u) * state["sphere_radius"]')
        if r.coupling.runs():
            tau, rate = self.number(r.coupling, "coupling"), self.number(r.coupling, "coupling_rate")
            self.add('z = state["dual_iterate"]', f"z.add_(c, alpha=-{rate})")
            self.add(f"pull = (z - w) * {tau}", f"u = u * (1 - {tau})")

    def _write(self) -> None:
        r, lr = self.recipe, self.number(self.recipe.write, "lr")
        if r.write.lr_ratio != 1:
            self.add(f"lr = lr * {self.number(r.write, 'lr_ratio')}")
        radius = f" * {self.number(r.write, 'radius')}" if r.write.radius != 1 else ""
        step = f"w.add_(u, alpha=-{lr}{radius})"
        rule, kind = r.decay.rule, r.decay.decay
        if not r.decay.runs() or rule.before_momentum or rule.in_direction:
            self.add(step)
        else:
            k = f"{lr} * {self.number(r.decay, 'weight_decay')}"
            if kind == "decoupled":
                self.add(f"w.mul_(1 - {k})", step)
            elif kind == "proximal":
                self.add(step, f"w.div_(1 + {k})")
            elif kind == "cautious":
                self.add(f"w.mul_(where_aligned(u, w, 1 - {k}))", step)
            else:
                p = self.number(r.decay, "decay_p")
                factor = f"lp_factor(w, {p}, {p} * ({k}))"
                factor = f"where_aligned(u, w, {factor})" if kind == "cautious-lp" else factor
                self.add(f"factor = {factor} if w.dim() > 1 else 1.0", step, "w.mul_(factor)")
        if r.coupling.runs():
            self.add("w.add_(pull)")
        if r.sphere.runs():
            self.add('to_sphere(w, state["sphere_radius"])')


def code(value: Any) -> str:
    """Return a value as code."""
    return "math.inf" if value == math.inf and not isinstance(value, str) else repr(value)


def without_aliases(lines: list[str]) -> list[str]:
    """Return lines in which what is only another name of a variable, as after ``c = m``, has that variable's name."""
    for i, line in enumerate(lines):
        found = re.fullmatch(r"(\w+) = ([a-z])", line)
        rest = lines[i + 1 :]
        if found and not any(re.match(rf"({found[1]}|{found[2]}) = ", later) for later in rest):
            return without_aliases(lines[:i] + [re.sub(rf"\b{found[1]}\b(?![\"'])", found[2], later) for later in rest])
        if found and rest and (step := re.match(rf"{found[1]} = ", rest[0])):
            start = rest[0][: step.end()]
            return without_aliases(
                [*lines[:i], start + re.sub(rf"\b{found[1]}\b", found[2], rest[0][len(start) :]), *rest[1:]]
            )
    return lines
