"""Students as programs of other runtimes: ONNX, torch.export, ExecuTorch, OpenVINO."""
