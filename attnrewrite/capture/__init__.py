"""Capture: turns Dynamo's graph into the IR (functional, pre-dispatch, normalized ATen)."""
