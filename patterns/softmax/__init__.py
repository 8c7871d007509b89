"""Softmax attention, written out: ``rule.py`` reads it, and the other files hold its specimens by kind."""

from __future__ import annotations

from attnrewrite.patterns.softmax.rule import PATTERN

__all__ = ["PATTERN"]
