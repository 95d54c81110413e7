"""Memory: what a model needs, what there is, and how it goes onto devices."""
