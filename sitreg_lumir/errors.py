"""What ends a command without a traceback: what the user can fix, and a signal."""


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that names the file and the remedy.

    The command line prints the message without a traceback and ends with exit code 2.

    Examples:
        >>> sitreg_lumir.load_model("nowhere.safetensors")
        Traceback (most recent call last):
            ...
        sitreg_lumir.errors.InputError: nowhere.safetensors: ...
    """


TRAINING_PACKAGES = frozenset(
    {
        "lightning",
        "pytorch_lightning",
        "jsonargparse",
        "torchmetrics",
        "monai",
        "nilearn",
        "matplotlib",
        "yaml",
        "wandb",
    }
)
"""What the extra ``train`` brings, by the names of imports."""


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """How to install what an import lacks, if the extra ``train`` brings it."""
    package = (error.name or "").partition(".")[0]
    if package not in TRAINING_PACKAGES:
        return None
    return (
        f"{package} is not installed, which training and predicting data sets need: pip install 'sitreg-lumir[train]'"
    )


class CollectiveError(InputError):
    """All processes of a run raise this together, each with the same line; the first one's is printed."""


class StoppedBySignalError(BaseException):
    """A signal asks the running verb to end; like ``KeyboardInterrupt``, it passes where errors are caught.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class RunStoppedError(Exception):
    """A signal ended a run after everything was saved, or another process of it ended.

    Args:
        message: one line that says how to go on; empty where another process says it.
        exit_code: of the command, 128 + the signal's number.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def printable(text: str) -> str:
    """A line of text in which characters that steer a terminal, hide or turn around what follows are escaped.

    Names of files and values in files may hold any.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode("ascii")
        for letter in text
    )
