"""`predict`: one network or an ensemble over the pairs of a data set, each field on disk as soon as it exists."""

import math
import shlex
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import nn
from torch.multiprocessing import ProcessRaisedException  # type: ignore[attr-defined]

from sitreg_lumir.challenge.predictions import (
    ALSO,
    EXACT,
    PairPlan,
    PairUpdates,
    plan_predictions,
    voxel_size,
    write_prediction,
)
from sitreg_lumir.data.datamodule import LumirDataModule
from sitreg_lumir.data.lightning_internals import leave_signals_alone
from sitreg_lumir.data.views import clean_view
from sitreg_lumir.deform.ops import warp
from sitreg_lumir.deform.splines import SplineUpdates
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import alone, check_folder_is_writable, own_temporary_files
from sitreg_lumir.network.ensemble import Ensemble
from sitreg_lumir.network.precision import turn_tf32_off
from sitreg_lumir.network.shipped import default_members, member_files
from sitreg_lumir.network.sitreg import Update
from sitreg_lumir.network.weights import (
    Member,
    ModelCard,
    load_members,
)
from sitreg_lumir.train.configs import nearest
from sitreg_lumir.train.settings import keep_freed_memory_of_small_grids, prepare_process

_SMALL_VOXEL = 1.5  # mm; below, the configs of the challenge's 1 mm fit, above, those of 2 mm


class FieldWriter(BasePredictionWriter):
    """Writes each predicted field as soon as it exists, so that memory stays flat."""

    def __init__(self, plans: dict[str, PairPlan]) -> None:
        super().__init__(write_interval="batch")
        self.plans = plans

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes what one batch predicted, each pair whole."""
        maps = prediction.pop("maps", None)
        for index, pair in enumerate(batch["pair"]):
            arrays = {name: tensor[index].cpu().numpy() for name, tensor in prediction.items()}
            exact = None
            if maps is not None:
                brains = ((batch[role][index, 0] > 0).cpu().numpy() for role in ("fixed", "moving"))
                exact = PairUpdates(maps[index], *brains)
            write_prediction(self.plans[pair.long_name], arrays, exact)


class Predictor(LightningModule):
    """Registers the pairs of a data set by the members' averaged control points."""

    def __init__(
        self,
        members: Sequence[Member],
        inverse: bool = False,
        warped: bool = False,
        disagreement: bool = False,
        flip: bool = False,
        exact: bool = False,
        maps: bool = False,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.inverse = inverse
        self.warped = warped
        self.disagreement = disagreement
        self.flip = flip
        self.exact = exact
        self.maps = maps

    def setup(self, stage: str) -> None:
        """Sets this process's precision."""
        turn_tf32_off()  # processes that share the pairs begin with PyTorch's defaults

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """``disp`` (fixed grid) and, when asked for, ``inverse`` (moving grid), ``warped`` (0..255), ``disagreement``.

        The fields and the disagreement are in voxels, the latter on the fixed grid. With ``maps``, also a list of each
        pair's :class:`~sitreg_lumir.deform.splines.SplineUpdates`, of which with ``exact`` the fields are samples.
        """
        fixed, moving = clean_view(batch["fixed"])[0], clean_view(batch["moving"])[0]
        members = [member for member in self.members if isinstance(member, Member)]
        ensemble = Ensemble.of(members, self.flip)
        prediction: dict[str, Any] = {}
        if self.exact and not self.disagreement:
            updates: Sequence[Update] = ensemble.control_points(fixed=fixed, moving=moving)
        else:
            (stage,) = ensemble.run(fixed=fixed, moving=moving, inverse=self.inverse, disagreement=self.disagreement)
            updates, prediction["disp"] = stage.updates, stage.disp
            if self.inverse:
                prediction["inverse"] = stage.disp_inv
            if stage.disagreement is not None:
                prediction["disagreement"] = stage.disagreement[:, 0]
        if self.exact or self.maps:
            maps = _of_pairs(updates, fixed.shape)
            if self.exact:
                prediction["disp"] = torch.stack([pair.sample() for pair in maps]).to(fixed.device)
                if self.inverse:
                    prediction["inverse"] = torch.stack([pair.sample(inverse=True) for pair in maps])
            if self.maps:
                prediction["maps"] = maps
        if self.warped:
            stored = batch["moving"]
            moved = warp(stored.float(), prediction["disp"])[:, 0]
            prediction["warped"] = moved.round().to(stored.dtype) if stored.dtype == torch.uint8 else moved
        return prediction


def _of_pairs(updates: Sequence[Update], shape: Sequence[int]) -> list[SplineUpdates]:
    """The updates of a batch ``(B, 3, ...)``, for fields of full resolution ``(B, C, X, Y, Z)``, pair by pair."""
    count, _, x, y, z = shape
    pairs = ([(first[i : i + 1], second[i : i + 1]) for first, second in updates] for i in range(count))
    return [SplineUpdates.rounded(pair, (x, y, z)) for pair in pairs]


def predict(
    member_paths: Sequence[str] | None,
    folder: str | Path,
    data_args: Sequence[str],
    *,
    inverse: bool = False,
    warped: bool = False,
    disagreement: bool = False,
    flip: bool = False,
    exact: bool = False,
    save_maps: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    devices: int = 1,
    precision: str = "float32",
    allow_imports: bool | str | Sequence[str] = (),
    check_headers: bool = True,
) -> None:
    """Writes ``disp_<fixed>_<moving>.nii.gz`` for each pair that is not there already.

    Args:
        member_paths: checkpoints, safetensors files or folders of them; None for those that come with the package.
        folder: where the fields go.
        data_args: ``--data.*`` arguments of :class:`LumirDataModule`.
        inverse: also write the inverse fields.
        warped: also write the moved images.
        disagreement: also write how far the members' updates differ, mm, fixed grid (see
            :func:`~sitreg_lumir.network.sitreg.run_stages`: a lower bound, no uncertainty).
        flip: also run the members on mirrored images, and average: exactly left-right symmetric, twice the time.
        exact: fields are samples of the exact map instead of the network's own, which the challenge defines.
        save_maps: also write the exact map of each pair, for :func:`~sitreg_lumir.io.maps.load_map`.
        overwrite: replace fields that were made otherwise.
        device: ``auto``, ``cpu`` or ``gpu``.
        devices: processes that share the pairs, each on a device of its own.
        precision: of the convolutions, ``float32`` or ``bfloat16``; all else is in float32 anyway.
        allow_imports: see :func:`~sitreg_lumir.network.weights.load_member`.
        check_headers: refuse images that are stored in another orientation than the others or than the members'
            training data; else print a warning, and take arrays as they are.

    Raises:
        InputError: members or data are wrong, or a field in the folder has another provenance; or a single member
            or voxels that are no cubes, and the disagreement is asked for.

    Examples:
        >>> data = ["--data.root", "LUMIR", "--data.cache", "cache", "--data.num_workers", "0"]
        >>> sitreg_lumir.predict(["member.ckpt"], "predictions", data, device="cpu")
        predictions: 0 fields are there already, 3 to predict
        ...next: sitreg-lumir evaluate predictions --data ...LUMIR_dataset.json
    """
    folder = Path(folder)
    prepare_process()
    files = default_members() if member_paths is None else member_files(member_paths)
    if disagreement and len(files) < 2 and not flip:
        raise InputError(f"{files[0]}: --disagreement needs two members or more; name them all with --members")
    members = load_members(files, allow_imports)
    Ensemble.of(members, flip)  # refuses what cannot be mirrored
    data = data_module(data_args)
    data.check_headers = check_headers
    trainer = Trainer(
        accelerator=device,
        devices=devices,
        strategy="auto" if devices == 1 else "ddp_spawn",  # one plan, made here, for all processes
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # the data module shares the pairs out
        inference_mode=True,
        precision="bf16-mixed" if precision == "bfloat16" else "32-true",
    )
    leave_signals_alone(trainer)
    data.check("predict")  # all that may be refused is refused before volumes are read, which takes long
    check_geometry(members[0].card, data)
    check_orientation(members[0].card, data)
    if disagreement:
        voxel_size(data.affine, data.dataset.path)
    asked = {"inverse": inverse, "warped": warped, "disagreement": disagreement}
    changes = {"precision": precision} | ({"flip": True} if flip else {}) | ({EXACT: True} if exact else {})
    plans = plan_predictions(
        folder,
        data.pairs,
        members=files,
        options=changes,
        also=[kind for kind in ALSO if {**asked, "map": save_maps}[kind]],
        overwrite=overwrite,
    )
    todo = {plan.pair.long_name: plan for plan in plans if not plan.skip}
    print(f"{folder}: {len(plans) - len(todo)} fields are there already, {len(todo)} to predict")
    if todo:
        with alone(folder), own_temporary_files() if devices > 1 else nullcontext():
            check_folder_is_writable(folder)
            keep_freed_memory_of_small_grids(math.prod(data.shape))
            data.to_predict = tuple(plan.pair for plan in todo.values())
            trainer.callbacks.append(FieldWriter(todo))  # type: ignore[attr-defined]
            try:
                predictor = Predictor(members, **asked, flip=flip, exact=exact, maps=save_maps)
                trainer.predict(predictor, datamodule=data, return_predictions=False)
            except ProcessRaisedException as error:  # of one of several processes: its whole traceback
                message = str(error).strip().splitlines()[-1]
                if f"{InputError.__name__}: " not in message:
                    raise
                raise InputError(message.partition(f"{InputError.__name__}: ")[2]) from None
    print(f"next: sitreg-lumir evaluate {shlex.quote(str(folder))} --data {shlex.quote(str(data.dataset.path))}")


def data_module(args: Sequence[str]) -> LumirDataModule:
    """The data module that ``--data.*`` arguments describe.

    Raises:
        InputError: an unknown or invalid argument.
    """
    parser = ArgumentParser(prog="sitreg-lumir predict", exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(LumirDataModule, "data")
    known = [action.dest for action in parser._actions]
    for argument in args:
        if argument.startswith("-") and argument.lstrip("-").split("=")[0] not in known:
            wrong = argument.lstrip("-").split("=")[0]
            raise InputError(f"unknown argument {argument.split('=')[0]!r}{nearest(wrong, known)}")
    try:
        data = parser.instantiate_classes(parser.parse_args(list(args))).data
    except (ArgumentError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(" ".join(str(error).split())[:300]) from None
    if not isinstance(data, LumirDataModule):
        raise InputError("--data is missing: name the folder of the data set, or its JSON")
    return data


def check_geometry(card: ModelCard, data: LumirDataModule) -> None:
    """The data must lie on the grid that the members know.

    Raises:
        InputError: shape or voxel size differ; the error names the ways out.
    """
    size = [float(np.linalg.norm(np.asarray(matrix)[:3, :3], axis=0).mean()) for matrix in (card.affine, data.affine)]
    if list(data.shape) != card.shape or abs(size[0] - size[1]) > 0.01 * size[0]:
        raise InputError(
            f"{data.dataset.path}: its grid is {tuple(data.shape)} at {size[1]:g} mm, but the members know "
            f"{tuple(card.shape)} at {size[0]:g} mm; name members trained on this grid (--members; `fit` with "
            f"--config {_config_for(size[1])} trains some), or give data on the members' grid (--data), or use "
            "`register --pairs`, which brings scans of any grid to the members'"
        )


def check_orientation(card: ModelCard, data: LumirDataModule) -> None:
    """The data's axes must point where those of the members' training data do.

    Raises:
        InputError: they do not; with ``check_headers`` of the data turned off, that is a warning.
    """
    letters, known = (
        "".join(map(str, nibabel.aff2axcodes(np.asarray(matrix)))) for matrix in (data.affine, card.affine)
    )
    if letters != known:
        problem = f"{data.dataset.path}: the axes of its images point to {letters}, those of the members' to {known}"
        if data.check_headers:
            raise InputError(f"{problem}; store the images as {known}, or use `register --pairs`, which takes any")
        print(f"warning: {problem}; the arrays are taken as they are", file=sys.stderr)


def _config_for(voxel_size: float) -> str:
    """A shipped config to train on data of that voxel size, mm."""
    return "ens_seed1" if voxel_size < _SMALL_VOXEL else "minilumir/mind_full"
