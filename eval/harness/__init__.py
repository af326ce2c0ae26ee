"""Help against no help on the tasks of lm-evaluation-harness: the base model with a trace in its prompt, as one model.

    task = load_task("gsm8k", data="data/gsm8k", limit=200)             # the harness's own task, on local files
    asked = questions(task)                                             # what q writes its traces for
    traces = {(task.name, q.doc_id): write(q.question) for q in asked}  # None: no help
    model = HelpedModel(scorer, open_generator(scorer), traces)
    result = evaluate(task, model)                                      # rows, and the harness's own table

Prompts, few-shot examples, filters, metrics and their aggregation are the harness's. With no trace the numbers are
those of its own `hf` model. Importing this package imports lm_eval, which takes seconds, and nothing else here does.
"""

import logging

# Before its modules are imported: at INFO the harness reports every step of its own.
logging.getLogger("lm_eval").setLevel(logging.WARNING)

from eval.harness.evaluation import Evaluation, evaluate  # noqa: E402
from eval.harness.generators import Generator, LocalGenerator, Prompt, ServerGenerator, open_generator  # noqa: E402
from eval.harness.model import HelpedModel  # noqa: E402
from eval.harness.placing import with_trace  # noqa: E402
from eval.harness.questions import LoadedTask, Question, questions  # noqa: E402
from eval.harness.tasks import load_task  # noqa: E402

__all__ = [
    "Evaluation",
    "Generator",
    "HelpedModel",
    "LoadedTask",
    "LocalGenerator",
    "Prompt",
    "Question",
    "ServerGenerator",
    "evaluate",
    "load_task",
    "open_generator",
    "questions",
    "with_trace",
]
