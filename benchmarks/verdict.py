"""What the verdict of `register` rests on: registrations made wrong on purpose, and good ones, of training subjects.

    python benchmarks/verdict.py REALBRAINS --out verdict.json     # some minutes; goes on where it was stopped
    python benchmarks/verdict.py REALBRAINS --out verdict.json --only-judge   # the tables, by the limits of today

REALBRAINS has `2mm/imagesTr` and `contrasts`. The subjects are halved: on `choose` the limits of
`registration/verdict.py` were chosen, `report` is what the tables show. `made_wrong.py` makes the scans. A registration
counts as wrong where nothing of the brain is left, or where the map differs from that of the scans as they were by more
than WRONG_MM, mean over the brain; as right below RIGHT_MM. Where the scan's place alone makes the verdict `failed`, no
field is predicted: nothing that follows could change it. One member predicts; with `--only aligned` a second one does,
too, and how far their fields lie apart is kept, as is the mutual information after alignment: neither is part of the
verdict, the last table shows what they would tell. No validation image is read.
"""

import argparse
import copy
import json
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import made_wrong as made
import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sitreg_lumir.errors import InputError
from sitreg_lumir.geometry.transforms import inside, transform_by
from sitreg_lumir.io.json_file import json_values
from sitreg_lumir.network.shipped import default_members
from sitreg_lumir.preprocessing.align import align_to_template
from sitreg_lumir.preprocessing.intensity import conform
from sitreg_lumir.preprocessing.template import load_template
from sitreg_lumir.registration.model import Model, as_tensor, load_model
from sitreg_lumir.registration.quality import brain_points, similarities
from sitreg_lumir.registration.summary import describe_alignment, template_match
from sitreg_lumir.registration.verdict import judge, placement_reasons

Array = NDArray[Any]
WRONG_MM, RIGHT_MM = 6.0, 3.0
PERSONS = ("P1", "P2", "P3")
PREDICTED = 1.3  # correlation of coarse structures, multiple of what chance gives, from which a field is predicted
HALVES = ("choose", "report")


@dataclass(frozen=True)
class Case:
    """A registration: ``group`` is ``good``, ``header``, ``part``, ``mirrored``, ``no brain`` or ``weights``."""

    half: str
    group: str
    kind: str
    number: int
    align: bool

    @property
    def key(self) -> str:
        """Names the case in the JSON file, and decides its random numbers."""
        return "/".join((self.half, self.group, self.kind, "aligned" if self.align else "as placed", str(self.number)))


def cases() -> list[Case]:
    """All cases, those that need no alignment first, and of every kind the first before any second."""
    table: list[tuple[str, Any, bool, int, int]] = [  # group, kinds, align, cases of a kind: choose, report
        ("good", made.GOOD, False, 4, 12),
        ("contrast", ("T2", "FLAIR"), False, 3, 9),
        ("same person", ("T1 T2", "T1 FLAIR", "T2 FLAIR"), False, 2, 4),
        ("header", made.HEADERS, False, 4, 17),
        ("header", made.UNALIGNED, False, 6, 20),
        ("no brain", made.NO_BRAINS, False, 6, 16),
        ("weights", ("spoiled weights",), False, 6, 20),
        ("part", made.PARTS, False, 1, 2),
        ("part", made.MOVED_PARTS, False, 2, 4),
        ("mirrored", made.MIRRORED, False, 2, 4),
        ("good", made.ALIGNED_GOOD, True, 2, 6),
        ("header", made.HEADERS, True, 4, 8),
        ("header", made.UNALIGNED, True, 4, 8),
        ("part", made.PARTS, True, 4, 8),
        ("part", made.MOVED_PARTS, True, 4, 8),
        ("no brain", made.NO_BRAINS, True, 12, 24),
    ]  # fmt: skip
    rows = []
    for group, kinds, align, choose, report in table:
        for half, count in (("choose", choose), ("report", report)):
            rows += [Case(half, group, kind, number, align) for kind in kinds for number in range(count)]
    return sorted(rows, key=lambda case: (case.align, case.number / (2 if case.half == "report" else 1)))


def main() -> None:
    """Registers what the JSON file lacks, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="REALBRAINS", help="folder with 2mm/imagesTr and contrasts")
    parser.add_argument("--members", nargs="+", help="default: the first of the shipped ones")
    parser.add_argument("--only", choices=("placed", "aligned"), help="only what needs no alignment, or one")
    parser.add_argument("--only-judge", action="store_true", help="register nothing more")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "verdict.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if not options.only_judge:
        members = options.members or default_members()[: 2 if options.only == "aligned" else 1]
        bench = Bench(options.root, *(load_model(path, device="cpu") for path in members))
        wanted = [case for case in cases() if options.only in (None, "aligned" if case.align else "placed")]
        for count, case in enumerate(wanted):
            if case.key not in rows:
                start = time.process_time()
                rows[case.key] = {**vars(case), **json_values(bench.measure(case), 6)}
                rows[case.key]["seconds"] = round(time.process_time() - start, 2)
                print(
                    f"{count}/{len(wanted)} {case.key}: {judged(rows[case.key])[0]}, {rows[case.key]['truth']}",
                    flush=True,
                )
                if count % 10 and case is not wanted[-1]:
                    continue
                temporary = options.out.with_suffix(".part")
                temporary.write_text(json.dumps(rows, indent=0) + "\n")
                temporary.replace(options.out)
    if options.only is not None:
        rows = {key: row for key, row in rows.items() if row["align"] == (options.only == "aligned")}
    for table in tables(rows):
        print(*table, sep="\n", end="\n\n")


class Bench:
    """The training subjects in two halves, a model, and perhaps another one."""

    def __init__(self, root: Path, model: Model, second: Model | None = None) -> None:
        files = sorted((root / "2mm" / "imagesTr").glob("*.nii.gz"))
        order = np.random.default_rng(0).permutation(len(files))
        self.files = {half: [files[index] for index in order[start::2]] for start, half in enumerate(HALVES)}
        self.contrasts = root / "contrasts"
        self.model, self.second = model, second

    def measure(self, case: Case) -> dict[str, Any]:
        """What the verdict needs to know, and the truth: ``right``, ``wrong`` or ``between``."""
        rng = np.random.default_rng(zlib.crc32(case.key.encode()))
        names = self.files[case.half]
        first, second = rng.choice(len(names), 2, replace=False)
        fixed, model = self._placed(names[first]), self.model
        if case.group == "same person":  # one to choose by, two to report, each way
            person = PERSONS[case.number // 2 + HALVES.index(case.half)]
            first_kind, second_kind = case.kind.split()[:: 1 - 2 * (case.number % 2)]
            fixed = self._placed(self.contrasts / f"{person}_{first_kind}.nii.gz")
            original = self.contrasts / f"{person}_{second_kind}.nii.gz"
            return self._judge(case, model, fixed, _load(original), None, original)
        if case.group == "contrast":
            person = PERSONS[case.number % 3]
            values, affine = _load(self.contrasts / f"{person}_{case.kind}.nii.gz")
            known: Array | None = np.eye(4)
        else:
            values, affine = _load(names[second])
            maker = {**made.GOOD, **made.ALIGNED_GOOD, **made.HEADERS, **made.UNALIGNED, **made.PARTS,
                     **made.MOVED_PARTS, **made.MIRRORED, **made.NO_BRAINS}.get(case.kind)  # fmt: skip
            known = np.eye(4)
            if maker is not None:
                values, affine, known = maker(values, affine, rng)
            if case.kind == "spoiled weights":
                model, known = self._degraded(rng), None
        return self._judge(case, model, fixed, (values, affine), known, names[second])

    def _judge(
        self, case: Case, model: Model, fixed: Any, moving: tuple[Array, Array], known: Array | None, original: Path
    ) -> dict[str, Any]:
        values, affine = moving
        brain = values > 0
        prealign, alignment = np.eye(4), None
        try:
            if case.align:
                alignment = align_to_template(values, affine, brain, load_template(), case.kind)
                prealign = alignment.prealign if alignment.needed else prealign
            image, in_grid = conform(values, affine, brain, prealign, model.shape, model.affine, case.kind)
        except InputError as error:
            return {"refused": str(error), "truth": "wrong"}
        images = (fixed[0], as_tensor(image), fixed[1], torch.from_numpy(in_grid)[None, None])
        points = brain_points(brain, affine)
        voxels = transform_by(np.linalg.inv(model.affine) @ prealign, points.T)
        summary: dict[str, Any] = {
            "fixed": {"alignment": None},
            "moving": {"alignment": describe_alignment(alignment, prealign)},
            "template_match": {"fixed": fixed[2], "moving": template_match(model, images[1], images[3])},
            "share_in_grid": float(inside(voxels, model.shape).mean()),
        }
        if alignment is not None:
            summary["mutual_information"] = alignment.mi_after
        disp = None
        if _promising(summary):
            disp = model.run(fixed=images[0], moving=images[1])[0].disp
            summary["similarity"] = {
                "aligned": similarities(*images, None, model.spacing),
                "registered": similarities(*images, disp, model.spacing),
            }
            if self.second is not None:
                apart = (self.second.run(fixed=images[0], moving=images[1])[0].disp - disp).norm(dim=1, keepdim=True)
                summary["members_apart_mm"] = float(apart[images[2]].double().median()) * model.spacing
        summary["truth"] = "wrong"
        if case.group == "same person" and disp is not None:  # both on one grid: the right map is none
            summary["map_mm"] = error = float(disp.norm(dim=1, keepdim=True)[images[2]].double().mean()) * model.spacing
            summary["truth"] = "wrong" if error > WRONG_MM else "right" if error < RIGHT_MM else "between"
        elif case.group in ("good", "contrast") and not case.align:
            summary["truth"] = "right"
        elif known is not None:
            moved = transform_by(prealign, points.T) - transform_by(np.linalg.inv(known), points.T)
            summary["placed_mm"] = error = float(np.linalg.norm(moved, axis=0).mean())
            if disp is not None:
                summary["map_mm"] = error = self._map_error(images, disp, prealign @ known, original, brain)
            summary["truth"] = "wrong" if error > WRONG_MM else "right" if error < RIGHT_MM else "between"
        return summary

    def _map_error(self, images: Any, disp: Tensor, placed: Array, original: Path, brain: Array) -> float:
        """Mean distance, mm, from the map of the moving scan as it was, where the moving scan shows the brain.

        ``placed`` takes true positions to the model's world.
        """
        moving = self._placed(original)
        reference = self.model.run(fixed=images[0], moving=moving[0])[0].disp
        affine = self.model.affine
        voxels = torch.nonzero(images[2][0, 0])[::50].T.numpy()
        at = (slice(None), *voxels)
        right, mapped = (transform_by(affine, voxels + field[0][at].double().numpy()) for field in (reference, disp))
        own = np.linalg.inv(nib.load(original).affine)
        nearest = np.rint(transform_by(own, right)).astype(int)
        shown = inside(transform_by(own, right), brain.shape)
        shown[shown] = brain[tuple(nearest[:, shown])]
        return float(np.linalg.norm(transform_by(np.linalg.inv(placed), mapped) - right, axis=0)[shown].mean())

    def _degraded(self, rng: np.random.Generator) -> Model:
        """The model with random weights added to those of the heads."""
        member = copy.deepcopy(self.model.members[0])
        strength = float(rng.uniform(0.5, 3))
        with torch.no_grad():
            for name, weights in member.network.named_parameters():
                if "heads" in name and weights.ndim > 1:
                    noise = torch.from_numpy(rng.normal(size=tuple(weights.shape))).float()
                    weights += strength * weights.std() * noise
        return replace(self.model, members=(member,))

    @lru_cache(maxsize=64)  # noqa: B019 (lives as long as the command)
    def _placed(self, path: Path) -> Any:
        values, affine = _load(path)
        image, brain = conform(values, affine, values > 0, np.eye(4), self.model.shape, self.model.affine)
        tensors = as_tensor(image), torch.from_numpy(brain)[None, None]
        return *tensors, template_match(self.model, *tensors)


def _promising(summary: dict[str, Any]) -> bool:
    """Whether the scan's place may pass: the verdict's limit is above what this asks for."""
    placed = summary["template_match"]["moving"]
    return bool(placed["correlation"] > PREDICTED * placed["by_chance"])


def judged(row: dict[str, Any]) -> tuple[str, list[str]]:
    """The verdict by the limits of today, and its reasons; ``refused`` where `register` ends with an error."""
    if "refused" in row:
        return "refused", [row["refused"]]
    if "similarity" not in row:
        failed, _ = placement_reasons(row)
        assert failed, row  # a limit lower than what `_promising` asks for would need more registrations
        return "failed", failed
    covered = {"in_model_grid": row["share_in_grid"], "seen_by_other": 1.0}
    neutral = {"ndv_percent": 0.0, "inverse_error_mm": {"p99": 0.0}, "coverage_fixed": {**covered, "in_model_grid": 1}}
    return judge({**row, **neutral, "coverage_moving": covered})


def tables(rows: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """The confusion table and the table by kind, Markdown, of the half that chose nothing."""
    reported = [(row, judged(row)[0]) for row in rows.values() if row["half"] == "report"]
    verdicts = ("ok", "check", "failed", "refused")
    counts = Counter((row["truth"], verdict) for row, verdict in reported if row["group"] != "mirrored")
    yield [
        f"| registration is | {' | '.join(verdicts)} |",
        "|---" * (1 + len(verdicts)) + "|",
        *(
            f"| {truth} | {' | '.join(str(counts[truth, verdict]) for verdict in verdicts)} |"
            for truth in ("right", "between", "wrong")
        ),
    ]
    kinds = Counter(((row["group"], row["kind"], row["align"]), row["truth"], verdict) for row, verdict in reported)
    lines = ["| scans | aligned | right: ok, check, failed | wrong: ok, check, failed or refused |"]
    lines.append("|---" * 4 + "|")
    for kind in dict.fromkeys(key[0] for key in kinds):
        right = [str(kinds[kind, "right", verdict]) for verdict in verdicts[:3]]
        wrong = [kinds[kind, "wrong", verdict] for verdict in verdicts]
        shown = ", ".join(map(str, (*wrong[:2], wrong[2] + wrong[3])))
        lines.append(f"| {kind[1]} | {'yes' if kind[2] else 'no'} | {', '.join(right)} | {shown} |")
    yield lines
    yield _others(rows)


def _others(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What is no part of the verdict: least, median and largest value of right and of wrong registrations."""
    lines = ["| measured | right | wrong | wrong, not failed |", "|---" * 4 + "|"]
    for name in ("mutual_information", "members_apart_mm"):
        known = [row for row in rows.values() if row.get(name) is not None and row["group"] != "mirrored"]
        right, wrong = ([row for row in known if row["truth"] == truth] for truth in ("right", "wrong"))
        passed = [row for row in wrong if judged(row)[0] != "failed"]
        cells = []
        for chosen in (right, wrong, passed):
            values = [row[name] for row in chosen]
            quantiles = " / ".join(f"{value:.2f}" for value in np.percentile(values, (0, 50, 100))) if values else "-"
            cells.append(f"{quantiles} ({len(values)})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _load(path: Path) -> tuple[Array, Array]:
    image: Any = nib.load(path)
    return np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine, dtype=np.float64)


if __name__ == "__main__":
    main()
