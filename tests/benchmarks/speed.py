"""Times this package against transformers + peft, alternately in one run, on the same weights, batch, precision and LoRA.

    python tests/build_smollm2.py
    python tests/benchmarks/speed.py --model ~/.cache/llm2vec_min/smollm2-135m --dtype bfloat16

Three tasks: an MNTP step, a SimCSE step (forward, backward, clipping, AdamW) and encoding of mixed-length text. The other
side is what a user would write with the libraries: `get_peft_model` over AutoModel with sdpa attention, logits at every
position, a bidirectional mask through `is_causal`; sentence-transformers on the exported model for encoding. Encoding beside
llama.cpp, OpenVINO and ONNX: tests/benchmarks/encoders.py.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
import transformers
from sentence_transformers import SentenceTransformer

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]
from encoders import make_texts

from llm2vec_min import LLM2Vec
from llm2vec_min.device import DTYPES
from llm2vec_min.lora import TARGET_MODULES, add_lora
from llm2vec_min.model import set_attention_dropout
from llm2vec_min.training.mntp import mask_tokens, mntp_loss
from llm2vec_min.training.simcse import embed_twins, info_nce

ATTENTION_DROPOUT, LORA_DROPOUT, TEMPERATURE = 0.3, 0.05, 0.05


class Ours:
    name = "llm2vec-min"

    def __init__(self, folder, dtype, device):
        self.l2v = LLM2Vec.from_pretrained(folder, dtype=dtype, device=device, lm_head=True)
        self.device = self.l2v.device

    def add_lora(self):
        add_lora(self.l2v.decoder, 16, 32.0, LORA_DROPOUT)
        self.l2v.decoder.train()
        self.parameters = [p for p in self.l2v.decoder.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def finish(self, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def mntp(self, masked_ids, labels):
        return self.finish(mntp_loss(self.l2v.decoder, self.l2v.lm_head, masked_ids, labels))

    def set_dropout(self, probability):
        set_attention_dropout(self.l2v.decoder, probability)

    def simcse(self, texts):
        self.set_dropout(ATTENTION_DROPOUT)
        first, second = embed_twins(self.l2v, self.l2v.tokenizer.encode(texts, max_length=128))
        loss = self.finish(info_nce(first, second, TEMPERATURE))  # checkpointing draws the noise again
        self.set_dropout(0.0)
        return loss

    def encode(self, texts):
        return self.l2v.encode(texts, batch_size=32)


class Libraries(Ours):
    name = "transformers + peft"

    def __init__(self, folder, dtype, device):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self.model.config.is_causal = False
        self.model.to(device).eval()
        self.device = torch.device(device)
        with tempfile.TemporaryDirectory() as exported:
            LLM2Vec.from_pretrained(folder, device="cpu").save(f"{exported}/model")
            self.sentence_transformer = SentenceTransformer(
                f"{exported}/model", device=str(device), model_kwargs={"dtype": dtype}
            )

    def add_lora(self):
        config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=LORA_DROPOUT, target_modules=list(TARGET_MODULES))
        self.model = peft.get_peft_model(self.model, config).train()
        self.decoder = self.model.base_model.model.model
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def mntp(self, masked_ids, labels):
        return self.finish(self.model(input_ids=masked_ids, labels=labels).loss)

    def tokenize(self, texts, limit):
        return self.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(self.device)

    def pool(self, decoder, batch):
        states, mask = decoder(**batch, use_cache=False).last_hidden_state.float(), batch["attention_mask"][:, :, None]
        return (states * mask).sum(1) / mask.sum(1)

    def simcse(self, texts):
        batch = self.tokenize(texts + texts, 128)
        self.set_dropout(ATTENTION_DROPOUT)
        first, second = self.pool(self.decoder, batch).chunk(2)
        scores = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T / TEMPERATURE
        loss = self.finish(F.cross_entropy(scores, torch.arange(len(texts), device=self.device)))
        self.set_dropout(0.0)
        return loss

    def set_dropout(self, probability):
        for layer in self.decoder.layers:
            layer.self_attn.attention_dropout = probability

    def encode(self, texts):
        return self.sentence_transformer.encode(texts, batch_size=32)


def synchronize(device: torch.device) -> None:
    """Waits until a GPU (CUDA, MPS) has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def alternate(task, sides, repeats, device):
    """Median seconds of each side and the median of the pairwise ratios, after a warm-up of both."""
    times = [[], []]
    for repeat in range(repeats + 1):
        for seconds, side in zip(times, sides, strict=True):
            synchronize(device)
            start = time.perf_counter()
            task(side)
            synchronize(device)
            if repeat:
                seconds.append(time.perf_counter() - start)
    ratios = [theirs / ours for ours, theirs in zip(*times, strict=True)]
    return *map(statistics.median, times), statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sides = [side(args.model, DTYPES[args.dtype], args.device) for side in (Ours, Libraries)]
    device = sides[0].device

    mixed = make_texts(128, 25, 400)
    sentences = make_texts(24, 20, 100)
    vocab_size = sides[0].l2v.decoder.config.vocab_size
    ids = torch.randint(1000 % vocab_size, vocab_size, (8, 128))
    masked_ids, labels = (
        t.to(device)
        for t in mask_tokens(ids, mask_id=sides[0].l2v.tokenizer.mask_id(), special_ids=set(), vocab_size=vocab_size)
    )
    rows = [("encode 128 texts, median 25 words", alternate(lambda s: s.encode(mixed), sides, args.repeats, device))]
    for side in sides:
        side.add_lora()
    rows.append(("MNTP step, 8 x 128 tokens", alternate(lambda s: s.mntp(masked_ids, labels), sides, args.repeats, device)))
    rows.append(("SimCSE step, 24 twins", alternate(lambda s: s.simcse(sentences), sides, args.repeats, device)))

    print(f"{args.model}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}, peft {peft.__version__}, medians of {args.repeats}")  # fmt: skip
    print(f"{'':<36}{'ours (s)':>10}{'libraries (s)':>15}{'ratio':>8}")
    for name, (ours, theirs, ratio) in rows:
        print(f"{name:<36}{ours:>10.3f}{theirs:>15.3f}{ratio:>7.2f}x")


if __name__ == "__main__":
    main()
