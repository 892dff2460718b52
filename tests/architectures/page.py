"""Write the generated part of docs/how-to/which-parameter.md: what param_groups gives about thirty architectures.

Run ``python -m tests.architectures.page`` after a change of the classification; the extra ``frameworks`` is needed.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from pathlib import Path

from torch import nn

import normopt
from tests.architectures import models

PAGE = Path(__file__).parents[2] / "docs/how-to/which-parameter.md"
MARK = "<!-- generated: python -m tests.architectures.page -->\n"

TRANSFORMERS = {
    "LlamaForCausalLM": "llama",
    "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "gpt_neox",
    "Phi3ForCausalLM": "phi3",
    "FalconForCausalLM": "falcon",
    "Gemma3ForCausalLM": "gemma3_text",
    "MixtralForCausalLM": "mixtral",
    "GptOssForCausalLM": "gpt_oss",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "MambaForCausalLM": "mamba",
    "Mamba2ForCausalLM": "mamba2",
    "RwkvForCausalLM": "rwkv",
    "BertForMaskedLM": "bert",
    "ModernBertForMaskedLM": "modernbert",
    "T5ForConditionalGeneration": "t5",
    "ViTForImageClassification": "vit",
    "SwinForImageClassification": "swin",
    "CLIPModel": "clip",
    "DetrForObjectDetection": "detr",
    "Wav2Vec2ForCTC": "wav2vec2",
    "WhisperForConditionalGeneration": "whisper",
}
TIMM = ("convnext_atto", "efficientnet_b0", "mobilevit_s", "nfnet_f0", "swin_tiny_patch4_window7_224", "test_vit")
TORCHVISION = {"resnet18": "", "mobilenet_v3_small": "", "fasterrcnn_resnet50_fpn": "detection", "r3d_18": "video"}
WHOLE = ("GPT2LMHeadModel", "GptOssForCausalLM", "test_vit", "fasterrcnn_resnet50_fpn")


def versions() -> str:
    """Return the libraries and the versions that the part is of."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "timm", "torchvision"))


def architectures() -> dict[str, nn.Module]:
    """Return the models by name, on the meta device; those of transformers with one layer of each sort."""
    built = [models.build_transformers(name, key, "CTC" if "CTC" in name else "") for name, key in TRANSFORMERS.items()]
    built += [models.build_timm(name) for name in TIMM]
    built += [models.build_torchvision(name, task) for name, task in TORCHVISION.items()]
    assert all(one.model is not None for one in built), [(one.name, one.why) for one in built if one.model is None]
    return {one.name: one.model for one in built if one.model is not None}


def row(name: str, groups: normopt.groups.ParamGroups) -> str:
    """Return a model's line of the table: the number of tensors of each kind, by rule."""
    counts: dict[str, dict[str, int]] = {"Muon": {}, "AdamW": {}}
    for group in groups:
        rule = "AdamW" if group.get("metric") == "diagonal" else "Muon"
        settings = [f"{group[key]}" for key in ("norm_matrix_view",) if key in group and rule == "Muon"]
        settings += [f"{group['norm_blocks']} blocks"] if "norm_blocks" in group and rule == "Muon" else []
        label = group["kind"] + (f" ({', '.join(settings)})" if settings else "")
        counts[rule][label] = counts[rule].get(label, 0) + len(group["params"])
    cells = [", ".join(f"{n} {label}" for label, n in found.items()) for found in counts.values()]
    return f"| `{name}` | {cells[0]} | {cells[1]} |"


def generated() -> str:
    """Return the generated part of the page."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = {name: normopt.param_groups(model, "muon-adamw") for name, model in architectures().items()}
    lines = [
        f"Of {versions()}, with random weights. Models of transformers have their default",
        "configuration, cut to one layer of each sort. The numbers are of tensors, by kind:",
        "",
        "| model | Muon | AdamW |",
        "|:--|:--|:--|",
        *(row(name, found) for name, found in groups.items()),
        "",
        "Four of them as `print(groups)` shows them:",
    ]
    for name in WHOLE:
        lines += ["", f"### {name}", "", "```text", str(groups[name]), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    written = PAGE.read_text(encoding="utf-8").partition(MARK)[0] + MARK + generated()
    PAGE.write_text(written, encoding="utf-8")
