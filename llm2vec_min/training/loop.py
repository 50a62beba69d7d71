"""What every stage shares and what is not the method: optimizer step, metrics, progress, checkpoints."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..device import kept_random_state, rank, world_size
from ..files import give_usual_mode, put
from ..model import Decoder
from ..weights import not_finite
from . import distributed
from .output import BEFORE, CHECKPOINT, METRICS, is_finished, open_output
from .settings import Settings, get_lr

SAVE_SECONDS = 120  # between checkpoints where --save-every names no steps: what a kill costs at most
MOST_SKIPPED = 5  # steps in a row without a finite gradient


def seed_torch(*numbers: int) -> torch.Generator:
    """Seeds torch, and a CPU generator that is returned, with one number made of all `numbers`."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def checksum(step: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of all that a checkpoint says. safetensors finds a file cut short, but not one that was written in part."""
    digest = hashlib.sha256(step.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Loop:
    """The optimizer's side of a training loop: `for step in loop: ...; loss.backward(); loop.update(loss, tokens)`.

    Everything random in a step is drawn after torch was seeded with the run's seed and the step's number. So a run that is
    killed and resumed takes the same steps as one that was not, and an evaluation in between changes nothing. After the last step,
    and however else it ends, the model is in eval mode and torch's random numbers go on as if nothing had been drawn.

    With several processes each trains on its share of the batch and calls `update` with its part of the loss.

    Args:
        model: its parameters with requires_grad are trained; their gradients so far are dropped.
        output: the run's folder, for metrics and checkpoints, made before the first step; None keeps nothing.
        arguments: noted in the folder.
        evaluate: called before the first step, every `eval_every` steps and after the last; returns named numbers.
        resume: continue from the folder's checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        output: str | Path | None = None,
        *,
        arguments: dict | None = None,
        evaluate: Callable[[], dict] | None = None,
        resume: bool = False,
        quiet: bool = False,
    ):
        if settings.batch_size % world_size():
            raise ValueError(f"--batch-size is {settings.batch_size}, which {world_size()} processes cannot share evenly")
        self.model, self.settings, self.quiet = model, settings, quiet
        self.output = None if output is None else Path(output).expanduser()
        self.arguments, self.resumed = arguments, resume
        self.is_new = not resume  # the folder has yet to be made
        self.is_main = rank() == 0  # who writes and reports
        self.evaluate = evaluate
        self.parameters = trainable_parameters(model)
        if not self.parameters:
            raise ValueError(
                "the model has no weight to train: give it a fresh adapter, add_lora(l2v.decoder), on top of merged ones"
            )
        for module in model.modules():
            if isinstance(module, Decoder):
                module.gradient_checkpointing |= settings.gradient_checkpointing
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.lr,
            betas=(0.9, settings.adam_beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.start = self._load_checkpoint() if resume and self.output is not None else 0
        distributed.broadcast(list(self.parameters.values()))
        self.history: list[dict] = []  # what this process adds to metrics.jsonl, for notebooks

    def __iter__(self) -> Iterator[int]:
        self.open()
        self.skipped = 0  # steps without a finite gradient, in a row
        self.flat = 0  # steps whose gradient was exactly 0 though their loss was not, in a row
        self.stopping = False  # this process got a signal
        self.stopped = False  # every process knows of one
        self.saved = time.monotonic()
        hidden = self.quiet or not self.is_main
        self.bar = tqdm(total=self.settings.steps, initial=self.start, desc="training", disable=hidden, mininterval=1.0)
        handlers = self._catch_signals()
        self.optimizer.zero_grad(set_to_none=True)
        for module in self.model.modules():
            if isinstance(module, Decoder) and any(".lora_" not in name for name in trainable_parameters(module)):
                module.changes += 1  # as after `merge_lora`, the base will not be the checkpoint it came from
        try:
            with kept_random_state(next(iter(self.parameters.values())).device):
                yield from self._steps()
        finally:
            self.model.eval()
            self._restore(handlers)
            self.bar.close()

    def _steps(self) -> Iterator[int]:
        s = self.settings
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
            late = not s.save_every and time.monotonic() - self.saved > SAVE_SECONDS
            if done < s.steps and (late or self.stopped or (s.save_every and done % s.save_every == 0)):
                self._save_checkpoint(done)
            if done < s.steps and self.stopped:
                raise KeyboardInterrupt(f"stopped after step {done}, which is saved; the same command with --resume goes on")
        self._check_result()

    def _check_result(self) -> None:
        """ValueError if the run ended without a usable result: weights that are not finite, its last steps skipped and these
        more than half of it (a longer run ends at `MOST_SKIPPED` in a row), or a gradient of exactly 0 in the last steps though
        they had a loss (all vectors are zero)."""
        broken = not_finite({name: parameter.detach() for name, parameter in self.parameters.items()})
        steps, what = self.settings.steps, ""
        if broken:
            what = f"the trained weights are not finite ({broken})"
        elif self.flat >= MOST_SKIPPED:
            what = f"the gradient was exactly 0 in the last {self.flat} of {steps} steps: the model has collapsed"
        elif 2 * self.skipped > steps:
            what = f"{self.skipped} of {steps} steps, the last ones, were not finite"
        if what:
            raise ValueError(f"{what}, so there is no result; start anew with a lower --lr or --dtype float32, and --overwrite")

    def open(self) -> None:
        """Makes the folder of a new run; iterating does it too, once every check has passed."""
        if self.output is not None and self.is_new and self.is_main:
            if self.resumed:  # --resume found no whole checkpoint
                for name in (CHECKPOINT, BEFORE):
                    (self.output / name).unlink(missing_ok=True)
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

    def update(self, loss: Tensor, tokens: int, **numbers: float) -> None:
        """The end of a step: gradients of all processes added up, clipping, optimizer step, report.

        Args:
            loss: scalar, this process's part of the step's loss; the part's gradients are already in place.
            tokens: real tokens of the whole step, for the report.
            numbers: more values for metrics.jsonl, by name; process 0's are written.
        Raises:
            ValueError: no weight has a gradient, too many steps in a row have one that is not finite, or a number's name is taken.
        """
        if taken := numbers.keys() & {"step", "lr", "grad_norm", "tokens_per_s"}:
            raise ValueError(f"{min(taken)} is a number of the loop's own; give yours another name")
        more = {name: float(torch.as_tensor(value).detach()) for name, value in numbers.items()}
        unreached = [parameter for parameter in self.parameters.values() if parameter.grad is None]
        if len(unreached) == len(self.parameters):
            raise ValueError("no weight has a gradient: call loss.backward() before update")
        for parameter in unreached:  # by this process's loss: zeros, to be added up; moments and weight decay still act
            parameter.grad = torch.zeros_like(parameter)
        loss, stop = loss.detach().clone(), loss.new_full((), float(self.stopping))
        distributed.all_reduce([loss, stop, *(p.grad for p in self.parameters.values())])
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm or math.inf)
        loss, norm, stop = torch.stack([loss, norm.to(loss), stop]).tolist()
        self.stopped = stop > 0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._skip(loss, norm)
            return
        self.flat = self.flat + 1 if norm == 0 and loss != 0 else 0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped = 0
        rate = tokens / (time.perf_counter() - self.started)
        record = dict(step=self.step + 1, loss=loss, lr=self.lr, grad_norm=norm, tokens_per_s=rate, **more)
        self._record({name: float(f"{value:.8g}") for name, value in record.items()})
        self.bar.set_postfix_str(f"loss {record['loss']:.3f}, lr {self.lr:.1e}, {rate:.0f} tokens/s", refresh=False)
        self.bar.update()

    def _skip(self, loss: float, norm: float) -> None:
        """A step without a finite gradient changes nothing but the count.

        Raises:
            ValueError: it was one too many; the state before the first of them is saved.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped, self.flat = self.skipped + 1, 0
        step, what = self.step + 1, f"the loss is {loss}, the gradient's norm {norm}"
        self._record({"step": step, "skipped": what})
        if self.is_main and not self.quiet:
            self.bar.write(f"step {step:>5}: {what}; skipped ({self.skipped} in a row)")
        self.bar.update()
        if self.skipped == MOST_SKIPPED:
            good = step - MOST_SKIPPED
            if good > 0:
                self._save_checkpoint(good)
            raise ValueError(
                f"{MOST_SKIPPED} steps in a row up to {step} were not finite ({what}); start anew with a lower --lr or "
                "--dtype float32, and --overwrite"
                + (f". The state after step {good} is saved, for --resume as it was" if good > 0 and self.output else "")
            )

    def _catch_signals(self) -> dict:
        """The first SIGINT or SIGTERM ends the run after its step; the next finds the handlers that were there before."""
        if self.output is None or threading.current_thread() is not threading.main_thread():
            return {}

        def stop(number, frame):
            self.stopping = True
            self._restore(before)
            if self.is_main:
                print("stopping after this step; once more stops at once", file=sys.stderr)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return before

    @staticmethod
    def _restore(handlers: dict) -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

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
            undefined = {name: None for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
            try:
                with open(self.output / METRICS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record | undefined) + "\n")  # JSON has no nan
            except OSError as error:
                raise ValueError(
                    f"{self.output / METRICS}: cannot be written ({error}); --resume goes on from what is saved"
                ) from None

    # ---- checkpoints ----

    def _save_checkpoint(self, step: int) -> None:
        """Trained weights and the optimizer's moments after `step` steps, in one file that is on the disk before it takes the
        last one's place; that one is kept beside it, for disks that lose what they said was written.

        Raises:
            ValueError: it could not be written; those before are whole.
        """
        if self.output is None or not self.is_main:
            return
        tensors = {f"parameter.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        tensors |= {f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()}  # a decoder has none, a head may
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        new, old, beside = (self.output / name for name in (CHECKPOINT, BEFORE, CHECKPOINT + ".part"))
        try:
            save_file(
                tensors,
                beside,
                metadata={"step": str(step), "sha256": checksum(str(step), tensors), "torch": torch.__version__},
            )
            give_usual_mode(beside)
            with open(self.output / METRICS, "ab") as file:
                os.fsync(file.fileno())
            if new.exists():
                os.replace(new, old)
            put(beside, new)
        except (OSError, safetensors.SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise ValueError(
                f"{new}: the state of step {step} could not be saved ({error}); what was saved before is whole"
            ) from None
        self.saved = time.monotonic()

    def _load_checkpoint(self) -> int:
        """The step of the newest whole checkpoint, with its state; metrics of later steps are dropped, and a torn line."""
        if is_finished(self.output):
            raise ValueError(f"{self.output}: holds a finished run or a model; there is nothing to go on with")
        step = self._read_checkpoint(self.output / CHECKPOINT)
        if step == 0 and (step := self._read_checkpoint(self.output / BEFORE)) and self.is_main:
            (self.output / CHECKPOINT).unlink(missing_ok=True)  # or it would take the place of the whole one
        if step == 0:
            self._say(f"{self.output}: no checkpoint yet, training starts from the beginning")
            self.is_new = True
            return 0
        if self.is_main:
            path, kept = self.output / METRICS, []
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
                try:
                    kept += [line] if json.loads(line)["step"] <= step else []
                except (ValueError, KeyError, TypeError):  # the line that was being written when the run was killed
                    continue
            beside = self.output / (METRICS + ".part")
            beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            put(beside, path)
        return step

    def _read_checkpoint(self, path: Path) -> int:
        """Takes over a checkpoint's state; 0, with a line that says why, if it is not whole."""
        if not path.is_file():
            return 0
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            if checksum(about.get("step", ""), tensors) != about.get("sha256"):
                raise ValueError("its checksum does not match")
        except FileNotFoundError:  # process 0 has found it torn, and removed it
            return 0
        except (OSError, MemoryError) as error:  # it may be whole
            raise ValueError(f"{path}: cannot be read now ({error}); nothing was changed") from None
        except Exception as error:  # SafetensorError is a plain Exception
            self._say(f"{path}: not whole ({error}); the one before, if there is one, is used")
            return 0
        if about.get("torch") != torch.__version__:
            self._say(
                f"{path}: made by torch {about.get('torch')}, this is {torch.__version__}: the run goes on, not bit for bit"
            )
        ours = {f"parameter.{name}": parameter.shape for name, parameter in self.parameters.items()}
        theirs = {key: tensor.shape for key, tensor in tensors.items() if key.startswith("parameter.")}
        if wrong := sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key)):
            raise ValueError(f"{path}: has other weights, or of other shapes, than this run trains: {', '.join(wrong[:3])}")
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(tensors.get(f"buffer.{name}", buffer))
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"parameter.{name}"])
                # a fused AdamW keeps its count of steps, like the moments, on the parameter's device
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}.{name}" in tensors:  # else no step was taken yet
                        self.optimizer.state[parameter][key] = tensors[f"{key}.{name}"].to(parameter.device)
        return int(about["step"])

    def _say(self, line: str) -> None:
        if self.is_main and not self.quiet:
            print(line)
