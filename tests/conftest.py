"""Tiny random models that hide no bug: unequal sizes, large weights, norm weights away from one."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llm2vec_min.weights import load_decoder, load_language_model

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def same_numbers_in_any_order():
    """What a test draws does not depend on those before it."""
    torch.manual_seed(0)


TEXTS = [
    "The cat sat on the mat, and the dog sat on the cat.",
    "A quick brown fox jumps over the lazy dog in the middle of the night.",
    "He said: what is it you want to know about 1984 and its 17 snake_case names?",
    "Über den Wolken muss die Freiheit wohl grenzenlos sein. Ça va?",
    "  leading spaces,\ttabs and   runs of them  ",
    "emoji 🙂🙃 and 漢字 and ﬁ ligatures",
    "",
    "a",
]
SIZES = dict(
    vocab_size=257,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.1,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
VARIANTS = {
    "llama": {},
    "llama-tied": dict(tie_word_embeddings=True),
    "llama-biases": dict(attention_bias=True, mlp_bias=True),
    "llama-head-dim": dict(head_dim=24, num_attention_heads=4),
    "llama-mha": dict(num_key_value_heads=4, rms_norm_eps=0.1),
    "llama-linear-rope": dict(rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=3.0)),
    "llama-llama3-rope": dict(rope_parameters=LLAMA3_ROPE),
    "llama-3.2": dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "mistral": dict(sliding_window=None),
    "mistral-window": dict(sliding_window=5),
    "qwen2": {},
    "qwen2-tied": dict(tie_word_embeddings=True),
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}


def make_reference(variant: str = "llama", **changes) -> transformers.PreTrainedModel:
    """A random transformers ...ForCausalLM of a variant, float32, in eval mode."""
    config_class, model_class = CLASSES[variant.split("-")[0]]
    torch.manual_seed(0)
    model = model_class(config_class(**(SIZES | VARIANTS[variant] | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """variant -> (transformers model, its checkpoint folder), made once each."""
    made = {}

    def get(variant: str):
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            model = make_reference(variant)
            model.save_pretrained(folder)
            made[variant] = model, folder
        return made[variant]

    return get


@pytest.fixture
def both(reference):
    """variant -> (transformers model, our language model with the same weights)."""

    def get(variant: str):
        model, folder = reference(variant)
        return model, load_language_model(folder)

    return get


def run_reference(model, input_ids, attention_mask=None, *, causal: bool, **options):
    """transformers' output for a direction; bidirectional through `config.is_causal`, as its own encoders do."""
    before = getattr(model.config, "is_causal", True)
    model.config.is_causal = causal
    try:
        return model(input_ids=input_ids, attention_mask=attention_mask, **options)
    finally:
        model.config.is_causal = before


def random_batch(B: int = 3, T: int = 11, padding: str | None = None, vocab_size: int = 257):
    """ids (B, T) and a padding mask (B, T) bool, or None; row 0 is never padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size, (B, T), generator=generator)
    if padding is None:
        return ids, None
    mask = torch.ones(B, T, dtype=torch.bool)
    for b in range(1, B):
        if padding == "left":
            mask[b, : 2 * b] = False
        else:
            mask[b, T - 2 * b :] = False
    return ids, mask


# ---- tokenizers of the four kinds ----


def _bpe(kind: str) -> Tokenizer:
    if kind in ("llama-2", "mistral"):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        specials = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
        if kind == "llama-2":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        template, bos = "<s> $A", "<s>"
    else:
        tokenizer = Tokenizer(models.BPE())
        if kind == "llama-3":
            pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(pattern), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
            specials, template, bos = ["<|begin_of_text|>", "<|end_of_text|>"], "<|begin_of_text|> $A", "<|begin_of_text|>"
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
            specials, template, bos = ["<|endoftext|>", "<|im_start|>"], None, None
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        max_token_length=6,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if "<0x00>" not in specials else ["▁", "_"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    if template:
        single = processors.TemplateProcessing(single=template, special_tokens=[(bos, tokenizer.token_to_id(bos))])
        tokenizer.post_processor = (
            processors.Sequence([processors.ByteLevel(trim_offsets=True), single]) if kind == "llama-3" else single
        )
    return tokenizer


TOKENIZER_CONFIGS = {
    "llama-2": dict(
        tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False,
        bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    ),
    "mistral": dict(
        tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False,
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=False,
    ),
    "llama-3": dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>",
    ),
    "smollm2": dict(
        tokenizer_class="GPT2Tokenizer", add_prefix_space=False, bos_token="<|im_start|>", eos_token="<|im_start|>",
        unk_token="<|endoftext|>", pad_token="<|im_start|>",
    ),
}  # fmt: skip


def write_tokenizer(folder: Path, kind: str = "llama-2") -> Path:
    tokenizer = _bpe(kind)
    if kind in ("llama-2", "mistral"):  # the byte tokens of a converted SentencePiece model are ordinary vocabulary
        raw = json.loads(tokenizer.to_str())
        raw["added_tokens"] = [t for t in raw["added_tokens"] if not t["content"].startswith("<0x")]
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    else:
        tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIGS[kind]))
    return folder


@pytest.fixture(scope="session", params=list(TOKENIZER_CONFIGS))
def tokenizer_folder(request, tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A checkpoint with a tokenizer: Llama, random, vocabulary 600."""
    folder = tmp_path_factory.mktemp("model")
    make_reference("llama", vocab_size=600).save_pretrained(folder)
    return write_tokenizer(folder, "llama-2")


@pytest.fixture
def decoder(model_folder):
    return load_decoder(model_folder)
