"""Real examples that are there on every machine: from the standard library's source text, and additions."""
