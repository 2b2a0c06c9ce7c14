"""One run: what it needs, its attempts, how their ends are told, what it shares with others."""
