"""What the student writes, and how it stops."""
