"""Deformable brain MRI registration: SITReg on MIND features.

Symmetric, inverse consistent, diffeomorphic; trained on T1 pairs only, robust on contrasts it has never seen.

    import sitreg_lumir

    registration = sitreg_lumir.register("fixed.nii.gz", "moving.nii.gz", "registration")

Everything public is a name of this module and is imported when it is first used, since torch takes seconds.
"""

import sys

# `python -m` puts the working folder first, whose files may be any; with -m, argv is ["-m", ...] until the module runs.
_RUN_AS_MODULE = sys.argv[:1] == ["-m"] and "sitreg_lumir" in {name.partition(".")[0] for name in sys.orig_argv[2:]}
del sys.path[: int(_RUN_AS_MODULE and not sys.flags.safe_path)]

from importlib import import_module  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names as in _HOMES, for type checkers, editors and the documentation
    from sitreg_lumir.average.build import build_template
    from sitreg_lumir.challenge.evaluate import evaluate
    from sitreg_lumir.challenge.evaluation_report import report_evaluation
    from sitreg_lumir.challenge.predict import predict
    from sitreg_lumir.data.datamodule import LumirDataModule
    from sitreg_lumir.data.lumir import read_dataset
    from sitreg_lumir.data.views import Augmentation, clean_view
    from sitreg_lumir.deform.backends.choice import use_backend
    from sitreg_lumir.deform.ops import warp
    from sitreg_lumir.demo.brain import STRUCTURES
    from sitreg_lumir.demo.data import make_demo_data
    from sitreg_lumir.demo.examples import labels_of
    from sitreg_lumir.errors import InputError
    from sitreg_lumir.geometry.resampling import resample_labels
    from sitreg_lumir.geometry.spline_map import SplineMap
    from sitreg_lumir.geometry.transforms import map_points
    from sitreg_lumir.io.maps import load_map
    from sitreg_lumir.io.read import load_disp, read_volume
    from sitreg_lumir.io.write import save_disp
    from sitreg_lumir.metrics.dsc import dsc
    from sitreg_lumir.network.mind import Mind
    from sitreg_lumir.network.sitreg import SITReg
    from sitreg_lumir.preprocessing.preprocess import preprocess
    from sitreg_lumir.registration.apply import apply
    from sitreg_lumir.registration.model import Model, load_model
    from sitreg_lumir.registration.register import register
    from sitreg_lumir.registration.result import Registration
    from sitreg_lumir.report.plots import plot_pair
    from sitreg_lumir.report.scores import read_scores
    from sitreg_lumir.train.averaging import WeightAverage
    from sitreg_lumir.train.final_epochs import GroupConsistency, NdvPenalty, add_term
    from sitreg_lumir.train.module import MindRegistration, RawRegistration
    from sitreg_lumir.train.registration import RegistrationModule
    from sitreg_lumir.train.terms import LossTerm, PairOutputs

_HOMES = {
    # two scans
    "register": "registration.register",
    "apply": "registration.apply",
    "preprocess": "preprocessing.preprocess",
    "load_model": "registration.model",
    "Model": "registration.model",
    "Registration": "registration.result",
    "load_map": "io.maps",
    "map_points": "geometry.transforms",
    "SplineMap": "geometry.spline_map",
    # many scans
    "build_template": "average.build",
    # LUMIR
    "LumirDataModule": "data.datamodule",
    "read_dataset": "data.lumir",
    "predict": "challenge.predict",
    "evaluate": "challenge.evaluate",
    "read_scores": "report.scores",
    "report_evaluation": "challenge.evaluation_report",
    # training
    "MindRegistration": "train.module",
    "RawRegistration": "train.module",
    "RegistrationModule": "train.registration",
    "NdvPenalty": "train.final_epochs",
    "GroupConsistency": "train.final_epochs",
    "WeightAverage": "train.averaging",
    "Augmentation": "data.views",
    # extending it
    "LossTerm": "train.terms",
    "PairOutputs": "train.terms",
    "add_term": "train.final_epochs",
    "Mind": "network.mind",
    "SITReg": "network.sitreg",
    "use_backend": "deform.backends.choice",
    # volumes and fields
    "read_volume": "io.read",
    "clean_view": "data.views",
    "load_disp": "io.read",
    "save_disp": "io.write",
    "warp": "deform.ops",
    "resample_labels": "geometry.resampling",
    "dsc": "metrics.dsc",
    "plot_pair": "report.plots",
    # to try things
    "make_demo_data": "demo.data",
    "labels_of": "demo.examples",
    "STRUCTURES": "demo.brain",
    "InputError": "errors",
}
"""Where each public name lives, below this package."""

__all__ = [
    "STRUCTURES",
    "Augmentation",
    "GroupConsistency",
    "InputError",
    "LossTerm",
    "LumirDataModule",
    "Mind",
    "MindRegistration",
    "Model",
    "NdvPenalty",
    "PairOutputs",
    "RawRegistration",
    "Registration",
    "RegistrationModule",
    "SITReg",
    "SplineMap",
    "WeightAverage",
    "__version__",
    "add_term",
    "apply",
    "build_template",
    "clean_view",
    "dsc",
    "evaluate",
    "labels_of",
    "load_disp",
    "load_map",
    "load_model",
    "make_demo_data",
    "map_points",
    "plot_pair",
    "predict",
    "preprocess",
    "read_dataset",
    "read_scores",
    "read_volume",
    "register",
    "report_evaluation",
    "resample_labels",
    "save_disp",
    "use_backend",
    "warp",
]


def __getattr__(name: str) -> Any:
    """Imports the module of a public name when that is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        from sitreg_lumir.errors import missing_extra

        remedy = missing_extra(error)
        if remedy is None:
            raise
        raise ModuleNotFoundError(f"{name}: {remedy}", name=error.name) from None


def __dir__() -> list[str]:
    """The public names, for completion and ``dir``."""
    return sorted(__all__)
