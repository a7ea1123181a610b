"""Networks by name: ``stillhouse:resnet20``, ``torchvision:resnet18``, ``timm:convnext_tiny``, ``pkg.mod:build``.

Classes of diffusers and transformers are named with their configuration: ``diffusers:UNet2DModel`` and options.

A `ModelSpec` is everything needed to build a network again in a fresh process; it travels in ``plan.json``.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError, did_you_mean, need


class MLP(nn.Sequential):
    """A multilayer perceptron with ReLU; `widths` are its hidden layers."""

    def __init__(self, shape: tuple[int, ...], classes: int, widths: tuple[int, ...] = (64, 64, 64)):
        sizes = [int(torch.Size(shape).numel()), *widths]
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        super().__init__(*layers, nn.Linear(sizes[-1], classes))


class CNN(nn.Module):
    """Two 3×3 convolutions with batch norm and max-pooling, then a hidden linear layer and the head."""

    def __init__(self, shape: tuple[int, ...], classes: int, widths: tuple[int, int, int] = (16, 32, 64)):
        super().__init__()
        a, b, h = widths

        def block(i: int, o: int) -> nn.Sequential:
            conv = nn.Conv2d(i, o, 3, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))

        self.block1, self.block2 = block(shape[0], a), block(a, b)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(16 * b, h), nn.ReLU())
        self.head = nn.Linear(h, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.pool(self.block2(self.block1(x)))))


class LeNet(nn.Sequential):
    """LeNet-5 with ReLU and max-pooling (LeCun et al., 1998), for images from 12 pixels on; no normalisation."""

    def __init__(self, shape: tuple[int, ...], classes: int):
        side = (min(shape[1:]) // 2 - 4) // 2
        if side < 1:
            raise UserError(f"LeNet needs images of at least 12 pixels, got {shape}; take stillhouse:convnet")
        convs = [nn.Conv2d(shape[0], 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        convs += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        h, w = ((s // 2 - 4) // 2 for s in shape[1:])
        head = [nn.Linear(16 * h * w, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)]
        super().__init__(*convs, *head)


class ConvNet(nn.Sequential):
    """The small net of data-set distillation: `depth` × [3×3 conv, norm, ReLU, 2×2 mean pool], then linear.

    `norm`: "instance" (group norm with a group per channel), "batch" or "none". `depth` 0 takes as many blocks as
    leave images of about 4 pixels: 3 for 32×32. Images of 28×28 are padded to 32 by the first convolution.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 128, depth: int = 0, norm: str = "instance"):
        norms = {
            "instance": lambda: nn.GroupNorm(width, width),
            "batch": lambda: nn.BatchNorm2d(width),
            "none": nn.Identity,
        }
        if norm not in norms:
            raise UserError(f"ConvNet: norm must be instance, batch or none, got {norm!r}")
        first = 3 if tuple(shape[1:]) == (28, 28) else 1
        sides = [s + 2 * (first - 1) for s in shape[1:]]
        depth = depth or max(1, min(sides).bit_length() - 3)
        layers: list[nn.Module] = []
        for k in range(depth):
            conv = nn.Conv2d(width if k else shape[0], width, 3, padding=1 if k else first)
            layers += [conv, norms[norm](), nn.ReLU(), nn.AvgPool2d(2)]
        pixels = (sides[0] >> depth) * (sides[1] >> depth)
        if not pixels:
            raise UserError(f"ConvNet: {depth} poolings leave nothing of images {shape}; give a smaller depth")
        super().__init__(*layers, nn.Flatten(), nn.Linear(width * pixels, classes))


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut (He et al., 2016); the shortcut subsamples and pads with zeros."""

    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.stride, self.pad = stride, o - i

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.pad or self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
            x = nn.functional.pad(x, (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2))
        return torch.relu(out + x)


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6k+2 (He et al., 2016, section 4.2), for 3×32×32 and other small images.

    `depths`, blocks of each of the three stages, stands in for `depth` where stages are unequal, and `widths` for
    width, 2·width, 4·width.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        depth: int = 20,
        width: int = 16,
        depths: Sequence[int] | None = None,
        widths: Sequence[int] | None = None,
    ):
        super().__init__()
        if depths is None and (depth - 2) % 6:
            raise UserError(f"a CIFAR ResNet has depth 6k+2 (8, 14, 20, 32, 44, 56, 110), got {depth}")
        depths = [(depth - 2) // 6] * 3 if depths is None else list(depths)
        widths = [width, 2 * width, 4 * width] if widths is None else list(widths)
        if len(depths) != 3 or len(widths) != 3 or min(*depths, *widths) < 1:
            raise UserError(f"a CIFAR ResNet has three stages, got depths {depths} and widths {widths}")
        i = widths[0]
        self.conv1 = nn.Conv2d(shape[0], i, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(i)
        for s, (k, o) in enumerate(zip(depths, widths)):
            blocks = [Block(i if b == 0 else o, o, 2 if s and b == 0 else 1) for b in range(k)]
            self.add_module(f"layer{s + 1}", nn.Sequential(*blocks))
            i = o
        self.linear = nn.Linear(i, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


OWN: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "lenet": LeNet,
    "convnet": ConvNet,
    "resnet": ResNet,
    **{f"resnet{d}": lambda shape, classes, d=d, **kw: ResNet(shape, classes, d, **kw) for d in (8, 14, 20, 32, 56)},
}


@dataclass(frozen=True)
class ModelSpec:
    """How to build a network again.

    Attributes:
        name: ``source:model``.
        classes: number of outputs.
        shape: one input, (channels, height, width).
        stem: ``"keep"`` as published; ``"small"`` puts a 3×3 stride-1 stem without max-pooling into a ResNet, which
            images of about 32 pixels want.
        options: further keyword arguments of the builder.
    """

    name: str
    classes: int
    shape: tuple[int, ...]
    stem: str = "keep"
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "options": dict(self.options)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> ModelSpec:
        try:
            spec = ModelSpec(**{**value, "shape": tuple(map(int, value["shape"]))})
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"this is no description of a network ({error!r}): {str(value)[:200]}") from None
        if not isinstance(spec.name, str) or not isinstance(spec.classes, int) or not isinstance(spec.options, Mapping):
            raise UserError(f"this is no description of a network (name, classes or options): {str(value)[:200]}")
        return spec

    def build(self, *, seed: int = 0, pretrained: bool = False) -> nn.Module:
        """The network, initialised from `seed` (the global generator is left as it was).

        Raises:
            UserError: unknown name, a builder that fails, or pretrained weights that cannot be had.
        """
        source, _, name = self.name.partition(":")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if not name:
                raise UserError(
                    f"no network {self.name!r}: expected SOURCE:NAME with SOURCE stillhouse, torchvision, timm or a "
                    "module of yours (package.module:function), or where a trained one is read RUN/students/NAME"
                )
            if source == "stillhouse":
                model = self._own(name, pretrained)
            elif source == "torchvision":
                model = self._torchvision(name, pretrained)
            elif source == "timm":
                model = self._timm(name, pretrained)
            elif source in ("diffusers", "transformers"):
                model = self._by_config(source, name)
            else:
                model = self._user(source, name)
        if self.stem == "small":
            small_stem(model)
        elif self.stem != "keep":
            raise UserError(f"stem must be 'keep' or 'small', got {self.stem!r}")
        return model

    def example(self, n: int = 2) -> Tensor:
        """A batch of n inputs with fixed random values."""
        return torch.randn(n, *self.shape, generator=torch.Generator().manual_seed(0))

    def _own(self, name: str, pretrained: bool) -> nn.Module:
        if name not in OWN:
            raise UserError(f"no model stillhouse:{name}; {did_you_mean(name, OWN)}")
        if pretrained:
            raise UserError(f"stillhouse:{name} has no published weights; drop --pretrained")
        return OWN[name](self.shape, self.classes, **self.options)

    def _torchvision(self, name: str, pretrained: bool) -> nn.Module:
        from torchvision import models

        if name not in models.list_models(module=models):
            raise UserError(f"no model torchvision:{name}; {did_you_mean(name, models.list_models(module=models))}")
        options = dict(self.options)
        if name.startswith("vit_"):
            options.setdefault("image_size", self.shape[-1])
        if not pretrained:
            if name in ("googlenet", "inception_v3"):
                options.setdefault("aux_logits", False)
                options.setdefault("init_weights", True)
            return models.get_model(name, weights=None, num_classes=self.classes, **options)
        try:
            model = models.get_model(name, weights="DEFAULT", **options)
        except OSError as error:
            raise UserError(f"the pretrained weights of torchvision:{name} could not be had: {error}") from None
        replace_head(model, self.classes)
        return model

    def _timm(self, name: str, pretrained: bool) -> nn.Module:
        import timm

        if not timm.is_model(name):
            raise UserError(f"no model timm:{name}; {did_you_mean(name, timm.list_models())}")
        options = dict(self.options)
        if "img_size" in inspect.signature(timm.model_entrypoint(name)).parameters or "vit" in name or "deit" in name:
            options.setdefault("img_size", self.shape[-1])
        try:
            return timm.create_model(
                name, pretrained=pretrained, num_classes=self.classes, in_chans=self.shape[0], **options
            )
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            raise UserError(f"the pretrained weights of timm:{name} could not be had: {_line(error)}") from None

    def _by_config(self, library: str, name: str) -> nn.Module:
        """A class of diffusers or transformers from its configuration (`options`), with fresh weights."""
        kind = getattr(import_library(library), name, None)
        if kind is None:
            raise UserError(f"{library} has no class {name!r}; check the installed version")
        if library == "diffusers":
            return kind.from_config(dict(self.options))
        return kind(kind.config_class.from_dict(dict(self.options)))

    @staticmethod
    def of(model: nn.Module, shape: tuple[int, ...] = (), classes: int = 0) -> ModelSpec:
        """How to build a model of diffusers or transformers again: its class and configuration.

        Raises:
            UserError: the model is of another kind.
        """
        library, config = type(model).__module__.partition(".")[0], getattr(model, "config", None)
        if library == "diffusers":
            options = {k: v for k, v in dict(config or {}).items() if not k.startswith("_")}
        elif library == "transformers" and config is not None:
            options = config.to_diff_dict()
            options.pop("transformers_version", None)
        else:
            raise UserError(f"{type(model).__name__} is no model of diffusers or transformers; give a ModelSpec for it")
        return ModelSpec(f"{library}:{type(model).__name__}", classes, shape, options=json.loads(json.dumps(options)))

    def _user(self, module: str, name: str) -> nn.Module:
        build = import_object(f"{module}:{name}", "--model")
        known = {"classes": self.classes, "num_classes": self.classes, "shape": self.shape, **self.options}
        try:
            takes = inspect.signature(build).parameters
            model = build(**{k: v for k, v in known.items() if k in takes})
        except Exception as error:
            raise UserError(f"{module}:{name} raised {type(error).__name__}: {_line(error)}") from None
        if not isinstance(model, nn.Module):
            raise UserError(f"{module}:{name} returned {type(model).__name__}, expected a torch.nn.Module")
        return model


def spec_and_network(
    given: nn.Module | ModelSpec, network: nn.Module | None, seed: int
) -> tuple[ModelSpec | None, nn.Module]:
    """What recipes make of a network that is given alive or as a `ModelSpec`.

    Args:
        given: a live module, or how it is built. network: a live one, with weights of its own, beside a spec.
        seed: of fresh weights, where neither is alive.

    Returns:
        How it is built again, None of a module that only lives; the network.
    """
    if isinstance(given, ModelSpec):
        return given, given.build(seed=seed) if network is None else network
    return None, given if network is None else network


def import_library(name: str) -> Any:
    """diffusers or transformers, which come with an extra."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise need({"diffusers": "diffusion", "transformers": "text"}[name], name) from None


def import_object(path: str, what: str) -> Any:
    """The object named ``package.module:name``, also from the current directory."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise UserError(
                f"{what} {path}: there is no module {error.name!r} here; expected stillhouse:NAME, torchvision:NAME, "
                "timm:NAME or package.module:function on the Python path"
            ) from None
        raise UserError(f"{what} {path}: importing it failed: {_line(error)}") from None
    except Exception as error:
        raise UserError(f"{what} {path}: importing it failed: {type(error).__name__}: {_line(error)}") from None
    if not hasattr(found, name):
        public = [k for k in vars(found) if not k.startswith("_")]
        raise UserError(f"{what} {path}: module {module!r} has no {name!r}; {did_you_mean(name, public)}")
    return getattr(found, name)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def replace_head(model: nn.Module, classes: int) -> None:
    """Gives the last linear layer `classes` outputs, freshly initialised, unless it has them already."""
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise UserError(f"{type(model).__name__} has no nn.Linear head to give {classes} classes to")
    name, head = linear[-1]
    if head.out_features != classes:
        model.set_submodule(name, nn.Linear(head.in_features, classes, bias=head.bias is not None))


def small_stem(model: nn.Module) -> None:
    """Replaces a ResNet's 7×7 stride-2 stem and max-pooling by a 3×3 stride-1 convolution, in place."""
    conv = getattr(model, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or not hasattr(model, "maxpool"):
        raise UserError(f"stem 'small' is for ResNets with conv1 and maxpool; {type(model).__name__} has none")
    model.conv1 = nn.Conv2d(conv.in_channels, conv.out_channels, 3, 1, 1, bias=conv.bias is not None)
    model.maxpool = nn.Identity()
