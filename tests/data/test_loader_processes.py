"""Two real processes: what each of them gets, and that together they get everything exactly once."""

import json
import os
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from data_samples import content, make_dataset, write
from lightning.pytorch import LightningModule, Trainer

from sitreg_lumir.data.datamodule import LumirDataModule

PROCESSES = 2


class Recorder(LightningModule):
    """Notes the groups and pairs that one process gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        kinds = ("fit", "fit validation", "validate", "test", "predict")
        self.batches: dict[str, list[Any]] = {kind: [] for kind in kinds}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.batches["fit"].append(batch["index"].tolist())
        return self.weight.sum() * 0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        verb = self.trainer.state.fn or ""
        self.batches["fit validation" if verb == "fit" else verb] += [pair.long_name for pair in batch["pair"]]

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _run(rank: int, port: int, folder: Path) -> None:
    """One of the processes: runs all verbs, and writes down what it got."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    silent: dict[str, Any] = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    results = {}
    for root in sorted(path for path in folder.iterdir() if path.name.endswith("pairs")):
        module = Recorder()
        trainer = Trainer(
            accelerator="cpu",
            devices=PROCESSES,
            strategy="ddp",
            max_epochs=1,
            use_distributed_sampler=False,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            default_root_dir=folder,
            **silent,
        )
        data = LumirDataModule(str(root), num_workers=0, pairs_per_epoch=10, cache=str(folder / "cache"))
        trainer.validate(module, datamodule=data, verbose=False)
        trainer.test(module, datamodule=data, verbose=False)
        trainer.predict(module, datamodule=data, return_predictions=False)
        trainer.fit(module, datamodule=data)
        results[root.name] = module.batches
    (folder / f"{rank}.json").write_text(json.dumps(results))


@pytest.mark.slow  # each process imports everything again
def test_two_processes_get_everything_once(tmp_path: Path) -> None:
    for pairs in (1, 3):
        root = make_dataset(tmp_path / f"{pairs} pairs")
        changed = content(root)
        write(root, changed | {"validation": changed["validation"][:pairs]})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_run, (port, tmp_path), nprocs=PROCESSES)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    for pairs in (1, 3):
        first, second = (rank[f"{pairs} pairs"] for rank in ranks)
        names = ["0100_0000_0101_0000", "0101_0000_0102_0000", "0102_0000_0100_0000"][:pairs]
        for verb in ("fit validation", "validate", "test", "predict"):
            assert Counter(first[verb] + second[verb]) == Counter(names), verb
            assert first[verb] == names[::PROCESSES], verb
        assert first["fit"] == [[0, 1], [4, 5]]
        assert second["fit"] == [[2, 3], [6, 7]]
