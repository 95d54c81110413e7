"""The command line: one module for each command, and `console` that draws for all of them."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, or the terminal was closed: ends a run like Ctrl-C, also where that means something milder."""
