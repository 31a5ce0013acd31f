"""What all tests share: the device of their tensors, and which of them compare numbers.

STABLEOPD_TEST_DEVICE=cuda makes the tensors of tests there; `make gpu-check` runs some so.
"""

import os

import pytest

# Files whose tests compare computed numbers. `make test-numerical` runs them without AVX, so that
# no tolerance is tuned to one processor.
NUMERICAL = {
    "test_advantage",
    "test_divergence",
    "test_drawing",
    "test_estimator",
    "test_hidden",
    "test_logprobs",
    "test_loss",
    "test_models_logits",
    "test_parallel_run",
    "test_parallel_step",
    "test_sampler",
    "test_sampler_distribution",
    "test_step",
    "test_step_dense",
    "test_sweep",
    "test_trl",
}

DEVICE = os.environ.get("STABLEOPD_TEST_DEVICE")
if DEVICE:
    import torch

    torch.set_default_device(DEVICE)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in NUMERICAL:
            item.add_marker("numerical")
