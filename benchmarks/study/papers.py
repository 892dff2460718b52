"""Presets that run the recipes of papers on data that are here, each declared in a file before its first run.

The file is docs/data/NAME.protocol.json: the claim, the decision, what differs from the paper, and the study itself as
`benchmarks.study.spec.Study` has it. The preset is what the file says, and its ``protocol`` is the file's sha256.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from benchmarks.study.spec import Frozen, Study

PROTOCOLS = Path(__file__).parents[2] / "docs/data"


def path(name: str) -> Path:
    """Return where the protocol of a preset is."""
    return PROTOCOLS / f"{name}.protocol.json"


def digest(name: str) -> str:
    """Return the sha256 of a preset's protocol."""
    return hashlib.sha256(path(name).read_bytes()).hexdigest()


class Protocol(Frozen):
    """What is declared of a preset before its first run.

    Attributes:
        paper: an arXiv id.
        claim: what the paper states.
        reported: the paper's numbers that ours are shown beside, by what they are.
        decision: how the claim is judged, on which comparison of arms.
        differs: what is not as in the paper, and why.
        chosen_by: the runs that were made before, none of which is part of the study.
        study: the study; in the file, without the hash of this declaration.
    """

    paper: str
    claim: str
    reported: dict[str, str]
    decision: str
    differs: tuple[str, ...]
    chosen_by: str
    study: Study


def declared(name: str) -> Protocol:
    """Read the protocol of a preset, whose study carries its hash."""
    told = Protocol.model_validate_json(path(name).read_bytes())
    return told.model_copy(update={"study": told.study.model_copy(update={"protocol": digest(name)})})


DECLARED = {name: declared(name) for name in ("paper-pwd", "paper-lpsgdm", "paper-agr", "paper-trajectory")}
