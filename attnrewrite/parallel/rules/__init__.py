"""Sharding rules: for each operator, where its result is sharded, and which shards of its operands it needs."""
