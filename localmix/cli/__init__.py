"""The command line: one module for each command, and `console` that draws for all of them."""
