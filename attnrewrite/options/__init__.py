"""The options of the user: compile options, environment variables, settings of caches."""
