"""The config file. Light on purpose: the client looks for it with `find`; only the daemon loads `settings`."""
