"""The passes over the IR; ``pipeline.rewrite`` runs them in their order."""
