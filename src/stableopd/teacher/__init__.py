"""Who scores the student's tokens."""
