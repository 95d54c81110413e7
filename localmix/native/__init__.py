"""The only code that touches llama.cpp: everything above it sees numpy arrays and dataclasses."""
