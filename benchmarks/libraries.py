"""Tabulates in Markdown what `bnres.fuse` fuses in the models of other libraries."""

import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bnres
from bnres.files import write_text

# A model's name, a function that builds the model without pretrained weights, and example inputs.
Model = tuple[str, Callable[[], nn.Module], tuple[Any, ...]]


def images(size: int) -> tuple[Tensor]:
    return (torch.randn(2, 3, size, size),)


def later(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: build(*args, **kwargs)


def _torchvision() -> Iterator[Model]:
    from benchmarks.torchvision_import import torchvision

    models = torchvision.models
    for name in (
        "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "densenet121", "mobilenet_v2",
        "mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5", "mnasnet0_5",
        "efficientnet_b0", "vgg11_bn",
    ):  # fmt: skip
        yield name, later(models.get_model, name, weights=None), images(64)
    for name, size in (("googlenet", 64), ("inception_v3", 299)):
        yield name, later(models.get_model, name, weights=None, init_weights=False), images(size)
    backbone = {"weights": None, "weights_backbone": None}
    for name in ("fcn_resnet50", "deeplabv3_resnet50"):
        yield name, later(models.get_model, name, **backbone), images(64)

    def frozen() -> nn.Module:
        # Without pretrained weights, torchvision's builder of this detector uses BatchNorm2d
        # instead of FrozenBatchNorm2d. So the detector is built here.
        norm = torchvision.ops.FrozenBatchNorm2d
        detector = models.detection
        resnet = models.resnet50(weights=None, norm_layer=norm)
        backbone = detector.backbone_utils._resnet_fpn_extractor(resnet, 3)
        return detector.FasterRCNN(backbone, num_classes=3).backbone

    # Only the detector's backbone has batch norms.
    yield "backbone of fasterrcnn_resnet50_fpn", frozen, images(64)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    target = {"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)}
    detection = backbone | {"num_classes": 3, "min_size": 64, "max_size": 64}
    yield (
        "retinanet_resnet50_fpn",
        later(models.get_model, "retinanet_resnet50_fpn", **detection),
        (list(images(64)[0]), [target, target]),
    )
    clip = torch.randn(2, 3, 4, 32, 32)
    yield "r3d_18", later(models.get_model, "r3d_18", weights=None), (clip,)


def _timm() -> Iterator[Model]:
    import timm

    for name in (
        "efficientnet_b0", "efficientnetv2_rw_t", "mobilenetv4_conv_small", "regnety_008",
        "darknet53", "cspresnet50", "resnet50d", "seresnet50", "skresnet18", "resnest14d",
        "res2net50_26w_4s",
        "hrnet_w18_small", "rexnet_100", "ghostnet_100", "dla34", "convmixer_768_32", "levit_128s",
        "repvgg_a0", "repvit_m0_9", "mobileone_s0", "fastvit_t8", "ese_vovnet19b_dw", "selecsls42",
        "xception41", "dpn48b", "tresnet_m", "starnet_s1", "mobilevit_xxs",
    ):  # fmt: skip
        fixed = 224 if name == "levit_128s" else 64
        yield name, later(timm.create_model, name), images(fixed)


def _ultralytics() -> Iterator[Model]:
    from ultralytics.nn.tasks import DetectionModel

    for name in ("yolov8n", "yolo11n"):
        yield name, later(DetectionModel, f"{name}.yaml", verbose=False), images(64)


def _segmentation() -> Iterator[Model]:
    import segmentation_models_pytorch as smp

    for name, encoder in (
        ("Unet", "resnet18"), ("Unet", "resnet34"), ("FPN", "resnet18"),
        ("DeepLabV3Plus", "resnet18"), ("UnetPlusPlus", "mobilenet_v2"),
    ):  # fmt: skip
        build = later(getattr(smp, name), encoder, encoder_weights=None)
        yield f"{name}, {encoder}", build, images(64)


def _transformers() -> Iterator[Model]:
    # transformers tries to import PyPI's package ``kernels``. Without this line it would import the
    # folder kernels/ of this repository instead.
    sys.modules["kernels"] = None  # type: ignore[assignment]
    import transformers as t

    for name in ("ResNet", "RegNet", "MobileNetV2", "Levit"):
        config = getattr(t, f"{name}Config")
        model = getattr(t, f"{name}ForImageClassification")
        size = 224 if name == "Levit" else 64
        yield model.__name__, later(model, config()), images(size)

    def conformer() -> nn.Module:
        config = t.Wav2Vec2ConformerConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
        return t.Wav2Vec2ConformerModel(config).encoder

    def detr() -> nn.Module:
        config = t.DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
            backbone_config=t.ResNetConfig(out_features=["stage4"]), d_model=32, encoder_layers=1,
            decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        )  # fmt: skip
        return t.DetrModel(config)

    yield "DetrModel", detr, images(64)
    yield "Wav2Vec2Conformer's encoder", conformer, (torch.randn(2, 20, 32),)


# torchvision comes first, because other libraries import it. With some builds of torch, only
# `benchmarks.torchvision_import` can import it.
LIBRARIES: dict[str, Callable[[], Iterator[Model]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "ultralytics": _ultralytics,
    "segmentation_models_pytorch": _segmentation,
    "transformers": _transformers,
}


ABOUT = """# Models of other libraries

This page lists what `bnres.fuse` fuses in each model in training mode. The columns are:

- *batch norms*: the number of batch norms.
- *fused*: the number of batch norms that run in fused operations.
- *patterns*: how often each pattern of operations is fused. In a pattern, `bn` is the batch norm,
  `conv` is the 2-D convolution before it, `add` is an addition, `+bn` is another batch norm whose
  output is added, `act` is an activation, and `pool` is the max-pool of a ResNet's stem.
- *reasons*: why a batch norm is not fused, or why the operation after it is not fused with it.

`python -m benchmarks models --out docs/models.md` made this page, with
"""
HEADER = "| model | batch norms | fused | patterns | reasons |\n|---|---:|---:|---|---|\n"


def run(out: Path | None, say: Callable[[str], object]) -> None:
    """Writes the table to ``out``, and passes the name of each model to ``say``.

    If ``out`` is None, only the table is passed to ``say``.
    """
    text = table(say if out is not None else lambda line: None)
    if out is None:
        say(text)
    else:
        write_text(out, text)


def table(say: Callable[[str], object]) -> str:
    """Returns the table for the installed libraries. Calls ``say`` with the name of each model."""
    versions = [f"bnres {bnres.__version__}", f"torch {torch.__version__}"]
    versions.append(f"Python {platform.python_version()}")
    text, sites, skipped = "", [], []
    for library, models in LIBRARIES.items():
        try:
            found = version(library.replace("_", "-"))
        except PackageNotFoundError:
            skipped.append(library)
            continue
        versions.append(f"{library} {found}")
        text += f"\n## {library}\n\n{HEADER}"
        for name, build, inputs in models():
            say(f"{library} {name}")
            torch.manual_seed(0)
            torch._dynamo.reset()
            of_model = bnres.explain(build().train(), *inputs).sites
            text += row(name, of_model)
            sites += of_model
    missing = f"\nNot installed, so skipped: {', '.join(skipped)}.\n" if skipped else ""
    total = f"\n## Total\n\n{HEADER}{row('all', sites)}"
    return f"{ABOUT}{', '.join(versions)}.\n{missing}{text}{total}"


def row(name: str, sites: list[bnres.fusion.Site]) -> str:
    """Formats a row of the table."""
    fused = [site for site in sites if site.fused]
    cells = (
        name,
        len(sites),
        len(fused),
        counted(s.pattern for s in fused),
        counted(s.reason for s in sites),
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def counted(names: Iterable[str]) -> str:
    """Formats how often each name occurs, starting with the most frequent name."""
    found = Counter(name for name in names if name)
    return ", ".join(f"{count} × {name}" for name, count in found.most_common())
