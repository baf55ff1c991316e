"""Models: layers composed into language models, and their generation."""
