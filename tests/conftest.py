"""STABLEOPD_TEST_DEVICE=cuda makes the tensors of tests there; `make gpu-check` runs some so."""

import os

DEVICE = os.environ.get("STABLEOPD_TEST_DEVICE")
if DEVICE:
    import torch

    torch.set_default_device(DEVICE)
