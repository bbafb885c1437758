"""Other tools' faces on this engine: change an import, keep the code. One module a tool."""
