"""The default executor: OpenVINO on the CPU, with one call of the model per hybrid batch."""

from stallfree.executors.openvino.executor import OpenVINOExecutor, Packs, check

__all__ = ["OpenVINOExecutor", "Packs", "check"]
