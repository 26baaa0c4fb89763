"""`export`: a checkpoint, of a run or of the official implementation, as safetensors and a model card."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sitreg_lumir import __version__
from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.io.read import read_volume
from sitreg_lumir.network.card import ModelCard
from sitreg_lumir.network.official import import_official
from sitreg_lumir.network.weights import Member, load_member, save_member


def export(
    checkpoint: Path,
    file: Path,
    *,
    half: bool = False,
    licence: str | None = None,
    dataset: Path | None = None,
    groups: int | None = None,
    allow_imports: bool | str | Sequence[str] = (),
) -> None:
    """Writes a checkpoint's network as safetensors + JSON.

    Args:
        checkpoint: of a run; with ``dataset`` a file of the official implementation.
        file: ends in ``.safetensors``.
        half: store half precision.
        licence: of the weights.
        dataset: what official weights were trained on; its grid becomes theirs.
        groups: of official weights' group normalisations; see :func:`~sitreg_lumir.network.official.read_official`.
        allow_imports: see :func:`~sitreg_lumir.network.weights.load_member`.

    Raises:
        InputError: the checkpoint is missing or damaged, or the file cannot be written.
    """
    member = load_member(checkpoint, allow_imports) if dataset is None else _import(checkpoint, dataset, groups)
    values = {**vars(member.card), "version": __version__}
    if licence is not None:
        values["licence"] = licence
    dtype = torch.float16 if half else torch.float32
    save_member(file, member.network, ModelCard(**values), dtype, member.input_transform)
    print(f"written: {file} and {file.with_suffix('.json').name}")


def _import(weights: Path, dataset: Path, groups: int | None) -> Member:
    """Official weights with the grid of the data set that they were trained on."""
    data = read_dataset(dataset, training=True)
    _, affine = read_volume(data.training[0].path, shape=data.shape)
    member = import_official(weights, data.shape, affine.tolist(), groups=groups)
    sizes = member.network.architecture
    print(
        f"{weights}: {sizes['in_channels']} input channel(s), features {sizes['features']}, heads "
        f"{sizes['head_features']}, {sizes['convolutions']} convolutions a block; {member.card.training['groups']}"
    )
    return member
