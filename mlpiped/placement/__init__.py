"""Who gets which place, and why not yet: pure decisions over what waits and what is free."""
