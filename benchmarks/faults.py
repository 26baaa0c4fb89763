"""Forced stops and full disks at every file operation of every verb, and kills at random times: is anything lost?

    python benchmarks/faults.py -o faults                # goes on where it was stopped; --minutes N ends it in time
    python benchmarks/faults.py -o faults --table        # what has been tried so far

Each verb runs on tiny volumes, in a process of its own that is forked from one which has imported everything, over the
result of an earlier, different command. At its k-th file operation (a file opened for writing, renamed, removed,
flushed to the disk, locked; a folder made or removed) below the try's folder the process ends at once (``stop``), or
the operation fails as on a full disk (``full``). In other tries it gets SIGKILL or SIGTERM at a random time. Then:

* a full disk is one line and exit code 2, unless the operation only cleaned up; SIGTERM ends with 143 within 5 s;
* what belongs together is all of the earlier command, all of the new one, or not there, once what the process left has
  been cleaned up as at the next start;
* the same command runs through, gives the new result, and leaves no temporary file.

``results.json`` holds each try; a try that failed keeps what it left in its folder.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_SECONDS = 5.0  # from SIGTERM to the end
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "fcntl.flock")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_pipe: list[int] = []  # in the forked process: where it says that the verb has begun, and obeys signals
_VOLATILE = ("seconds",)  # of JSON files


@dataclass(frozen=True)
class Verb:
    """A command on the prepared files.

    Attributes:
        old: the earlier command's arguments; ``OUT`` stands for the try's result.
        new: the arguments of the command that is disturbed.
        groups: glob patterns below the try's folder; the files of each belong together.
        again: arguments instead of ``new`` where a checkpoint is there already.
    """

    old: list[str]
    new: list[str]
    groups: tuple[str, ...]
    again: list[str] | None = None


def verbs(work: Path) -> dict[str, Verb]:
    """The verbs that are disturbed, cheap ones first."""
    data, multi = work / "data" / "LUMIR_dataset.json", work / "data" / "LUMIR_dataset_multimodal.json"
    first, second = (str(work / "runs" / name / "checkpoints" / "last.ckpt") for name in ("first", "second"))
    fixed, moving = (str(work / "data" / "imagesVal" / f"LUMIRMRI_{n}_0000.nii.gz") for n in ("0100", "0101"))
    field = str(work / "fields" / "disp_0100_0101.nii.gz")
    cache = ["--data.cache", str(work / "cache"), "--data.num_workers", "0"]
    predict = ["predict", "--data", str(data), "-o", "OUT", "--overwrite", "--device", "cpu", *cache]
    container = ["container", "--images", str(data.parent), "-o", "OUT", "--device", "cpu"]
    register = ["register", "--fixed", fixed, "--moving", moving, "-o", "OUT", "--align", "none", "--overwrite"]
    register += ["--no-report", "--members", first, "--save"]
    fit = [*_training(data, work), "--runs", "OUT", "--name", "run"]
    resample = ["resample-field", field, "--to", fixed, "-o", "OUT/disp.nii.gz"]
    return {
        "evaluate": Verb(
            ["evaluate", "--identity", "--data", str(multi), "-o", "OUT"],
            ["evaluate", "--identity", "--data", str(data), "-o", "OUT"],
            ("out/evaluation.*",),
        ),
        "export": Verb(
            ["export", second, "-o", "OUT/member.safetensors"],
            ["export", first, "-o", "OUT/member.safetensors"],
            ("out/member.*",),
        ),
        "submit": Verb(
            ["submit", str(work / "fields2"), "--data", str(data), "-o", "OUT/fields.zip"],
            ["submit", str(work / "fields"), "--data", str(data), "-o", "OUT/fields.zip"],
            ("out/*.zip",),
        ),
        "resample-field": Verb([*resample, "--itk"], resample, ("out/disp.*",)),
        "apply": Verb(
            ["apply", "-t", str(work / "pair"), "--to", "fixed", "--image", fixed, "-o", "OUT/moved.nii.gz"],
            ["apply", "-t", str(work / "pair"), "--to", "fixed", "--image", moving, "-o", "OUT/moved.nii.gz"],
            ("out/moved.nii.gz",),
        ),
        "predict": Verb(
            [*predict, "--members", second, "--save-maps"],
            [*predict, "--members", first, "--save-maps"],
            ("out/disp_0100_0101.*", "out/disp_0101_0100.*", "out/map_0100_0101.*", "out/map_0101_0100.*"),
        ),
        "container": Verb(
            [*container, "--data", str(data), "--members", second],
            [*container, "--data", str(data), "--members", first],
            ("out/disp_0100_0101.*", "out/disp_0101_0100.*"),
        ),
        "register": Verb([*register, "map,alignments"], [*register, "map,transforms"], ("out/*",)),
        "fit": Verb([], fit, ("out/run/checkpoints/last.ckpt",), [*fit, "--resume"]),
    }


def _training(data: Path, work: Path) -> list[str]:
    return [
        "fit", "--data", str(data), "--data.cache", str(work / "cache"), "--data.num_workers", "0", "--wandb", "off",
        "--data.pairs_per_epoch", "3", "--data.batch_size", "1", "--trainer.max_epochs", "1", "--trainer.accelerator",
        "cpu", "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1", "--checkpoint-every", "1",
        "--model.features", "[4,4]", "--model.head_features", "[4,4]", "--model.window", "3", "--panels-every", "9",
    ]  # fmt: skip


def prepare(work: Path) -> None:
    """Makes the data set, two trainings, their fields and a registration, once."""
    from sitreg_lumir.demo.data import make_demo_data

    def data() -> int:
        make_demo_data(work / "data", shape=(20, 28, 24), voxel_size=8.0, training=2)
        return 0

    commands = verbs(work)
    training = _training(work / "data" / "LUMIR_dataset.json", work)
    steps: list[tuple[Path, Callable[[], int]]] = [(work / "data", data)]
    for name, seed in (("first", "1"), ("second", "2")):
        steps.append(
            (
                work / "runs" / name / "checkpoints" / "last.ckpt",
                _calling([*training, "--runs", str(work / "runs"), "--name", name, "--seed_everything", seed]),
            )
        )
    for result, arguments in (
        (work / "fields" / "disp_0101_0100.nii.gz", commands["predict"].new),
        (work / "fields2" / "disp_0101_0100.nii.gz", commands["predict"].old),
        (work / "pair", commands["register"].new),
    ):
        out = result if result.suffix != ".gz" else result.parent
        steps.append((result, _calling([part.replace("OUT", str(out)) for part in arguments])))
    for result, action in steps:
        if not result.exists():
            code, output, _ = in_child(action, work)
            if code:
                sys.exit(f"{result}: cannot be prepared\n{output}")


def _calling(arguments: list[str]) -> Callable[[], int]:
    def call() -> int:
        from sitreg_lumir import cli

        run = cli._run

        def begun(argv: Any) -> int:
            for begins in _pipe:
                os.write(begins, b"x")
            return run(argv)

        cli._run = begun
        sys.argv = ["sitreg-lumir", *arguments]
        return cli.main()

    return call


def in_child(
    action: Callable[[], int], folder: Path, *, after: float | None = None, number: int = signal.SIGKILL
) -> tuple[int, str, float]:
    """Runs in a forked process, which gets a signal after so many seconds.

    Returns:
        exit code, what it wrote, and the seconds from the signal (else from the start) to its end.
    """
    output = folder / "output.txt"
    ready, begins = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            null, file = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for source, target in ((null, 0), (file, 1), (file, 2)):
                os.dup2(source, target)
            _pipe.append(begins)
            code = action()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(begins)
    os.read(ready, 1)
    os.close(ready)
    start = time.monotonic()
    if after is not None:
        time.sleep(after)
        start = time.monotonic()
        os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, output.read_text(errors="replace"), time.monotonic() - start


class Disturbance:
    """Counts the file operations below a folder, and disturbs the k-th one.

    Args:
        folder: of the try.
        at: k, from 1; 0 only counts.
        kind: ``stop`` or ``full``.
    """

    def __init__(self, folder: Path, at: int, kind: str) -> None:
        self.folder, self.at, self.kind, self.count = str(folder), at, kind, 0
        sys.addaudithook(self._audit)
        flush = os.fsync

        def fsync(descriptor: Any) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(self.folder):
                self._operation()
            flush(descriptor)

        os.fsync = fsync

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and isinstance(flags, int) and flags & _WRITES and self._inside(path):
                self._operation()
        elif event == "fcntl.flock" or (
            event in _CHANGES and isinstance(arguments[0], str | bytes | os.PathLike) and self._inside(arguments[0])
        ):
            self._operation()

    def _inside(self, path: Any) -> bool:
        text = os.fsdecode(path)
        return text.startswith(self.folder) or not text.startswith("/")  # relative: a folder that is being removed

    def _operation(self) -> None:
        self.count += 1
        if self.count == self.at:
            if self.kind == "stop":
                os._exit(99)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fingerprint(path: Path) -> str:
    """A checksum of a file's content; of JSON without what differs between two runs."""
    content = path.read_bytes()
    if path.suffix == ".json":
        values = json.loads(content)
        content = json.dumps({key: value for key, value in values.items() if key not in _VOLATILE}).encode()
    return hashlib.sha256(content).hexdigest()


def state(folder: Path, verb: Verb) -> list[dict[str, str]]:
    """Of each group, its files and their fingerprints."""
    return [
        {path.name: fingerprint(path) for path in sorted(folder.glob(group)) if not path.name.startswith(".")}
        for group in verb.groups
    ]


class Tries:
    """Runs tries of a verb and judges them."""

    def __init__(self, work: Path, name: str, verb: Verb) -> None:
        self.work, self.name, self.verb = work, name, verb
        self.old: Path | None = None
        if verb.old:
            self.old = self._made("old", verb.old)
        self.new = self._made("new", verb.new)
        self.states = [state(self.new, verb), [{} for _ in verb.groups]]
        if self.old is not None:
            self.states.append(state(self.old, verb))

    def _made(self, kind: str, arguments: list[str]) -> Path:
        folder = self.work / "wholes" / self.name / kind
        if not (folder / "seconds").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            code, output, seconds = in_child(self._call(arguments, folder), folder)
            if code:
                sys.exit(f"{self.name}: {output}")
            (folder / "seconds").write_text(str(seconds))
        return folder

    def _call(self, arguments: list[str], folder: Path) -> Callable[[], int]:
        return _calling([part.replace("OUT", str(folder / "out")) for part in arguments])

    @property
    def seconds(self) -> float:
        """How long the command takes undisturbed."""
        return float((self.new / "seconds").read_text())

    def count(self) -> int:
        """The number of file operations of the command."""
        folder = self._start("count")

        def action() -> int:
            disturbance = Disturbance(folder, 0, "")
            self._call(self.verb.new, folder)()
            (folder / "operations").write_text(str(disturbance.count))
            return 0

        in_child(action, folder)
        return int((folder / "operations").read_text())

    def disturb(self, at: int, kind: str) -> str:
        """Disturbs the k-th operation; the problem, if there is one."""
        folder = self._start(f"{kind}-{at}")

        def action() -> int:
            call = self._call(self.verb.new, folder)
            Disturbance(folder, at, kind)
            return call()

        code, output, _ = in_child(action, folder)
        if "Traceback" in output:
            return f"traceback: {output.strip().splitlines()[-1][:200]}"
        if kind == "full" and code not in (0, 2):
            return f"exit code {code}"
        return self._judge(folder)

    def kill(self, after: float, number: int) -> str:
        """Sends a signal after so many seconds; the problem, if there is one."""
        folder = self._start(f"signal-{number}-{after:.3f}")
        code, output, seconds = in_child(self._call(self.verb.new, folder), folder, after=after, number=number)
        if number == signal.SIGTERM:
            if code not in (0, 143):
                return f"exit code {code}: {output.strip()[-200:]}"
            if seconds > MOST_SECONDS:
                return f"ended after {seconds:.1f} s"
            if left := leftovers(folder):
                return f"left {left[0]}"
        return self._judge(folder)

    def _start(self, name: str) -> Path:
        folder = self.work / "tries" / self.name / name
        shutil.rmtree(folder, ignore_errors=True)
        if self.old is None:
            folder.mkdir(parents=True)
        else:
            shutil.copytree(self.old, folder)
        return folder

    def _judge(self, folder: Path) -> str:
        in_child(lambda: _clean(folder), folder)
        try:
            groups = state(folder, self.verb)
        except ValueError as error:
            return f"damaged: {error}"
        for number, group in enumerate(groups):
            if self.verb.again is None and group not in (known[number] for known in self.states):
                return f"mixed: {sorted(group)}"
        resume = self.verb.again is not None and bool(groups[0])
        code, output, _ = in_child(self._call(self.verb.again if resume else self.verb.new, folder), folder)  # type: ignore[arg-type]
        if code:
            return f"again: exit code {code}: {output.strip()[-200:]}"
        if left := leftovers(folder):
            return f"again left {left[0]}"
        if self.verb.again is None and state(folder, self.verb) != self.states[0]:
            return "again gave another result"
        shutil.rmtree(folder)
        return ""


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders, and locks."""
    return [path.name for path in folder.rglob(".*") if not path.name.startswith(".nfs")]


def _clean(folder: Path) -> int:
    from sitreg_lumir.io.temporary import clean_leftovers

    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        clean_leftovers(path)
    return 0


def table(results: dict[str, Any]) -> str:
    """A Markdown table of what was tried and what went wrong."""
    lines = ["| verb | operations | stops | failures | full disks | failures | kills | failures |", "|---" * 8 + "|"]
    for name, result in results.items():
        cells = [name, str(result["operations"])]
        for kind in ("stop", "full", "kill"):
            tries = result.get(kind, {})
            cells += [str(len(tries)), str(sum(1 for problem in tries.values() if problem))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs what has not been run yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the tries and results.json")
    parser.add_argument("--verbs", nargs="+", help="only these")
    parser.add_argument("--every", type=int, default=1, help="only each so many-th operation (default: 1)")
    parser.add_argument("--kills", type=int, default=50, help="at random times, of each verb (default: 50)")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further try after so long")
    parser.add_argument("--table", action="store_true", help="print what has been tried, and stop")
    options = parser.parse_args()
    work = options.output.absolute()
    work.mkdir(parents=True, exist_ok=True)
    file = work / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if options.table:
        print(table(results))
        return
    import sitreg_lumir.challenge.predict
    import sitreg_lumir.demo.data
    import sitreg_lumir.registration.register
    import sitreg_lumir.train.run  # noqa: F401

    end = time.monotonic() + 60 * options.minutes
    prepare(work)
    for name, verb in verbs(work).items():
        if options.verbs and name not in options.verbs:
            continue
        tries = Tries(work, name, verb)
        result = results.setdefault(name, {"operations": tries.count()})
        planned = [(kind, at) for at in range(1, result["operations"] + 1, options.every) for kind in ("stop", "full")]
        planned += [("kill", at) for at in range(options.kills)]
        for kind, at in planned:
            if time.monotonic() > end:
                break
            if str(at) in result.setdefault(kind, {}):
                continue
            if kind == "kill":
                when = random.Random(f"{name} {at}").uniform(0, tries.seconds)
                problem = tries.kill(when, (signal.SIGKILL, signal.SIGTERM)[at % 2])
            else:
                problem = tries.disturb(at, kind)
            result[kind][str(at)] = problem
            if problem:
                print(f"{name}, {kind} {at}: {problem}", flush=True)
            draft = file.with_suffix(".draft")
            draft.write_text(json.dumps(results, indent=1))
            os.replace(draft, file)
    print(table(results))


if __name__ == "__main__":
    main()
