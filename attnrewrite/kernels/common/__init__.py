"""What the families of kernels share."""
