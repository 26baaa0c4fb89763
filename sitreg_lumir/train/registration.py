"""What all LightningModules share: it glues views, network, loss terms and scores together, and nothing more."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from sitreg_lumir.data.datamodule import LumirDataModule
from sitreg_lumir.data.images import Pair
from sitreg_lumir.data.lightning_internals import batches_done, datamodule_of
from sitreg_lumir.data.views import Augmentation, clean_view, downsampled_by_two
from sitreg_lumir.errors import InputError
from sitreg_lumir.losses import warped_lncc
from sitreg_lumir.metrics import PairTable
from sitreg_lumir.network.card import CARD_KEY, ModelCard
from sitreg_lumir.network.ensemble import Ensemble
from sitreg_lumir.network.input_transform import channels_of
from sitreg_lumir.network.sitreg import SITReg, Stage, run_stages
from sitreg_lumir.train.automatic import settle
from sitreg_lumir.train.measured import finite_means, score
from sitreg_lumir.train.model_card import card_of, refuse_other_transform
from sitreg_lumir.train.rates import check_share, learning_rate
from sitreg_lumir.train.terms import LossTerm, PairOutputs, pair_terms
from sitreg_lumir.train.triplets import (
    View,
    groups_of_three,
    one_pair_each,
    pair_of,
    scale_gradient,
    three_pairs_in_turn,
)
from sitreg_lumir.train.variants import checked_transform


class RegistrationModule(LightningModule):
    """What all variants share: the training step over a list of loss terms, validation and the model card.

    What the network sees of an image is the input transform's matter alone: the card names it, and predictions make
    it again. A variant passes another ``input_transform``; it does not override ``inputs``, ``clean`` or ``forward``.

    Args:
        in_channels: of the network; by default as many as the input transform gives.
        features: channels of the encoder, finest level first.
        head_features: channels of the control point heads, finest level first.
        learning_rate: of Adam.
        diffusion_weight: of the fields' smoothness.
        stage_weight: of each earlier stage's loss (deep supervision).
        window: of the LNCC, voxels.
        augmentation: of the views that the network sees in training; the loss always compares clean ones.
        recompute: compute activations again in the backward pass: less memory, more time, the same numbers; ``auto``
            does so where the memory that is free does not suffice otherwise.
        coarse_epochs: so many epochs at the beginning see the images at half resolution, where a step costs about a
            sixth; the weights go on to the full one.
        coarse_window: of the LNCC in these epochs, voxels of half resolution; None: ``window``.
        stage_every: the losses of earlier stages count in every so many-th step only, with so many times the weight:
            the same gradient on average, and less work.
        one_direction: compare pairs on the fixed grid alone. Images come in both orders, so that both directions
            learn; a step computes less. Triplets always compare on both grids.
        final_rate_share: share of the learning rate that is left at the end of training; below 1, the rate falls
            along half a cosine over the Trainer's ``max_epochs``.
        input_transform: a module ``(B, 1, X, Y, Z)``, intensity in [0, 1] -> ``(B, channels, X, Y, Z)`` with an
            attribute ``channels``; None for the intensities themselves.

    Examples:
        >>> module = sitreg_lumir.RegistrationModule(features=[4, 4], head_features=[4, 4])
        >>> fixed, moving = torch.rand(2, 1, 1, 8, 10, 6)
        >>> disp, disp_inv = module(fixed=fixed, moving=moving)
        >>> disp.shape
        torch.Size([1, 3, 8, 10, 6])
    """

    def __init__(
        self,
        in_channels: int | None = None,
        features: Sequence[int] = (12, 32, 64, 128, 128, 128),
        head_features: Sequence[int] = (12, 64, 128, 256, 256, 256),
        learning_rate: float = 4e-4,
        diffusion_weight: float = 1.0,
        stage_weight: float = 0.01,
        window: int = 11,
        augmentation: Augmentation | None = None,
        recompute: bool | Literal["auto"] = "auto",
        coarse_epochs: int = 0,
        coarse_window: int | None = None,
        stage_every: int = 1,
        one_direction: bool = False,
        final_rate_share: float = 1.0,
        input_transform: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if coarse_epochs < 0:
            raise InputError(f"--model.coarse_epochs {coarse_epochs}: must be 0 or more")
        for name, width in (("window", window), ("coarse_window", coarse_window)):
            if width is not None and (width < 1 or width % 2 == 0):
                raise InputError(f"--model.{name} {width}: must be odd and positive")
        if stage_every < 1:
            raise InputError(f"--model.stage_every {stage_every}: must be 1 or more")
        check_share(final_rate_share)
        self.automatic, self.recompute = recompute == "auto", recompute is True
        self.coarse_epochs, self.coarse_window = coarse_epochs, coarse_window
        self.stage_every, self.one_direction, self.final_rate_share = stage_every, one_direction, final_rate_share
        self.input_transform = input_transform
        channels = channels_of(input_transform) if in_channels is None else in_channels
        self.network = SITReg(in_channels=channels, features=features, head_features=head_features)
        self.initialised_from: dict[str, Any] | None = None  # where a fine-tuned run's first weights came from
        self.learning_rates = {0: learning_rate}  # first epoch -> rate from there on; callbacks add theirs
        self.augmentation = augmentation
        self.terms: list[LossTerm] = pair_terms(diffusion_weight, stage_weight, stage_every, one_direction)
        self.values: dict[str, list[Tensor]] = {}  # of the loss terms in this step, by micro batch
        self._names: list[tuple[str, ...]] = []  # of the images in this step
        self.scores, self.lncc = PairTable(), MeanMetric()
        self.reported_labels = False
        self._group: Any = None
        self._on_trial = False
        self.window, self.diffusion_weight = window, diffusion_weight

    def inputs(self, image: Tensor) -> Tensor:
        """The network's input from an image ``(B, 1, X, Y, Z)`` in [0, 1]."""
        return image if self.input_transform is None else self.input_transform(image)

    @property
    def ensemble(self) -> Ensemble:
        """The network, and what it sees of an image, as an ensemble of one."""
        return Ensemble([self.network], self.inputs)

    def check_variant(self) -> dict[str, Any] | None:
        """What the card records of the input transform, once it is sure that predictions can do what this module does.

        Raises:
            InputError: they could not: it does something with images, or has a network, that no card can hold.
        """
        return checked_transform(self, RegistrationModule, self.network, self.input_transform)

    def setup(self, stage: str) -> None:
        """Refuses variants that no card can describe, before anything is trained."""
        if stage == "fit":
            self.check_variant()

    def forward(self, *, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """``disp`` and ``disp_inv`` ``(B, 3, X, Y, Z)``, voxels, from images ``(B, 1, X, Y, Z)`` in [0, 1]."""
        (stage,) = self.ensemble.run(fixed=fixed, moving=moving)
        return stage.disp, stage.disp_inv

    @torch.no_grad()
    def disp(self, *, fixed: Tensor, moving: Tensor) -> Tensor:
        """``disp`` of ``forward`` alone, bit by bit the same; without the inverse field less is computed."""
        (stage,) = self.ensemble.run(fixed=fixed, moving=moving, inverse=False)
        return stage.disp

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, whose learning rate is set at each step."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rates[0], betas=(0.9, 0.999))

    def on_fit_start(self) -> None:
        """Checks that data and network go together."""
        data = datamodule_of(self.trainer)
        if isinstance(data, LumirDataModule):
            settle(self, data)

    def on_train_start(self) -> None:
        """Sets the accumulation of the epoch that is resumed."""
        self.on_train_epoch_start()  # resuming in the middle of an epoch does not start it

    def on_train_epoch_start(self) -> None:
        """Sets how many micro batches make the epoch's steps."""
        self.trainer.accumulate_grad_batches = self.lumir.accumulate_in(self.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets the epoch's learning rate, since restoring Adam's state brings the old one back."""
        epoch, last = self.fractional_epoch(), self.trainer.max_epochs
        rate = learning_rate(self.learning_rates, epoch, last, self.final_rate_share)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    @contextmanager
    def trial(self, recompute: bool) -> Iterator[None]:
        """Within the block all loss terms are evaluated, with weight 1, and nothing is remembered of it."""
        before = self.recompute, self.values
        self.recompute, self.values, self._on_trial = recompute, {}, True
        try:
            yield
        finally:
            (self.recompute, self.values), self._on_trial = before, False

    @property
    def lumir(self) -> LumirDataModule:
        """The data module of the running trainer."""
        data: LumirDataModule = datamodule_of(self.trainer)
        return data

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of a micro batch, whose gradients add up to the global batch's."""
        passes = self.trainer.accumulate_grad_batches
        if batch_idx % passes == 0:
            self.values, self._names = {}, []
        batch = self.mirrored(batch)
        count = batch["images"].shape[1]
        alone = self.trainer.world_size == 1 or count == 2
        needed = range(count) if alone else pair_of(self.global_rank)
        views = [self.view(batch, position, position in needed) for position in range(count)]
        loss = self.pair_loss(views[0], views[1])[0] if count == 2 else self.triplet_step(views)
        self.record("loss", loss)
        self._names += batch["names"]
        if (batch_idx + 1) % passes == 0:
            self.log_step(len(batch["images"]))
        return loss

    def log_step(self, groups: int) -> None:
        """Logs the step's loss and its terms, means over its micro batches and all processes, if they are finite.

        One exchange of a few numbers between the processes serves the log and the decision to stop.

        Raises:
            CollectiveError: the loss is not finite in one process or more; raised in all of them.
        """
        for name, value in finite_means(self.values, self._names, self.global_step, self.trainer.world_size).items():
            self.log(f"train/{name}", value, batch_size=groups, prog_bar=name == "loss")

    def pair_step(self, moving: View, fixed: View) -> tuple[Tensor, Tensor, Tensor]:
        """One pair's weighted loss, and its last fields ``disp`` and ``disp_inv``."""
        loss, last = self.pair_loss(moving, fixed, inverse=True)
        return loss, last.disp, last.disp_inv

    def pair_loss(self, moving: View, fixed: View, inverse: bool = False) -> tuple[Tensor, Stage]:
        """One pair's weighted loss and its last stage, with the inverse field where a term or the caller needs it."""
        assert moving.network_input is not None and fixed.network_input is not None
        active = self.active_terms("pair")
        stages = run_stages(
            [self.network],
            fixed=fixed.network_input,
            moving=moving.network_input,
            levels=range(self.network.levels) if any(term.earlier for term, _ in active) else (0,),
            inverse=inverse or any(term.inverse for term, _ in active),
            recompute=self.recompute,
        )
        outputs = PairOutputs(stages, fixed.clean, moving.clean, fixed.mask, moving.mask, self.present_window())
        loss = fixed.clean.new_zeros(())
        for term, weight in active:
            loss = loss + weight * self.record(term.name, term.call(outputs))
        return loss, stages[-1]

    def present_window(self) -> int:
        """Width of the local correlation in this epoch, voxels."""
        if self.coarse_window is not None and self.current_epoch < self.coarse_epochs:
            return self.coarse_window
        return self.window

    def triplet_step(self, views: list[View]) -> Tensor:
        """Mean loss of a triplet's pairs, and its group consistency: all three here, or one on each of three ranks."""
        if self.trainer.world_size == 1:
            fields = three_pairs_in_turn(self.pair_step, views)
        else:
            fields = one_pair_each(self.pair_step, views, self.global_rank, self.group_of_three())
        loss = fields.loss
        for term, weight in self.active_terms("triplet"):
            value = self.record(term.name, term.call(fields.disps, fields.disps_inv, [view.mask for view in views]))
            loss = loss + weight * scale_gradient(value, fields.gradient_scale)
        return loss

    def record(self, name: str, value: Tensor) -> Tensor:
        """Keeps a value for the log, and returns it."""
        self.values.setdefault(name, []).append(value.detach())
        return value

    def group_of_three(self) -> Any:
        """The processes that share this one's triplets."""
        if self._group is None:
            self._group = groups_of_three(self.global_rank, self.trainer.world_size)
        return self._group

    def active_terms(self, scope: str) -> list[tuple[LossTerm, float]]:
        """The terms of a scope with their present weights, without those of weight 0."""
        if self._on_trial:
            return [(term, 1.0) for term in self.terms if term.scope == scope]
        epoch, step = self.fractional_epoch(), self.global_step
        weighted = [(term, term.weight(epoch, step)) for term in self.terms if term.scope == scope]
        return [(term, weight) for term, weight in weighted if weight]

    def mirrored(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with left and right exchanged in all images of the groups that are to be."""
        chosen = batch.get("mirrored")
        if chosen is None or not chosen.any():
            return batch
        images = batch["images"].clone()  # (B, N, 1, X, Y, Z)
        images[chosen] = images[chosen].flip(self.lumir.left_right_axis + 3)
        return {**batch, "images": images}

    def view(self, batch: dict[str, Any], position: int, needed: bool = True) -> View:
        """One image's views; the augmented one depends on its seed only, so that all ranks see the same."""
        clean, mask = self.clean(batch["images"][:, position])
        if self.current_epoch < self.coarse_epochs:
            clean, mask = downsampled_by_two(clean)
        augmented = clean
        if needed and self.augmentation is not None:
            augmented = self.augmentation(clean, mask, batch["view_seed"][:, position]).to(clean.dtype)
        return View(clean, mask, self.inputs(augmented) if needed else None)

    def clean(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """The clean view, in float64 if the network is, and the mask."""
        clean, mask = clean_view(stored)
        return clean.to(torch.float64 if self.dtype == torch.float64 else torch.float32), mask

    def fractional_epoch(self) -> float:
        """The epoch with the share of it that is done; what weights of loss terms depend on."""
        batches = max(int(self.trainer.num_training_batches), 1)
        return self.current_epoch + batches_done(self.trainer) / batches

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Scores validation pairs."""
        fixed, fixed_mask = self.clean(batch["fixed"])
        moving, moving_mask = self.clean(batch["moving"])
        disp = self.disp(fixed=fixed, moving=moving)
        self.lncc.update(warped_lncc(disp, fixed, moving, fixed_mask, moving_mask, self.window))
        pair: Pair = batch["pair"][0]
        self.reported_labels |= score(
            self.scores, disp, pair, batch, fixed_mask, self.lumir, report_labels=not self.reported_labels
        )

    def on_validation_epoch_end(self) -> None:
        """Logs means over the validation pairs, and by group."""
        self.log("val/lncc", self.lncc.compute())
        self.log_dict({f"val/{name}": value for name, value in self.scores.means().items()})
        self.lncc.reset()
        self.scores.clear()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def card(self) -> ModelCard:
        """What must be known to use the weights: see :class:`ModelCard`."""
        return card_of(self, self.lumir)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts the model card into the checkpoint."""
        checkpoint[CARD_KEY] = self.card().to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps where a resumed run came from; another input transform than the checkpoint's is refused."""
        if CARD_KEY not in checkpoint:
            return
        card = ModelCard.from_dict(checkpoint[CARD_KEY], Path("the checkpoint"))
        refuse_other_transform(card, self.check_variant())
        self.initialised_from = card.training.get("initialised_from")
