"""``attnrewrite bench``: how long the passes take, and the kernels of this machine side by side."""
