"""A child process whose tasks are functions of the standard library and their arguments."""

from importlib import import_module

from engines.trt.processes import answer_tasks


def call(task):
    module, name, argument = task
    return getattr(import_module(module), name)(argument)


if __name__ == "__main__":
    answer_tasks(call)
