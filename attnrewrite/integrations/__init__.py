"""Ways in for users of other libraries. None of them is a dependency: each module imports its own library.

transformers   ``attn_implementation="attnrewrite"``
accelerate     ``Accelerator(dynamo_plugin=AttnRewritePlugin())``
"""
