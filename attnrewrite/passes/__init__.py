"""The passes over the IR, in ``pipeline.rewrite`` in their order."""
