"""`doctor`: what is installed, what there is to compute on, which trained members are found; and whether it suffices.

Each part is looked at independently, since this must answer where something is broken. Heavy imports happen inside.
"""

import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sitreg_lumir import __version__
from sitreg_lumir.errors import InputError

REGISTERING = ("torch", "numpy", "scipy", "numba", "nibabel", "SimpleITK", "safetensors")
"""Packages without which two scans cannot be registered."""
OTHERS = ("lightning", "monai", "torchmetrics", "wandb", "matplotlib", "nilearn")
"""Packages of the extra `train`, which training, data sets and the demo need."""
EXTRAS = {"deepbet": "strip", "ipyniivue": "notebooks"}
"""Packages that are asked for by name, and the extra that brings each."""

UNTRIED = (
    "training, prediction and the Triton kernels have never run on a GPU: the kernels were tested in Triton's "
    "interpreter, memory was counted on a CPU; run benchmarks/gpu.py, correctness first"
)
"""What is not known of GPUs."""

Report = dict[str, Any]


def package_versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of what it computes with; None where a package is missing."""
    packages = {name: _version(name) for name in (*REGISTERING, *OTHERS)}
    return {"python": platform.python_version(), "sitreg-lumir": __version__, **packages}


def examine() -> Report:
    """Everything that `doctor` reports, plain values only.

    Returns:
        ``versions``, ``device``, ``backends``, ``models``, ``extras``, ``wandb``; ``ready``: whether two scans can be
        registered; ``reasons``: one line each why they cannot. A part that could not be looked at is an ``error``.
    """
    versions = package_versions()
    reasons = [f"{name} is not installed; pip install {name}" for name in REGISTERING if not versions[name]]
    report: Report = {"versions": versions}
    parts: dict[str, Callable[[list[str]], Any]] = {
        "device": _device,
        "backends": _backends,
        "models": _models,
        "extras": _extras,
        "wandb": _wandb,
    }
    for name, look in parts.items():
        try:
            report[name] = look(reasons)
        except Exception as error:  # a broken package may raise anything, and the other parts still count
            line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            report[name] = {"error": line}
            if name in ("backends", "models") and not reasons:
                reasons.append(f"{name}: {line}")
    return {**report, "ready": not reasons, "reasons": reasons}


def lines(report: Report) -> list[str]:
    """A report for people."""
    printed = ["versions"]
    printed += [f"  {name:<14}{value or 'missing'}" for name, value in report["versions"].items()]
    for part in ("device", "backends", "models", "extras", "wandb"):
        printed += ["", part, *(f"  {line}" for line in _indented(report[part]))]
    printed += ["", "two scans can be registered" if report["ready"] else "two scans cannot be registered:"]
    return printed + [f"  {reason}" for reason in report["reasons"]]


def _indented(value: Any) -> list[str]:
    """Nested values as lines; entries of a list are set apart by a dash."""
    if isinstance(value, dict):
        flat = {key: entry for key, entry in value.items() if not isinstance(entry, dict | list)}
        printed = [f"{key:<14}{_word(entry)}" for key, entry in flat.items()]
        for key, entry in value.items():
            if isinstance(entry, dict | list) and entry:
                printed += [key, *(f"  {line}" for line in _indented(entry))]
        return printed
    if isinstance(value, list):
        return [line for entry in value for line in _dashed(_indented(entry))]
    return [_word(value)]


def _dashed(printed: list[str]) -> list[str]:
    return [f"{'- ' if place == 0 else '  '}{line}" for place, line in enumerate(printed)]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device(reasons: list[str]) -> Report:
    import torch

    from sitreg_lumir.train.memory import system_memory

    total, free = system_memory()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report: Report = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable cores": usable,
        "torch threads": torch.get_num_threads(),
        "memory": _gigabytes(total),
        "free memory": _gigabytes(free),
        "mps": bool(torch.backends.mps.is_available()),
        "tf32": "off in every verb, so that float32 is float32 on a GPU, too",
        "cuda": [],
    }
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        properties = torch.cuda.get_device_properties(index)
        report["cuda"].append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": _gigabytes(total),
                "free memory": _gigabytes(free),
            }
        )
    report["chosen"] = "cuda" if report["cuda"] else "cpu"
    if report["cuda"]:
        report["not yet tried"] = UNTRIED
    return report


def _backends(reasons: list[str]) -> Report:
    """Which loops compute deformations: found out by a small composition on each device."""
    import torch

    from sitreg_lumir.deform.backends import backend_of, cuda
    from sitreg_lumir.deform.ops import compose

    asked = os.environ.get("SITREG_LUMIR_BACKEND", "auto")
    report: Report = {"asked for": asked, "triton": find_spec("triton") is not None}
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        field = torch.zeros(1, 3, 2, 2, 2, device=device)
        try:
            backend = backend_of(field).NAME
            compose(field, field)
        except ValueError as error:
            reasons.append(f"deformations on {device}: {error}")
            report[device] = {"chosen": None, "why": str(error)}
            continue
        report[device] = {"chosen": backend, "why": _why(backend, asked)}
        if device != "cpu" and backend == "torch" and asked == "auto":
            try:
                cuda.usable(torch.device(device), asked=True)
            except ValueError as error:
                report[device]["why"] = str(error)
    folder, writable = _numba_cache()
    report["compiled loops"] = {"folder": folder, "writable": writable}
    if not writable:
        report["compiled loops"]["note"] = "compiled again in each process; set NUMBA_CACHE_DIR to a writable folder"
    return report


def _why(backend: str, asked: str) -> str:
    """Why a backend computes."""
    reasons = {
        "torch": "plain PyTorch, no faster kernels for this device",
        "cuda": "Triton kernels, compiled and run on this device",
        "cpu": "loops compiled by numba",
    }
    return reasons[backend] if asked == "auto" else f"SITREG_LUMIR_BACKEND={asked}"


def _numba_cache() -> tuple[str | None, bool]:
    """Where numba keeps machine code, and whether it can."""
    from sitreg_lumir.deform.backends.cpu import lookups

    path = lookups.lookup.stats.cache_path  # type: ignore[attr-defined]
    if path is None:
        return None, False
    folder = Path(path)
    existing = next(path_above for path_above in (folder, *folder.parents) if path_above.exists())
    return str(folder), os.access(existing, os.W_OK)


def _models(reasons: list[str]) -> Report:
    from sitreg_lumir.network.shipped import SHIPPED, VARIABLE, default_members
    from sitreg_lumir.network.weights import load_members

    named = os.environ.get(VARIABLE)
    report: Report = {"from": f"{VARIABLE}={named}" if named else str(SHIPPED), "members": []}
    try:
        files = default_members()
    except InputError as error:
        reasons.append(str(error))
        return report
    report["members"] = [_member(file, reasons) for file in files]
    if len(files) > 1 and not any("error" in member for member in report["members"]):
        try:
            load_members(files)
        except InputError as error:
            reasons.append(str(error))
    return report


def _member(file: Path, reasons: list[str]) -> Report:
    """One member: loaded, with its checksum compared with its card's."""
    import numpy as np
    from nibabel.affines import voxel_sizes

    from sitreg_lumir.io.checksum import sha256_file
    from sitreg_lumir.network.weights import load_member

    report: Report = {"file": str(file)}
    try:
        member = load_member(file)
        report["sha256"] = sha256_file(file)
    except InputError as error:
        reasons.append(str(error))
        return {**report, "error": str(error)}
    report["checksum"] = "that of its card" if _has_checksum(file) else "computed here, its card names none"
    report["grid"] = " x ".join(map(str, member.card.shape))
    report["resolution"] = " x ".join(f"{size:g}" for size in voxel_sizes(np.asarray(member.card.affine))) + " mm"
    transform = member.card.input_transform
    report["input"] = "intensities" if transform is None else "MIND" if member.mind else transform["class_path"]
    report["parameters"] = sum(parameter.numel() for parameter in member.parameters())
    report["licence"] = member.card.licence
    return report


def _has_checksum(file: Path) -> bool:
    """Whether a card with a checksum lies beside a member; loading has compared them."""
    card = file.with_suffix(".json")
    return file.suffix == ".safetensors" and '"sha256"' in card.read_text(encoding="utf-8")


def _extras(reasons: list[str]) -> Report:
    return {
        name: _version(name) or f"missing; pip install 'sitreg-lumir[{extra}]' brings it"
        for name, extra in EXTRAS.items()
    }


def _wandb(reasons: list[str]) -> Report:
    report: Report = {"installed": find_spec("wandb") is not None, "mode": "offline, unless fit has --wandb online"}
    if os.environ.get("WANDB_MODE"):
        report["WANDB_MODE"] = f"{os.environ['WANDB_MODE']}, which `fit` does not follow: --wandb decides"
    return report


def _cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gigabytes(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e9:.1f} GB"
