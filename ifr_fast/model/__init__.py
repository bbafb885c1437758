"""A Hugging Face decoder, opened: its layers, their output maps, and how it is run and watched."""
