"""Reports: self-contained, safe with any text, readable, and the pictures show what they say."""

import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import data_samples
import numpy as np
import pytest
from pages import Page
from PIL import Image

from sitreg_lumir.challenge.provenance import make_provenance, save_field
from sitreg_lumir.cli import main
from sitreg_lumir.data.lumir import read_dataset
from sitreg_lumir.errors import InputError
from sitreg_lumir.report.pictures import GRID_MM, Volumes, render
from sitreg_lumir.report.report import write_pair_report, write_run_report
from sitreg_lumir.report.scores import DASH, StoredScores, worst_pairs

SHAPE = (20, 24, 18)
HOSTILE = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>&amp;</style>"
NAN = math.nan


def volumes(**changes: Any) -> Volumes:
    """An ellipsoid of random intensities, a smooth field, and maps."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij"))
    fixed = rng.integers(1, 255, SHAPE).astype(np.uint8) * (np.sum(grid**2, axis=0) < 0.8)
    values = {
        "fixed": fixed,
        "moving": np.roll(fixed, 1, 0),
        "warped": fixed.astype(np.float32),
        "disp": np.sin(3 * grid + grid.sum(axis=0)).astype(np.float32),
        "jac_det": (1 + 0.2 * grid.sum(axis=0)).astype(np.float32),
        "disagreement": np.abs(grid.sum(axis=0) - 1).astype(np.float32),
        "voxel_size": (2.0, 2.0, 2.0),
    }
    return Volumes(**(values | changes))


def write_pair(file: Path, text: str = "plain", **changes: Any) -> Page:
    """A report with ``text`` in every place that takes one."""
    contents = {
        "numbers": {text: 1.5, "missing": NAN, "none": None, "part": {text: text, "deep": {text: [1, 2.0]}}},
        "verdict": "check",
        "reasons": [text],
        "title": text,
        "names": (text, text),
        "slices": 3,
    }
    write_pair_report(file, **(vars(volumes()) | contents | changes))
    return Page(file)


def scored(text: str = "plain") -> StoredScores:
    """Three T1-T1 and two T1-T2 pairs, neither in order, with ``text`` in every place that takes one."""
    rows = (
        ("good", "T1-T1", 0.9, 1.0, 0.95, 0.85),
        ("bad", "T1-T1", 0.5, math.inf, 0.9, 0.1),
        ("unknown", "T1-T1", NAN, NAN, NAN, NAN),
        ("fair", "T1-T2", 0.7, 2.0, 0.8, NAN),
        (text, "T1-T2", 0.8, 1.5, 0.85, 0.75),
    )
    cases = [
        {"pair": pair, "group": group, "field": f"disp_{pair}.nii.gz", "dsc": dsc, "hd95": hd95, "ndv": 0.0}
        | {"dsc/1": first, "dsc/2": second}
        for pair, group, dsc, hd95, first, second in rows
    ]
    scores = {"pairs": 3, "dsc": {"mean": 0.7, "sd": 0.28, "pairs": 2, "infinite": 0}}
    summary = {
        "groups": {
            "T1-T1": scores | {"hd95": {"mean": math.inf, "sd": NAN, "pairs": 2, "infinite": 1}},
            "T1-T2": {"pairs": 1, "dsc": {"mean": 0.75, "sd": NAN, "pairs": 2, "infinite": 0}},
        },
        "gap": -0.05,
        "fields": text,
        "labels": {"1": {"name": "easy"}, "2": {"name": text}},
        "notes": [text],
    }
    return StoredScores(cases, summary)


def write_run(file: Path, text: str = "plain") -> Page:
    write_run_report(file, scored(text), [(text, volumes()), ("bad", volumes(jac_det=None))], slices=2)
    return Page(file)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    folder = tmp_path_factory.mktemp("reports")
    return {
        "pair": write_pair(folder / "pair.html"),
        "run": write_run(folder / "run.html"),
        "hostile pair": write_pair(folder / "hostile pair.html", HOSTILE),
        "hostile run": write_run(folder / "hostile run.html", HOSTILE),
    }


@pytest.mark.parametrize("name", ["pair", "run", "hostile pair", "hostile run"])
def test_nothing_is_loaded_and_nothing_else_may_run(pages: dict[str, Page], name: str) -> None:
    page = pages[name]
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form", "video", "audio", "source", "foreignobject")
        for key, value in attributes.items():
            assert not key.startswith("on") and key not in ("style", "srcset", "action", "background", "poster")
            if key in ("src", "href"):
                assert value is not None and value.startswith("data:"), (tag, value)
    (style,), (script,) = page.styles, page.scripts
    assert "url(" not in style and "@import" not in style
    for block in page.data:
        pictures = [picture for layer in block["layers"].values() for picture in layer]
        assert pictures and all(re.fullmatch(r"data:image/(png|jpeg);base64,[\w+/=]+", picture) for picture in pictures)
    (policy,) = [
        element["content"] for element in page.all("meta") if element.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.split(" ", 1) for rule in str(policy).split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    for rule, content in (("style-src", style), ("script-src", script)):
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    assert set(rules) == {"default-src", "img-src", "style-src", "script-src", "base-uri", "form-action"}


@pytest.mark.parametrize("name", ["pair", "run"])
def test_hostile_text_stays_text(pages: dict[str, Page], name: str) -> None:
    plain, hostile = pages[name], pages[f"hostile {name}"]
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert [list(attributes) for _, attributes in hostile.elements] == [
        list(attributes) for _, attributes in plain.elements
    ]
    assert "".join(hostile.text).replace(HOSTILE, "plain") == "".join(plain.text)
    assert "".join(hostile.text).count(HOSTILE) >= 6


def test_text_that_no_page_can_hold_is_replaced(tmp_path: Path) -> None:
    page = write_pair(tmp_path / "odd.html", "a\x00b\udcffc\u202egnp.exe")
    assert "a\ufffdb?c\ufffdgnp.exe" in page.text


@pytest.mark.parametrize("name", ["pair", "run"])
def test_pictures_are_described_and_sliders_labelled(pages: dict[str, Page], name: str) -> None:
    page = pages[name]
    assert page.all("html")[0]["lang"] == "en"
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    images = page.all("img")
    assert all("alt" in image and image["width"] and image["height"] for image in images)
    planes = 3 * (1 if name == "pair" else 2)
    described = [str(image["alt"]) for image in images if image["alt"]]
    assert sum(alt.startswith("fixed image, ") for alt in described) == planes
    assert sum(alt.startswith("grid ") for alt in described) == planes
    assert all(alt.endswith("slice") for alt in described)
    sliders = [element for element in page.all("input") if element["type"] == "range"]
    labels = {element["for"] for element in page.all("label") if "for" in element}
    assert len(sliders) == planes and {element["id"] for element in sliders} == labels
    assert all(element["aria-valuetext"] for element in sliders)
    assert len({element["name"] for element in page.all("input") if element["type"] == "radio"}) == planes // 3
    hidden = [attributes for _, attributes in page.elements if "hidden" in attributes]
    assert [element["class"] for element in hidden] == ["slider"] * planes, "only what needs scripts waits for them"
    assert all(str(chart["aria-label"]) for chart in page.all("svg"))


def test_the_worst_come_first(pages: dict[str, Page]) -> None:
    page = pages["run"]
    pairs = [row[0] for row in page.rows if row[1:2] in (["T1-T1"], ["T1-T2"]) and row[0] != "Structure"]
    assert pairs == ["bad", "fair", "plain", "good", "unknown"]
    assert [row[0] for row in page.rows if row[0] in ("easy", "plain") and len(row) == 6] == ["plain", "easy"]
    assert ["open" in case for case in page.all("details")] == [True, False]
    text = "".join(page.text)
    assert text.index("Place 1 of 5") < text.index("Place 3 of 5")
    assert worst_pairs(scored().cases, 1) == ["bad", "fair"]
    assert worst_pairs(scored().cases, 2) == ["bad", "fair", "plain", "good"]


def test_without_dice_the_least_similar_come_first() -> None:
    cases = [{"pair": name, "group": "T1-T1", "lncc": value} for name, value in (("a", -0.5), ("b", NAN), ("c", -0.2))]
    assert worst_pairs(cases, 3) == ["c", "a", "b"]


def test_missing_numbers_are_dashes(pages: dict[str, Page]) -> None:
    run = pages["run"]
    assert run.row("unknown") == ["unknown", "T1-T1", DASH, DASH, "0.0000"]
    assert run.row("bad") == ["bad", "T1-T1", "0.500", "∞", "0.0000"]
    (structure,) = [row for row in run.rows if row[0] == "plain" and len(row) == 6]
    assert structure[1:5] == ["0.475", "0.750", "0.100", "bad"]
    assert run.row("T1-T1") == ["T1-T1", "3", "0.700 ± 0.280", "∞"]
    assert run.row("T1-T2") == ["T1-T2", "1", "0.750", DASH]
    text = pages["pair"].text
    assert text[text.index("missing") + 1] == text[text.index("none") + 1] == DASH
    assert not {"nan", "NaN", "None", "inf"} & {text.strip() for page in pages.values() for text in page.text}


def test_a_run_reads_the_same_from_disk(tmp_path: Path) -> None:
    held = scored()
    with (tmp_path / "evaluation.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(held.cases[0]))
        writer.writeheader()
        writer.writerows({key: "" if value != value else value for key, value in case.items()} for case in held.cases)
    stored = json.dumps(held.summary).replace("NaN", "null").replace("Infinity", "null")
    (tmp_path / "evaluation.json").write_text(stored)
    write_run_report(tmp_path / "held.html", held)
    write_run_report(tmp_path / "stored.html", tmp_path / "evaluation.csv")
    assert (tmp_path / "held.html").read_bytes() == (tmp_path / "stored.html").read_bytes()
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(InputError, match=r"evaluation\.csv or \.json"):
        write_run_report(tmp_path / "again.html", tmp_path)
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(InputError, match=r"evaluation\.json: no such file"):
        write_run_report(tmp_path / "again.html", tmp_path)
    assert not (tmp_path / "again.html").exists()


def test_equal_input_gives_equal_bytes_and_failure_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first.html", "second.html"):
        write_pair(tmp_path / name)
    first = (tmp_path / "first.html").read_bytes()
    assert first == (tmp_path / "second.html").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match=r"first\.html: cannot be written \(No space"):
        write_pair(tmp_path / "first.html", "other")
    assert (tmp_path / "first.html").read_bytes() == first
    assert len(list(tmp_path.iterdir())) == 2


def test_wrong_arguments_are_refused_with_their_value(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="verdict must be one of ok, check, failed or None, got 'fine'"):
        write_pair(tmp_path / "x.html", verdict="fine")
    with pytest.raises(ValueError, match=r"disp must be \(3, 20, 24, 18\), got \(20, 24, 18\)"):
        write_pair(tmp_path / "x.html", disp=np.zeros(SHAPE))
    with pytest.raises(ValueError, match="voxel_size must be three positive numbers"):
        write_pair(tmp_path / "x.html", voxel_size=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="slices must be 1 or more, got 0"):
        write_pair(tmp_path / "x.html", slices=0)
    with pytest.raises(ValueError, match="no scores of pair 'other'"):
        write_run_report(tmp_path / "x.html", scored(), [("other", volumes())])
    assert not list(tmp_path.iterdir())


def test_a_page_of_noise_at_1_mm_stays_small(tmp_path: Path) -> None:
    shape = (160, 224, 192)  # noise is what pictures compress worst; one slice of each plane stands for all
    image = np.random.default_rng(0).integers(1, 255, shape, dtype=np.uint8)
    disp = np.zeros((3, *shape), dtype=np.float32)
    disp[:, ::4] = 1.5
    scale = image.astype(np.float32) / 100
    same = {"fixed": image, "moving": image, "warped": image, "jac_det": scale, "disagreement": scale}
    write_pair_report(tmp_path / "noise.html", **same, disp=disp, slices=1)
    (plane, *rest) = Page(tmp_path / "noise.html").data
    a_slice = sum(len(layer[0]) for block in (plane, *rest) for layer in block["layers"].values())
    page = (tmp_path / "noise.html").stat().st_size
    assert page + 15 * a_slice < 25e6


def decode(uri: str) -> np.ndarray:
    """A picture as RGBA ``(rows, columns, 4)``."""
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
    return np.asarray(picture.convert("RGBA")).astype(int)


def layers(**changes: Any) -> dict[str, Mapping[str, np.ndarray]]:
    """The start slice of each plane by layer."""
    planes, _ = render(volumes(**changes), 3)
    return {plane.name: {key: decode(slices[plane.start]) for key, slices in plane.layers.items()} for plane in planes}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_right_front_and_head_are_right_or_up(axis: int) -> None:
    image = np.full(SHAPE, 20, dtype=np.float32)
    np.moveaxis(image, axis, 0)[-5:] = 200
    shown = layers(fixed=image)
    for name, normal in (("sagittal", 0), ("coronal", 1), ("axial", 2)):
        grey = shown[name]["fixed"][..., 0]
        if axis != normal:
            across = min(axis for axis in range(3) if axis != normal)
            bright, dark = (grey[:, -2], grey[:, 2]) if axis == across else (grey[1], grey[-2])
            assert bright.min() > 150 > 100 > dark.max(), name


def test_jacobian_colours_say_less_more_and_folded() -> None:
    determinant = np.ones(SHAPE, dtype=np.float32)
    determinant[:4], determinant[4:8], determinant[8:12], determinant[12:14] = 0.5, 2.0, -0.1, NAN
    shown = layers(fixed=np.ones(SHAPE), jac_det=determinant)["axial"]["jacobian"]
    less, more, folded, unknown, same = (shown[12, column] for column in (2, 6, 10, 13, 17))
    assert less[2] > less[0] + 50 and less[3] > 200
    assert more[0] > more[2] + 50 and more[3] > 200
    assert tuple(folded) == (255, 0, 255, 255)
    assert unknown[3] == 0 and same[3] == 0


def test_maps_are_shown_within_the_fixed_image_only() -> None:
    shown = layers(jac_det=np.full(SHAPE, 2.0))["axial"]
    assert shown["jacobian"][0, 0, 3] == 0 and shown["jacobian"][12, 10, 3] > 200
    assert shown["disagreement"][0, 0, 3] == 0


def test_the_grid_is_the_moving_image_s_where_it_came_to_lie() -> None:
    still, moved = np.zeros((3, *SHAPE), dtype=np.float32), np.zeros((3, *SHAPE), dtype=np.float32)
    moved[0], moved[2] = 1.0, 3.0  # voxel x shows voxel x + 1: the grid comes to lie one voxel to the left
    positions = []
    for disp in (still, moved):
        line = layers(disp=disp)["axial"]["grid"][..., 3]
        scale = line.shape[1] / SHAPE[0]
        columns = np.flatnonzero((line > 100).mean(axis=0) > 0.9)
        positions.append((columns + 0.5) / scale - 0.5)  # voxels
        assert ((line > 100).mean(axis=1) > 0.9).sum() > 3, "lines of the other direction stay"
    spacing = GRID_MM / 2
    for places, shift in zip(positions, (0, 1), strict=True):
        assert len(places) >= 4
        offset = (places + shift) / spacing
        assert np.abs(offset - np.rint(offset)).max() * spacing < 0.3


def test_edges_lie_on_the_border_of_the_fixed_image_s_parts() -> None:
    image = np.full(SHAPE, 50.0)
    image[6:14, 6:18] = 200
    edges = layers(fixed=image)["axial"]["edges"][..., 3]
    rows, columns = np.nonzero(edges > 150)
    scale = edges.shape[1] / SHAPE[0]
    x, y = columns / scale, SHAPE[1] - rows / scale
    near = np.minimum(
        np.minimum(np.abs(x - 6), np.abs(x - 14)) + 10 * ((y < 5) | (y > 19)),
        np.minimum(np.abs(y - 6), np.abs(y - 18)) + 10 * ((x < 5) | (x > 15)),
    )
    assert len(near) > 100 and near.max() < 1.0  # voxels


def test_pixels_are_square_whatever_the_voxels() -> None:
    planes, _ = render(volumes(voxel_size=(1.0, 0.5, 3.0)), 2)
    assert {plane.name: plane.size for plane in planes} == {
        "axial": (40, 24),
        "coronal": (40, 108),
        "sagittal": (24, 108),
    }


def test_odd_images_have_pictures_too() -> None:
    negative = np.random.default_rng(0).normal(size=SHAPE)
    negative[3, 3, 3] = NAN
    for image in (np.zeros(SHAPE), np.full(SHAPE, 7.0), negative, np.ones(SHAPE, dtype=">i2")):
        shown = layers(fixed=image, moving=image, warped=image, jac_det=None, disagreement=None)
        assert set(shown["axial"]) == {"fixed", "moving", "warped", "edges", "grid"}
    full = layers(fixed=np.full(SHAPE, 7.0))["axial"]["fixed"]
    assert full[..., 0].min() > 250


def test_evaluate_writes_a_report_of_the_worst_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_samples.make_dataset(tmp_path / "data", validation=4)
    lists = [root / "LUMIR_dataset.json", root / "LUMIR_dataset_multimodal.json"]
    disp = np.zeros((3, *data_samples.SHAPE), dtype=np.float32)
    for path in lists:
        for pair in read_dataset(path, validation=True).validation:
            provenance = make_provenance(pair, [], {})
            save_field(tmp_path / f"out/disp_{pair.long_name}.nii.gz", disp, data_samples.AFFINE, provenance)
    data_samples.save(tmp_path / "out/disagreement_0100_0000_0101_0001.nii.gz", np.ones(data_samples.SHAPE, np.float32))
    command = ["evaluate", str(tmp_path / "out"), "--dataset", *map(str, lists)]
    assert main(command) == 0
    assert not (tmp_path / "out/report.html").exists()
    assert main([*command, "--report"]) == 0
    assert f"written: {tmp_path / 'out/report.html'}" in capsys.readouterr().out
    page = Page(tmp_path / "out/report.html")
    assert len(page.all("details")) == 4, "three of T1-T1, one of T1-T2"
    kinds = [set(block["layers"]) for block in page.data]
    assert len(kinds) == 12 and all("jacobian" in kind for kind in kinds)
    assert sum("disagreement" in kind for kind in kinds) == 3
    scores = {row["pair"]: float(row["dsc"]) for row in csv.DictReader((tmp_path / "out/evaluation.csv").open())}
    assert [row[0] for row in page.rows if row[0] in scores] == sorted(scores, key=scores.__getitem__)

    before = ["evaluate", "--identity", "--report", "--dataset", str(lists[0])]
    assert main(before) == 2
    assert "-o FOLDER" in capsys.readouterr().err
    assert main([*before, "-o", str(tmp_path / "before")]) == 0
    assert len(Page(tmp_path / "before/report.html").all("details")) == 3


def run_chromium(folder: Path, page: Path, *options: str) -> str:
    """Standard output of headless Chromium on one page, with a profile of its own."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on the path (Debian's package `chromium`)")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        shown, said = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its children, too
        raise
    assert process.returncode == 0, said[-2000:]
    return shown


def test_a_browser_shows_it(tmp_path: Path) -> None:
    write_pair(tmp_path / "pair.html", HOSTILE)
    run_chromium(
        tmp_path,
        tmp_path / "pair.html",
        f"--screenshot={tmp_path / 'shot.png'}",
        "--window-size=1200,1400",
        "--force-device-scale-factor=1",
    )
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    assert shot.shape == (1400, 1200, 3)
    black = (shot.max(axis=2) < 8).mean()
    coloured = (shot.max(axis=2) - shot.min(axis=2) > 60).mean()
    assert 0.05 < black < 0.8, "the pictures stand on black"
    assert coloured > 0.01, "maps and verdict are in colour"
    assert len(np.unique(shot.reshape(-1, 3), axis=0)) > 500


def test_the_sliders_work_and_the_policy_holds_in_a_browser(tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    write_run(page, HOSTILE)
    driver = """
      document.addEventListener("securitypolicyviolation", (event) => {
        document.body.dataset.blocked = `${document.body.dataset.blocked ?? ""} ${event.effectiveDirective}`;
      });
      const plane = document.querySelectorAll(".plane")[4], slider = plane.querySelector("input");
      const sources = () => Array.from(plane.querySelectorAll("img[data-layer]"), (image) => image.src);
      const before = sources();
      slider.value = slider.value === "0" ? "1" : "0";
      slider.dispatchEvent(new Event("input"));
      const changed = sources().filter((source, place) => source !== before[place]).length;
      document.body.dataset.changed = `${changed} of ${before.length}`;
      document.body.dataset.sliders = document.querySelectorAll(".slider:not([hidden])").length;
      document.body.dataset.read = slider.getAttribute("aria-valuetext") === plane.querySelector("output").textContent;
      new Image().src = "http://127.0.0.1:9/picture.png";
      const evil = document.createElement("script");
      evil.textContent = "document.body.dataset.evil = 'ran'";
      document.body.append(evil);
    """
    allowed = base64.b64encode(hashlib.sha256(driver.encode()).digest()).decode()
    text = page.read_text(encoding="utf-8").replace("script-src ", f"script-src 'sha256-{allowed}' ")
    page.write_text(text.replace("</body>", f"<script>{driver}</script></body>"), encoding="utf-8")
    shown = run_chromium(tmp_path, page, "--dump-dom")
    (body,) = re.findall(r"<body[^>]*>", shown)
    assert 'data-sliders="6"' in body
    count, total = map(int, re.search(r'data-changed="(\d+) of (\d+)"', body).groups())  # type: ignore[union-attr]
    assert count == total > 8
    assert 'data-read="true"' in body
    assert "img-src" in body and "script-src" in body, "the net and foreign scripts are blocked"
    assert "data-evil" not in body
