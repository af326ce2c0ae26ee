"""Scores from vLLM: servers of one's own, one that this package launches, or an engine in this process."""

from scorer.vllm.client import VllmScorer, open_vllm

__all__ = ["VllmScorer", "open_vllm"]
