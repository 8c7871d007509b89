"""What the user asks for: options, environment variables, settings."""
