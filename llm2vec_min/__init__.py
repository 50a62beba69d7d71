"""LLM2Vec (arXiv 2404.05961) from scratch: any Llama or Mistral checkpoint as a text encoder.

Read in this order:
    config      what a model is, and the paper's recipe for each
    model       the decoder and its one toggle, causal or bidirectional
    lora        the adapter that is trained
    weights     safetensors in and out
    tokenizer   text to ids, and which tokens are pooled
    pooling     token states to one vector
    encoder     LLM2Vec: load, encode, save
    mntp        stage 1     simcse    stage 2     (pretrain: what comes before)
Around them: hub (names), data (text files), training (the loop's plumbing), distributed (several processes), memory
(what a step will need), evaluation (scores), export and mteb_adapter (other libraries), cli (errors).
"""

from .config import ModelConfig
from .encoder import LLM2Vec

__all__ = ["LLM2Vec", "ModelConfig"]
