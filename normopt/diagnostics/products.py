"""Products of the Hessian or the Gauss–Newton matrix of a network with vectors, by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from normopt._checks import check_bool, check_choice, check_integer
from normopt.sharding.layout import layout_of

Batches = Iterable[tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]
Matrix = Literal["hessian", "gauss-newton"]
Product = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Products:
    """A loss on fixed batches: its gradient, and products of its Hessian or Gauss–Newton matrix with vectors.

    Vectors are all parameters that require a gradient, flattened, on the device of the first.

    Args:
        model, loss, batches, matrix, train, seed: as of `hessian_spectrum`.

    Attributes:
        size: the number of entries of a vector.
        dtype: float64 if any parameter is, else float32.
        device: the device of vectors.
    """

    def __init__(self, model: nn.Module, loss: Loss, batches: Batches, matrix: Matrix, train: bool, seed: int) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"the model must be a torch.nn.Module, but is a {type(model).__name__}")
        if not callable(loss):
            raise TypeError(f"the loss must be callable as loss(output, target), but is {loss!r}")
        check_choice("matrix", matrix, ("hessian", "gauss-newton"))
        check_bool("train", train)
        check_integer("seed", seed, 0)
        self.model, self.loss, self.matrix, self.train, self.seed = model, loss, matrix, train, seed
        self.params = _checked_params(model)
        self._sizes = [p.numel() for p in self.params]
        self.size = sum(self._sizes)
        wide = any(p.dtype == torch.float64 for p in self.params)
        self.dtype, self.device = torch.float64 if wide else torch.float32, self.params[0].device
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("there is no batch: pass at least one pair (input, target)")
        for batch in self.batches:
            if not isinstance(batch, list | tuple) or len(batch) != 2:
                raise TypeError(f"a batch must be a pair (input, target), but is a {type(batch).__name__}")
        rows = [len(y) if isinstance(y, Tensor) and y.dim() else 0 for _, y in self.batches]
        self.shares = [r / sum(rows) if all(rows) else 1 / len(rows) for r in rows]

    def gradient(self) -> tuple[float, Tensor]:
        """Return the loss and its gradient, in float64."""
        with self._session():
            total, flat = 0.0, torch.zeros(self.size, dtype=torch.float64, device=self.device)
            for share, (x, y) in zip(self.shares, self.batches, strict=True):
                loss = self._loss(self.model(x), y)
                total += share * float(loss.detach())
                flat += share * self._flat(torch.autograd.grad(loss, self.params, materialize_grads=True))
            return total, flat

    @contextmanager
    def product(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Give a function that multiplies a vector by the matrix; the result is float64.

        The graph of a single batch is kept; those of several are made anew in each product, which saves memory.
        """
        kept: list[Product] = []

        def product(v: Tensor) -> Tensor:
            pieces = [x.view_as(p).to(p) for x, p in zip(torch.split(v, self._sizes), self.params, strict=True)]
            if kept:
                return self._flat(kept[0](pieces))
            torch.manual_seed(self.seed)
            total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
            for share, (x, y) in zip(self.shares, self.batches, strict=True):
                times = self._differentiated(x, y)
                total.add_(self._flat(times(pieces)), alpha=share)
                if len(self.batches) == 1:
                    kept.append(times)
            return total

        with self._session():
            yield product

    def _differentiated(self, x: Any, y: Any) -> Product:
        """Differentiate the loss of a batch once; return what differentiates it again, along a vector."""
        output = self.model(x)
        loss = self._loss(output, y)
        params = self.params
        if self.matrix == "hessian":
            first = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
            _check_graph(first)
            return lambda v: _again(first, params, v, "parameters")
        if not isinstance(output, Tensor):
            raise TypeError(f"the Gauss–Newton matrix needs one tensor as output, not a {type(output).__name__}")
        # Jᵀu is linear in u, and the derivative of ⟨Jᵀu, v⟩ in u is Jv.
        u = torch.zeros_like(output, requires_grad=True)
        transposed = torch.autograd.grad(output, params, u, create_graph=True, materialize_grads=True)
        slopes = torch.autograd.grad(loss, output, create_graph=True)
        _check_graph([*transposed, *slopes])

        def times(v: Sequence[Tensor]) -> Sequence[Tensor]:
            moved = _again(transposed, [u], v, "parameters")
            curved = _again(slopes, [output], moved, "outputs")
            return torch.autograd.grad(output, params, curved[0], retain_graph=True, materialize_grads=True)

        return times

    def _loss(self, output: Any, y: Any) -> Tensor:
        loss = self.loss(output, y)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"the loss must be a tensor of one element, but is {given}: return the mean of the batch")
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on the parameters by automatic differentiation: is it detached?")
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {float(loss.detach())}: its Hessian is not defined")
        return loss.reshape(())

    def _flat(self, pieces: Iterable[Tensor]) -> Tensor:
        flat = torch.empty(self.size, dtype=torch.float64, device=self.device)
        for out, x in zip(torch.split(flat, self._sizes), pieces, strict=True):
            out.copy_(x.detach().reshape(-1))
        return flat

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Set modes, random numbers and kernels for the products; put everything back at the end."""
        modes = [(module, module.training) for module in self.model.modules()]
        buffers = [(b, b.detach().clone()) for b in self.model.buffers()]  # batch norm writes them
        devices = range(torch.cuda.device_count()) if any(p.is_cuda for p in self.params) else ()
        try:
            self.model.train(self.train)
            with (
                torch.random.fork_rng(devices),
                torch.enable_grad(),
                torch.autocast(self.device.type, enabled=False),
                sdpa_kernel(SDPBackend.MATH),
            ):
                torch.manual_seed(self.seed)
                yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for b, saved in buffers:
                    b.copy_(saved)


def _checked_params(model: nn.Module) -> list[Tensor]:
    """Return the parameters that require a gradient, if all are of a kind whose second derivatives are exact."""
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("the model has no parameter that requires a gradient")
    for name, p in model.named_parameters():
        if torch.nn.parameter.is_lazy(p):
            raise TypeError(f"{name} is lazy and has no shape yet: run the model once first")
        if layout_of(p) is not None:
            raise TypeError(f"{name} is a DTensor: gather the model's weights first")
        if p.requires_grad and p.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name} is {p.dtype}, and the matrix needs float32 or float64: pass copy.deepcopy(model).float()"
            )
    return params


def _again(first: Sequence[Tensor], inputs: Sequence[Tensor], v: Sequence[Tensor], of: str) -> Sequence[Tensor]:
    """Return the gradient of ⟨first, v⟩ in the inputs."""
    pairs = [(f, x) for f, x in zip(first, v, strict=True) if f.requires_grad]
    if not pairs:
        raise ValueError(
            f"the gradient does not depend on the {of}: the matrix is zero, as of a loss that is linear, or a backward "
            "pass of your own cuts the graph"
        )
    fs, xs = zip(*pairs, strict=True)
    try:
        return torch.autograd.grad(fs, inputs, xs, retain_graph=True, materialize_grads=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"the gradient cannot be differentiated again ({error}): replace the operation by one that can, such as an "
            "uncompiled module, or attention and recurrent layers without fused kernels"
        ) from error


def _check_graph(first: Sequence[Tensor]) -> None:
    """Raise for a once_differentiable operation: its node would raise if it ran, but no path to the inputs has it."""
    seen, todo = set(), [x.grad_fn for x in first]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if "Error" in node.name():
            raise RuntimeError("the backward pass of an operation is once_differentiable: it has no second derivative")
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
