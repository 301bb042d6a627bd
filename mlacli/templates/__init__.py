"""Chat templates by name, in jinja; written for mlacli after the formats that the models use."""
