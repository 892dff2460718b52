"""The playground's mathematics is normopt's, and its controls change its pictures, with a mouse and without."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import normopt
from normopt.norms.base import Scale
from normopt.norms.lp import Lp
from normopt.stages import Momentum
from normopt.stages.momentum import step_
from tests.directions import direction
from tests.patience import patience

MAPS = Path(__file__).parents[2] / "docs/playground/maps.js"

ORDERS = [1.0, 1.1, 1.5, 2.0, 3.0, 8.0, 100.0, math.inf]
SCALES: list[Scale] = ["unit", "dual", "power", "matched"]
GRADIENTS = [
    [1.0, 0.45],
    [-3.0, 4.0, 0.0],
    [0.0, 0.0],
    [0.0, -2.0],
    [-0.0, 1.0],
    [1.0, 1.0],
    [-2.0, 2.0, 2.0, 1.0],
    [1e-300, -3e-301],
    [1e300, -3e299, 1.0],
    [1e-200, 1e200],
    [5e-324, 0.0],
    [7.0],
    [math.nan, 1.0, -2.0],
    [1.0, math.nan],
    [math.nan, 0.0],
    [math.inf, -1.0, 0.0],
    [-math.inf, math.inf],
    *np.random.default_rng(0).standard_normal((6, 5)).tolist(),
]
SCHEDULES = [
    (start, s, total, space, end)
    for start, space, end in [
        (8.0, "p", 2.0),
        (1.0, "p", 2.0),
        (1.5, "p", 3.0),
        (8.0, "exponent", 2.0),
        (math.inf, "exponent", 2.0),
        (math.inf, "exponent", 1.5),
    ]
    for total in (1, 2, 7)
    for s in (1, 2, 4, 7, 9)
]
MOMENTA = [([1.0, -2.0], [0.5, 3.0], 0.9), ([0.0, 1e300], [1e-300, -1.0], 0.5), ([1.0], [2.0], 0.0)]
CASES = [(g, p, scale) for g in GRADIENTS for p in ORDERS for scale in SCALES]
METRICS = [
    (g, p, scale, roots)
    for g in ([1.0, 0.45], [-3.0, 4.0], [0.0, -2.0])
    for p in ORDERS
    for scale in SCALES
    for roots in ([1.0, 1.0], [1.0, 2.0], [0.5, 3.0])
]

# What both node and the browser run: JSON has no ∞ and no NaN, so that every number travels as text.
SCRIPT = """
(maps, text) => {
  const { cases, metrics, schedules, momenta } = JSON.parse(text);
  const read = x => Array.isArray(x) ? x.map(read) : Number(x);
  const write = x => Array.isArray(x) ? x.map(write) : String(x);
  const attempt = rule => { try { return write(rule()); } catch (e) { return e.name; } };
  return JSON.stringify({
    norms: cases.map(([g, p]) => write(maps.norm(read(g), read(p)))),
    duals: cases.map(([g, p]) => write(maps.dualNorm(read(g), read(p)))),
    maps: cases.map(([g, p]) => write(maps.dualMap(read(g), read(p)))),
    updates: cases.map(([g, p, scale]) => attempt(() => maps.update(read(g), read(p), scale))),
    metrics: metrics.map(([g, p, scale, roots]) => {
      const { d, dual, u } = maps.inMetric(read(g), read(p), scale, roots);
      return { d: write(d), dual: write(dual), u: u && write(u) };
    }),
    schedules: schedules.map(([a, s, n, space, b]) => write(maps.cosineP(read(a), read(s), read(n), space, read(b)))),
    momenta: momenta.map(([m, g, mu]) => write(maps.ema(read(m), read(g), read(mu)))),
    refused: [
      attempt(() => maps.dualMap([1, 2], 0.5)),
      attempt(() => maps.dualMap([1, 2], NaN)),
      attempt(() => maps.update([1, 2], 3, "none")),
      attempt(() => maps.cosineP(Infinity, 1, 3)),
      attempt(() => maps.cosineP(1, 1, 3, "exponent")),
    ],
  });
}
"""


def as_text(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return [as_text(entry) for entry in x]
    if isinstance(x, float) and math.isinf(x):
        return "Infinity" if x > 0 else "-Infinity"
    return x if isinstance(x, str) else "NaN" if isinstance(x, float) and math.isnan(x) else repr(x)


def question() -> str:
    of_metrics = [[as_text(g), as_text(p), scale, roots] for g, p, scale, roots in METRICS]
    return json.dumps(
        {"cases": as_text(CASES), "metrics": of_metrics, "schedules": as_text(SCHEDULES), "momenta": as_text(MOMENTA)}
    )


def check(answer: str) -> None:
    """Each answer of maps.js against normopt in float64."""

    def same(theirs: Any, ours: torch.Tensor | float, case: Any) -> None:
        expected = ours.tolist() if isinstance(ours, torch.Tensor) else ours
        got = [float(x) for x in theirs] if isinstance(theirs, list) else float(theirs)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=0, equal_nan=True, err_msg=str(case))

    found = json.loads(answer)
    for i, (g, p, scale) in enumerate(CASES):
        c = torch.tensor(g, dtype=torch.float64)
        lp = Lp(p)
        same(found["norms"][i], lp.norm(c), CASES[i])
        same(found["duals"][i], lp.dual_norm(c), CASES[i])
        same(found["maps"][i], lp.dual_map(c), CASES[i])
        if scale == "power" and p == 1:
            with pytest.raises(ValueError, match="not defined at p = 1"):
                direction(lp, [c], scale, False, 0.0)
            assert found["updates"][i] == "RangeError"
        else:
            same(found["updates"][i], direction(lp, [c], scale, False, 0.0)[0][0], CASES[i])
    for theirs, (g, p, scale, roots) in zip(found["metrics"], METRICS, strict=True):
        c, r, lp = torch.tensor(g, dtype=torch.float64), torch.tensor(roots, dtype=torch.float64), Lp(p)
        d = lp.dual_map(c / r) / r
        same(theirs["d"], d, (g, p, roots))
        same(theirs["dual"], lp.dual_norm(c / r), (g, p, roots))
        if scale == "matched":
            same(theirs["u"], d * (c / r**2).norm() / d.norm(), (g, p, roots))
        elif scale == "power" and p == 1:
            assert theirs["u"] is None
        else:
            same(theirs["u"], direction(lp, [c / r], scale, False, 0.0)[0][0] / r, (g, p, scale, roots))
    for theirs, (start, s, total, space, end) in zip(found["schedules"], SCHEDULES, strict=True):
        opt = normopt.SteepestDescent([torch.zeros(1)], lr=0.1, norm="lp", p=start, scale="unit")
        schedule = normopt.schedules.CosineP(opt, total, end, space)
        same(theirs, schedule.p_at(start, s), (start, s, total, space, end))
    for theirs, (m, g, mu) in zip(found["momenta"], MOMENTA, strict=True):
        old, new = torch.tensor(m, dtype=torch.float64), torch.tensor(g, dtype=torch.float64)
        rule = Momentum(momentum=mu, momentum_rule="ema").coefficients()
        same(theirs, step_(rule, [old], [new])[0], (m, g, mu))
    assert found["refused"] == ["RangeError"] * 5


def test_the_maps_are_those_of_normopt(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    shutil.copy(MAPS, tmp_path / "maps.mjs")
    main = tmp_path / "main.mjs"
    main.write_text(
        'import * as maps from "./maps.mjs";\nimport { readFileSync } from "node:fs";\n'
        f"console.log(({SCRIPT.strip()})(maps, readFileSync(0, 'utf8')));\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [node, str(main)], input=question(), capture_output=True, encoding="utf-8", timeout=patience(20), check=False
    )
    assert done.returncode == 0, done.stderr
    check(done.stdout)


def test_the_maps_in_the_browser_are_those_of_normopt(visit: Any) -> None:
    one = visit()
    one.goto("playground/")
    script = f"async text => ({SCRIPT.strip()})(await import(new URL('maps.js', location.href)), text)"
    check(one.page.evaluate(script, question()))


BALL = ("#pg-ball .pg-ball", "#pg-ball .pg-d", "#pg-ball .pg-u")
WALK = ("#pg-paths .pg-lpsgdm", "#pg-curves .pg-lpsgdm")
EVERY_WALK = tuple(f"#pg-paths path.pg-{name}" for name in ("sgd", "signsgd", "lpsgdm"))
FIT = "#pg-fit .pg-fit-line"
CONTOURS = ("#pg-paths .pg-contours path:first-child",)


def drawn(one: Any, parts: tuple[str, ...]) -> list[str]:
    one.frame()
    return [str(one.page.locator(part).first.get_attribute("d")) for part in parts]


def changes(one: Any, parts: tuple[str, ...], act: Any) -> None:
    before = drawn(one, parts)
    act()
    for part, old, new in zip(parts, before, drawn(one, parts), strict=True):
        assert old != new, part


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("control", "key", "parts"),
    [
        ("#pg-p", "ArrowLeft", BALL + WALK),
        ("#pg-p", "End", BALL + WALK),
        ("[data-p='1.5']", "Enter", BALL + WALK),
        ("[name=pg-scale]:checked", "ArrowRight", ("#pg-ball .pg-u", *WALK)),
        ("#pg-metric", "ArrowRight", BALL),
        ("#pg-condition", "ArrowRight", CONTOURS + EVERY_WALK),
        ("#pg-angle", "ArrowRight", CONTOURS + EVERY_WALK),
        ("[name=pg-surface]:checked", "ArrowRight", CONTOURS + EVERY_WALK),
        ("#pg-momentum", "Space", EVERY_WALK),
        ("#pg-anneal", "Space", WALK),
        ("#pg-sgd-lr", "ArrowRight", ("#pg-paths path.pg-sgd",)),
        ("#pg-signsgd-lr", "ArrowRight", ("#pg-paths path.pg-signsgd",)),
        ("#pg-lpsgdm-lr", "ArrowRight", WALK),
        ("#pg-step", "Home", EVERY_WALK),
        ("#pg-reset", "Enter", EVERY_WALK),
        ("#pg-fit-step", "ArrowLeft", (*EVERY_WALK, FIT)),
        ("[name=pg-from]:checked", "ArrowRight", (FIT,)),
        (".pg-handle", "ArrowUp", ("#pg-ball .pg-g", "#pg-ball .pg-d")),
    ],
)
def test_every_control_takes_the_keyboard(visit: Any, control: str, key: str, parts: tuple[str, ...]) -> None:
    one = visit()
    one.goto("playground/")
    changes(one, parts, lambda: one.page.press(control, key))


def test_the_mouse_drags_p_and_the_gradient(visit: Any) -> None:
    one = visit(viewport=(1280, 900))
    one.goto("playground/")
    page = one.page

    def drag(selector: str, start: tuple[float, float], to: tuple[float, float]) -> None:
        page.locator(selector).scroll_into_view_if_needed()
        box = page.locator(selector).bounding_box()
        page.mouse.move(box["x"] + start[0] * box["width"], box["y"] + start[1] * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + to[0] * box["width"], box["y"] + to[1] * box["height"], steps=4)
        page.mouse.up()

    changes(one, BALL + WALK, lambda: drag("#pg-p", (0.5, 0.5), (1.0, 0.5)))
    assert page.inner_text("#pg-p-text") == "∞"
    assert page.inner_text("#pg-d-text") == "(1.00, 1.00)"  # the corner
    changes(one, ("#pg-ball .pg-d",), lambda: drag(".pg-handle", (0.5, 0.5), (-2.0, 4.0)))
    x, y = (float(t) for t in page.inner_text("#pg-g-text").strip("()").replace("−", "-").split(", "))
    assert -1.6 <= x < 1
    assert -1.6 <= y < 0.45
    assert page.inner_text("#pg-d-text") == f"({'−' if x < 0 else ''}1.00, {'−' if y < 0 else ''}1.00)"


def test_the_numbers_are_those_of_normopt(visit: Any) -> None:
    one = visit()
    one.goto("playground/")
    g = torch.tensor([1.0, 0.45], dtype=torch.float64)
    for p in (1.5, 3.0):
        one.page.click(f"[data-p='{p:g}']")
        for scale in SCALES:
            one.page.check(f"[name=pg-scale][value={scale}]")
            one.frame()
            u = direction(Lp(p), [g], scale, False, 0.0)[0][0].tolist()
            assert one.page.inner_text("#pg-u-text") == f"({u[0]:.2f}, {u[1]:.2f})"
        assert one.page.inner_text("#pg-p-text") == f"{p:g}"
        d = Lp(p).dual_map(g).tolist()
        assert one.page.inner_text("#pg-d-text") == f"({d[0]:.2f}, {d[1]:.2f})"
        assert one.page.inner_text("#pg-dual-text") == f"{float(Lp(p).dual_norm(g)):.2f}"


def test_a_walk_is_that_of_the_optimizer(visit: Any) -> None:
    """LPSGDM with its schedule on Rosenbrock's valley: the same loss at the last step, to the digits shown."""
    one = visit()
    one.goto("playground/")
    one.page.check("[name=pg-surface][value=rosenbrock]")
    one.frame()
    w = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    opt = normopt.LPSGDM([w], lr=0.002, p=4.0, momentum=0.9)
    schedule = normopt.schedules.CosineP(opt, total_steps=1000)

    def loss() -> torch.Tensor:
        return (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2

    for _ in range(1000):
        opt.zero_grad()
        loss().backward()
        opt.step()
        schedule.step()
    assert float(one.page.inner_text("#pg-lpsgdm-loss")) == pytest.approx(loss().item(), rel=0.05)
    assert one.page.inner_text("#pg-lpsgdm-p") == "p = 2"


def largest_decrease(f: Any, gradient: list[float], w: list[float], p: float) -> float:
    """The loss less its least value along −D(g), by a search over ever finer grids of the length."""
    d = Lp(p).dual_map(torch.tensor(gradient, dtype=torch.float64)).tolist()
    lengths = np.geomspace(1e-8, 1e2, 2000)
    for _ in range(4):
        losses = f(*(x - lengths * dx for x, dx in zip(w, d, strict=True)))
        best = int(losses.argmin())
        low, high = lengths[max(best - 1, 0)], lengths[min(best + 1, len(lengths) - 1)]
        lengths = np.linspace(low, high, 200)
    return float(f(*w) - losses.min())


def ellipse(x: Any, y: Any, condition: float = 20.0, degrees: float = 30.0) -> Any:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return ((cos * y - sin * x) ** 2 + (cos * x + sin * y) ** 2 / condition) / 2


def valley(x: Any, y: Any) -> Any:
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def gradient(f: Any, w: list[float]) -> list[float]:
    at = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    return list(torch.autograd.grad(f(*at), at)[0].tolist())


def test_the_decrease_under_each_p_is_that_of_an_exact_line_search(visit: Any) -> None:
    one = visit()
    one.goto("playground/")
    points = [*np.random.default_rng(1).uniform(-1.5, 1.5, (8, 2)).tolist(), [-1.2, 1.0], [0.5, 0.25], [0.0, 1.0]]
    script = """async points => {
        const [{ ORDERS, decrease, fit }, { quadratic, rosenbrock }] = await Promise.all(
            ["fit.js", "surfaces.js"].map(name => import(new URL(name, location.href))));
        return [quadratic(20, 30), rosenbrock].map(surface => ({
            orders: ORDERS.map(String), decreases: points.map(w => ORDERS.map(p => decrease(surface, w, p))),
            fits: points.map(w => fit(surface, w)), still: fit(surface, surface.minimum),
        }))}"""
    for f, found in zip((ellipse, valley), one.page.evaluate(script, points), strict=True):
        orders = [float(p) for p in found["orders"]]
        assert orders[0] == 1
        assert orders[-1] == math.inf
        for w, theirs, fit in zip(points, found["decreases"], found["fits"], strict=True):
            ours = [largest_decrease(f, gradient(f, w), w, p) for p in orders]
            np.testing.assert_allclose(theirs, ours, rtol=1e-6, atol=1e-9 * f(*w))
            assert fit["most"] == max(theirs)
            assert fit["relative"] == pytest.approx([x / max(theirs) for x in theirs])
            assert theirs[orders.index(float(fit["best"] or math.inf))] == fit["most"]  # JSON has no ∞, but null
        assert found["still"]["most"] == 0


def test_which_norm_fits_now(visit: Any) -> None:
    """The page's sentences about SGD's path and the numbers beside the picture are those of normopt's SGD."""
    one = visit()
    one.goto("playground/")
    page = one.page

    def put(name: str, value: float) -> None:
        page.evaluate(
            """([id, value]) => { const slider = document.getElementById(id); slider.value = value;
            slider.dispatchEvent(new Event("input")) }""",
            [f"pg-{name}", value],
        )
        one.frame()

    def shown(name: str) -> str:
        return str(page.inner_text(f"#pg-fit-{name}-text"))

    def percent(text: str) -> float:
        return float(text.removesuffix(" % of f"))

    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    w = torch.tensor([-1.15 * cos - 0.85 * sin, -1.15 * sin + 0.85 * cos], dtype=torch.float64, requires_grad=True)
    rule = {"norm": "l2", "scale": "dual", "momentum_rule": "ema"}
    opt = normopt.SteepestDescent([w], lr=0.3, momentum=0.9, **rule)
    points = []
    for _ in range(201):
        points.append(w.tolist())
        opt.zero_grad()
        ellipse(*w).backward()
        opt.step()
    for step, best in ((0, "∞"), (20, "1"), (200, "1.96")):
        put("fit-step", step)
        at = points[step]
        parts = {p: 100 * largest_decrease(ellipse, gradient(ellipse, at), at, p) / ellipse(*at) for p in (1, 2, 4)}
        order, text = shown("best").removeprefix("p = ").split(": ")
        assert order == best
        assert percent(text) >= max(parts.values()) * 0.99
        assert shown("p") == "p = 4"
        assert percent(shown("two")) == pytest.approx(parts[2], rel=0.02)
        assert percent(shown("chosen")) == pytest.approx(parts[4], rel=0.02)
    assert percent(shown("two")) == 100
    put("step", 0)  # either slider moves both
    assert page.input_value("#pg-fit-step") == "0"
    two = shown("two")
    for angle, best in ((0, "∞"), (45, "1")):
        put("angle", angle)
        assert shown("best").startswith(f"p = {best}: ")
        assert shown("two") == two
    put("condition", 0)
    put("angle", 30)
    for step in (0, 5, 50):
        put("step", step)
        assert shown("best") == "p = 2: 100 % of f"
    put("angle", 45)
    page.check("[name=pg-surface][value=rosenbrock]")
    page.check("[name=pg-from][value=signsgd]")
    one.frame()
    assert "% of f" in shown("best")
    assert page.get_attribute("#pg-fit", "aria-label").endswith(f"p = 4: {shown('chosen')}.")


def test_p_1_says_where_power_is_not_defined(visit: Any) -> None:
    one = visit()
    one.goto("playground/")
    one.page.click("[data-p='1']")
    one.frame()
    assert one.page.inner_text("#pg-u-text") == "not defined at p = 1"
    assert one.page.inner_text("#pg-lpsgdm-loss") == "not defined at p = 1"
    one.page.check("[name=pg-scale][value=dual]")
    one.frame()
    assert one.page.inner_text("#pg-d-text") == "(1.00, 0.00)"
    assert one.page.inner_text("#pg-u-text") == "(1.00, 0.00)"


def test_it_plays_pauses_and_resets(visit: Any) -> None:
    one = visit()
    one.goto("playground/")
    page = one.page
    step = page.locator("#pg-step")
    page.click("#pg-reset")
    one.frame()
    assert step.input_value() == "0"
    page.click("#pg-play")
    page.wait_for_function("document.getElementById('pg-step').valueAsNumber > 5")
    assert page.inner_text("#pg-play") == "Pause"
    page.click("#pg-play")
    one.frame()
    stopped = step.input_value()
    one.frame()
    assert step.input_value() == stopped
    assert 5 < int(stopped) < 200
    assert page.inner_text("#pg-play") == "Play"


def test_less_motion_shows_the_walk_whole(visit: Any) -> None:
    one = visit(reduced_motion="reduce")
    one.goto("playground/")
    one.page.click("#pg-reset")
    one.page.click("#pg-play")
    one.frame()
    assert one.page.input_value("#pg-step") == "200"
    assert one.page.inner_text("#pg-play") == "Play"


def test_the_pictures_follow_the_scheme_and_the_width(visit: Any) -> None:
    one = visit(viewport=(390, 800), color_scheme="light")
    one.goto("playground/")

    def colour() -> str:
        return str(one.page.evaluate("getComputedStyle(document.querySelector('.pg-minimum')).stroke"))

    light = colour()
    one.page.click("label[for=__palette_1]:visible")
    assert colour() != light
    assert one.page.evaluate("document.documentElement.scrollWidth") == 390


def test_every_control_has_a_name(visit: Any) -> None:
    one = visit()
    one.goto("playground/")
    unnamed = """() => [...document.querySelectorAll(".pg input, .pg button, .pg [role], .pg form")].filter(e =>
        !e.ariaLabel && !e.labels?.[0]?.textContent.trim() && !e.textContent.trim()).map(e => e.outerHTML)"""
    assert one.page.evaluate(unnamed) == []
    for slider in one.page.locator(".pg input[type=range]").all():
        assert slider.get_attribute("aria-valuetext")
