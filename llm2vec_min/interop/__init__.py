"""Other libraries: the same vectors in transformers, sentence-transformers and mteb.

`python -m llm2vec_min.interop.export` writes a merged folder; `python -m llm2vec_min.interop.mteb_adapter` runs mteb's tasks.
In Python: `interop.export.export_model` and `interop.mteb_adapter.MTEBEncoder`.
"""
