"""Write what only a release knows into README.md and pyproject.toml: the repository's address, and the tag.

``python .github/prepare_release.py https://github.com/OWNER/NAME v0.1.0`` from the root of the repository. A package
index shows the README by itself, so its links to files and its pictures need whole addresses.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def with_whole_addresses(text: str, repository: str, tag: str) -> str:
    """Return Markdown with the addresses of files of the repository as whole ones; pictures as raw files."""

    def whole(match: re.Match[str]) -> str:
        picture, label, target = match.groups()
        return f"{picture}[{label}]({repository}/{'raw' if picture else 'blob'}/{tag}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)", whole, text)


def with_urls(text: str, repository: str, tag: str) -> str:
    """Return a pyproject.toml with the project's addresses."""
    urls = {
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
        "Documentation": f"{repository}/tree/{tag}/docs",
    }
    return text + "\n[project.urls]\n" + "".join(f'{name} = "{url}"\n' for name, url in urls.items())


def main(repository: str, tag: str, root: Path = Path()) -> None:
    """Write both files anew."""
    version = re.search(r'__version__ = "(.+)"', (root / "normopt/__init__.py").read_text(encoding="utf-8"))
    if version is None or tag != f"v{version[1]}":
        raise SystemExit(f"the tag is {tag}, but normopt.__version__ is {version and version[1]}: they must agree")
    for name, change in (("README.md", with_whole_addresses), ("pyproject.toml", with_urls)):
        path = root / name
        path.write_text(change(path.read_text(encoding="utf-8"), repository, tag), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
