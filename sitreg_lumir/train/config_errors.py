"""What is wrong with a config or an option, in one line made of jsonargparse's message."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from sitreg_lumir.data.datamodule import LumirDataModule
from sitreg_lumir.train.configs import nearest
from sitreg_lumir.train.registration import RegistrationModule

_UNKNOWN_KEY = (  # how jsonargparse says it
    r"Group '([\w.]+)' does not accept (?:nested key|option) '([\w.]+)'",
    r"[Kk]ey '([\w.]+)' is not expected",
    r"[Uu]nrecognized arguments?: --([\w.]+)",
    r"Option '([\w.]+)' is not accepted",
)
_NO_CLASS = re.compile(
    r"Problem with given class_path '([^']+)': (No module named '[^']+'|module '[^']+' has no attribute '[^']+')"
)


def explained(message: str, args: Sequence[str]) -> str:
    """One line out of jsonargparse's message; an unknown key comes with its file and the nearest known key.

    Args:
        message: what jsonargparse says.
        args: of LightningCLI, with files of configs after ``--config``.
    """
    text = " ".join(message.split())
    if misnamed := _NO_CLASS.search(text):
        return (
            f"{misnamed[1]}: no such class ({misnamed[2]}); a class of yours is looked for in the working folder "
            "and on PYTHONPATH, as module.Class, with --allow-imports module"
        )
    unknown = next(filter(None, (re.search(pattern, text) for pattern in _UNKNOWN_KEY)), None)
    if unknown is None:
        return text[:400]
    wrong = ".".join(unknown.groups())
    known = _known_keys() if "." in wrong else [key.split(".")[-1] for key in _known_keys()]
    files = [file for option, file in pairwise(args) if option in ("--config", "-c")]
    word = re.compile(rf"\b{wrong.split('.')[-1]}\b")
    where = next((f"{file}: " for file in files if word.search(Path(file).read_text())), "")
    if wrong in known:
        return (
            f"{where}the key {wrong!r} is not one of the class that was chosen; leave it out, or choose another class"
        )
    return f"{where}unknown key {wrong!r}{nearest(wrong, known)}"


def _known_keys() -> list[str]:
    """All keys that configs and the command line may have."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(LumirDataModule, "data")
    keys = [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]
    for module in (RegistrationModule, *_subclasses(RegistrationModule)):
        model = LightningArgumentParser()
        model.add_lightning_class_args(module, "model.init_args")
        keys += [action.dest for action in model._actions if action.dest.startswith("model.")]
    return [*keys, "model.class_path", "seed_everything"]


def _subclasses(base: type) -> list[type]:
    direct: list[type] = base.__subclasses__()
    return [subclass for child in direct for subclass in (child, *_subclasses(child))]
