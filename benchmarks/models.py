"""Measures whole models: decoding, and the training step."""

TASKS: tuple = ()
