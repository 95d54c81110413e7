"""Where weights come from: a checkpoint folder or a GGUF file, behind one interface."""
