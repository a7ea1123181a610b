"""Which pipeline to try on a new task, learned from recorded runs (AutoDistiller; He et al. 2021, arXiv 2109.11105).

Every finished run is a row: facts of the task and of both models, the choices of its pipeline, and as target how much
of the teacher's score the student has. A tree model learns, task by task, which choices lie above the task's mean; how
well it does so on a task it has not seen is measured by leaving one task out.

`runs` reads them, `learn` has the model and its test, `pipelines` the adviser: `advise`, whose `Advice` is a list of
commands with reasons. Another adviser is another module that gives an `Advice`: `sizes` says how large a teacher or a
student should be, by the `law` of capacity gap.
"""

from stillhouse.recommend.law import PUBLISHED, Law, best_teacher, fit_law, read_law
from stillhouse.recommend.learn import Model, left_out
from stillhouse.recommend.pipelines import Advice, advise, enough
from stillhouse.recommend.runs import Recorded, facts_of, merged, new_task, read_runs
from stillhouse.recommend.sizes import advise_size, size_of

__all__ = [
    "PUBLISHED",
    "Advice",
    "Law",
    "Model",
    "Recorded",
    "advise",
    "advise_size",
    "best_teacher",
    "enough",
    "facts_of",
    "fit_law",
    "left_out",
    "merged",
    "new_task",
    "read_law",
    "read_runs",
    "size_of",
]
