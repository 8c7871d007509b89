"""Comparison of results: verification at the first call, kernels within a tolerance, and what a site means."""
