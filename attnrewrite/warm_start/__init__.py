"""Warm start: rewritten graphs are stored, so that another process does not capture and rewrite the same graph again.

What a rewriting depends on is written down in full (:mod:`.key`); what cannot be written down is not stored. A stored
graph is JSON (:mod:`.codec`), which names what is called, in a directory that nobody else can write to
(:mod:`.directory`). It goes to Inductor, whose own caches find it again.
"""
