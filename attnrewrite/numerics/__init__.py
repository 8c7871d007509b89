"""Real numbers: verification at the first call, and kernels that are admitted within a tolerance."""
