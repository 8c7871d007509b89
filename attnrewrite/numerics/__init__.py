"""Comparison of results: verification at the first call, admission of kernels within a tolerance, and what a site means."""
