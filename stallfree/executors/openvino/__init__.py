"""The default executor: OpenVINO on the CPU, one call for a hybrid batch."""

from stallfree.executors.openvino.executor import OpenVINOExecutor

__all__ = ["OpenVINOExecutor"]
