"""What other frameworks write, read into the package's own types."""
