"""The next byte of Python's own standard library: real text that is on every machine, so nothing is downloaded."""

from __future__ import annotations

import hashlib
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from benchmarks.tasks.base import Splits
from benchmarks.tasks.common import Classification

# Tests, other people's packages, and the character tables of encodings/, which are no text.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
CORPUS = 4_000_000  # bytes
CONTEXT = 64
WIDTH, HEADS, BLOCKS = 64, 4, 2
PER_EPOCH, HELD_OUT = 640, 256  # windows


class Bytes(Classification):
    """A byte-level GPT on the source of the standard library, split by files."""

    name = "bytes"
    epochs, batch_size = 10, 16
    target = 0.35
    residual_depth: int | None = 2 * BLOCKS
    description = (
        f"Python's standard library as bytes: its .py files in the order of their paths, without tests and character "
        f"tables, the first {CORPUS // 10**6} MB; 80/10/10 per cent for training, validation and test, whole files "
        f"each. The next byte is predicted at each of {CONTEXT} places; an epoch is {PER_EPOCH} windows drawn from the "
        f"training files, validation and test are {HELD_OUT} windows each, evenly spread. The network is a pre-norm "
        f"GPT of {BLOCKS} blocks, width {WIDTH}, {HEADS} heads, with biases and a head of its own, PyTorch's own "
        "initialisation (135,168 weights in matrices, 2,048 in biases and gains); cross-entropy in nats a byte"
    )

    def load(self) -> Splits:
        """The windows, read once a process."""
        return _load()

    def build(self) -> nn.Module:
        """The network."""
        return GPT()

    def fingerprint(self) -> str:
        """Of the corpus: every version of Python has another."""
        return hashlib.sha256(b"".join(map(_text, parts()))).hexdigest()


class GPT(nn.Module):
    """Bytes [batch, CONTEXT] → logits of the byte that follows each [batch, CONTEXT, 256]."""

    places: Tensor

    def __init__(self, width: int = WIDTH, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(CONTEXT), persistent=False)
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        """Every place sees the places before it and itself."""
        x = self.embedding(text) + self.position(self.places)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class Block(nn.Module):
    """Attention, then an MLP, each on the normalised stream and added to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The stream [batch, CONTEXT, width], with what the block adds."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        added: Tensor = self.down(gelu(self.up(self.norm2(x))))
        return x + added


@cache
def parts() -> tuple[list[Path], list[Path], list[Path]]:
    """The files of training, validation and test: a file belongs where it begins."""
    library = Path(sysconfig.get_path("stdlib"))
    train, validation, test = list[Path](), list[Path](), list[Path]()
    begin = 0
    for file in sorted(library.rglob("*.py"), key=lambda file: file.relative_to(library).as_posix()):
        # _sysconfigdata_*.py says how this Python was built.
        if SKIPPED.intersection(file.relative_to(library).parts) or file.name.startswith("_sysconfigdata"):
            continue
        if begin >= CORPUS:
            break
        (train if begin < 0.8 * CORPUS else validation if begin < 0.9 * CORPUS else test).append(file)
        begin += file.stat().st_size
    return train, validation, test


def _text(files: list[Path]) -> bytes:
    return b"".join(file.read_bytes() for file in files)


@cache
def _load() -> Splits:
    train, validation, test = (_windows(_text(part)) for part in parts())
    return Splits(train=train, validation=_spread(validation), test=_spread(test), per_epoch=PER_EPOCH)


def _windows(text: bytes) -> tuple[Tensor, Tensor]:
    """Text cut into (windows, the byte that follows each place), both [windows, CONTEXT] views of one tensor."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    used = (len(data) - 1) // CONTEXT * CONTEXT
    return data[:used].view(-1, CONTEXT), data[1 : used + 1].view(-1, CONTEXT)


def _spread(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """HELD_OUT of the windows, evenly spread."""
    x, y = data
    chosen = torch.linspace(0, len(x) - 1, HELD_OUT).long()
    return x[chosen], y[chosen]
