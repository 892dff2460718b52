"""Eigenvalues of the Hessian or the Gauss–Newton matrix of a network, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from normopt._checks import check_integer, check_number
from normopt._plots import subplots
from normopt.diagnostics.products import Loss, Matrix, Products

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
COLUMNS = 1 << 16  # of the basis that are rotated in one call
ASYMMETRY = 1e-3  # of max|α|, β; roundoff of float32 makes 1e-6
# Half-width of an interval in standard deviations. A Gaussian error needs 1.96; a quadratic form has heavier tails.
WIDTH = 2.25


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalue distribution of a Hessian or Gauss–Newton matrix H of n parameters, from `hessian_spectrum`.

    Attributes:
        nodes: points of the estimated distribution [K].
        weights: their weights [K], which sum to 1: n times a weight is a number of eigenvalues.
        outliers: the eigenvalues of largest magnitude that were found one by one [r], descending in magnitude. They
            are among the nodes, with weight 1/n each. All eigenvalues if n is at most the number of Lanczos steps.
        size: n.
        largest: the largest eigenvalue.
        largest_error: ‖Hy − λy‖ of its unit vector y. H has an eigenvalue within this distance. The error is usually
            far smaller: about its square over the distance to the next eigenvalue.
        smallest: the smallest eigenvalue, counted from −∞.
        smallest_error: the same for the smallest.
        trace: the estimate of tr H.
        trace_half: half-width of its 95 % confidence interval; 0 if all eigenvalues were found.
        matrix: "hessian" or "gauss-newton".
        products: the number of products of H with a vector.

    Example:
        >>> found = normopt.hessian_spectrum(model, loss, batches)
        >>> found.largest, found.trace, found.effective_rank
        >>> found.plot().savefig("spectrum.png")
    """

    nodes: Array
    weights: Array
    outliers: Array
    size: int
    largest: float
    largest_error: float
    smallest: float
    smallest_error: float
    trace: float
    trace_half: float
    matrix: str
    products: int

    @property
    def scale(self) -> float:
        """The largest magnitude of an eigenvalue, max|λ|."""
        return max(abs(self.largest), abs(self.smallest))

    @property
    def anisotropy(self) -> float:
        """The anisotropy max|λ|/mean|λ|, from 1 to n, which is n over the effective rank; NaN if H = 0.

        Not over the median: half of the eigenvalues of a network may be nearer to 0 than Lanczos separates, and on the
        networks of the tests the median of the nodes was off by up to a factor of 10.
        """
        return _ratio(self.scale, float(self.weights @ np.abs(self.nodes)))

    @property
    def effective_rank(self) -> float:
        """The effective rank Σ|λ|/max|λ|, from 1 to n; NaN if H = 0."""
        return _ratio(self.size * float(self.weights @ np.abs(self.nodes)), self.scale)

    @property
    def negative(self) -> float:
        """The negative part: the fraction of Σ|λ| that negative eigenvalues have; NaN if H = 0."""
        return _ratio(float(self.weights @ np.maximum(-self.nodes, 0)), float(self.weights @ np.abs(self.nodes)))

    def quantile(self, q: ArrayLike) -> Array:
        """Return the eigenvalues below which the fractions q of all lie, in the shape of q.

        Args:
            q: fractions from 0 to 1.
        """
        order = np.argsort(self.nodes)
        at = np.searchsorted(np.cumsum(self.weights[order]), q)
        found: Array = self.nodes[order][np.minimum(at, len(order) - 1)]
        return found

    def share(self, above: float) -> float:
        """Return the fraction of the eigenvalues with |λ| > above.

        Args:
            above: the threshold.
        """
        return float(self.weights[np.abs(self.nodes) > above].sum())

    def density(self, at: ArrayLike, width: float) -> Array:
        """Return the density of the eigenvalues, every eigenvalue smoothed to a Gaussian; its integral is 1.

        Args:
            at: the points.
            width: the standard deviation of the Gaussians, in the unit of the eigenvalues.

        Raises:
            TypeError: ``width`` is not a number.
            ValueError: ``width`` is not above 0.
        """
        check_number("width", width, low=0, open_low=True)
        bumps = np.exp(-0.5 * ((np.asarray(at, dtype=np.float64)[..., None] - self.nodes) / width) ** 2)
        found: Array = bumps @ self.weights / (width * math.sqrt(2 * math.pi))
        return found

    def plot(self) -> Figure:
        """Plot the density on a logarithmic scale, smoothed by a hundredth of the range, with the outliers as ticks.

        Returns:
            A pyplot figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        figure, ax = subplots(1, 1, figsize=(6, 3.2), layout="constrained")
        width = (self.largest - self.smallest or 1.0) / 100
        at = np.linspace(self.smallest - 5 * width, self.largest + 5 * width, 1000)
        ax.plot(at, self.density(at, width), linewidth=1)
        ax.plot(self.outliers, np.zeros_like(self.outliers), "|", transform=ax.get_xaxis_transform(), markersize=12)
        ax.set(yscale="log", xlabel="eigenvalue", ylabel="density", ylim=(0.05 / (self.size * width), None))
        return figure


def hessian_spectrum(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[tuple[Any, Any]],
    *,
    matrix: Matrix = "hessian",
    steps: int = 64,
    probes: int = 10,
    seed: int = 0,
    train: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Spectrum:
    """Estimate the eigenvalue distribution of the Hessian of a loss at the model's weights.

    ::

        H     the Hessian of the loss, the mean over the batches, in all parameters that require a gradient
              "gauss-newton": JᵀLJ, J the Jacobian of the outputs and L the Hessian of the loss in the outputs
        1.    m Lanczos steps from a random start; Q: the Ritz vectors of the m/4 values θ of largest magnitude
        2.    for each probe: a random start in the complement of Q, m − m/4 Lanczos steps on PHP, P = 1 − QQᵀ
        tr H = Σθ + tr PHP            exact for any Q; tr PHP is the mean over the probes
        density: 1/n at each θ, (n − m/4)/n from the probes: the mean of the Gauss quadratures of the last m/8 steps

    Without step 1, the weight of an outlier would be a random number with a relative standard deviation of
    √(2/probes); with it, outliers count exactly. If n ≤ m, step 1 finds all eigenvalues, and there is no step 2.
    The Lanczos vectors are fully reorthogonalised. The basis has the dtype of the weights, the coefficients of the
    recurrence are float64. Products are by automatic differentiation, exact but for roundoff.

    Weights, buffers, gradients, modes and random numbers stay as they are. Equal seeds give equal results, bit for
    bit where the model's operations are deterministic. Autocast is off, and scaled_dot_product_attention runs in its
    "math" form, which alone can be differentiated twice. On CUDA, switch TF32 off: products would have three digits.

    Args:
        model: any module; called as ``model(input)``.
        loss: called as ``loss(output, target)``; returns the mean over the batch, one number.
        batches: (input, target) pairs on the model's device; kept in a list. Their mean is weighted by the targets'
            first dimension, if all targets are tensors.
        matrix: "hessian" (the default), or "gauss-newton", which has no negative eigenvalue if the loss is convex in
            the outputs. The outputs must then be one tensor.
        steps: m, from 8. Default 64.
        probes: the number of probes. Default 10. More of them narrow the interval of the trace as 1/√probes.
        seed: seed of the starts, and of dropout. Default 0.
        train: True: batch norm uses the statistics of each batch, and dropout is active, with the same mask in every
            product. False (the default): all modules are in eval mode.
        progress: called as ``progress(done, total)`` after each product.

    Returns:
        A `Spectrum`.

    Cost: m + probes·(m − m/4) + 2 products with H, 546 by default. On one core, a product on one batch takes 1.1 (MLP)
    to 3.1 times (convolutions with batch norm) as long as a training step with AdamW on the batch; with several
    batches, whose graphs are made anew in each product, up to 4 times. Memory: m·n numbers for the basis, about ten
    times the weights for the products, and the graph of the backward pass. With 10 million parameters and m = 64, the
    whole process had 3.3 GB on a CPU, and a product with its orthogonalisation took 1.3 s on one core.

    On the exact Hessians of the tests (an MLP, a convolution with batch norm, attention; at the start and trained) the
    defaults have both ends within 1e-4 of max|λ|, the Wasserstein distance within 10 % of the mean |λ|, and, for at
    least 97 of 100 seeds, the share of |λ| > λmax/100 within .02. Neither PyHessian, curvlinops nor BackPACK is used:
    the page of the diagnostics says why.

    Raises:
        TypeError: not a module, or ``loss`` or ``progress`` is not callable; a batch is not a pair; a parameter is
            lazy, sharded, or neither float32 nor float64; the outputs are not one tensor, for "gauss-newton"; an
            argument has the wrong type.
        ValueError: no parameter requires a gradient, or there is no batch; the loss is not one finite number, or does
            not depend on the parameters; the gradient does not depend on them, so that the matrix is zero or the
            graph was cut; a product is not finite; an argument is out of range.
        RuntimeError: an operation has no second derivative.

    Source: arXiv:1901.10159 and 1912.07145 (stochastic Lanczos quadrature of neural networks); deflation for the trace
    as in Hutch++, arXiv:2010.09649; Gauss–Newton products, Schraudolph 2002. Deflation for the density, and averaging
    over the last steps: ours.

    Example:
        >>> found = normopt.hessian_spectrum(model, loss, batches, matrix="gauss-newton")
        >>> found.largest, found.largest_error
    """
    check_size(steps, probes)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable as progress(done, total), but is {progress!r}")
    products = Products(model, loss, batches, matrix, train, seed)
    return estimate(products, steps, probes, progress)


def check_size(steps: object, probes: object) -> None:
    """Raise unless the numbers of Lanczos steps and probes are valid."""
    check_integer("steps", steps, 8)
    check_integer("probes", probes)


def estimate(
    products: Products, steps: int, probes: int, progress: Callable[[int, int], object] | None = None
) -> Spectrum:
    """Estimate the spectrum as `hessian_spectrum` says."""
    n, generator = products.size, torch.Generator().manual_seed(products.seed)
    steps = min(steps, n)
    kept, probes = (n, 0) if steps == n else (steps // 4, probes)
    done, total = 0, steps + probes * (steps - kept) + 2
    with products.product() as product:

        def counted(v: Tensor) -> Tensor:
            nonlocal done
            found = product(v)
            done += 1
            if progress is not None:
                progress(done, total)
            return found

        basis = torch.empty(steps, n, dtype=products.dtype, device=products.device)
        run = _Lanczos(counted, basis, 0, generator)
        theta, columns = run.ritz()
        ends = [run.end(i) for i in (0, -1)]
        order = np.argsort(-np.abs(theta), kind="stable")[:kept]
        _rotate(basis, columns[:, order], basis[:kept])
        outliers, nodes, weights, firsts = theta[order], [theta[order]], [np.full(kept, 1 / n)], []
        averaged = max(1, steps // 8)
        for _ in range(probes):
            run = _Lanczos(counted, basis, kept, generator)
            ends = [min(ends[0], run.end(0), key=_value), max(ends[1], run.end(-1), key=_value)]
            firsts.append((run.alpha[0], run.alpha[0] ** 2 + run.beta[0] ** 2))
            for skip in range(averaged):
                values, columns = run.ritz(skip)
                nodes.append(values)
                weights.append(columns[0] ** 2 * (n - kept) / (n * probes * averaged))
        del basis, run  # nearly all memory
        (smallest, smallest_error), (largest, largest_error) = (_residual(counted, y) for _, y in ends)
    trace, half, d = float(outliers.sum()), 0.0, n - kept
    if probes:
        # v uniform on the sphere: d·⟨v, Av⟩ has the mean tr A and the variance 2d/(d + 2)·(‖A‖² − (tr A)²/d).
        mean, square = np.mean(firsts, axis=0)
        trace += d * float(mean)
        half = WIDTH * d * math.sqrt(2 / (d + 2) * max(float(square - mean**2), 0.0) / probes)
    return Spectrum(
        np.concatenate(nodes),
        np.concatenate(weights),
        outliers,
        n,
        largest,
        largest_error,
        smallest,
        smallest_error,
        trace,
        half,
        products.matrix,
        done,
    )


class _Lanczos:
    """Lanczos steps in the complement of the first rows of a basis, which are orthonormal.

    Args:
        product: H times a vector, in float64.
        basis: the basis [m, n]; the rows from ``start`` on become the Lanczos vectors.
        start: the number of rows to stay orthogonal to.
        generator: of the start vector, on the CPU, so that it is the same on every device.
    """

    def __init__(
        self, product: Callable[[Tensor], Tensor], basis: Tensor, start: int, generator: torch.Generator
    ) -> None:
        alpha, beta = np.zeros((2, len(basis) - start))
        norm = scale = asymmetry = 0.0
        for j in range(start, len(basis)):
            i = j - start
            if norm <= 1e-14 * scale:  # the start, or an invariant subspace is complete
                w = torch.randn(basis.shape[1], generator=generator).to(basis.device, torch.float64)
                w, norm, _ = _orthogonal(w, basis[:j])
            else:
                beta[i - 1] = norm
            basis[j] = w / norm
            w = product(basis[j])
            alpha[i] = float(w @ basis[j].double())
            w, norm, parts = _orthogonal(w, basis[: j + 1])
            if not math.isfinite(alpha[i] + norm):
                raise ValueError("a product with the matrix is not finite: the loss's derivatives overflow here")
            scale = max(scale, abs(alpha[i]), norm)
            # In exact arithmetic Hv has no part along Lanczos vectors before the last, and β along that.
            expected = np.append(np.zeros(i - 1), beta[i - 1]) if i else np.zeros(0)
            asymmetry = max(asymmetry, np.abs(parts[start:j] - expected).max(initial=0))
        if start == 0 and asymmetry > ASYMMETRY * scale:  # after deflation, H may be no more than roundoff
            raise ValueError(
                "the matrix is not symmetric: the backward pass of an operation has a wrong or no derivative, or the "
                "model draws random numbers of its own"
            )
        beta[-1] = norm
        self.alpha, self.beta, self.vectors = alpha, beta, basis[start:]

    def ritz(self, skip: int = 0) -> tuple[Array, Array]:
        """Return the Ritz values, ascending, and the eigenvectors of T as columns, without the last ``skip`` steps."""
        m = len(self.alpha) - skip
        off = self.beta[: m - 1]
        return np.linalg.eigh(np.diag(self.alpha[:m]) + np.diag(off, 1) + np.diag(off, -1))

    def end(self, i: int) -> tuple[float, Tensor]:
        """Return the Ritz value i of the ascending ones, and its vector [n]."""
        values, columns = self.ritz()
        out = self.vectors.new_empty(1, self.vectors.shape[1])
        _rotate(self.vectors, columns[:, [i]], out)
        return float(values[i]), out[0]


def _rotate(vectors: Tensor, columns: Array, out: Tensor) -> None:
    """Write the combinations of the rows of ``vectors`` whose coefficients the columns are into ``out``."""
    turn = torch.from_numpy(columns.T.copy()).to(vectors)
    for x, y in zip(torch.split(vectors, COLUMNS, dim=1), torch.split(out, COLUMNS, dim=1), strict=True):
        y.copy_(turn @ x)  # out may be rows of vectors


def _orthogonal(w: Tensor, basis: Tensor) -> tuple[Tensor, float, Array]:
    """Subtract from w, in float64, its part in the span of the basis's rows; return w, its norm, the coefficients."""
    norm = float(torch.linalg.vector_norm(w))
    passes: list[Tensor] = []
    for i in range(6):  # each pass leaves a part in the span, small as the basis is orthonormal, but w shrinks too
        before = norm
        passes.append(basis @ w.to(basis.dtype))
        w -= passes[-1] @ basis
        norm = float(torch.linalg.vector_norm(w))
        if i and norm > before / 2:
            break
    return w, norm, passes[0].double().cpu().numpy()


def _residual(product: Callable[[Tensor], Tensor], y: Tensor) -> tuple[float, float]:
    """Return the Rayleigh quotient θ of y, and ‖Hy − θy‖/‖y‖."""
    hy, y = product(y), y.double()
    theta = float(hy @ y / (y @ y))
    return theta, float(torch.linalg.vector_norm(hy.sub_(y, alpha=theta)) / torch.linalg.vector_norm(y))


def _value(end: tuple[float, Tensor]) -> float:
    return end[0]


def _ratio(a: float, b: float) -> float:
    """Return a/b; 0/0 is NaN."""
    return a / b if b else math.inf if a else math.nan
