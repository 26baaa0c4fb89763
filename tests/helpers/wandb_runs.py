"""Offline runs of W&B, read back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


def records(file: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: seven bytes of header, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, block, parts = file.read_bytes(), 7, 32768, b""
    assert content.startswith(b":W&B")
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


class Logged(NamedTuple):
    """What a W&B run folder holds."""

    run: Any
    config: dict[str, Any]
    history: list[dict[str, Any]]
    exit_code: int
    text: str


def read_run(folder: Path) -> Logged:
    """Reads ``offline-run-.../run-<id>.wandb`` back."""
    import wandb

    wandb.teardown()  # finishing a run does not wait until its file is closed
    (file,) = folder.glob("*.wandb")
    stored = list(records(file))
    (started,) = [record.run for record in stored if record.HasField("run")]
    updates = [*started.config.update, *(update for record in stored for update in record.config.update)]
    config = {item.key: json.loads(item.value_json) for item in updates}
    history: list[dict[str, Any]] = []
    for record in stored:
        if record.HasField("history"):
            row: dict[str, Any] = {}
            for item in record.history.item:
                place = row
                keys = list(item.nested_key) or [item.key]
                for key in keys[:-1]:
                    place = place.setdefault(key, {})
                place[keys[-1]] = json.loads(item.value_json)
            history.append(row)
    (exit_code,) = [record.exit.exit_code for record in stored if record.HasField("exit")]
    return Logged(started, config, history, exit_code, "\n".join(map(str, stored)))


def segments(folder: Path) -> list[Path]:
    """The W&B run folders of a run folder, the earliest first."""
    return sorted((folder / "wandb").glob("offline-run-*"))
