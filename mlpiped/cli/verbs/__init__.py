"""One module for each kind of verb; `ctl` imports the one that is asked for."""
