"""Experiments, one a file: only nouns. `python train.py --help` lists them."""
