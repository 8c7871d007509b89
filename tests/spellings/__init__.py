"""Spellings of softmax attention, composed at random and judged against eager."""
