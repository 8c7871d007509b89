"""Attention reuse across diffusion steps: Pyramid Attention Broadcast and FasterCache, for compiled models.

    enabling     enable_cache and its companions: puts a session around a compiled model's calls
    session      the calls of one model, one after the other
    call         one of these calls: what the graphs within it may reuse
    model_paths  the model's modules by their paths
    memory       what is stored for the model, in all streams and threads
    streams      what is stored for one stream of calls
    runs         where the stream is in its denoising run
    method       the two methods: when an attention is computed, and what replaces it otherwise
    guidance     FasterCache's prediction of the unconditional half
    graphs       the attention values of a graph, and the graphs that return them or take them
    identity     how the same attention is known again in another graph
    compiled     the call of such a graph

The settings are in ``options/cache_config.py``.
"""
