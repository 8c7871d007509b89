"""Tests of the vocabulary in which graphs are read."""
