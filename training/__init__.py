"""Training: the only room that knows optimisers, meshes, disks and clocks.

The data side: `data` (what a batch is, and the text a model trains on) reads a token store that `store` prepares from
the documents of `corpus` with a `tokenizer`; `references` says how well simple models and compressors do on it.
"""
