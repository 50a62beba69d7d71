"""Runs that are killed, starved or stopped, each continued by the same command with --resume: the end is the same, bit for bit.

One other process imports the package once and forks a child for every run: `python tests/training/test_faults.py ...`.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FLAGS = {
    "mntp": ["--stage", "mntp", "--eval", "", "--max-length", "16"],
    "simcse": ["--stage", "simcse", "--eval", ""],
    "supervised": ["--stage", "supervised", "--eval", "", "--micro-batch-size", "5"],
    "pretrain": [
        "--stage", "pretrain", "--vocab-size", "300", "--hidden-size", "16", "--intermediate-size", "24", "--num-hidden-layers", "1",
        "--max-length", "16",
    ],
}  # fmt: skip


class Lab:
    """Runs of one stage in forked children."""

    def __init__(self, stage: str, model: str, place: str):
        self.place, self.model, self.text = Path(place), Path(place) / "model", Path(place) / "text.txt"
        shutil.copytree(model, self.model)
        words = "the cat sat on the mat and a dog ran over that hill while it was cold".split()
        rng = random.Random(0)
        self.text.write_text(
            "".join(" ".join(rng.choices(words, k=9)) + f" {i}\n" for i in range(2200 if stage == "pretrain" else 100))
        )
        if stage == "supervised":
            lines = self.text.read_text().splitlines()
            self.text = self.text.with_suffix(".jsonl")
            rows = [{"query": line, "positive": line[:20], "negative": line[9:]} for line in lines]
            self.text.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.flags = [
            *FLAGS[stage], *(["--model", str(self.model)] if stage != "pretrain" else []), "--data", str(self.text),
            "--steps", "6", "--batch-size", "4", "--device", "cpu", "--lr", "1e-3", "--save-every", "1", "--eval-every", "2",
        ]  # fmt: skip
        self.number, self.events = 0, self.place / "events"

    def run(self, output: Path, *flags: str, before=None, kill_after: float | None = None) -> tuple[int, str]:
        """Exit code (negative: the signal that ended it) and all that was printed."""
        reading, writing = os.pipe()  # no file, which a full disk would cut
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(writing, 1), os.dup2(writing, 2)
                sys.argv = ["train.py", *self.flags, "--output", str(output), *flags]
                if before:
                    before(output)
                cli.run(train.main)
                code = 0
            except SystemExit as end:
                code = end.code
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        os.close(writing)
        killer = threading.Timer(kill_after or 0, os.kill, (child, signal.SIGKILL))
        if kill_after is not None:
            killer.start()
        with open(reading, encoding="utf-8", errors="replace") as pipe:
            said = pipe.read()  # until the child has ended
        if kill_after is not None:  # before the child's number may be another's
            killer.cancel(), killer.join()
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), said

    def result(self, output: Path) -> tuple:
        """All that a run leaves, but for its speed and its own name."""
        found = {
            path.name: path.read_bytes() for path in output.iterdir() if path.name not in ("metrics.jsonl", "train_args.json")
        }
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop("tokens_per_s", None)
        beside = sorted(path.name for path in output.parent.iterdir() if path.name.startswith(output.name))
        return found, lines, [name.removeprefix(output.name) for name in beside]

    def undisturbed(self) -> None:
        def count(output):
            """One line for each time a file of the run is opened, renamed or removed."""
            log = os.open(self.events, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            sys.addaudithook(lambda event, args: self.touches(output, event, args) and os.write(log, event.encode() + b"\n"))

        started = time.monotonic()
        code, said = self.run(self.place / "whole", before=count)
        self.seconds = time.monotonic() - started
        assert code == 0, said
        self.expected = self.result(self.place / "whole")
        self.points = len(self.events.read_text().splitlines())

    @staticmethod
    def touches(output: Path, event: str, args: tuple) -> bool:
        return event in ("open", "os.rename", "os.remove", "os.mkdir") and str(args[0]).startswith(str(output))

    def fresh(self) -> Path:
        self.number += 1
        return self.place / f"run{self.number}"

    def check(self, output: Path, what: str, *flags: str) -> str:
        code, said = self.run(output, "--resume", *flags)
        assert code == 0, f"{what}: --resume ended with {code}: {said[-2000:]}"
        for found, expected, kind in zip(self.result(output), self.expected, ("files", "metrics", "beside"), strict=True):
            assert found == expected, f"{what}: another end, {kind}: {str(found)[:1500]} instead of {str(expected)[:1500]}"
        shutil.rmtree(output)
        return said

    # ---- what can happen ----

    def killed_at_random(self, seed: int) -> None:
        output, rng = self.fresh(), random.Random(seed)
        for _ in range(rng.choice([1, 1, 2])):
            self.run(output, "--resume", kill_after=rng.uniform(0.05, self.seconds))
        self.check(output, f"seed {seed}")

    def killed_at_point(self, point: int) -> None:
        """As a file is about to be opened, renamed or removed for the `point`-th time."""
        output = self.fresh()

        def die(output):
            left = [point]

            def hook(event, args):
                if self.touches(output, event, args):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)

        code, _ = self.run(output, before=die)
        assert code == -signal.SIGKILL, point
        self.check(output, f"point {point} of {self.points}")

    def killed_in_a_line(self) -> None:
        """Half a line of metrics is on the disk."""
        output = self.fresh()

        def die(output):
            def record(loop, what):
                original(loop, what)
                if what["step"] == 4:
                    with open(output / "metrics.jsonl", "a") as file:
                        file.write('{"step": 5, "lo')
                    os.kill(os.getpid(), signal.SIGKILL)

            original, Loop._record = Loop._record, record

        code, _ = self.run(output, before=die)
        assert code == -signal.SIGKILL
        self.check(output, "half a line")

    def killed_while_writing_a_checkpoint(self) -> None:
        output = self.fresh()

        def die(output):
            def save_half(tensors, path, metadata):
                original(tensors, path, metadata=metadata)
                if metadata["step"] == "3":
                    os.truncate(path, path.stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)

            original, loop.save_file = loop.save_file, save_half

        code, _ = self.run(output, before=die)
        assert code == -signal.SIGKILL
        self.check(output, "half a checkpoint")

    def torn_checkpoint(self, *which: int) -> None:
        """A disk that promised and forgot: the newest checkpoint is of the right size, with another byte, or cut."""
        kinds = ("a byte", "cut", "empty", "metadata")
        for damage in [kinds[i] for i in which] or kinds:
            output = self.fresh()

            def die(output):
                def save(self, step):
                    original(self, step)
                    if step == 3:
                        os.kill(os.getpid(), signal.SIGKILL)

                original, Loop._save_checkpoint = Loop._save_checkpoint, save

            self.run(output, before=die)
            path = output / "checkpoint.safetensors"
            data = bytearray(path.read_bytes())
            if damage == "a byte":
                data[-100] ^= 1
            elif damage == "metadata":
                at = data.index(b'"step":"3"') + 8
                data[at : at + 1] = b"4"
            else:
                del data[(len(data) // 2 if damage == "cut" else 0) :]
            path.write_bytes(data)
            said = self.check(output, damage)
            assert "checkpoint.safetensors: not whole" in said and "the one before, if there is one, is used" in said, said
            assert "Traceback" not in said

    def signals(self, *numbers: int) -> None:
        """The step ends, its state is saved, the message says how to go on."""
        for number in numbers or (signal.SIGINT, signal.SIGTERM):
            output = self.fresh()

            def send(output, number=number):
                def update(loop, *args, **named):
                    if loop.step == 2:
                        os.kill(os.getpid(), number)
                    original(loop, *args, **named)

                original, Loop.update = Loop.update, update

            code, said = self.run(output, "--save-every", "0", before=send)
            assert code == 130, said
            assert "stopped after step 3, which is saved; the same command with --resume goes on" in said
            assert "Traceback" not in said
            self.check(output, "signal", "--save-every", "0")

            def send_twice(output, number=number):
                def update(loop, *args, **named):
                    os.kill(os.getpid(), number), os.kill(os.getpid(), number)

                Loop.update = update

            code, said = self.run(output := self.fresh(), "--save-every", "0", before=send_twice)
            assert code == (130 if number == signal.SIGINT else -number), (code, said)
            shutil.rmtree(output)

    def full_disk(self, *limits: int) -> None:
        """No file may grow beyond a limit: in the checkpoint, and then in the result."""

        def limit(output, size):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        size = max(len(data) for data in self.expected[0].values())
        for most in limits or (size // 2, 400):
            output = self.fresh()
            code, said = self.run(output, before=lambda output, most=most: limit(output, most))
            assert code == 2 and "Traceback" not in said and "train.py: error: " in said.splitlines()[-1], said
            assert str(output) in said.splitlines()[-1] or "File too large" in said.splitlines()[-1], said
            self.check(output, f"full disk, {most} bytes")

    def other_circumstances(self) -> None:
        """Another text of the same length, no base model, other settings: one line, and nothing is damaged."""
        output = self.fresh()

        def stop(output):
            def update(loop, *args):
                if loop.step == 3:
                    os.kill(os.getpid(), signal.SIGINT)
                original(loop, *args)

            original, Loop.update = Loop.update, update

        assert self.run(output, before=stop)[0] == 130
        text = self.text.read_text()
        for change, undo, flags, words in [
            (lambda: self.text.write_text(text.replace("cat", "cow")), lambda: self.text.write_text(text), (), "SHA-256 of"),
            (lambda: self.text.write_text(text + "more\n"), lambda: self.text.write_text(text), (), "SHA-256 of"),
            (self.text.unlink, lambda: self.text.write_text(text), (), "text.txt: not a readable text file"),
            (
                lambda: self.model.rename(self.place / "m"),
                lambda: (self.place / "m").rename(self.model),
                (),
                "neither a folder nor",
            ),
            (lambda: None, lambda: None, ("--lr", "1e-2"), "lr was 0.001, is 0.01"),
            (lambda: None, lambda: None, ("--seed", "1"), "seed was 0, is 1"),
        ]:
            change()
            code, said = self.run(output, "--resume", *flags)
            undo()
            last = said.splitlines()[-1]
            assert code == 2 and last.startswith("train.py: error: ") and words in last, said
        self.check(output, "other circumstances")


@pytest.fixture
def lab(model_folder, tmp_path):
    def start(stage: str, *experiments: str):
        command = [sys.executable, __file__, stage, str(model_folder), str(tmp_path), *experiments]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-4000:]

    return start


def test_killed_and_starved(lab):
    lab(
        "mntp", "killed_at_random 1", "killed_at_random 2", "killed_at_random 3", "killed_at_point 9", "killed_at_point -1",
        "killed_in_a_line", "killed_while_writing_a_checkpoint", "torn_checkpoint 0 3", "full_disk 9000",
    )  # fmt: skip


def test_stopped_and_changed(lab):
    lab("simcse", "signals 15", "other_circumstances")


@pytest.mark.slow
@pytest.mark.parametrize("stage", FLAGS)
def test_killed_at_every_moment(lab, stage):
    rest = ["killed_in_a_line", "killed_while_writing_a_checkpoint", "torn_checkpoint", "full_disk", "signals"]
    lab(stage, *(f"killed_at_random {seed}" for seed in range(25)), "every_point", *rest)


if __name__ == "__main__":
    import train
    from llm2vec_min import cli
    from llm2vec_min.training import loop
    from llm2vec_min.training.loop import Loop

    lab = Lab(*sys.argv[1:4])
    lab.undisturbed()
    for experiment in sys.argv[4:]:
        name, *number = experiment.split()
        if name == "every_point":
            for point in range(lab.points):
                lab.killed_at_point(point)
        elif name == "killed_at_point":
            lab.killed_at_point(int(number[0]) % lab.points)
        else:
            getattr(lab, name)(*map(int, number))
