"""The page of architectures shows what param_groups gives them."""

from __future__ import annotations

import pytest

from tests.architectures import page


@pytest.mark.exhaustive
def test_the_page_shows_what_is_given():
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    shown = page.PAGE.read_text(encoding="utf-8").partition(page.MARK)[2]
    if page.versions() not in shown:
        pytest.skip(f"the page is of other versions than {page.versions()}")
    assert shown == page.generated()
