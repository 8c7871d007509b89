"""Specimens with a few steps swapped, inserted, deleted or changed: whatever becomes of them, eager's numbers stay."""
