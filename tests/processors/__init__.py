"""What becomes of every attention processor of diffusers: ``python -m tests.processors``."""
