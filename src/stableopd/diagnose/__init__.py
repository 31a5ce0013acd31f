"""Diagnosing a run from files alone: reading, measuring, judging, showing, watching."""
