"""One forward pass, recorded: the layers of a text, ready to be scored."""
