"""`demo`: two scans registered by the shipped members, then the whole method on small data, in minutes on a CPU."""

import shlex
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sitreg_lumir.challenge.evaluate import evaluate
from sitreg_lumir.challenge.predict import predict
from sitreg_lumir.challenge.provenance import find_field
from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.deform.ops import warp
from sitreg_lumir.demo.data import make_demo_data
from sitreg_lumir.demo.examples import labels_of
from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.resampling import resample_labels
from sitreg_lumir.io.read import load_disp, read_image, read_volume
from sitreg_lumir.metrics import dsc
from sitreg_lumir.registration.register import register
from sitreg_lumir.report.plots import plot_pair
from sitreg_lumir.train.run import RunOptions, fit


def demo(folder: Path, steps: int | None = None) -> None:
    """Registers the example pair, then makes data, trains a small MIND model a little, and scores it.

    Each part is skipped when its result is there, so that a stopped demo can be continued.

    Args:
        folder: gets ``registration/``, ``data/``, ``runs/demo/``, ``predictions/``, ``demo.png``.
        steps: of training, instead of the demo config's.

    Raises:
        InputError: the folder cannot be used.
    """
    print(f"1/5  a T2 registered onto a T1 by the shipped members: {folder / 'registration'}", flush=True)
    _register_examples(folder / "registration")
    print(f"2/5  data made from the MNI152 template: {folder / 'data'}", flush=True)
    dataset = make_demo_data(folder / "data")
    both = [dataset, dataset.with_name("LUMIR_dataset_multimodal.json")]
    run = folder / "runs" / "demo"
    checkpoint = run / "checkpoints" / "last.ckpt"
    print(f"3/5  training a small network on T1 pairs: {run}", flush=True)
    finished = run / "finished"
    if finished.is_file():
        print("     trained already")
    else:
        arguments = ["--config", "demo", "--data.root", str(dataset), "--data.cache", str(folder / "cache")]
        if steps is not None:
            if steps < 1:
                raise InputError(f"`steps` must be positive, got {steps}")
            arguments += ["--data.pairs_per_epoch", str(steps), "--trainer.max_epochs", "1"]
        resume = checkpoint if checkpoint.is_file() else None
        fit(arguments, RunOptions(run, wandb="off", resume=resume))
        finished.touch()
    print("4/5  fields for the validation pairs", flush=True)
    predictions = folder / "predictions"
    for lists in both:
        data = ["--data.root", str(lists), "--data.cache", str(folder / "cache"), "--data.num_workers", "0"]
        predict([str(checkpoint)], predictions, data, overwrite=True)
    print("5/5  scores before (affine only) and after", flush=True)
    datasets = [read_dataset(lists, validation=True) for lists in both]
    before = evaluate(None, datasets, folder / "before", identity=True)
    after = evaluate(predictions, datasets)
    picture = folder / "demo.png"
    _draw(predictions, both[1], picture)
    print()
    for group in ("T1-T1", "T1-T2"):
        was, is_ = (scores.summary["groups"][group]["dsc"]["mean"] for scores in (before, after))
        print(f"Dice {group}: {was:.3f} before, {is_:.3f} after")
    print(f"a few steps only, to show how: the shipped members were trained longer; picture: {picture}")
    print(f"look at: {folder / 'registration' / 'report.html'}")
    print(f"next:    sitreg-lumir fit --config minilumir/mind_small --data {shlex.quote(str(dataset))}")


def _register_examples(folder: Path) -> None:
    """The pair that comes with the package, and the Dice coefficient of its structures before and after."""
    if (folder / "summary.json").is_file():
        print("     registered already")
        return
    registration = register("EXAMPLE-T1", "EXAMPLE-T2", folder, overwrite=True)
    fixed, moving = (read_image(labels_of(name)) for name in ("EXAMPLE-T1", "EXAMPLE-T2"))
    affine = np.linalg.inv(registration.forward.moving_to_model) @ registration.forward.fixed_to_model
    labels = [label for label in np.unique(fixed.data) if label]
    scores = [
        np.nanmean(dsc(fixed.data, moving.data, moved, labels))
        for moved in (
            resample_labels(moving.data, moving.affine, affine, fixed.shape, fixed.affine),
            registration.warp(moving.data, moving.affine, labels=True),
        )
    ]
    print(f"     Dice: {scores[0]:.3f} aligned, {scores[1]:.3f} registered; verdict: {registration.verdict}")


def _draw(predictions: Path, dataset: Path, picture: Path) -> None:
    """The first T1-T2 pair: a contrast that the network was not trained on."""
    pair = read_dataset(dataset, validation=True).validation[0]
    fixed, _ = read_volume(pair.fixed.path)
    moving, _ = read_volume(pair.moving.path)
    field = find_field(predictions, pair)
    if field is None:
        raise InputError(f"{predictions}: the field of {pair.name} is gone; run the demo again")
    disp, _ = load_disp(field.path)
    warped = warp_image(moving.astype(np.float32), disp)
    plot_pair(fixed, moving, warped, disp, picture, f"{pair.long_name}: fixed T1, moving T2", spacing=3)


def warp_image(moving: NDArray[np.float32], disp: NDArray[np.float32]) -> NDArray[np.float32]:
    """``moving`` ``(X, Y, Z)`` pulled through ``disp`` ``(3, X, Y, Z)``, voxels, trilinear."""
    warped = warp(torch.from_numpy(moving)[None, None], torch.from_numpy(disp)[None])
    result: NDArray[np.float32] = warped[0, 0].numpy()
    return result
