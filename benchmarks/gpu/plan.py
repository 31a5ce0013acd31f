"""What the GPU check measures: phases with their limits, and the sizes. Page and phases read it."""

# Seconds; with the start of the script less than ten minutes together.
LIMITS = {
    "correct": 80,
    "loss": 90,
    "rollouts": 90,
    "step": 140,
    "demo": 90,
    "profile": 60,
}

# Names how the phases are started: "fork", or "spawn" where CUDA does not allow it any more.
START = "STABLEOPD_GPU_START"

# The loss: tokens by width of the hidden states.
VOCABULARY, WIDTHS, TOKENS = 151_936, (1_536, 2_048), (4_096, 16_384, 32_768)
# Rollouts: of each prompt, and their budgets.
PROMPTS, PER_PROMPT, PROMPT_TOKENS, BUDGETS = 16, 4, 64, (256, 1_024)
# The step: methods of ours, and the peer; names as in sides.py.
METHODS, PEER = ("stable_opd", "opd", "gkd"), "DistillationTrainer"
