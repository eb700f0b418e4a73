"""The images of accuracy.py: pixels [N, 1, 28, 28] of uint8 and labels [N]."""
import gzip
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from regimes import CLASSES, PIXELS, Regime
from torch.utils.data import TensorDataset

MEAN, STD = 72.9, 90.  # of the training images' pixels, 0 to 255


def read_images(folder: Path, name: str) -> TensorDataset:
    """Two files of the MNIST family, whose heads have 16 and 8 bytes."""
    def read(kind, head):
        data = gzip.decompress((folder / f'{name}-{kind}-ubyte.gz').read_bytes())
        return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=head)

    try:
        return TensorDataset(read('images-idx3', 16).view(-1, 1, PIXELS, PIXELS), read('labels-idx1', 8).long())
    except FileNotFoundError as error:
        sys.exit(f'error: no {error.filename}: apt install dataset-fashion-mnist, or give --data a folder with the '
                 f'four files of https://github.com/zalandoresearch/fashion-mnist (data/fashion)')


def load_images(folder: Path) -> dict[str, TensorDataset]:
    """All images by their use."""
    train = read_images(folder, 'train')
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).split([50_000, 2_000, 8_000])
    parts = zip(('pool', 'calibration', 'validation'), order, strict=True)
    return {'test': read_images(folder, 't10k'), **{part: TensorDataset(*train[index]) for part, index in parts}}


def regime_images(regime: Regime, images: dict[str, TensorDataset], device: torch.device) -> dict[str, TensorDataset]:
    """What a regime trains and evaluates on, in its size on the device, the same for all seeds and methods."""
    def fitted(pixels, labels):
        if regime.pixels != PIXELS:
            shape = (regime.pixels, regime.pixels)
            pixels = torch.cat([F.interpolate(part.float(), shape, mode='bilinear').round_().byte()
                                for part in pixels.split(1000)])
        return TensorDataset(pixels.to(device), labels.to(device))

    pixels, labels = images['pool'].tensors
    if regime.per_class is not None:
        index = torch.cat([(labels == label).nonzero()[:regime.per_class, 0] for label in range(CLASSES)])
        pixels, labels = pixels[index], with_noise(labels[index], regime.noise)
    counts = {'test': regime.test, 'validation': regime.validation, 'calibration': None}
    return {'train': fitted(pixels, labels), **{part: fitted(*images[part][:count]) for part, count in counts.items()}}


def with_noise(labels: torch.Tensor, share: float) -> torch.Tensor:
    """A copy in which so many labels, the same ones each time, are drawn anew."""
    labels, generator = labels.clone(), torch.Generator().manual_seed(0)
    replaced = torch.randperm(len(labels), generator=generator)[:round(share * len(labels))]
    labels[replaced] = torch.randint(CLASSES, (len(replaced),), generator=generator)
    return labels


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """By Fashion-MNIST's own mean and deviation; in a larger size as EfficientNet-Lite0 takes them."""
    if pixels.shape[-1] == PIXELS:
        return pixels.float().sub_(MEAN).div_(STD)
    return pixels.float().sub_(127.5).div_(127.5).repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)


def flip_and_crop(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    (count, _, _, size), device = pixels.shape, pixels.device
    padding = size // 14
    flip = (torch.rand(count, 1, 1, 1, generator=generator) < 0.5).to(device)
    padded = F.pad(torch.where(flip, pixels.flip(-1), pixels), [padding] * 4)
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator).to(device)
    return padded.unfold(2, size, 1).unfold(3, size, 1)[torch.arange(count, device=device), :, top, left]


def epoch_batches(images: TensorDataset, regime: Regime, seed: int, epoch: int):
    """Input, target and index of an epoch's batches; they depend on nothing else."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(len(images), generator=generator)
    for index in order[:len(images) // regime.batch * regime.batch].split(regime.batch):
        pixels, target = images[index.to(images.tensors[0].device)]
        yield normalise(flip_and_crop(pixels, generator) if regime.augment else pixels), target, index


def evaluation_batches(images: TensorDataset):
    """Input and target of all images in turn."""
    pixels, labels = images.tensors
    size = 1000 if pixels.shape[-1] == PIXELS else 50 if pixels.device.type == 'cpu' else 500
    return zip(map(normalise, pixels.split(size)), labels.split(size), strict=True)
