"""Variants as users write them: modules with their own defaults, and what their networks see of an image."""

VARIANTS = """
from pathlib import Path

import torch
from torch import nn

from sitreg_lumir.network.sitreg import SITReg
from sitreg_lumir.train.module import MindRegistration, RawRegistration, RegistrationModule


class Gradient(nn.Module):
    channels = 2

    def __init__(self, scale: float = 1.0, axes: tuple[int, ...] = (2,)) -> None:
        super().__init__()
        self.scale, self._axes = scale, axes

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        gradient = sum(torch.roll(image, 1, axis) - image for axis in self._axes)
        return torch.cat([self.scale * image, gradient], dim=1)


class Root(nn.Module):
    channels = 1

    def __init__(self, power: float = 0.5) -> None:
        super().__init__()
        self.power = power

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image**self.power


class Steep(Root):
    def __init__(self, offset: float = 0.1, **kwargs: float) -> None:
        super().__init__(**kwargs)
        self.offset = offset

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image) + self.offset


class Learned(nn.Module):
    channels = 3

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.convolution = nn.Conv3d(1, 3, 3, padding=1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.convolution(image) * self.gain


class Untold(nn.Module):
    channels = 1

    def __init__(self, power: float = 0.5) -> None:
        super().__init__()
        self.exponent = power

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image**self.exponent


class Doubled(Root):
    def __init__(self, power: float = 0.5) -> None:
        super().__init__(2 * power)


class Random(Root):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + torch.rand_like(image)


class Miscounted(Root):
    channels = 2


class Uncounted(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image


class OfPath(Root):
    def __init__(self, folder: Path = Path("x")) -> None:
        super().__init__()
        self.folder = folder


class Small(MindRegistration):
    def __init__(
        self,
        features: list[int] = [4, 8],
        head_features: list[int] = [8, 4],
        learning_rate: float = 7e-4,
        sigma: float = 0.75,
        window: int = 3,
    ) -> None:
        super().__init__(features, head_features, learning_rate, window=window, sigma=sigma)


class SmallPassingOn(MindRegistration):
    def __init__(self, features: list[int] = [4, 8], head_features: list[int] = [8, 4], **kwargs) -> None:
        super().__init__(features, head_features, **kwargs)


class OnGradient(RegistrationModule):
    def __init__(
        self, features: list[int] = [4, 4], head_features: list[int] = [4, 4], window: int = 3, scale: float = 3.0
    ) -> None:
        super().__init__(features=features, head_features=head_features, window=window, input_transform=Gradient(scale))


class OverridesInputs(RawRegistration):
    def inputs(self, image: torch.Tensor) -> torch.Tensor:
        return image**0.5


class OverridesClean(RawRegistration):
    def clean(self, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clean, mask = super().clean(stored)
        return clean**0.5, mask


class SetsMind(RawRegistration):
    def __init__(self, features: list[int] = [4, 4], head_features: list[int] = [4, 4]) -> None:
        super().__init__(features, head_features)
        self.mind = Root()


class SetsInputs(RawRegistration):
    def __init__(self, features: list[int] = [4, 4], head_features: list[int] = [4, 4]) -> None:
        super().__init__(features, head_features)
        self.inputs = Root()


class Wider(SITReg):
    pass


class OtherNetwork(RawRegistration):
    def __init__(self, features: list[int] = [4, 4], head_features: list[int] = [4, 4]) -> None:
        super().__init__(features, head_features)
        self.network = Wider(1, features, head_features)


class OtherPart(RawRegistration):
    def __init__(self, features: list[int] = [4, 4], head_features: list[int] = [4, 4]) -> None:
        super().__init__(features, head_features)
        self.network.heads[0].final = nn.Sequential(self.network.heads[0].final, nn.Tanh())


class OtherChannels(RegistrationModule):
    def __init__(self, features: list[int] = [4, 4], head_features: list[int] = [4, 4]) -> None:
        super().__init__(6, features, head_features, input_transform=Gradient())
"""
