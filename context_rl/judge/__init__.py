"""A judge of free-form answers: any chat endpoint that speaks OpenAI's protocol.

endpoint.py    one request: repetitions, and errors that no repetition mends
verdicts.py    what the judge's text says
asking.py      rows -> verdicts, each asked once and kept in judge.jsonl
judging.py     what a run asks its judge
"""

from context_rl.judge.asking import Judge
from context_rl.judge.endpoint import JudgeError, check_endpoint
from context_rl.judge.judging import Judging, check_verdicts

__all__ = ["Judge", "JudgeError", "Judging", "check_endpoint", "check_verdicts"]
