"""Which group of subjects is trained on when, and on which process: decided by (seed, epoch, index)."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from sitreg_lumir.data.cache import VolumeCache
from sitreg_lumir.data.images import Image
from sitreg_lumir.data.loaders import OneLineLoader
from sitreg_lumir.errors import InputError

# the first word of every seed sequence, so that the kinds of draws are independent
_GROUPS, _VIEWS, _MIRRORED, _SCANS = 1, 2, 3, 5


def draw_groups(seed: int, epoch: int, subjects: int, size: int, count: int) -> NDArray[np.int64]:
    """The ordered groups of one epoch: ``(count, size)``, distinct subjects 0..subjects-1 in each row.

    No group comes twice as long as there are ``count`` ordered groups; after all were drawn, all are drawn
    again in another order. A row depends on all arguments, ``count`` included.

    Raises:
        ValueError: fewer subjects than a group has members, or a negative seed.
    """
    if subjects < size or seed < 0 or count < 1:
        raise ValueError(f"cannot draw {count} groups of {size} from {subjects} subjects with seed {seed}")
    generator = np.random.default_rng(np.random.SeedSequence((_GROUPS, seed, epoch, size)))
    groups = math.perm(subjects, size)
    rounds = [min(groups, count - start) for start in range(0, count, groups)]
    rest = np.concatenate([generator.choice(groups, drawn, replace=False) for drawn in rounds])
    # the number of a group, written in the mixed base (subjects, subjects - 1, ...), says which of the
    # subjects that are left comes next
    columns: list[NDArray[np.int64]] = []
    for left in range(subjects, subjects - size, -1):
        rest, column = np.divmod(rest, left)
        for taken in np.sort(np.stack(columns), axis=0) if columns else ():
            column = column + (column >= taken)
        columns.append(column)
    return np.stack(columns, axis=1)


def draw_images(seed: int, epoch: int, people: Sequence[str], size: int, count: int) -> NDArray[np.int64]:
    """The ordered groups of one epoch as places of images: ``(count, size)``, different people in each row.

    Where each image shows another person, these are the groups of :func:`draw_groups`. Else those are of people, and
    for each member of a group one of the person's images is drawn.

    Args:
        seed: of the run.
        epoch: from 0.
        people: who each image shows.
        size: images in a group.
        count: of groups.

    Raises:
        ValueError: fewer people than a group has members, or a negative seed.
    """
    different = [*dict.fromkeys(people)]
    groups = draw_groups(seed, epoch, len(different), size, count)
    if len(different) == len(people):
        return groups
    images = [[place for place, shown in enumerate(people) if shown == person] for person in different]
    generator = np.random.default_rng(np.random.SeedSequence((_SCANS, seed, epoch, size)))
    draws = generator.random(groups.shape).ravel()
    drawn = [images[who][int(draw * len(images[who]))] for who, draw in zip(groups.ravel(), draws, strict=True)]
    return np.array(drawn, dtype=np.int64).reshape(groups.shape)


def view_seed(seed: int, epoch: int, index: int, position: int) -> int:
    """The seed (63 bits) of the augmented view of the image at ``position`` in an epoch's group ``index``."""
    words = np.random.SeedSequence((_VIEWS, seed, epoch, index, position)).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def is_mirrored(seed: int, epoch: int, index: int) -> bool:
    """Whether an epoch's group ``index`` is trained on left-right mirrored, where mirroring is on: every other one."""
    words = np.random.SeedSequence((_MIRRORED, seed, epoch, index)).generate_state(1, np.uint64)
    return bool(words[0] & np.uint64(1))


def split_batch(batch_size: int, world_size: int, micro_batch: int | None) -> tuple[int, int]:
    """Divides the global batch: groups per process and backward pass, and the passes to accumulate.

    Raises:
        InputError: it does not divide.
    """
    if batch_size < 1 or batch_size % world_size:
        nearest = max(1, round(batch_size / world_size)) * world_size
        raise InputError(
            f"batch_size {batch_size} (global) does not divide by {world_size} processes; "
            f"choose a multiple of {world_size}, for example {nearest}"
        )
    share = batch_size // world_size
    micro = share if micro_batch is None else micro_batch
    if micro < 1 or share % micro:
        choices = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise InputError(f"micro_batch {micro} does not divide the {share} groups of each process; choose {choices}")
    return micro, share // micro


def count_teams(world_size: int) -> int:
    """Teams of processes that take a triplet at a time: of three processes each, or of the only one.

    Raises:
        InputError: several processes that do not form teams of three.
    """
    if world_size > 1 and world_size % 3:
        raise InputError(
            f"{world_size} processes cannot share triplets; choose 1 process or a multiple of 3 "
            f"(trainer.devices times trainer.num_nodes), for example {3 * math.ceil(world_size / 3)}"
        )
    return max(1, world_size // 3)


class GroupDataset(Dataset[dict[str, Any]]):
    """The groups of one epoch; item ``index`` holds the stored volumes of that group's images.

    A pure lookup: the groups are drawn before, and nothing random happens in a worker. With ``mirror`` an item says
    whether its group is to be mirrored; its volumes are as stored.
    """

    def __init__(
        self,
        images: Sequence[Image],
        cache: VolumeCache,
        groups: NDArray[np.int64],
        seed: int,
        epoch: int,
        mirror: bool = False,
    ) -> None:
        self.images = images
        self.cache = cache
        self.groups = groups
        self.seed = seed
        self.epoch = epoch
        self.mirror = mirror

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        members = [self.images[member] for member in self.groups[index]]
        return {
            "images": [torch.from_numpy(self.cache.read(image.path)) for image in members],
            "index": index,
            "epoch": self.epoch,
            "view_seed": [view_seed(self.seed, self.epoch, index, position) for position in range(len(members))],
            "mirrored": self.mirror and is_mirrored(self.seed, self.epoch, index),
            "names": tuple(image.name for image in members),
        }


def collate_groups(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items -> a batch: ``images`` ``(B, N, 1, X, Y, Z)``, uint8 if all are, else float32."""
    stored = [volume for item in items for volume in item["images"]]
    if any(volume.dtype != torch.uint8 for volume in stored):
        stored = [volume.float() for volume in stored]
    images = torch.stack(stored)
    return {
        "images": images.view(len(items), -1, 1, *images.shape[1:]),
        "index": torch.tensor([item["index"] for item in items]),
        "epoch": torch.tensor([item["epoch"] for item in items]),
        "view_seed": torch.tensor([item["view_seed"] for item in items]),
        "mirrored": torch.tensor([item["mirrored"] for item in items]),
        "names": [item["names"] for item in items],
    }


class GroupBatches(Sampler[list[int]]):
    """The epoch's indices of one process, in micro batches.

    Global step ``s`` takes the groups ``s * batch_size`` up to ``(s + 1) * batch_size``, and each process a
    contiguous share of them. Groups that do not fill a last global batch are dropped. ``start`` is the batch
    to begin with; the length is that of the whole epoch.
    """

    def __init__(self, count: int, batch_size: int, micro_batch: int, rank: int, world_size: int) -> None:
        if count < batch_size:
            raise InputError(
                f"an epoch of {count} groups does not fill one batch of {batch_size}; "
                "lower batch_size or raise the number of groups per epoch"
            )
        self.steps = count // batch_size
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.share = batch_size // world_size
        self.accumulate = self.share // micro_batch
        self.rank = rank
        self.start = 0

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, len(self)):
            step, part = divmod(batch, self.accumulate)
            first = step * self.batch_size + self.rank * self.share + part * self.micro_batch
            yield list(range(first, first + self.micro_batch))


class EpochLoader(OneLineLoader):
    """One epoch's batches, with a state that counts those trained on, not those prefetched.

    Lightning stores ``state_dict`` in each checkpoint and, when it resumes in mid-epoch, loads it into the
    new loader before it iterates. Lightning counts the same batches itself, so a state fits only the same
    division of the epoch.

    Args:
        dataset: the epoch's groups.
        batches: the division of the epoch; its ``start`` is moved on resume.
        settings: plain values that decide which batch is which; ``groups``, ``batch_size``, ``micro_batch`` and
            ``world_size`` are those of ``batches``.
        processed: how many batches of the running epoch were trained on to the end; a batch in flight when a
            checkpoint is written on an exception is thereby taken again.
    """

    def __init__(
        self,
        dataset: GroupDataset,
        batches: GroupBatches,
        settings: dict[str, int | str],
        processed: Callable[[], int],
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_sampler=batches, collate_fn=collate_groups, **options)
        self.epoch = dataset.epoch
        self.batches = batches
        self.settings = settings
        self.processed = processed
        self.handed_out = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.handed_out = self.batches.start
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the epoch, the batches consumed of it, and the settings."""
        consumed = min(self.handed_out, self.processed())
        return {"epoch": self.epoch, "consumed": consumed, "settings": dict(self.settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the consumed batches.

        Raises:
            InputError: the checkpoint stands within an epoch that is divided in another way now (into other
                pairs, or triplets instead of pairs), or within a step.
        """
        if state["consumed"] == epoch_length(state["settings"]):
            if state["epoch"] == self.epoch:
                self.batches.start = self.handed_out = len(self)
            return  # a finished epoch, however it was divided
        before = {"mirror": False, **state["settings"]}
        changed = [key for key, value in self.settings.items() if before.get(key) != value]
        if changed or state["epoch"] != self.epoch:
            what = ", ".join(f"{key} {before.get(key)} -> {self.settings[key]}" for key in changed)
            raise InputError(
                f"the checkpoint stands within epoch {state['epoch']} and cannot be continued with other "
                f"settings ({what or f'epoch {self.epoch}'}); keep them or resume from the end of an epoch"
            )
        if state["consumed"] % self.batches.accumulate:
            raise InputError(
                "the checkpoint stands between the micro batches of a step and lacks their gradients; "
                "resume from another checkpoint"
            )
        self.batches.start = self.handed_out = int(state["consumed"])


def epoch_length(settings: dict[str, int]) -> int:
    """Batches per process of an epoch with these settings of an ``EpochLoader``."""
    share = settings["batch_size"] // settings["world_size"]
    return settings["groups"] // settings["batch_size"] * (share // settings["micro_batch"])
