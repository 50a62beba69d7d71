"""LLM2Vec (arXiv 2404.05961) from scratch: any Llama, Mistral or Qwen2 checkpoint as a text encoder.

Here, in reading order, is the model, from a name and a text to a vector:
    config      what a model is, and the paper's recipe for each
    model       the decoder, causal or bidirectional
    lora        the adapter that is trained
    tokenizer   text to ids, and which tokens are pooled
    pooling     token states to one vector
    weights     safetensors in and out
    encoder     LLM2Vec: load, encode, save
Beside them hub (names), data (text files), device, fast, files, cli. Then three folders: training (from a batch to an adapter),
evaluation (from vectors to numbers), interop (other libraries).
"""

from .config import ModelConfig
from .encoder import LLM2Vec

__all__ = ["LLM2Vec", "ModelConfig"]
