"""The functions that users call in addition to ``torch.compile``.

accelerate         the decorator @accelerate_attention
attention_forward  one attention, eagerly or in a graph; its arguments are checked in ``arguments``
attention_backend  the kernels of one model
explain            a report on a model
"""
