"""Model configurations: the fields of config.json by family, and errors that name the file and the field."""
