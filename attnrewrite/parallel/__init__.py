"""Context parallelism: a graph whose sequence is sharded over a process group computes its rank's part of the whole."""
