"""The model card: what must be known to use a member, beside its weights. Plain values only."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sitreg_lumir.errors import InputError
from sitreg_lumir.network.card_schema import check_card, mind_problem
from sitreg_lumir.network.input_transform import named
from sitreg_lumir.network.mind import Mind

CARD_KEY = "sitreg_lumir"  # where a Lightning checkpoint keeps the card
MIND_PATH = f"{Mind.__module__}.{Mind.__qualname__}"
INTENSITY_RULE = "stored 0..255 -> stored / 255; mask = stored > 0; 0 outside the mask"


@dataclass(frozen=True)
class ModelCard:
    """What must be known to use a member; plain values only.

    Attributes:
        architecture: constructor arguments of :class:`SITReg`.
        mind: constructor arguments of :class:`Mind` where that is the input transform, else None.
        shape: of the grid the member was trained on.
        affine: 4x4, voxel to world (RAS, mm) of that grid.
        intensity: what stored values mean.
        training: data set, seed, epochs, steps: whatever is known.
        licence: of the weights.
        version: of this package when it was written.
        input_transform: what the network sees of an image, as
            :func:`~sitreg_lumir.network.input_transform.describe` states it; None for raw intensities. Follows from
            ``mind`` where that alone is given.

    Raises:
        ValueError: ``mind`` and ``input_transform`` contradict each other.
    """

    architecture: dict[str, Any]
    mind: dict[str, Any] | None
    shape: list[int]
    affine: list[list[float]]
    intensity: str = INTENSITY_RULE
    training: dict[str, Any] = field(default_factory=dict)
    licence: str = "unknown"
    version: str = "unknown"
    input_transform: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        transform = self.input_transform
        if transform is None and self.mind is not None:
            object.__setattr__(self, "input_transform", {"class_path": MIND_PATH, "init_args": dict(self.mind)})
        elif transform is not None:
            mind = transform["init_args"] if transform["class_path"] == MIND_PATH else None
            if self.mind is not None and self.mind != mind:
                raise ValueError(f"mind is {self.mind}, but input_transform is {named(transform)}")
            object.__setattr__(self, "mind", mind)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for files. With a transform of the user's, ``mind`` is left out.

        Versions that only know ``mind`` refuse such a card instead of predicting without the transform.
        """
        values = asdict(self)
        if self.mind is None and self.input_transform is not None:
            del values["mind"]
        return values

    @property
    def diffusion_weight(self) -> float:
        """Of the fields' smoothness at the end of the training; the published 1 where the card does not say."""
        weight = self.training.get("diffusion_weight", 1.0)
        return float(weight) if isinstance(weight, int | float) else 1.0

    def input_contract(self) -> dict[str, Any]:
        """What members of one ensemble must share."""
        shared = {key: getattr(self, key) for key in ("architecture", "mind", "shape", "affine", "intensity")}
        return {**shared, "input_transform": named(self.input_transform)}

    @classmethod
    def from_dict(cls, values: Any, path: Path) -> "ModelCard":
        """Checks that all that is needed is there.

        Raises:
            InputError: not a card.
        """
        required = {"architecture", "shape", "affine", "intensity"}
        if not isinstance(values, dict) or not required <= values.keys() or not {"mind", "input_transform"} & {*values}:
            raise InputError(
                f"{path}: holds no model card (geometry, intensity rule, architecture); "
                "write the member again with `sitreg-lumir export`"
            )
        transform = values.get("input_transform")
        if transform is not None and (
            not isinstance(transform, dict)
            or not isinstance(transform.get("class_path"), str)
            or not isinstance(transform.get("init_args"), dict)
        ):
            raise InputError(f"{path}: its input_transform must have class_path and init_args")
        check_card(values, path)
        if transform is not None and transform["class_path"] == MIND_PATH and mind_problem(transform["init_args"]):
            raise InputError(f"{path}: its model card {mind_problem(transform['init_args'])}; export the member again")
        known = {entry.name for entry in fields(cls)}
        try:
            return cls(**{"mind": None, **{key: value for key, value in values.items() if key in known}})
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
