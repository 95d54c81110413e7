"""Repositories of the Hugging Face hub: headers, files, what was downloaded."""
