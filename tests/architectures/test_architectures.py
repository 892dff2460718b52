"""param_groups reads real architectures as their own libraries do: none misread, few refused, those with a way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.architectures import models
from tests.architectures.examine import Verdict, examine
from tests.architectures.expected import of_timm, of_torchvision, of_transformers

MOST_REFUSED = 0.08

# Small, and each unlike the others: (class, model type, task).
TRANSFORMERS = [
    ("AlbertForMaskedLM", "albert", "MASKED_LM"),
    ("BertForSequenceClassification", "bert", "SEQUENCE_CLASSIFICATION"),
    ("BloomForCausalLM", "bloom", "CAUSAL_LM"),
    ("CamembertForMaskedLM", "camembert", "MASKED_LM"),
    ("CLIPModel", "clip", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
    ("ConvNextForImageClassification", "convnext", "IMAGE_CLASSIFICATION"),
    ("DebertaForMaskedLM", "deberta", "MASKED_LM"),
    ("DetrForObjectDetection", "detr", "OBJECT_DETECTION"),
    ("FalconForCausalLM", "falcon", "CAUSAL_LM"),
    ("GPT2LMHeadModel", "gpt2", "CAUSAL_LM"),
    ("GPTNeoXForCausalLM", "gpt_neox", "CAUSAL_LM"),
    ("GptOssForCausalLM", "gpt_oss", "CAUSAL_LM"),
    ("HubertForCTC", "hubert", "CTC"),
    ("JambaForCausalLM", "jamba", "CAUSAL_LM"),
    ("Llama4ForCausalLM", "llama4_text", "CAUSAL_LM"),
    ("LlamaForCausalLM", "llama", "CAUSAL_LM"),
    ("LlamaModel", "llama", "BASE"),
    ("Mamba2ForCausalLM", "mamba2", "CAUSAL_LM"),
    ("MixtralForCausalLM", "mixtral", "CAUSAL_LM"),
    ("ModernBertForMaskedLM", "modernbert", "MASKED_LM"),
    ("Phi3ForCausalLM", "phi3", "CAUSAL_LM"),
    ("RwkvForCausalLM", "rwkv", "CAUSAL_LM"),
    ("SegformerForSemanticSegmentation", "segformer", "SEMANTIC_SEGMENTATION"),
    ("SwinForImageClassification", "swin", "IMAGE_CLASSIFICATION"),
    ("T5ForConditionalGeneration", "t5", "SEQ_TO_SEQ_CAUSAL_LM"),
    ("ViTForImageClassification", "vit", "IMAGE_CLASSIFICATION"),
    ("Wav2Vec2ForXVector", "wav2vec2", "AUDIO_XVECTOR"),
    ("WhisperForConditionalGeneration", "whisper", "SPEECH_SEQ_2_SEQ"),
    ("XLNetLMHeadModel", "xlnet", "CAUSAL_LM"),
]
TIMM = [
    ("beit_base_patch16_224", "beit"),
    ("convnext_atto", "convnext"),
    ("deit_tiny_distilled_patch16_224", "deit"),
    ("efficientformer_l1", "efficientformer"),
    ("efficientnet_b0", "efficientnet"),
    ("ghostnet_050", "ghostnet"),
    ("gmixer_12_224", "mlp_mixer"),
    ("hiera_tiny_224", "hiera"),
    ("levit_128", "levit"),
    ("mobilevit_s", "mobilevit"),
    ("nfnet_f0", "nfnet"),
    ("pvt_v2_b0", "pvt_v2"),
    ("resnet18", "resnet"),
    ("swin_tiny_patch4_window7_224", "swin_transformer"),
    ("test_vit", "vision_transformer"),
    ("vovnet39a", "vovnet"),
    ("xcit_nano_12_p8_224", "xcit"),
]
TORCHVISION = [
    ("alexnet", ""),
    ("convnext_tiny", ""),
    ("deeplabv3_mobilenet_v3_large", "segmentation"),
    ("fasterrcnn_mobilenet_v3_large_fpn", "detection"),
    ("googlenet", ""),
    ("mobilenet_v3_small", ""),
    ("mvit_v1_b", "video"),
    ("r3d_18", "video"),
    ("resnet18", ""),
    ("resnext50_32x4d", ""),
    ("ssd300_vgg16", "detection"),
    ("swin_t", ""),
    ("vit_b_16", ""),
]
LIBRARIES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], list[Any]]] = {
    "transformers": (models.transformers_names, models.build_transformers, of_transformers, TRANSFORMERS),
    "timm": (models.timm_names, models.build_timm, of_timm, TIMM),
    "torchvision": (models.torchvision_names, models.build_torchvision, of_torchvision, TORCHVISION),
}


def verdicts(library: str, names: Iterable[Any]) -> list[Verdict]:
    _, build, expected_of, _ = LIBRARIES[library]
    return [examine(build(*name), expected_of) for name in names]


def report(found: list[Verdict]) -> str:
    """What was misread, by architecture."""
    misread = [v for v in found if v.status == "misread"]
    lines = [f"{v.name}: {problem}" for v in misread for problem in v.problems[:3]]
    return f"{len(misread)} misread:\n" + "\n".join(lines[:60])


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_sample_is_read_as_its_library_reads_it(library):
    models.allow_torchvision_import()
    pytest.importorskip(library)
    found = verdicts(library, LIBRARIES[library][3])
    assert not [v.name for v in found if v.status == "misread"], report(found)
    assert Counter(v.status for v in found)["refused"] <= 0.1 * len(found)
    assert not [(v.name, v.message) for v in found if v.status == "skipped"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("library", LIBRARIES)
def test_none_is_misread_and_few_are_refused(library):
    models.allow_torchvision_import()
    pytest.importorskip(library)
    found = verdicts(library, LIBRARIES[library][0]())
    count = Counter(v.status for v in found)
    print(library, dict(count))
    tried = len(found) - count["skipped"]
    assert not count["misread"], report(found)
    assert count["refused"] <= MOST_REFUSED * tried, [v.name for v in found if v.status == "refused"]
    assert tried >= 0.95 * len(found), [(v.name, v.message) for v in found if v.status == "skipped"]
