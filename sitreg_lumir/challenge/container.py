"""What the container of the challenge's test phase runs: a list of pairs, a folder of images, fields out."""

from collections.abc import Sequence
from pathlib import Path

from sitreg_lumir.challenge.predict import predict
from sitreg_lumir.errors import InputError
from sitreg_lumir.io.atomic import temporary_folder


def run_container(
    dataset: Path, images: Path, members: Path, output: Path, *, device: str = "auto", allow_imports: Sequence[str] = ()
) -> None:
    """Writes ``disp_<fixed>_<moving>.nii.gz`` for each pair of the JSON's ``validation`` list.

    The volume cache lies in a temporary folder and volumes are read by this process, so that neither a home folder
    nor shared memory is needed. Headers that contradict each other are warned of and not refused: the official
    evaluation reads arrays alone. Fields that other members left in the output folder are written again.

    Args:
        dataset: the JSON; it need not lie with the images.
        images: what the JSON's paths start from; only read.
        members: the weights, a folder or a file.
        output: where the fields go.
        device: ``auto``, ``cpu`` or ``gpu``.
        allow_imports: modules from which the members may take the class of their input transform.

    Raises:
        InputError: a mount is missing, or the members or the data are wrong.
    """
    if not dataset.is_file():
        raise InputError(f"{dataset}: no such file; mount the dataset JSON there, or name it with --data")
    if not images.is_dir():
        raise InputError(f"{images}: no such folder; mount the image folders there, or name them with --images")
    with temporary_folder() as cache:
        data = {"root": dataset.absolute(), "images": images.absolute(), "cache": cache, "num_workers": 0}
        arguments = [f"--data.{name}={value}" for name, value in data.items()]
        predict(
            [str(members)],
            output,
            arguments,
            overwrite=True,
            device=device,
            allow_imports=allow_imports,
            check_headers=False,
        )
