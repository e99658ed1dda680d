"""Files for a system in production: takes a directory, gives the settings, secrets and server configurations in it."""
