"""Validation pairs as a dataset: volumes, label maps and landmarks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sitreg_lumir.data.cache import VolumeCache
from sitreg_lumir.data.images import Pair
from sitreg_lumir.io.read import read_labels


class PairDataset(Dataset[dict[str, Any]]):
    """Validation pairs with their volumes, and their label maps and landmarks where both images have them."""

    def __init__(self, pairs: Sequence[Pair], cache: VolumeCache, shape: tuple[int, ...]) -> None:
        self.pairs = pairs
        self.cache = cache
        self.shape = shape

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        item: dict[str, Any] = {
            "fixed": torch.from_numpy(self.cache.read(pair.fixed.path)),
            "moving": torch.from_numpy(self.cache.read(pair.moving.path)),
            "pair": pair,
        }
        for kind in ("labels", "landmarks"):
            fixed, moving = (getattr(image, kind) for image in (pair.fixed, pair.moving))
            if fixed is not None and moving is not None:
                item[f"fixed_{kind}"] = torch.from_numpy(read_labels(fixed, shape=self.shape))
                item[f"moving_{kind}"] = torch.from_numpy(read_labels(moving, shape=self.shape))
        return item


def collate_pairs(items: list[dict[str, Any]]) -> dict[str, Any]:
    """One item -> a batch: volumes ``(1, 1, X, Y, Z)``, ``pair`` a list of one ``Pair``."""
    (item,) = items
    return {key: value[None, None] if isinstance(value, Tensor) else [value] for key, value in item.items()}
