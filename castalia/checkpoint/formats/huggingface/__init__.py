"""Hugging Face's format. `names` has the tables of model types, `config_json` reads and writes the settings."""
