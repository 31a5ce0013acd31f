"""Measurements of rollouts: pure functions of text and numbers, no model."""
