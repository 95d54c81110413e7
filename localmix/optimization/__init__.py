"""Optimization: which type each tensor gets, so that a model of a given size is the best that it can be."""
