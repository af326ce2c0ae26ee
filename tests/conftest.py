"""Settings and fixtures for all tests: no network, a fixed number of threads, tiny models made once a session."""

import os
import tempfile

# Before transformers, datasets and TRL are imported: they read these when they load.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["CONTEXT_RL_CACHE"] = tempfile.mkdtemp(prefix="context-rl-test-scores-")  # no test meets a user's store

from pathlib import Path

import hypothesis
import pytest
import tiny
import torch
import transformers

torch.set_num_threads(2)
# On a busy machine a first example may take longer than Hypothesis's 0.2 s; that is no failure.
hypothesis.settings.register_profile("repository", deadline=None)
hypothesis.settings.load_profile("repository")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture -> folder with a random model and its tokenizer; read, never written to."""
    folders = {}
    for name in tiny.ARCHITECTURES:
        folders[name] = tmp_path_factory.mktemp(name)
        tiny.save_model(folders[name], name)
    return folders


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds models/ and recipes/."""
    return REPOSITORY
