"""From Dynamo's graph to the IR."""
