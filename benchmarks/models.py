"""Builds the whole nets that each provider runs, for training steps and inference."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnres
from benchmarks.cases import ModelCase
from benchmarks.check import check
from benchmarks.operations import DTYPES, LAYOUTS
from benchmarks.providers.base import Unavailable

CLASSES = 1000
CIFAR_IMAGE = 32
# The last batch norm of each residual block has this weight. `_stock` says why it is small.
LAST_WEIGHT = 0.2
# In fp16 the loss is multiplied by this factor, because gradients would underflow without it. The
# factor is constant, so that all steps do the same work. Gradients of up to 16 do not overflow.
LOSS_SCALE = 2.0**12
# The gradients of all parameters of a net are joined into one vector. This is the least allowed
# cosine of the angle between the provider's vector and the vector of the stock net in fp32. In 16
# bits, rounding errors add up over the layers. In fp32, TF32 or a different order of additions
# changes the sign of some of ReLU's inputs near zero, and ReLU then passes different gradients.
COSINE = {"bf16": 0.9, "fp16": 0.98, "fp32": 0.99}
# The greatest allowed relative error of the logits, compared with the logits of the stock net in
# fp32. The errors of 20 to 50 layers add up.
LOGITS_TOLERANCE = {"bf16": 0.15, "fp16": 0.03, "fp32": 0.01}


@dataclass(frozen=True)
class Work:
    """A net that is ready to be timed.

    Attributes:
        run: runs one training step or one inference.
        forward: runs the forward of a training step, including the loss, or runs one inference.
        verify: returns the relative error of the logits. Raises `benchmarks.check.WrongResult` if
            the logits, or the gradients in training, differ too much from the stock net's. Call
            ``verify`` before ``run``, because a training step changes the weights.
        model: the net.
    """

    run: Callable[[], object]
    forward: Callable[[], Tensor]
    verify: Callable[[], float]
    model: nn.Module


def dtype_of(case: ModelCase) -> str:
    """Returns the dtype in which a case is run. ``eager-fp16-cudnn`` runs bf16 cases in fp16."""
    return "fp16" if case.provider == "eager-fp16-cudnn" and case.dtype == "bf16" else case.dtype


def prepare(case: ModelCase, device: torch.device) -> Work:
    """Builds the net of a case, with the same weights for every provider.

    Raises:
        Unavailable: if the provider does not support the device or the case.
    """
    if device.type != "cuda" and case.provider in ("eager-fp16-cudnn", "compile-max-autotune"):
        raise Unavailable("needs a GPU")
    if case.provider == "eager-fp16-cudnn" and case.dtype != "bf16":
        raise Unavailable("only supports bf16 cases, and converts them to fp16")
    torch._dynamo.reset()
    torch.backends.cudnn.benchmark = True  # for every provider, as training scripts do
    work = _training if case.suite in ("step", "memory") else _inference
    return work(case, device)


def _stock(case: ModelCase) -> nn.Module:
    """Builds the stock net, which has torch's own layers.

    With torchvision's initial weights, a ResNet-50 amplifies rounding errors so much that correct
    implementations can't be compared. So the last batch norm of each residual block gets the small
    weight ``LAST_WEIGHT``. ``zero_init_residual`` marks these batch norms by the weight 0.
    """
    torch.manual_seed(0)
    model = bnres.models.create_model(
        case.net,
        num_classes=CLASSES,
        fused=False,
        stem="cifar" if case.image <= CIFAR_IMAGE else "imagenet",
        zero_init_residual=True,
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.masked_fill_(module.weight == 0, LAST_WEIGHT)
    return model


def _placed(model: nn.Module, case: ModelCase, device: torch.device) -> nn.Module:
    return model.to(device).to(memory_format=LAYOUTS[case.layout])  # type: ignore[call-overload]


def _images(case: ModelCase, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.batch, 3, case.image, case.image)
    images = torch.randn(shape, device=device, generator=generator)
    return images.contiguous(memory_format=LAYOUTS[case.layout])


def _of_provider(stock: nn.Module, case: ModelCase) -> nn.Module:
    if case.provider.startswith("bnres"):
        return bnres.fuse(stock)
    return stock


def _compiled(model: nn.Module, case: ModelCase) -> Callable[[Tensor], Tensor]:
    if not case.provider.startswith("compile"):
        return model
    # Inductor's CUDA graphs are disabled, because `benchmarks.clock` captures the graph itself.
    mode = "max-autotune-no-cudagraphs" if case.provider.endswith("max-autotune") else None
    return torch.compile(model, dynamic=False, mode=mode)


def _training(case: ModelCase, device: torch.device) -> Work:
    images = _images(case, device)
    generator = torch.Generator(device).manual_seed(1)
    labels = torch.randint(CLASSES, (case.batch,), device=device, generator=generator)
    model = _placed(_of_provider(_stock(case), case), case, device).train()
    forward = _compiled(model, case)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    dtype = DTYPES[dtype_of(case)]
    scaler = torch.amp.GradScaler(
        device.type, init_scale=LOSS_SCALE, enabled=dtype == torch.float16
    )

    def loss_of(forward: Callable[[Tensor], Tensor], cast: bool) -> tuple[Tensor, Tensor]:
        # With autocast's cache of cast weights, the capture of a CUDA graph would fail.
        with torch.autocast(
            device.type, dtype if cast else torch.bfloat16,
            enabled=cast and dtype != torch.float32, cache_enabled=False,
        ):  # fmt: skip
            logits = forward(images)
        return logits, F.cross_entropy(logits.float(), labels)

    def recipes() -> AbstractContextManager[None]:
        return bnres.recompute() if case.provider == "bnres-recompute" else nullcontext()

    def step_forward() -> Tensor:
        with recipes():
            return loss_of(forward, True)[1]

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = step_forward()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if case.launch == "graph":
            # scaler.step() reads on the host whether a gradient overflowed, which can't be captured
            # in a CUDA graph.
            optimizer.step()
        else:
            scaler.step(optimizer)
        scaler.update(LOSS_SCALE)
        return loss.detach()

    def gradients(
        model: nn.Module, forward: Callable[[Tensor], Tensor], cast: bool
    ) -> tuple[Tensor, Tensor]:
        with recipes():
            logits, loss = loss_of(forward, cast)
        scale = scaler.get_scale() if cast else 1.0
        found = torch.autograd.grad(scale * loss, list(model.parameters()))
        return logits.detach(), torch.cat([g.flatten().float() / scale for g in found])

    def verify() -> float:
        oracle = _placed(_stock(case), case, device).train()
        expected, expected_gradient = gradients(oracle, oracle, False)
        actual, gradient = gradients(model, forward, True)
        error = check("logits", [actual], [expected], LOGITS_TOLERANCE[dtype_of(case)])
        cosine = F.cosine_similarity(gradient, expected_gradient, dim=0)
        check("gradient's cosine", [cosine], [torch.ones_like(cosine)], 1 - COSINE[dtype_of(case)])
        return error

    return Work(run, step_forward, verify, model)


def _inference(case: ModelCase, device: torch.device) -> Work:
    dtype = DTYPES[dtype_of(case)]
    images = _images(case, device)
    stock = _placed(_stock(case), case, device)
    with torch.no_grad():
        stock.train()(images[: min(case.batch, 32)])  # This updates the running statistics.
        expected = stock.eval()(images)
    model = _of_provider(stock, case).to(dtype).eval()
    forward, cast = _compiled(model, case), images.to(dtype)

    def run() -> Tensor:
        with torch.inference_mode():
            return forward(cast)

    def verify() -> float:
        return check("logits", [run()], [expected], LOGITS_TOLERANCE[dtype_of(case)])

    return Work(run, run, verify, model)
