"""`localmix serve`: a llama-server for each model, and the HTTP front that stands before them."""
