"""Tests of the passes over attention sites."""
