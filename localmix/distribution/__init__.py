"""A model spread over several machines: the workers, the way to them, and what to say when one is lost."""
