"""Chat: the conversation, its engine in a child process, what is kept of it."""
