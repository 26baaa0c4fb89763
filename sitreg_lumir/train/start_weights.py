"""Fine-tuning: a new run whose network starts with the weights of a trained member."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sitreg_lumir.errors import InputError
from sitreg_lumir.io.checksum import sha256_file
from sitreg_lumir.network.card import ModelCard
from sitreg_lumir.network.input_transform import named, same_transform
from sitreg_lumir.network.official import read_official
from sitreg_lumir.network.shipped import member_files
from sitreg_lumir.network.sitreg import SITReg
from sitreg_lumir.network.weights import read_member
from sitreg_lumir.train.registration import RegistrationModule

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StartWeights:
    """What a run starts from.

    Attributes:
        path: of the file.
        network: the trained network, float32, on the CPU.
        card: of the member; None for a file of the official implementation, which has none.
        transform: parameters and buffers of the member's input transform.
    """

    path: Path
    network: SITReg
    card: ModelCard | None
    transform: dict[str, Tensor]

    def provenance(self) -> dict[str, Any]:
        """What the new run's card records of it: file name, SHA-256, and what the member's own card says."""
        entries: dict[str, Any] = {"file": self.path.name, "sha256": sha256_file(self.path)}
        if self.card is not None:
            entries.update(
                shape=self.card.shape,
                input_transform=named(self.card.input_transform),
                licence=self.card.licence,
                training=self.card.training,
            )
        return entries


def read_start_weights(member: str) -> StartWeights:
    """Reads the member that ``--init-from`` names.

    Args:
        member: a ``.ckpt`` or ``.safetensors`` file, a file of the official implementation, a folder that holds one
            member, or the name of a member that comes with the package.

    Raises:
        InputError: there is no such member, or its file is damaged.
    """
    path = _find(member)
    if path.suffix in (".ckpt", ".safetensors"):
        stored = read_member(path)
        return StartWeights(path, stored.build_network(), stored.card, stored.transform)
    return StartWeights(path, read_official(path).network, None, {})


def start_from(module: RegistrationModule, start: StartWeights) -> None:
    """Gives a module's network the weights, and records where they came from; nothing else of the run changes.

    Raises:
        InputError: the architectures differ.
    """
    differences = architecture_differences(start.network, module.network)
    if differences:
        raise InputError(f"{start.path}: does not fit this run's network: {'; '.join(differences)}")
    module.network.load_state_dict(start.network.state_dict())
    own, theirs = module.check_variant(), None if start.card is None else start.card.input_transform
    if start.card is not None and not same_transform(own, theirs):
        _log.warning(
            "%s was trained on %s, this run's network sees %s",
            start.path.name,
            named(theirs) or "raw intensities",
            named(own) or "raw intensities",
        )
    elif start.transform and module.input_transform is not None:
        module.input_transform.load_state_dict(start.transform)
    module.initialised_from = start.provenance()


def architecture_differences(start: SITReg, network: SITReg) -> list[str]:
    """Each difference in words, that of the input channels first, with the option that resolves it."""
    differences = []
    for key, own in network.architecture.items():
        theirs: Any = start.architecture[key]
        if own == theirs:
            continue
        remedy = ""
        if key == "in_channels":
            kind = {1: "RawRegistration", 6: "MindRegistration"}.get(theirs)
            remedy = f" (--model {kind} takes {theirs})" if kind else ""
        elif key in ("features", "head_features"):
            remedy = f" (--model.{key} '{theirs}')"
        differences.append(f"{key} is {theirs}, but this run's is {own}{remedy}")
    return differences


def _find(member: str) -> Path:
    files = member_files([member])
    if len(files) > 1:
        raise InputError(f"{member}: holds {len(files)} members; name one: {', '.join(file.name for file in files)}")
    return files[0]
