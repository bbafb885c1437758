"""Files: written whole or not at all, with checksums, and refused where they are damaged."""
