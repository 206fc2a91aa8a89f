"""A child process that builds engines, one after the other: see :func:`engines.trt.build.build_all`."""

from typing import Any

from engines.trt.build import Task, make_engine
from engines.trt.processes import answer_tasks


def build_task(task: Any) -> Any:
    return make_engine(Task.model_validate(task)).model_dump(mode="json", by_alias=True)


if __name__ == "__main__":
    answer_tasks(build_task)
