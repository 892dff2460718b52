"""Two steps of small real models under "muon-adamw": a falling loss, and steps of the size that the preset promises."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import normopt
from benchmarks.vision import allow_torchvision_import

WIDTH, TOKENS, BATCH = 32, 16, 16
SMALL = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, intermediate_size=64)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
PIXELS = dict(image_size=32, patch_size=8, num_channels=3, num_labels=7)


def text(**more: Any) -> dict[str, Any]:
    ids = torch.randint(3, 50, (BATCH, TOKENS))
    return {"input_ids": ids, "labels": ids, **more}


def images(size: int = 32) -> dict[str, Any]:
    return {"pixel_values": torch.randn(BATCH, 3, size, size), "labels": torch.arange(BATCH) % 7}


def of_transformers(cls: str, config: str, inputs: Callable[[], dict[str, Any]], **settings: Any) -> Any:
    """Return a builder of a model of transformers and of its loss."""

    def build() -> tuple[nn.Module, Callable[[], Tensor]]:
        transformers = pytest.importorskip("transformers")
        model = getattr(transformers, cls)(getattr(transformers, config)(**settings)).float().eval()
        batch = inputs()
        return model, lambda: model(**batch).loss

    return build


def of_timm(name: str, size: int = 64, **settings: Any) -> Any:
    def build() -> tuple[nn.Module, Callable[[], Tensor]]:
        model = pytest.importorskip("timm").create_model(name, num_classes=7, **settings).train()
        batch = images(size)
        return model, lambda: cross_entropy(model(batch["pixel_values"]), batch["labels"])

    return build


def of_torchvision(name: str, size: int = 64) -> Any:
    def build() -> tuple[nn.Module, Callable[[], Tensor]]:
        models = pytest.importorskip("torchvision").models
        model = models.get_model(name, weights=None, num_classes=7).train()
        batch = images(size)
        return model, lambda: cross_entropy(model(batch["pixel_values"]), batch["labels"])

    return build


def detector() -> tuple[nn.Module, Callable[[], Tensor]]:
    """RetinaNet on a feature pyramid: in training it needs no operators of torchvision's own."""
    models = pytest.importorskip("torchvision").models.detection
    backbone = models.backbone_utils.mobilenet_backbone(
        backbone_name="mobilenet_v3_small", weights=None, fpn=True, trainable_layers=6
    )
    sizes = ((16,), (32,), (64,))
    anchors = models.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    model = models.RetinaNet(backbone, num_classes=3, anchor_generator=anchors, min_size=64, max_size=64).train()
    pictures = [torch.rand(3, 64, 64) for _ in range(4)]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])} for _ in pictures]
    return model, lambda: sum(model(pictures, targets).values())


def clip() -> dict[str, Any]:
    ids = torch.randint(3, 50, (BATCH, TOKENS))
    return {"input_ids": ids, "pixel_values": torch.randn(BATCH, 3, 32, 32), "return_loss": True}


def speech() -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 2000), "labels": torch.arange(BATCH) % 7}


MODELS: dict[str, Any] = {
    "Llama": of_transformers("LlamaForCausalLM", "LlamaConfig", text, num_key_value_heads=2, **SMALL),
    "ResNet": of_timm("test_resnet"),
    "GPT-2": of_transformers("GPT2LMHeadModel", "GPT2Config", text, n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=50),
    "GPT-NeoX": of_transformers("GPTNeoXForCausalLM", "GPTNeoXConfig", text, **SMALL),
    "Phi-3": of_transformers(
        "Phi3ForCausalLM", "Phi3Config", text, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, **SMALL
    ),
    "Falcon": of_transformers("FalconForCausalLM", "FalconConfig", text, **SMALL),
    "Mixtral": of_transformers("MixtralForCausalLM", "MixtralConfig", text, num_key_value_heads=2, **SMALL, **EXPERTS),
    "GPT-OSS": of_transformers(
        "GptOssForCausalLM", "GptOssConfig", text, num_key_value_heads=2, head_dim=8, pad_token_id=0, **SMALL, **EXPERTS
    ),
    "Mamba": of_transformers(
        "MambaForCausalLM", "MambaConfig", text, hidden_size=WIDTH, num_hidden_layers=2, vocab_size=50, state_size=4
    ),
    "BERT": of_transformers("BertForMaskedLM", "BertConfig", text, **SMALL),
    "ModernBERT": of_transformers(
        "ModernBertForMaskedLM", "ModernBertConfig", text, pad_token_id=0, cls_token_id=1, sep_token_id=2, **SMALL
    ),
    "T5": of_transformers(
        "T5ForConditionalGeneration", "T5Config", text, d_model=WIDTH, d_ff=64, d_kv=8, num_layers=2, num_heads=4,
        vocab_size=50, decoder_start_token_id=0,
    ),
    "ViT": of_transformers("ViTForImageClassification", "ViTConfig", images, **{**SMALL, **PIXELS, "vocab_size": 2}),
    "Swin": of_transformers(
        "SwinForImageClassification", "SwinConfig", images, embed_dim=16, depths=[1, 1], num_heads=[2, 4],
        window_size=4, **{**PIXELS, "patch_size": 2},
    ),
    "ConvNeXt": of_transformers(
        "ConvNextForImageClassification", "ConvNextConfig", images, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2,
        num_labels=7,
    ),
    "CLIP": of_transformers(
        "CLIPModel", "CLIPConfig", clip, projection_dim=16,
        text_config={**SMALL, "projection_dim": 16, "eos_token_id": 2}, vision_config={**SMALL, **PIXELS},
    ),
    "wav2vec2": of_transformers(
        "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", speech, num_labels=7, conv_dim=[16, 16],
        conv_stride=[5, 4], conv_kernel=[10, 4], num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, classifier_proj_size=16, mask_time_prob=0.0, **SMALL,
    ),
    "EfficientNet": of_timm("test_efficientnet"),
    "MobileNet": of_torchvision("mobilenet_v3_small"),
    "detector": detector,
}  # fmt: skip
CHEAP = ("Llama", "ResNet")


def matrices(x: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """The matrices, out x in, that a tensor is under its group's view, cut into the group's blocks."""
    view, blocks = group["norm_matrix_view"], group["norm_blocks"]
    if view in ("batch", "batch-transposed"):
        stack = list(x.reshape(-1, *x.shape[-2:]))
        stack = [m.T for m in stack] if view == "batch-transposed" else stack
    else:
        stack = [(x.transpose(0, 1) if view == "transposed" else x).flatten(1)]
    return [part for m in stack for part in (m.split(blocks) if isinstance(blocks, tuple) else m.chunk(blocks))]


def promises(p: Tensor, group: dict[str, Any]) -> tuple[float, float]:
    """The least and the most RMS of an update.

    That is lr under AdamW. Under Muon, r singular values f in rows x columns entries have f * sqrt(r / (rows *
    columns)), where r is between the gradient's rank and min(rows, columns).
    """
    lr = group["lr"] * group["lr_ratio"] * group["radius"]
    if group["norm"] != "spectral":
        return lr, lr
    least = most = 0.0
    for grad in matrices(p.grad, group):
        rows, columns = grad.shape
        factor = {
            "none": 1.0,
            "original": math.sqrt(max(1.0, rows / columns)),
            "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        }[group["norm_aspect"]]
        sigma = torch.linalg.svdvals(grad)
        # Five steps of Newton-Schulz bring what is above 1 % of the whole near to 1.
        least += factor**2 * int((sigma > 0.01 * sigma.square().sum().sqrt()).sum())
        most += factor**2 * min(rows, columns)
    return lr * math.sqrt(least / p.numel()), lr * math.sqrt(most / p.numel())


@pytest.mark.parametrize(
    "name", [name if name in CHEAP else pytest.param(name, marks=pytest.mark.exhaustive) for name in MODELS]
)
def test_two_steps_fall_and_have_the_promised_size(name, one_thread):
    allow_torchvision_import()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, loss_of = MODELS[name]()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        groups = normopt.param_groups(model, "muon-adamw")
        names = {p: n for n, p in model.named_parameters()}
        optimizer = normopt.Muon(groups)
        losses, wrong = [], []
        for i in range(2):
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            before = {p: p.detach().clone() for p in names}
            optimizer.step()
            losses.append(loss.item())
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is None or not (felt := p.grad.abs() > 1e-6).any():  # below that, AdamW's eps counts
                        continue
                    step, (low, high) = p.detach() - before[p], promises(p, group)
                    least = (step if group["norm"] == "spectral" else step[felt]).square().mean().sqrt().item()
                    most = step.square().mean().sqrt().item()
                    # In later steps AdamW's averages may cancel.
                    if (i == 0 and least < low / 3) or most > high * 3:
                        wrong.append((names[p], tuple(p.shape), group["kind"], least / low, most / high))
        losses.append(loss_of().item())
    assert not wrong
    assert all(map(math.isfinite, losses))
    assert losses[2] < losses[0], losses
