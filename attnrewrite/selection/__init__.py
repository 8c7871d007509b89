"""The choice of the kernel for a site."""
