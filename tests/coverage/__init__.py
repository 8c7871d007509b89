"""How much of the attention in real models is found, rewritten and right: ``python -m tests.coverage``."""
