"""Attention reuse across diffusion steps: Pyramid Attention Broadcast and FasterCache, for compiled models.

``config.py`` has the settings, ``method.py`` the rules of the two methods, ``runs.py`` when a run begins,
``guidance.py`` FasterCache's prediction of the unconditional half. ``graphs.py`` finds what is kept of each attention
and makes the graphs that compute it or take it; ``compiled.py`` calls them; ``session.py`` stands around the model's
call; ``enabling.py`` is how users get there.
"""
