"""``attnrewrite bench``: times the passes, and the kernels of this machine."""
