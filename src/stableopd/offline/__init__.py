"""A teacher without a training: it scores rollouts that are there, or writes golden solutions."""
