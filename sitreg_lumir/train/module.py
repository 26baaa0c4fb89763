"""The LightningModules: they glue views, network, loss terms and scores together, and nothing more."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from nibabel.affines import voxel_sizes
from torch import Tensor

from sitreg_lumir import __version__
from sitreg_lumir.data.datamodule import LumirDataModule
from sitreg_lumir.data.views import Augmentation, clean_view
from sitreg_lumir.errors import InputError
from sitreg_lumir.measures.losses import similarity
from sitreg_lumir.measures.metrics import RegistrationScores
from sitreg_lumir.network.mind import Mind
from sitreg_lumir.network.sitreg import SITReg, run_stages
from sitreg_lumir.network.weights import CARD_KEY, ModelCard
from sitreg_lumir.train.terms import LossTerm, PairOutputs, pair_terms


class RegistrationModule(LightningModule):
    """What both variants share: the training step over a list of loss terms, validation and the model card.

    Args:
        features: channels of the encoder, finest level first.
        head_features: channels of the control point heads, finest level first.
        learning_rate: of Adam.
        diffusion_weight: of the fields' smoothness.
        stage_weight: of each earlier stage's loss (deep supervision).
        window: of the local correlation, voxels.
        augmentation: of the views that the network sees in training; the loss always compares clean ones.
    """

    def __init__(
        self,
        in_channels: int,
        features: Sequence[int],
        head_features: Sequence[int],
        learning_rate: float,
        diffusion_weight: float,
        stage_weight: float,
        window: int,
        augmentation: Augmentation | None,
    ) -> None:
        super().__init__()
        self.mind: Mind | None = None
        self.network = SITReg(in_channels=in_channels, features=features, head_features=head_features)
        self.learning_rate = learning_rate
        self.augmentation = augmentation
        self.terms: list[LossTerm] = pair_terms(diffusion_weight, stage_weight, window)
        self.scores = RegistrationScores()
        self.window = window

    def inputs(self, image: Tensor) -> Tensor:
        """The network's input from an image ``(B, 1, X, Y, Z)`` in [0, 1]."""
        return image if self.mind is None else self.mind(image)

    def forward(self, *, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """``disp`` and ``disp_inv`` ``(B, 3, X, Y, Z)``, voxels, from images ``(B, 1, X, Y, Z)`` in [0, 1]."""
        disp, disp_inv = self.network(fixed=self.inputs(fixed), moving=self.inputs(moving))
        return disp, disp_inv

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.999))

    def on_fit_start(self) -> None:
        self.trainer.accumulate_grad_batches = self.lumir.accumulate

    @property
    def lumir(self) -> LumirDataModule:
        """The data module of the running trainer."""
        data: LumirDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        epoch, step = self.fractional_epoch(), self.global_step
        outputs = self.pair_outputs(batch, moving=0, fixed=1)
        loss = outputs.fixed.new_zeros(())
        for term in self.terms:
            weight = term.weight(epoch, step)
            if term.scope != "pair" or weight == 0:
                continue
            value = term.call(outputs)
            loss = loss + weight * value
            self.log_train(term.name, value, len(outputs.fixed))
        if not torch.isfinite(loss):
            names = "; ".join(" and ".join(pair) for pair in batch["names"])
            raise InputError(
                f"the loss is not finite at step {step} (images {names}); the last checkpoint is good: "
                "check these images, or resume with a lower learning rate"
            )
        self.log_train("loss", loss, len(outputs.fixed), prog_bar=True)
        return loss

    def pair_outputs(self, batch: dict[str, Any], moving: int, fixed: int) -> PairOutputs:
        """Registers one pair of a batch's images by its training views."""
        clean, mask, seen = zip(*(self.views(batch, position) for position in (moving, fixed)), strict=True)
        stages = run_stages(
            [self.network],
            moving=self.inputs(seen[0]),
            fixed=self.inputs(seen[1]),
            levels=range(self.network.levels),
        )
        return PairOutputs(stages, fixed=clean[1], moving=clean[0], fixed_mask=mask[1], moving_mask=mask[0])

    def views(self, batch: dict[str, Any], position: int) -> tuple[Tensor, Tensor, Tensor]:
        """One image's clean view, its mask, and the view that the network sees."""
        clean, mask = clean_view(batch["images"][:, position])
        if self.augmentation is None:
            return clean, mask, clean
        return clean, mask, self.augmentation(clean, mask, batch["view_seed"][:, position])

    def fractional_epoch(self) -> float:
        """The epoch with the share of it that is done; what weights of loss terms depend on."""
        batches = max(int(self.trainer.num_training_batches), 1)
        return self.current_epoch + self.trainer.fit_loop.epoch_loop.batch_idx / batches

    def log_train(self, name: str, value: Tensor, batch_size: int, prog_bar: bool = False) -> None:
        """Logs ``train/<name>`` of this step."""
        self.log(f"train/{name}", value.detach(), batch_size=batch_size, prog_bar=prog_bar)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        (pair,) = batch["pair"]
        fixed, fixed_mask = clean_view(batch["fixed"])
        moving, moving_mask = clean_view(batch["moving"])
        disp, _ = self(fixed=fixed, moving=moving)
        lncc = similarity(disp, fixed, moving, fixed_mask, moving_mask, self.window)
        self.log("val/lncc", lncc, on_epoch=True, on_step=False, batch_size=1, sync_dist=True)
        self.scores.update(
            disp[0].float().cpu(),
            group=pair.group,
            fixed_mask=fixed_mask[0, 0].cpu(),
            labels=self.lumir.evaluation_labels,
            voxel_size=voxel_sizes(self.lumir.affine).tolist(),
            **{key: batch[key][0, 0].cpu() for key in _LABEL_KEYS if key in batch},
        )

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{name}": value for name, value in self.scores.compute().items()})
        self.scores.reset()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def card(self) -> ModelCard:
        """What must be known to use the weights: see :class:`ModelCard`."""
        data = self.lumir
        return ModelCard(
            architecture=self.network.architecture,
            mind=None if self.mind is None else {"sigma": self.mind.sigma, "radius": self.mind.radius},
            shape=list(data.shape),
            affine=data.affine.tolist(),
            training={
                "variant": type(self).__name__,
                "data": data.dataset.name,
                "images": len(data.dataset.training),
                "seed": data.seed,
                "epochs": self.current_epoch,
                "steps": self.global_step,
                "augmentation": None if self.augmentation is None else plain_values(self.augmentation),
            },
            version=__version__,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CARD_KEY] = asdict(self.card())


def plain_values(augmentation: Augmentation) -> dict[str, Any]:
    """The augmentation's settings, for the card."""
    return {name: list(value) for name, value in vars(augmentation).items()}


_LABEL_KEYS = ("fixed_labels", "moving_labels", "fixed_landmarks", "moving_landmarks")


class RawRegistration(RegistrationModule):
    """The baseline: SITReg on raw intensities; sizes and rates of the authors' public LUMIR configuration."""

    def __init__(
        self,
        features: list[int] = [12, 32, 64, 128, 128, 128],  # noqa: B006 (read only)
        head_features: list[int] = [12, 64, 128, 256, 256, 256],  # noqa: B006
        learning_rate: float = 4e-4,
        diffusion_weight: float = 1.0,
        stage_weight: float = 0.01,
        window: int = 11,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(
            1, features, head_features, learning_rate, diffusion_weight, stage_weight, window, augmentation
        )


class MindRegistration(RegistrationModule):
    """SITReg on MIND features: trained on one contrast, robust on others.

    Args:
        features: channels of the encoder, finest level first.
        head_features: channels of the control point heads, finest level first.
        learning_rate: of Adam.
        diffusion_weight: of the fields' smoothness.
        stage_weight: of each earlier stage's loss (deep supervision).
        window: of the local correlation, voxels.
        augmentation: of the views that the network sees in training.
        sigma: of MIND's patches, voxels.
    """

    def __init__(
        self,
        features: list[int] = [12, 32, 64, 128, 128, 128],  # noqa: B006 (read only)
        head_features: list[int] = [12, 64, 128, 256, 256, 256],  # noqa: B006
        learning_rate: float = 4e-4,
        diffusion_weight: float = 1.0,
        stage_weight: float = 0.01,
        window: int = 11,
        augmentation: Augmentation | None = None,
        sigma: float = 0.5,
    ) -> None:
        super().__init__(
            6, features, head_features, learning_rate, diffusion_weight, stage_weight, window, augmentation
        )
        self.mind = Mind(sigma)
