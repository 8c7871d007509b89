"""Tests of what is proved about a graph."""
