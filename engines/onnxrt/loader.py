"""Load a bundle's graphs as ONNX Runtime sessions."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from dipgo.base import install
from dipgo.base.errors import OUT_OF_MEMORY, DipgoError, is_out_of_memory, not_imported


def session_from_graph(path: Path, threads: int | None = None, share_weights: bool = False) -> Any:
    """Return an ``InferenceSession`` on the CPU; ``threads`` None leaves the choice to ONNX Runtime.

    With ``share_weights`` the weights stay where they are mapped from the file, and activations come from one arena of
    the process: nothing is a session's own, so that any number of sessions take the memory of one.

    Idle threads do not spin: a program has several sessions, and the spinning threads of one would take the cores
    from the next.

    Raises:
        DipgoError: onnxruntime is missing, or refuses the graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise not_imported("onnxruntime", error, install.CPU) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    without: list[str] = []
    if share_weights:
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.disable_prepacking", "1")
        without = ["NchwcTransformer", "ConstantFolding"]  # both would write rearranged copies
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=without
        )
    except Exception as error:  # onnxruntime raises a class of its own for each kind of failure
        raise refusal(path, error) from error


def refusal(path: Path, error: Exception) -> DipgoError:
    """Return why ONNX Runtime does not load or run a graph, as one line."""
    detail = " ".join(str(error).split())[:300]
    cure = "export it again"
    if "bfloat16" in detail or "NOT_IMPLEMENTED" in detail:  # no kernel of an operator in this type
        cure = "ONNX Runtime's CPU has no bfloat16: export with --dtype fp16 or fp32, or give --backend torch"
    if is_out_of_memory(error):
        return DipgoError(f"{path}: ONNX Runtime is {OUT_OF_MEMORY}")
    return DipgoError(f"{path}: ONNX Runtime refuses it ({detail}); {cure}")


@cache
def _share_arena() -> None:
    """Register the process's arena, once: ONNX Runtime takes no second one."""
    import onnxruntime

    host = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(host, None)
