"""What every stage shares and what is not the method: settings, schedule, optimizer step, resume, metrics, progress."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..device import rank, world_size
from ..files import read_json, replace_folder, write_json
from . import distributed

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
ARGUMENTS = "train_args.json"


@dataclass
class Settings:
    """How to train; every field is the `train.py` flag of that name. Fields of other stages are ignored."""

    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # sequences per optimizer step, over all processes
    micro_batch_size: int = 0  # sequences per forward pass of one process; 0: its whole share of the batch
    max_length: int = 512  # tokens
    lr: float = 5e-5  # peak
    warmup_steps: int = 0
    schedule: str = "linear"  # decay to zero: linear or cosine
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    mask_probability: float = 0.2
    mask_style: str = "bert"
    attention_dropout: float = 0.3
    temperature: float = 0.05  # cosine / temperature; 0.05 is the paper's scale of 20
    gradient_checkpointing: bool = False
    seed: int = 0
    eval_every: int = 0  # steps; 0: a quarter of the run
    save_every: int = 0  # steps; 0: no checkpoints


def get_lr(step: int, settings: Settings) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warmup, then linear or cosine decay to zero."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)  # in [0, 1)
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * (1 - progress)


def seed_torch(*numbers: int) -> torch.Generator:
    """Seeds torch, and returns a CPU generator of its own, with a number that changes with any of `numbers`."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def plan_output(output: str | Path, arguments: dict, *, overwrite: bool = False, resume: bool = False) -> Path:
    """The folder a run is to work in; nothing is written yet. It is the output itself, or `OUTPUT.part` beside it while an
    earlier run stands there, which stays whole until `finish_output` puts the new one in its place.

    Raises:
        ValueError: the output already holds something, or `resume` finds a run with other arguments.
    """
    output = Path(output)
    beside = output.with_name(output.name + ".part")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: is a file, expected a folder")
    if resume:
        work = beside if beside.is_dir() else output
        before = read_json(work / ARGUMENTS) if (work / ARGUMENTS).is_file() else {}
        if changed := [name for name in before if name in arguments and before[name] != arguments[name]]:
            found = ", ".join(f"{name} was {before[name]!r}, is {arguments[name]!r}" for name in changed)
            raise ValueError(f"--resume: {work} was started with other arguments: {found}")
        return work
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            state = "files" if is_finished(output) else "an unfinished run; --resume continues it"
            raise ValueError(f"--output {output}: already holds {state}; --overwrite starts anew")
        if not (output / ARGUMENTS).exists():
            raise ValueError(f"--output {output}: holds files, but not a run; --overwrite replaces runs only")
        return beside
    return output


def is_finished(work: Path) -> bool:
    """config.json is the last file of a result, and the checkpoint goes after it."""
    return (work / "config.json").is_file() and not (work / CHECKPOINT).exists()


def open_output(work: Path, arguments: dict | None = None) -> None:
    """Makes a run's folder, once every check has passed, and notes the exact arguments in it.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        if work.name.endswith(".part"):  # what an earlier try to replace a run has left
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        (work / METRICS).unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
        if arguments is not None:
            write_json(work / ARGUMENTS, arguments)
    except OSError as error:
        raise ValueError(f"--output {work}: cannot be written ({error})") from None


def finish_output(work: Path, output: str | Path) -> None:
    """The run's result is saved in `work`: puts it in its place, and drops the checkpoint, which is no longer needed."""
    output = Path(output)
    if work != output:
        replace_folder(work, output)
    (output / CHECKPOINT).unlink(missing_ok=True)


class Loop:
    """The optimizer's side of a training loop: `for step in loop: ...; loop.update(loss)`.

    Everything random in a step is drawn after torch was seeded with the run's seed and the step's number. So a run that is
    killed and resumed takes the same steps as one that was not, and an evaluation in between changes nothing.

    With several processes each trains on its share of the batch and calls `update` with its part of the loss.

    Args:
        model: its parameters with requires_grad are trained.
        output: the run's folder, for metrics and checkpoints, made before the first step; None keeps nothing.
        arguments: noted in the folder.
        evaluate: called before the first step, every `eval_every` steps and after the last; returns named numbers.
        resume: continue from the folder's checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        output: Path | None = None,
        *,
        arguments: dict | None = None,
        evaluate: Callable[[], dict] | None = None,
        resume: bool = False,
        quiet: bool = False,
    ):
        if settings.batch_size % world_size():
            raise ValueError(
                f"--batch-size is {settings.batch_size}, which {world_size()} processes do not divide evenly"
            )
        self.model, self.settings, self.output, self.quiet = model, settings, output, quiet
        self.arguments, self.is_new = arguments, not resume
        self.is_main = rank() == 0  # who writes and reports
        self.evaluate = evaluate
        self.parameters = trainable_parameters(model)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.lr,
            betas=(0.9, settings.adam_beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.start = self._load_checkpoint() if resume else 0
        distributed.synchronize(list(self.parameters.values()))
        self.history: list[dict] = []  # what metrics.jsonl holds, for notebooks

    def __iter__(self) -> Iterator[int]:
        s = self.settings
        self.open()
        self.bar = tqdm(total=s.steps, initial=self.start, desc="training", disable=self.quiet or not self.is_main, mininterval=1.0)
        self.model.train()
        if self.start == 0:
            self._evaluate(0)
        eval_every = s.eval_every or -(-s.steps // 4)
        for self.step in range(self.start, s.steps):
            self.lr = get_lr(self.step, s)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr
            self.generator = seed_torch(s.seed, self.step)  # for what all processes must draw alike
            self.started = time.perf_counter()
            yield self.step
            done = self.step + 1
            if done == s.steps or done % eval_every == 0:
                self._evaluate(done)
            if s.save_every and done % s.save_every == 0 and done < s.steps:
                self._save_checkpoint(done)
        self.bar.close()
        self.model.eval()

    def open(self) -> None:
        """Makes the folder of a new run; iterating does it too, once every check has passed."""
        if self.output is not None and self.is_new and self.is_main:
            open_output(self.output, self.arguments)
        self.is_new = False

    def micro_batches(self) -> list[slice]:
        """This process's rows of the batch, as many at a time as one forward pass takes."""
        share = self.settings.batch_size // world_size()
        first, size = rank() * share, self.settings.micro_batch_size or share
        return [slice(first + i, first + min(i + size, share)) for i in range(0, share, size)]

    def seed_dropout(self, part: int = 0) -> None:
        """Before forward pass `part` of a step: the same noise each time for it, another for any other process."""
        seed_torch(self.settings.seed, self.step, rank() + 1, part)

    def update(self, loss: Tensor, tokens: int) -> None:
        """The end of a step: gradients of all processes added up, clipping, optimizer step, report.

        Args:
            loss: scalar, this process's part of the step's loss; the part's gradients are already in place.
            tokens: real tokens of the whole step, for the report.
        """
        loss = loss.detach().clone()
        distributed.add_up([loss, *(p.grad for p in self.parameters.values())])
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        record = {"step": self.step + 1, "loss": float(loss), "lr": self.lr, "grad_norm": float(norm)}  # waits for the device
        record["tokens_per_s"] = rate = tokens / (time.perf_counter() - self.started)
        if not math.isfinite(record["loss"]):
            raise ValueError(f"the loss of step {self.step + 1} is {record['loss']}: lower --lr or use --dtype float32")
        self._record({name: round(value, 8) for name, value in record.items()})
        self.bar.set_postfix_str(f"loss {record['loss']:.3f}, lr {self.lr:.1e}, {rate:.0f} tokens/s", refresh=False)
        self.bar.update()

    def _evaluate(self, step: int) -> None:
        if self.evaluate is None:
            return
        self.model.eval()
        with torch.no_grad():
            numbers = self.evaluate()
        self.model.train()
        self._record({"step": step} | numbers)
        if not self.quiet and self.is_main:
            self.bar.write(f"step {step:>5}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))

    def _record(self, record: dict) -> None:
        self.history.append(record)
        if self.output is not None and self.is_main:
            with open(self.output / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    # ---- killed and resumed ----

    def _save_checkpoint(self, step: int) -> None:
        """Trained weights and the optimizer's moments after `step` steps, in one file that is replaced atomically."""
        if self.output is None or not self.is_main:
            return
        tensors = {f"parameter.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        beside = self.output / (CHECKPOINT + ".part")
        save_file({name: t.contiguous() for name, t in tensors.items()}, beside, metadata={"step": str(step)})
        os.replace(beside, self.output / CHECKPOINT)

    def _load_checkpoint(self) -> int:
        path = self.output / CHECKPOINT
        if not path.is_file():
            if self.is_main and not self.quiet:
                print(f"{self.output}: no checkpoint yet, training starts from the beginning")
            self.is_new = True
            return 0
        with safetensors.safe_open(path, framework="pt") as file, torch.no_grad():
            step = int(file.metadata()["step"])
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(f"parameter.{name}"))
                state = {key: file.get_tensor(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
                # AdamW counts its steps on the host unless fused on a GPU; the moments live beside the parameter.
                self.optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
        if self.is_main:
            lines = (self.output / METRICS).read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            (self.output / METRICS).write_text("".join(line + "\n" for line in kept))
        return step
