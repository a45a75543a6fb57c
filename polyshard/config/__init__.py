"""Model configurations: the fields of config.json, by family, and the errors that name file and field."""
