"""The model card of a network in training."""

from typing import TYPE_CHECKING, Any

from sitreg_lumir import __version__
from sitreg_lumir.data.datamodule import LumirDataModule
from sitreg_lumir.errors import InputError
from sitreg_lumir.network.card import ModelCard
from sitreg_lumir.network.input_transform import named, same_transform

if TYPE_CHECKING:
    from sitreg_lumir.train.registration import RegistrationModule

_PUBLISHED: dict[str, Any] = {
    "window": 11,
    "coarse_window": None,
    "stage_every": 1,
    "one_direction": False,
    "final_rate_share": 1.0,
}


def card_of(module: "RegistrationModule", data: LumirDataModule) -> ModelCard:
    """Makes the card that a checkpoint of a module holds.

    Args:
        module: in training.
        data: what it is trained on.

    Raises:
        InputError: predictions could not do what the module does.
    """
    augmentation = module.augmentation
    options = {name: getattr(module, name) for name in _PUBLISHED}
    return ModelCard(
        architecture=module.network.architecture,
        mind=None,
        input_transform=module.check_variant(),
        shape=list(data.shape),
        affine=data.affine.tolist(),
        training={
            "variant": type(module).__name__,
            "data": data.dataset.name,
            "images": len(data.dataset.training),
            "seed": data.seed,
            "epochs": module.current_epoch,
            "coarse_epochs": min(module.coarse_epochs, module.current_epoch),
            "steps": module.global_step,
            "diffusion_weight": module.diffusion_weight,
            **{name: value for name, value in options.items() if value != _PUBLISHED[name]},
            **({"mirror": True} if data.mirror else {}),
            "augmentation": (
                None if augmentation is None else {name: list(value) for name, value in vars(augmentation).items()}
            ),
            **({} if module.initialised_from is None else {"initialised_from": module.initialised_from}),
        },
        version=__version__,
    )


def refuse_other_transform(card: ModelCard, own: dict[str, Any] | None) -> None:
    """Compares the input transform of a checkpoint's card with that of the module that loads it.

    Raises:
        InputError: they differ.
    """
    if not same_transform(card.input_transform, own):
        raise InputError(
            f"the checkpoint's network sees {named(card.input_transform) or 'raw intensities'}, but this config's "
            f"sees {named(own) or 'raw intensities'}; use the run's own config.yaml"
        )
