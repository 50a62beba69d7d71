"""On a real GPU, without a stand-in: the same numbers, the fast kernels, no waits, runs that resume. Skipped where there is none.

pytest tests/test_gpu.py
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from build_vectors import ENCODERS, FILE, TEXTS
from conftest import VARIANTS, random_batch, run_reference
from llm2vec_min import LLM2Vec
from llm2vec_min.device import pick_device
from llm2vec_min.fast import CAN_COMPILE, compile_layers
from llm2vec_min.lora import add_lora
from llm2vec_min.model import attend, attention_mask, rotate, set_attention_dropout, swiglu
from llm2vec_min.training.simcse import embed_twins, info_nce

ROOT = Path(__file__).parent.parent
FAST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (CUDA)")


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return pick_device("cuda")


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers(both, gpu, variant, causal, padding):
    theirs, mine = (copy.deepcopy(model).to(gpu) for model in both(variant))
    ids, mask = random_batch(padding=padding)
    if not causal:  # transformers has no window to both sides
        for config in (theirs.config, mine.config, mine.model.config):
            config.sliding_window = None
    theirs_mask = None if mask is None else mask.long().to(gpu)
    expected = run_reference(theirs, ids.to(gpu), theirs_mask, causal=causal).logits
    logits = mine(ids.to(gpu), mask, causal=causal)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_vectors_of_the_demo_model(name, gpu):
    """In float32 what the CPU computed; in bfloat16 the same direction."""
    preset, causal = ENCODERS[name]
    options = {} if causal is None else {"causal": causal}
    stored = load_file(FILE)[name]
    for dtype, least in (("float32", 1 - 1e-5), ("bfloat16", 0.999)):
        l2v = LLM2Vec.from_pretrained(preset, device=gpu, dtype=dtype, **options)
        vectors = torch.from_numpy(l2v.encode(TEXTS, normalize=True))
        assert F.cosine_similarity(vectors, stored).min() > least


@pytest.mark.parametrize("K", [9, 3], ids=["own key heads", "grouped"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_a_fast_attention_kernel_runs(gpu, K, noise, causal, padded, dtype):
    """torch refuses where it would have to fall back on its slow one, forward or backward."""
    q = torch.randn(4, 9, 32, 64, device=gpu, dtype=dtype, requires_grad=True)
    k, v = torch.randn(2, 4, K, 32, 64, device=gpu, dtype=dtype, requires_grad=True).unbind()
    padding = torch.arange(32, device=gpu)[None] < torch.tensor([[32], [20], [9], [1]], device=gpu) if padded else None
    mask = attention_mask(padding, 32, causal=causal, device=gpu)
    with sdpa_kernel(FAST):
        y = attend(q, k, v, mask, causal, noise)
        y.float().square().sum().backward()
    assert y.isfinite().all() and q.grad.isfinite().all()
    if not noise:
        exact = (x.detach().double().cpu() for x in (q, k, v))
        how = dict(is_causal=causal and mask is None, enable_gqa=True)
        expected = F.scaled_dot_product_attention(*exact, attn_mask=None if mask is None else mask.cpu(), **how)
        torch.testing.assert_close(y.double().cpu(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("function", "shapes"), [(rotate, [(2, 9, 4, 16), (9, 1, 16), (9, 1, 16)]), (swiglu, [(2, 9, 112)] * 2)]
)
def test_one_kernel_computes_the_same(gpu, function, shapes):
    if not CAN_COMPILE:
        pytest.skip("no compiler here, so this is the plain version")
    inputs = [torch.randn(shape, device=gpu) for shape in shapes]
    torch.testing.assert_close(function(*inputs), function.__wrapped__(*inputs), rtol=1e-5, atol=1e-5)


@pytest.fixture
def l2v(gpu):
    l2v = LLM2Vec.from_pretrained("tiny", device=gpu)
    add_lora(l2v.decoder, r=4, dropout=0.1)
    set_attention_dropout(l2v.decoder, 0.3)
    return l2v.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_waits_nowhere(l2v, checkpointing):
    """torch itself refuses to wait for the device from the batch to the gradients."""
    l2v.decoder.gradient_checkpointing = checkpointing
    batch = l2v.tokenize(TEXTS)
    for mode in ("default", "error"):  # the first pass compiles the fused kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            twins = embed_twins(l2v, batch)
            info_nce(*twins, 0.05).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in l2v.decoder.parameters() if p.requires_grad)


def test_compiled_passes_draw_the_same_noise(l2v):
    """GradCache computes a batch twice, without a graph and with one; after an evaluation, too."""
    torch._dynamo.reset()
    compile_layers(l2v.decoder)
    for texts in (TEXTS[:2], TEXTS[:3], [TEXTS[0]] * 2, TEXTS):
        l2v.eval().encode(texts)
        l2v.train()
        passes = []
        for with_gradient in (False, True):
            torch.manual_seed(1)
            with torch.set_grad_enabled(with_gradient):
                passes.append(torch.cat(embed_twins(l2v, l2v.tokenize(texts))).float())
        assert F.cosine_similarity(*passes).min() > 0.9999
        assert (passes[0][: len(texts)] - passes[0][len(texts) :]).abs().max() > 1e-3, "the noise is on"
    torch._dynamo.reset()


DIE = "from llm2vec_min.training import Loop; update = Loop.update\n" \
      "def die(self, *a):\n    if self.step == 5: import os; os._exit(9)\n    update(self, *a)\n" \
      "Loop.update = die"  # fmt: skip


def run_train(*flags, preamble="") -> subprocess.CompletedProcess:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{preamble}\nimport train; train.run(train.main)"
    return subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "flags",
    [["mntp"], ["simcse"], ["supervised", "--micro-batch-size", "8", "--gradient-checkpointing"], ["simcse", "--compile"]],
    ids=" ".join,
)
def test_killed_run_resumes_to_the_same_weights(tmp_path, flags):
    common = ["--stage", *flags, "--model", "tiny", "--steps", "8", "--batch-size", "32", "--eval", "", "--deterministic",
              "--save-every", "4", "--seed", "3"]  # fmt: skip
    outputs = [str(tmp_path / name) for name in "abc"]
    for output in outputs[:2]:
        done = run_train(*common, "--output", output)
        assert done.returncode == 0, done.stderr
    killed = run_train(*common, "--output", outputs[2], preamble=DIE)
    assert killed.returncode == 9, killed.stderr
    done = run_train(*common, "--output", outputs[2], "--resume")
    assert done.returncode == 0, done.stderr
    runs = [Path(output, "adapter_model.safetensors").read_bytes() for output in outputs]
    assert runs[0] == runs[1], "the same seed"
    assert runs[0] == runs[2], "resumed"


def test_too_little_memory_says_what_to_change(tmp_path):
    preamble = "import torch; torch.cuda.set_per_process_memory_fraction(0.002)"
    flags = ["--stage", "simcse", "--model", "tiny", "--steps", "2", "--batch-size", "8192", "--eval", "",
             "--micro-batch-size", "0"]  # fmt: skip
    done = run_train(*flags, "--output", str(tmp_path / "run"), preamble=preamble)
    assert done.returncode != 0 and "too little memory" in done.stderr and "--micro-batch-size" in done.stderr
    assert "Traceback" not in done.stderr
