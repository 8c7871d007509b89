"""Comparison of results: verification at the first call, and admission of kernels within a tolerance."""
