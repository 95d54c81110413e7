"""What models cost: corpora, perplexity, divergence, speed."""
