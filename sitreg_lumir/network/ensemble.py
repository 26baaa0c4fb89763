"""Images in, stages out: the one way from a pair of images through input transform and networks to fields."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sitreg_lumir.network.mirrored import with_mirrored
from sitreg_lumir.network.sitreg import Stage, StageNetwork, Update, predict_control_points, run_stages
from sitreg_lumir.network.weights import Member


@dataclass(frozen=True, eq=False)
class Ensemble:
    """One network or several, and what they see of an image.

    Args:
        networks: of one architecture, or mirrored ones.
        input_transform: an image ``(B, 1, X, Y, Z)``, intensity in [0, 1] -> ``(B, in_channels, X, Y, Z)``, such as
            :class:`~sitreg_lumir.network.mind.Mind`; None for the intensities themselves.
    """

    networks: Sequence[StageNetwork]
    input_transform: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, members: Sequence[Member], flip: bool = False) -> "Ensemble":
        """The ensemble of members that agree in input transform and grid, as ``load_members`` makes sure.

        Args:
            members: one or more.
            flip: also run them on mirrored images, and average: exactly left-right symmetric, twice the time.

        Raises:
            InputError: the members' grid cannot be mirrored.
        """
        own, card = [member.network for member in members], members[0].card
        networks = with_mirrored(own, card.affine, card.shape) if flip else own
        return cls(networks, members[0].input_transform)

    @property
    def levels(self) -> int:
        """Number of stages."""
        return self.networks[0].levels

    def inputs(self, image: Tensor) -> Tensor:
        """What the networks see of an image ``(B, 1, X, Y, Z)``: ``(B, in_channels, X, Y, Z)``."""
        return image if self.input_transform is None else self.input_transform(image)

    def run(
        self,
        *,
        fixed: Tensor,
        moving: Tensor,
        levels: Sequence[int] = (0,),
        inverse: bool = True,
        disagreement: bool = False,
        recompute: bool = False,
    ) -> list[Stage]:
        """Registers a pair of images.

        Args:
            fixed: ``(B, 1, X, Y, Z)``, intensity in [0, 1].
            moving: ``(B, 1, X, Y, Z)``, intensity in [0, 1].
            levels: after which stages fields are wanted; 0 is full resolution, the last.
            inverse: also give ``disp_inv``; without it less is computed.
            disagreement: also measure how far the members' updates differ.
            recompute: with gradients, compute activations again in the backward pass instead of keeping them.

        Returns:
            one :class:`~sitreg_lumir.network.sitreg.Stage` per wanted level, coarsest first.

        Raises:
            ValueError: as :func:`~sitreg_lumir.network.sitreg.run_stages`.
        """
        return run_stages(  # arguments one by one: a dictionary of them would hold the inputs until the end
            self.networks,
            fixed=self.inputs(fixed),
            moving=self.inputs(moving),
            levels=levels,
            inverse=inverse,
            disagreement=disagreement,
            recompute=recompute,
        )

    def control_points(self, *, fixed: Tensor, moving: Tensor) -> list[Update]:
        """The updates of all stages alone, without the fields that they make up: less time than :meth:`run`.

        Args:
            fixed: ``(B, 1, X, Y, Z)``, intensity in [0, 1].
            moving: ``(B, 1, X, Y, Z)``, intensity in [0, 1].

        Returns:
            as :func:`~sitreg_lumir.network.sitreg.predict_control_points`.
        """
        return predict_control_points(self.networks, fixed=self.inputs(fixed), moving=self.inputs(moving))
