"""Real models with drawn masks and weights of drawn sizes: whatever becomes of them, eager's numbers stay."""
