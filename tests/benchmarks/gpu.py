"""Speed, memory and growth for the real shapes with random weights, against transformers + peft in the same run.

    python tests/benchmarks/gpu.py                                             # one GPU, for 7B with 40 GB or more
    python tests/benchmarks/gpu.py --models 1.3b --batch 8                     # one with 24 GB
    python tests/benchmarks/gpu.py --device cpu --models 135m --batch 4 --length 128

Needs tests/requirements.txt, no download. Prints tables and writes each row as JSON (--output) as soon as it
is there. Each side runs alone, from loading to the last task, ours first in one round and last in the next; times are the best
of all repeats, peak memory is a side's own, with its weights. PEFT runs with its float32 adapters and with bfloat16 ones;
"compiled" is torch.compile on each layer, on either side (`--sides`). The plan is asked first: checkpointing, for all sides,
where ours does not fit without it, no row where it does not fit at all; what runs out of memory all the same leaves an empty
cell. "of the limit": operations (2 per weight and token forward, 2
backward, 2 more with checkpointing, 2 with GradCache) per second over those of a large bfloat16 matrix product, measured here.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]
from peak_memory import PeakMemory
from speed import Libraries, Ours, make_texts, synchronize

from llm2vec_min import LLM2Vec, ModelConfig
from llm2vec_min.config import PRESETS
from llm2vec_min.device import pick_device
from llm2vec_min.fast import compile_layers
from llm2vec_min.model import Decoder, init_weights
from llm2vec_min.tokenizer import Tokenizer
from llm2vec_min.training import memory
from llm2vec_min.training.mntp import mask_tokens
from llm2vec_min.training.settings import Settings
from llm2vec_min.training.simcse import backward, embed_twins, info_nce
from llm2vec_min.weights import load_decoder, save_checkpoint

TINY = PRESETS["tiny"].model
SHAPES = {  # hidden, layers, heads, key/value heads, MLP, vocabulary
    "test": (64, 2, 4, 2, 112, 4096),
    "135m": (576, 30, 9, 3, 1536, 49152),
    "360m": (960, 32, 15, 5, 2560, 49152),
    "1.3b": (2048, 24, 16, 16, 5504, 32000),
    "7b": (4096, 32, 32, 32, 11008, 32000),
    "mistral-7b": (4096, 32, 32, 8, 14336, 32000),
}


def make_config(name: str) -> ModelConfig:
    C, L, H, K, I, V = SHAPES[name]
    return ModelConfig(
        vocab_size=V, hidden_size=C, intermediate_size=I, num_hidden_layers=L, num_attention_heads=H,
        num_key_value_heads=K, head_dim=C // H, tie_word_embeddings=V > 40000,
    )  # fmt: skip


class RandomOurs(Ours):
    def __init__(self, name: str, device: torch.device, checkpointing: bool):
        torch.set_default_dtype(torch.bfloat16)
        with device:
            decoder = Decoder(make_config(name))
            lm_head = nn.Linear(decoder.config.hidden_size, decoder.config.vocab_size, bias=False)
        torch.set_default_dtype(torch.float32)
        init_weights(decoder)
        if decoder.config.tie_word_embeddings:
            lm_head.weight = decoder.embed_tokens.weight
        self.l2v = LLM2Vec(decoder.requires_grad_(False), Tokenizer(TINY)).eval()
        self.l2v.lm_head = lm_head.requires_grad_(False)
        pick_device(str(device))  # without cuDNN's attention, as in train.py and embed.py
        self.device, decoder.gradient_checkpointing = device, checkpointing

    def encode(self, texts):
        return self.l2v.encode(texts)  # batches by tokens

    def simcse_cached(self, texts, micro_batch_size):
        """GradCache."""
        self.set_dropout(0.3)
        encoded = self.l2v.tokenizer.encode(texts, max_length=128)
        parts = [encoded[i : i + micro_batch_size] for i in range(0, len(encoded), micro_batch_size)]

        def embed(part):
            torch.manual_seed(part)
            return torch.stack(embed_twins(self.l2v, parts[part]), dim=1)

        backward(embed, len(parts), lambda twins: info_nce(twins[:, 0], twins[:, 1], 0.05))
        self.set_dropout(0.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class RandomLibraries(Libraries):
    def __init__(self, name: str, device: torch.device, checkpointing: bool):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(TINY, padding_side="left")
        raw = {k: v for k, v in make_config(name).to_dict().items() if k not in ("architectures", "rope_scaling", "model_type")}
        config = transformers.LlamaConfig(**raw | {"is_causal": False, "use_cache": False})
        with device:
            self.model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            ).eval()
        torch.backends.cuda.enable_cudnn_sdp(True)  # torch's own choice
        self.device, self.checkpointing = device, checkpointing

    @torch.no_grad()
    def encode(self, texts):
        """As sentence-transformers does: sorted by length, padded to the longest of each batch."""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = [None] * len(texts)
        for start in range(0, len(order), 32):
            rows = order[start : start + 32]
            pooled = self.pool(self.model.model, self.tokenize([texts[i] for i in rows], 512)).cpu().numpy()
            for i, vector in zip(rows, pooled, strict=True):
                vectors[i] = vector
        return vectors

    def add_lora(self):
        super().add_lora()
        if self.checkpointing:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class RandomLibrariesBfloat16(RandomLibraries):
    """Adapters as a user gets them who casts the whole model."""

    name = "transformers + peft, bfloat16 adapters"

    def add_lora(self):
        super().add_lora()
        for parameter in self.parameters:
            parameter.data = parameter.data.bfloat16()


class CompiledOurs(RandomOurs):
    """As `train.py --compile` does it."""

    def add_lora(self):
        super().add_lora()
        compile_layers(self.l2v.decoder)


class CompiledLibrariesBfloat16(RandomLibrariesBfloat16):
    name = "transformers + peft, bfloat16 adapters, torch.compile on each layer"

    def add_lora(self):
        super().add_lora()
        for layer in self.decoder.layers:
            layer.compile()


SIDES = {
    "ours": RandomOurs, "theirs": RandomLibraries, "theirs_bf16": RandomLibrariesBfloat16,
    "ours_compiled": CompiledOurs, "theirs_bf16_compiled": CompiledLibrariesBfloat16,
}  # fmt: skip


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def room(device: torch.device) -> float:
    """Bytes that a GPU has left; a CPU's are not counted."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def timed(task, side) -> float | None:
    """Seconds, or None if the memory does not suffice."""
    try:
        synchronize(side.device)
        start = time.perf_counter()
        task(side)
        synchronize(side.device)
        return time.perf_counter() - start
    except RuntimeError as error:
        if not memory.is_out_of_memory(error):
            raise
    if hasattr(side, "optimizer"):
        side.optimizer.zero_grad(set_to_none=True)
        side.set_dropout(0.0)  # which the step did not come to
    free(side.device)
    return None


def peak_of(task, side) -> float:
    """Peak bytes of one task with the side's weights; the side is alone."""
    parameters = side.l2v.parameters() if hasattr(side, "l2v") else side.model.parameters()
    if side.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(side.device)
        task(side)
        return torch.cuda.max_memory_allocated(side.device)
    parameters = list({p.data_ptr(): p for p in parameters}.values())
    state = [t for s in side.optimizer.state.values() for t in s.values()] if hasattr(side, "optimizer") else []
    with PeakMemory([*parameters, *state]) as counted:
        task(side)
    return counted.peak + sum(t.numel() * t.element_size() for t in [*parameters, *state])


def matrix_rate(device: torch.device) -> float:
    """bfloat16 operations per second of a large matrix product, x W^T as in a linear layer, the best of five."""
    n = 8192 if device.type == "cuda" else 2048
    a, best = torch.randn(n, n, device=device).bfloat16(), 0.0
    for _ in range(6):
        start = time.perf_counter()
        a @ a.T
        synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def theory(config: ModelConfig, stage: str, device: torch.device, rate: float, seconds: float, tokens: int, **settings) -> dict:
    """What share of the machine's rate a step over that many tokens reached, and the peak that --dry-run would print."""
    settings = Settings(attention_dropout=0.3, **settings)
    passes = 4 + 2 * settings.gradient_checkpointing + 2 * (settings.micro_batch_size > 0)
    weights = memory.count_parameters(config)["layer"] * config.num_hidden_layers
    peak = memory.plan(config, settings, stage, on_gpu=device.type == "cuda").peak
    return dict(of_the_limit=passes * weights * tokens / seconds / rate, predicted_gb=peak / 1e9)


def compare(name: str, args, device: torch.device, rate: float, write) -> None:
    """Encoding, an MNTP step and a SimCSE step of all sides."""
    config, B, T = make_config(name), args.batch, args.length
    on_gpu = device.type == "cuda"
    texts, sentences = make_texts((64 if on_gpu else 16) * B, 25, 400), make_texts(4 * B, 20, 100)
    ids = torch.randint(1000, 4000, (B, T))
    masked_ids, labels = mask_tokens(ids, mask_id=5, special_ids=set(), vocab_size=4000)
    lengths = [len(row.ids) for row in Tokenizer(TINY).encode(sentences, max_length=128)]
    twins = dict(batch_size=len(sentences), max_length=max(lengths))
    stages = {"mntp": Settings(batch_size=B, max_length=T), "simcse": Settings(attention_dropout=0.3, **twins)}
    fitted = [memory.fit(config, s, stage, room(device), {"micro_batch_size"}, on_gpu=on_gpu) for stage, s in stages.items()]
    checkpointing = any(settings.gradient_checkpointing for settings in fitted)
    if any(memory.plan(config, s, stage, on_gpu=on_gpu).peak > room(device) for stage, s in zip(stages, fitted, strict=True)):
        print(f"{name}: does not fit into {room(device) / 1e9:.0f} GB; take a smaller --batch")
        return
    tasks = {
        f"encode {len(texts)} texts": (lambda s: s.encode(texts), 0, None),
        f"MNTP {B} x {T}": (
            lambda s: s.mntp(masked_ids.to(device), labels.to(device) if isinstance(s, Libraries) else labels),
            B * T,
            "mntp",
        ),
        f"SimCSE {len(sentences)} twins": (lambda s: s.simcse(sentences), 2 * sum(lengths), "simcse"),
    }
    tasks = {label: task for label, task in tasks.items() if (task[2] or "encode") in args.tasks}
    seconds = {(side, label): [] for side in args.sides for label in tasks}
    peaks = {}
    for turn in range(2):
        for side_name in args.sides[:: 1 - 2 * turn]:
            side = SIDES[side_name](name, device, checkpointing)
            for label, (task, _, stage) in tasks.items():
                if stage is not None and not hasattr(side, "optimizer"):
                    side.add_lora()
                runs = [timed(task, side) for _ in range(args.repeats + 1)][1:]  # the first one warms up
                if None in runs:
                    continue
                seconds[side_name, label] += runs
                if turn == 0:
                    peaks[side_name, label] = peak_of(task, side) / 1e9
            del side
            free(device)
    for label, (_, tokens, stage) in tasks.items():
        best = {side: min(seconds[side, label], default=None) for side in args.sides}
        row = dict(model=name, task=label + (", checkpointing" if checkpointing and stage else ""))
        row |= {f"{side}_s": value for side, value in best.items()}
        row |= {
            "ratio" + side.removeprefix("theirs").replace("ours", "_ours"): best[side]
            and best["ours"]
            and best[side] / best["ours"]
            for side in args.sides[1:]
        }
        row |= {f"{side}_gb": peaks.get((side, label)) for side in args.sides}
        if stage is not None and best["ours"]:
            settings = stages[stage]
            row |= theory(config, stage, device, rate, best["ours"], tokens, batch_size=settings.batch_size,
                          max_length=settings.max_length, gradient_checkpointing=checkpointing)  # fmt: skip
        write(row)


def growth(name: str, args, device: torch.device, rate: float, write) -> None:
    """Our step time and peak memory for growing batches, with and without checkpointing and GradCache."""
    config, few = make_config(name), max(args.batch // 2, 1)
    for checkpointing in (False, True):
        side = RandomOurs(name, device, checkpointing)
        side.add_lora()
        side.simcse(make_texts(4, 20, 100))  # the optimizer's moments come with the first step
        for batch in sorted({max(args.batch // 4, 1), few, args.batch}):
            ids = torch.randint(1000, 4000, (batch, args.length))
            masked_ids, labels = mask_tokens(ids, mask_id=5, special_ids=set(), vocab_size=4000)
            pair = masked_ids.to(device), labels  # these on the CPU, as in train.py
            sentences = make_texts(4 * batch, 20, 100)
            lengths = [len(row.ids) for row in side.l2v.tokenizer.encode(sentences, max_length=128)]
            twins = dict(tokens=2 * sum(lengths), batch_size=4 * batch, max_length=max(lengths))
            for label, task, stage, settings in (
                (f"MNTP, {batch} x {args.length}", lambda s, pair=pair: s.mntp(*pair),
                 "mntp", dict(tokens=batch * args.length, batch_size=batch, max_length=args.length)),
                (f"SimCSE, {4 * batch} twins", lambda s, x=sentences: s.simcse(x), "simcse", twins),
                (f"SimCSE, {4 * batch} twins, GradCache by {few}", lambda s, x=sentences: s.simcse_cached(x, few),
                 "simcse", twins | dict(micro_batch_size=few)),
            ):  # fmt: skip
                row = dict(model=name, task=label + (", checkpointing" if checkpointing else ""))
                expected = theory(config, stage, device, rate, 1.0, gradient_checkpointing=checkpointing, **settings)
                held = sum(p.numel() * p.element_size() for p in side.l2v.parameters())
                seconds = None
                free(device)  # what is cached counts as used
                if expected["predicted_gb"] * 1e9 < room(device) + held and timed(task, side):
                    peak, seconds = peak_of(task, side), timed(task, side)
                if seconds is None:
                    write(row | dict(ours_s=None, ours_gb=None, of_the_limit=None, predicted_gb=expected["predicted_gb"]))
                    continue
                row |= dict(ours_s=seconds, ours_gb=peak / 1e9)
                write(row | theory(config, stage, device, rate, seconds, gradient_checkpointing=checkpointing, **settings))
        del side
        free(device)


def loading(name: str, device: torch.device) -> dict:
    """From safetensors to the device: rate, and how much the process's own host memory grew."""

    def own_memory() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    with tempfile.TemporaryDirectory() as folder:
        decoder = RandomOurs(name, torch.device("cpu"), False).l2v.decoder
        size = sum(p.numel() * 2 for p in decoder.parameters())
        save_checkpoint(decoder, folder, torch.bfloat16)
        (Path(folder) / "config.json").write_text(json.dumps(decoder.config.to_dict()))
        del decoder
        free(device)
        before, start = own_memory(), time.perf_counter()
        decoder = load_decoder(folder, device, torch.bfloat16)
        sum(p.float().sum() for p in decoder.norm.parameters()).item()
        seconds = time.perf_counter() - start
        row = dict(model=name, task="loading", ours_s=seconds, checkpoint_gb=size / 1e9, host_gb=(own_memory() - before) / 1e9)
    return row


def print_row(row: dict) -> None:
    cells = ("" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values())
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=["1.3b", "7b"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32, help="sequences of an MNTP step; SimCSE takes 4 times as many")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence of MNTP")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--parts", nargs="+", choices=("compare", "growth", "loading"), default=["compare", "growth", "loading"]
    )
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=["ours", "theirs", "theirs_bf16"],
                        help='of "compare"; the first one, "ours", is what the others are divided by')  # fmt: skip
    parser.add_argument("--tasks", nargs="+", choices=("encode", "mntp", "simcse"), default=["encode", "mntp", "simcse"])
    parser.add_argument("--output", default="gpu.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    rate = matrix_rate(device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}, {rate / 1e12:.3g} x 10^12 bfloat16 operations/s"
    )
    rows = []

    def write(row: dict) -> None:
        rows.append(row)
        print_row(row)
        Path(args.output).write_text(json.dumps({"machine": machine, "operations_per_s": rate, "rows": rows}, indent=2))

    if "compare" in args.parts:
        heads = [f"{side} (s)" for side in args.sides] + [f"{side} / ours" for side in args.sides[1:]]
        heads += [f"{side} (GB)" for side in args.sides] + ["of the limit", "predicted (GB)"]
        print("\n| model | task | " + " | ".join(heads) + " |")
        for name in args.models:
            compare(name, args, device, rate, write)
    if "growth" in args.parts:
        print("\n| model | task | step (s) | peak (GB) | of the limit | predicted (GB) |")
        for name in args.models:
            growth(name, args, device, rate, write)
    if "loading" in args.parts:
        print("\n| model | task | seconds | checkpoint (GB) | host memory (GB) |")
        for name in args.models:
            write(loading(name, device))


if __name__ == "__main__":
    main()
