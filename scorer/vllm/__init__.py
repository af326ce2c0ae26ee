"""Scores from vLLM: servers of one's own, one that this package launches, or an engine in this process."""

from scorer.vllm.client import VllmScorer, open_vllm
from scorer.vllm.engine import EngineScorer

__all__ = ["EngineScorer", "VllmScorer", "open_vllm"]
