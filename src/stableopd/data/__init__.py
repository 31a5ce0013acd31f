"""Prompts, golden solutions and grading."""
