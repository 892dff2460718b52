"""What the site ships of others is what SHA256SUMS says, with each licence beside it."""

from __future__ import annotations

import hashlib

from tests.site.conftest import ROOT

VENDOR = ROOT / "docs/vendor"


def test_every_file_is_the_one_that_was_taken() -> None:
    lines = (VENDOR / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    known = {name.removeprefix("./"): digest for digest, name in (line.split(maxsplit=1) for line in lines)}
    files = {str(p.relative_to(VENDOR)) for p in VENDOR.rglob("*") if p.is_file()} - {"SHA256SUMS"}
    assert set(known) == files
    for name, digest in known.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name


def test_every_part_has_its_licence() -> None:
    for name in ("katex/LICENSE", "mermaid/LICENSE", "fonts/LICENSE-Inter", "fonts/LICENSE-DejaVu"):
        assert len((VENDOR / name).read_text(encoding="utf-8")) > 500
