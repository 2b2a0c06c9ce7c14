"""All runs: which begin, which wait for which, where their steps go."""
