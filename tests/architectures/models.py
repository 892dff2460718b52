"""Real architectures with random weights on the meta device: transformers' classes, timm's and torchvision's families.

A model costs some tens of milliseconds: nothing is allocated, and stacks of layers are cut to the few that hold one of
each sort. Nothing is downloaded: a class whose construction asks for the hub or for a package that is not installed is
skipped, and the tests count those.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.vision import allow_torchvision_import

LABELS = 37  # classes of every classifier: a number that no width has, so that a head's rows tell it

# Of transformers' model mappings, by the task in their names.
TASKS = (
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "MASKED_IMAGE_MODELING",
    "CAUSAL_IMAGE_MODELING",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "IMAGE_SEGMENTATION",
    "AUDIO_CLASSIFICATION",
    "AUDIO_FRAME_CLASSIFICATION",
    "AUDIO_XVECTOR",
    "CTC",
    "SPEECH_SEQ_2_SEQ",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "VIDEO_CLASSIFICATION",
    "DEPTH_ESTIMATION",
    "IMAGE_TEXT_TO_TEXT",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "PRETRAINING",
    "BASE",
)

DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "num_hidden_layers_decoder",
)
# What the defaults of a config lack: without it, its own library cannot build the model.
MISSING: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 24},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "dots1": {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
    "informer": {"prediction_length": 24},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "time_series_transformer": {"prediction_length": 24},
}
MISSING["hunyuan_vl"] = {"text_config": MISSING["hunyuan_vl_text"]}
KINDS_OF_LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types", "hybrid_override_pattern")


@dataclass(frozen=True)
class Built:
    """A model, or why there is none."""

    name: str
    task: str
    model: nn.Module | None
    why: str = ""


def transformers_names(tasks: tuple[str, ...] = TASKS) -> list[tuple[str, str, str]]:
    """Return (class, model type, task) of every class in the mappings; a class is listed under its first task."""
    allow_torchvision_import()
    from transformers.models.auto import modeling_auto

    found: dict[str, tuple[str, str, str]] = {}
    for task in tasks:
        mapping = f"MODEL_FOR_{task}_MAPPING_NAMES" if task != "BASE" else "MODEL_MAPPING_NAMES"
        for model_type, classes in getattr(modeling_auto, mapping).items():
            for cls in (classes,) if isinstance(classes, str) else classes:
                found.setdefault(cls, (cls, model_type, task))
    return list(found.values())


def build_transformers(cls: str, model_type: str, task: str = "", cut: bool = True) -> Built:
    """Build a class of transformers with random weights on the meta device, from its default config."""
    allow_torchvision_import()
    import transformers

    try:
        with _quiet():
            config_class = transformers.CONFIG_MAPPING[model_type]
            model_class = getattr(transformers, cls)
            if not issubclass(model_class.config_class or config_class, config_class):
                config_class = model_class.config_class
            missing = dict(MISSING.get(model_type, {}))
            if task == "CTC":
                missing["vocab_size"] = 32
            if cls == "ReformerForMaskedLM" or task in ("SEQUENCE_CLASSIFICATION", "QUESTION_ANSWERING"):
                missing.pop("is_decoder", None)
            labels = 2 if task == "QUESTION_ANSWERING" else LABELS
            model = None
            if cut:
                with contextlib.suppress(Exception):
                    model = model_class(small(config_class(**missing), labels))
            if model is None:
                model = model_class(_with_labels(config_class(**missing), labels))
    except (Exception, SystemExit) as error:
        return Built(cls, task, None, f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")
    return Built(cls, task, model.train())


def small(config: Any, labels: int = LABELS) -> Any:
    """Return the config with few layers: as many as have one of each sort, and no fewer than two."""
    for inner in [config, *_sub_configs(config)]:
        kinds = [k for k in (getattr(inner, name, None) for name in KINDS_OF_LAYERS) if isinstance(k, list | tuple)]
        dense = [n for n in (getattr(inner, "first_k_dense_replace", 0), getattr(inner, "num_dense_layers", 0)) if n]
        for name in DEPTHS:
            depth = getattr(inner, name, None)
            if isinstance(depth, int) and depth > 3:
                least = 1 + max((_first_of_each(k) for k in kinds if len(k) == depth), default=1)
                least = max([least, *(n + 1 for n in dense if isinstance(n, int))])
                with contextlib.suppress(Exception):
                    setattr(inner, name, min(least, depth))
                    for kind in KINDS_OF_LAYERS:
                        if isinstance(of := getattr(inner, kind, None), list | tuple) and len(of) == depth:
                            setattr(inner, kind, of[:least])
    return _with_labels(config, labels)


def _first_of_each(kinds: Any) -> int:
    return max(list(kinds).index(kind) for kind in set(kinds))


def _with_labels(config: Any, labels: int) -> Any:
    with contextlib.suppress(Exception):
        config.num_labels = labels
    return config


def _sub_configs(config: Any) -> list[Any]:
    inner = [getattr(config, name, None) for name in getattr(type(config), "sub_configs", {}) or {}]
    return [c for c in inner if c is not None and not isinstance(c, dict)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """On the meta device, without warnings, notices and requests."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Make layers with parameters on the meta device, and other tensors with memory."""
    empty = torch.empty

    def on_meta(*sizes: Any, **settings: Any) -> torch.Tensor:
        return empty(*sizes, **(settings | {"device": "meta"}))

    torch.empty = on_meta
    try:
        yield
    finally:
        torch.empty = empty


@functools.cache
def timm_names() -> list[tuple[str, str]]:
    """Return (architecture, family) for one architecture, the smallest name of, each family of timm."""
    allow_torchvision_import()
    import timm

    names = []
    for family in timm.list_modules():
        members = sorted(timm.list_models(module=family), key=lambda name: (len(name), name))
        names += [(members[0], family)] if members else []
    return names


def build_timm(name: str, family: str = "") -> Built:
    """Build an architecture of timm with random weights on the meta device."""
    allow_torchvision_import()
    import timm

    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return Built(name, family, timm.create_model(name, pretrained=False, num_classes=LABELS).train())
    except Exception as error:
        return Built(name, family, None, f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")


def torchvision_names() -> list[tuple[str, str]]:
    """Return (builder, task) of torchvision's classifiers, detectors, segmenters and video classifiers."""
    allow_torchvision_import()
    from torchvision import models

    places = {"": models, "detection": models.detection, "segmentation": models.segmentation, "video": models.video}
    return [
        (name, task)
        for task, place in places.items()
        for name in models.list_models(module=place)
        if not name.startswith("quantized_")
    ]


def build_torchvision(name: str, task: str = "") -> Built:
    """Build a model of torchvision with random weights on the meta device."""
    allow_torchvision_import()
    from torchvision import models

    settings: dict[str, Any] = {"weights": None, "num_classes": LABELS}
    if task in ("detection", "segmentation"):
        settings["weights_backbone"] = None
    if task == "segmentation" and not name.startswith("lraspp"):
        settings["aux_loss"] = True
    if name in ("googlenet", "inception_v3"):
        settings["init_weights"] = False
    # The widths of a RegNet are computed with tensors.
    place = _parameters_on_meta() if name.startswith("regnet") else torch.device("meta")
    try:
        with warnings.catch_warnings(), place:
            warnings.simplefilter("ignore")
            return Built(name, task, models.get_model(name, **settings).train())
    except Exception as error:
        return Built(name, task, None, f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")
