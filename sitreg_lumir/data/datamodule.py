"""LightningDataModule: groups of training images and validation pairs of a LUMIR dataset."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray

from sitreg_lumir.data.cache import VolumeCache, default_folder
from sitreg_lumir.data.images import Image, Pair
from sitreg_lumir.data.lightning_internals import batches_consumed, begin_epoch, running
from sitreg_lumir.data.loaders import OneLineLoader
from sitreg_lumir.data.lumir import LumirDataset, groups_of_pairs, raise_problems, read_dataset
from sitreg_lumir.data.pair_dataset import PairDataset, collate_pairs
from sitreg_lumir.data.sampler import (
    EpochLoader,
    GroupBatches,
    GroupDataset,
    count_teams,
    draw_images,
    split_batch,
)
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.read import read_affine
from sitreg_lumir.network.mirrored import left_right_axis

_PAIR, _TRIPLET = 2, 3
_MOST = {"pairs_per_epoch": 10**8, "batch_size": 10**4, "num_workers": 256, "seed": 2**32 - 1}


class LumirDataModule(LightningDataModule):
    """Ordered pairs of different subjects for training, later triplets, and the dataset's own pairs for all else.

    What an epoch holds is a pure function of the seed and the epoch, on any number of processes. The Trainer
    must have ``use_distributed_sampler=False`` and ``reload_dataloaders_every_n_epochs=1``.

    Args:
        root: the folder of a LUMIR dataset, or its JSON.
        validation: further dataset JSONs, relative to the folder of the first, whose validation pairs are added.
        seed: decides which pairs are drawn, in which order, and the seeds of the augmented views.
        pairs_per_epoch: pairs drawn per epoch; those that do not fill a last batch are dropped.
        batch_size: pairs per optimiser step over all processes.
        micro_batch: pairs per device and backward pass, ``accumulate`` of which make a step; ``auto`` is chosen from
            the memory that is free (until that is done, and for other modules than the package's, the whole share),
            None stands for the device's whole share. The gradient is that of the whole batch in any case.
        num_workers: processes that load volumes, per device.
        cache: folder of the volume cache, by default ``~/.cache/sitreg_lumir`` (or in ``$XDG_CACHE_HOME``).
        images: the folder that the JSONs' paths start from, by default that of the first JSON.
        mirror: train every other pair or triplet, drawn by the seed, with left and right exchanged; its images are
            mirrored together. The grid must run from left to right with its middle at x = 0.

    After ``setup``: ``shape`` and ``affine`` (``(4, 4)``, RAS, mm) are the grid of the first training image
    (of the first fixed image where nothing is trained), ``pairs`` all validation pairs, ``groups`` the names of
    the groups that they are in, ``evaluation_labels`` and ``label_names`` what the JSON says; with ``mirror``,
    ``left_right_axis`` is the axis of voxels that runs between left and right.

    Raises:
        InputError: from ``prepare_data``, which looks at all files and volumes before anything runs.

    Examples:
        >>> data = sitreg_lumir.LumirDataModule("LUMIR", pairs_per_epoch=4, batch_size=2, cache="cache", num_workers=0)
        >>> data.prepare_data()
        >>> data.setup("fit")
        >>> data.shape, [pair.name for pair in data.pairs]
        ((8, 10, 6), ['0100_0101', '0101_0102', '0102_0100'])
    """

    dataset: LumirDataset
    pairs: tuple[Pair, ...]
    groups: tuple[str, ...]
    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    evaluation_labels: tuple[int, ...] | None
    label_names: dict[int, str]
    left_right_axis: int

    def __init__(
        self,
        root: str,
        validation: list[str] | None = None,
        seed: int = 0,
        pairs_per_epoch: int = 2000,
        batch_size: int = 4,
        micro_batch: int | Literal["auto"] | None = "auto",
        num_workers: int = 2,
        cache: str | None = None,
        images: str | None = None,
        mirror: bool = False,
    ) -> None:
        super().__init__()
        if seed < 0 or num_workers < 0:
            raise InputError(f"data.seed and data.num_workers must not be negative, got {seed} and {num_workers}")
        sizes = {"pairs_per_epoch": pairs_per_epoch, "batch_size": batch_size, "num_workers": num_workers, "seed": seed}
        for name, value in sizes.items():
            if value > _MOST[name]:
                raise InputError(f"data.{name} must be {_MOST[name]} at most, got {value}")
        self.root = root
        self.images = images
        self.validation = validation or []
        self.seed = seed
        self.pairs_per_epoch = pairs_per_epoch
        self.batch_size = batch_size
        self.automatic = micro_batch == "auto"
        self.micro_batch: int | None = None if isinstance(micro_batch, str) else micro_batch
        self.resumed_micro_batch: int | None = None  # of the checkpoint within an epoch that a run goes on from
        self.num_workers = num_workers
        self.mirror = mirror
        self.triplets_from: int | None = None
        self.triplets_per_epoch = 0
        self.cache = Path(cache).expanduser() if cache else default_folder()
        self.check_headers = (
            True  # refuse files that are stored otherwise than the others; else take arrays as they are
        )
        self.to_predict: tuple[Pair, ...] | None = None  # those of the pairs whose fields are wanted; None: all
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer pairs than processes
        self._stage: str | None = None  # that ``check`` was asked about

    def use_triplets(self, start_epoch: int, triplets_per_epoch: int) -> None:
        """From ``start_epoch`` on, trains on triplets of three different subjects, one per optimiser step and team.

        A team is the only process, or three neighbours (ranks 3t, 3t + 1 and 3t + 2), each of which gets the same
        triplet. So one process and three take one triplet per step, six take two. ``batch_size`` and
        ``micro_batch`` are for pairs only; where a run goes on from the end of an epoch of pairs, they may be
        changed to what divides by the processes that there are now.

        May be called before ``setup`` or after it, and again, until the loader of the first epoch is made.

        Raises:
            InputError: a negative epoch or no triplets; after ``setup`` also what ``setup`` refuses.
        """
        if start_epoch < 0 or triplets_per_epoch < 1:
            raise InputError(
                "triplets need a start_epoch that is not negative and a positive triplets_per_epoch, "
                f"got {start_epoch} and {triplets_per_epoch}"
            )
        self.triplets_from = start_epoch
        self.triplets_per_epoch = triplets_per_epoch
        if hasattr(self, "dataset") and self._training():
            self._check_phases()

    @property
    def pairs_until(self) -> int | None:
        """The first epoch of triplets; None where there is none in this run."""
        last = self.trainer.max_epochs if self.trainer else None
        endless = last is None or last < 0
        planned = self.triplets_from is not None and (endless or self.triplets_from < (last or 0))
        return self.triplets_from if planned else None

    @property
    def accumulate(self) -> int:
        """Micro batches per optimiser step in the Trainer's current epoch."""
        return self.accumulate_in(self.trainer.current_epoch if self.trainer else 0)

    def accumulate_in(self, epoch: int) -> int:
        """Micro batches per optimiser step in an epoch, for ``Trainer.accumulate_grad_batches``."""
        if self._group_size(epoch) == _TRIPLET:
            return 1
        return split_batch(self.batch_size, self._processes()[1], self.micro_batch)[1]

    def check(self, stage: str | None = None) -> None:
        """Looks at the JSONs, at every file's header and at what the run asks for; no volume is read or cached.

        Afterwards all is set that ``setup`` sets.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None: what the Trainer runs.

        Raises:
            InputError: something of it is wrong.
        """
        self._stage = stage
        self._read(check_files=True)
        if self._training():
            self._check_phases()
        self.affine = read_affine(self._first().path)

    def prepare_data(self) -> None:
        """Checks all files and fills the cache; on one process."""
        self.check()
        for cache in self._caches():
            if cache.paths:
                cache.build()

    def setup(self, stage: str | None = None) -> None:
        """Opens what ``prepare_data`` made; on every process."""
        self._read(check_files=False)
        if self._training():
            self._check_phases()
        self._training_cache, self._pair_cache = self._caches()
        self._training_cache.open()
        self._pair_cache.open()
        cache = self._training_cache if self._training() else self._pair_cache
        self.affine = cache.affine(self._first().path)
        if self._training() and self.mirror:
            self.left_right_axis = left_right_axis(self.affine, self.shape, f"{self.dataset.path}: --data.mirror true")

    def train_dataloader(self) -> EpochLoader:
        """The batches of the Trainer's current epoch, for this process."""
        trainer = self.trainer
        if trainer is None or getattr(trainer, "reload_dataloaders_every_n_epochs", 0) != 1:
            raise ValueError("train on this data with Trainer(reload_dataloaders_every_n_epochs=1)")
        epoch, images = trainer.current_epoch, self.dataset.training
        rank, world_size = self._processes()
        size, count, batch_size = self._group_size(epoch), self.pairs_per_epoch, self.batch_size
        if size == _TRIPLET:
            # the processes of a team are one here, so that one process and a team of three take over from each other
            rank, world_size = rank // 3, count_teams(world_size)
            count, batch_size, micro_batch = self.triplets_per_epoch, world_size, 1
        else:
            micro_batch, _ = split_batch(batch_size, world_size, self.micro_batch)
        groups = draw_images(self.seed, epoch, [image.who for image in images], size, count)
        batches = GroupBatches(count, batch_size, micro_batch, rank, world_size)
        begin_epoch(trainer, len(batches))
        return EpochLoader(
            GroupDataset(images, self._training_cache, groups, self.seed, epoch, self.mirror),
            batches,
            settings={
                "seed": self.seed,
                "groups": count,
                "group_size": size,
                "batch_size": batch_size,
                "micro_batch": micro_batch,
                "world_size": world_size,
                "images": _key(images),
                "mirror": self.mirror,
            },
            processed=lambda: batches_consumed(trainer),
            **self._loading(),
        )

    def val_dataloader(self) -> OneLineLoader | list[Any]:
        """Validation pairs one by one; process r of W takes each W-th from r on, none comes twice."""
        return self._pair_loader(self.pairs)

    def test_dataloader(self) -> OneLineLoader | list[Any]:
        """Loads the pairs as ``val_dataloader`` does."""
        return self.val_dataloader()

    def predict_dataloader(self) -> OneLineLoader | list[Any]:
        """Loads the pairs ``to_predict`` as ``val_dataloader`` loads all."""
        return self._pair_loader(self.pairs if self.to_predict is None else self.to_predict)

    def _pair_loader(self, pairs: Sequence[Pair]) -> OneLineLoader | list[Any]:
        if not pairs:
            return []
        rank, world_size = self._processes()
        own = PairDataset(pairs[rank::world_size], self._pair_cache, self.shape)
        return OneLineLoader(own, batch_size=1, collate_fn=collate_pairs, **self._loading())

    def _processes(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _group_size(self, epoch: int) -> int:
        return _PAIR if self.triplets_from is None or epoch < self.triplets_from else _TRIPLET

    def _check_phases(self) -> None:
        """Refuses what an epoch of this run could not do, before the first of them."""
        _, world_size = self._processes()
        if self._group_size(0) == _PAIR:
            split_batch(self.batch_size, world_size, self.micro_batch)
        if self.pairs_until is None:
            return
        teams, subjects = count_teams(world_size), len({image.who for image in self.dataset.training})
        if subjects < _TRIPLET:
            images = "images" if subjects == len(self.dataset.training) else "images of different subjects"
            raise InputError(f"{self.dataset.path}: triplets need 3 training {images}, `training` lists {subjects}")
        if self.triplets_per_epoch < teams:
            raise InputError(
                f"triplets_per_epoch {self.triplets_per_epoch} is not enough for {world_size} processes, "
                f"which take {teams} per step; raise it"
            )

    def _first(self) -> Image:
        """The image whose grid stands for all."""
        return self.dataset.training[0] if self._training() else self.pairs[0].fixed

    def _training(self) -> bool:
        return (running(self.trainer) or self._stage or "fit") == "fit"

    def _loading(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}

    def _read(self, *, check_files: bool) -> None:
        training = self._training()
        self.dataset = read_dataset(
            self.root,
            training=training,
            validation=not training,
            check_files=check_files,
            images=self.images,
            check_headers=self.check_headers,
        )
        self.shape = self.dataset.shape
        self.evaluation_labels, self.label_names = (
            self.dataset.evaluation_labels,
            dict(self.dataset.label_names),
        )
        pairs = list(self.dataset.validation)
        for name in self.validation:
            file = self.dataset.path.parent / name
            further = read_dataset(
                file,
                validation=True,
                check_files=check_files,
                images=self.dataset.root,
                check_headers=self.check_headers,
            )
            if further.shape != self.shape:
                raise InputError(f"{further.path}: its shape is {further.shape}, that of {self.root} is {self.shape}")
            if further.evaluation_labels != (self.evaluation_labels or further.evaluation_labels):
                raise InputError(f"{further.path}: its evaluation_labels differ from those of {self.root}")
            self.evaluation_labels = further.evaluation_labels
            self.label_names |= further.label_names
            pairs += further.validation
        times = Counter((pair.fixed, pair.moving) for pair in pairs)
        twice = sorted({pair.long_name for pair in pairs if times[pair.fixed, pair.moving] > 1})
        raise_problems(self.dataset.path, [f"validation pair {name} comes from several JSONs" for name in twice])
        self.pairs, self.groups = tuple(pairs), groups_of_pairs(pairs, self.dataset.path)

    def _caches(self) -> tuple[VolumeCache, VolumeCache]:
        """Of the training images (none where nothing is trained) and of the pairs' images."""
        training = [image.path for image in self.dataset.training] if self._training() else []
        paired = [image.path for pair in self.pairs for image in (pair.fixed, pair.moving)]
        return VolumeCache(training, self.shape, self.cache), VolumeCache(paired, self.shape, self.cache)


def _key(images: Sequence[Image]) -> str:
    """Which images in which order, without the folder they lie in."""
    return hashlib.sha256(" ".join(image.name for image in images).encode()).hexdigest()[:16]
