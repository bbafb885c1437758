"""Generation, token by token, each token with its route graph."""
