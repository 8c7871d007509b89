"""The entrances beside ``torch.compile``: decorators, context managers, functions."""
