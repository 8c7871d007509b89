"""Which kernel serves a site."""
