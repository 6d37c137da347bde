"""For tests of the vLLM engine without a GPU: put this folder on PYTHONPATH.

 1. vLLM needs torchvision, whose wheel is built for CUDA and does not load its operators beside a CPU build of torch;
    their schemas are enough.
 2. With oneDNN, vLLM keeps packed copies of the linear weights, which a push of new weights would not reach.

It is a sitecustomize because vLLM looks at models in a process of its own.
"""

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder


def declare_operators():
    import torch

    global library  # it lives as long as the process
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class Before(MetaPathFinder):
    """Runs something once, before a module is imported."""

    def __init__(self, name: str, run):
        self.name, self.run = name, run

    def find_spec(self, name, path, target=None):
        if name == self.name:
            sys.meta_path.remove(self)
            self.run()


class WithoutOneDNN(MetaPathFinder, Loader):
    """vllm._custom_ops, with its switch for oneDNN off."""

    def find_spec(self, name, path, target=None):
        if name == "vllm._custom_ops":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            self.loader, spec.loader = spec.loader, self
            return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        assert hasattr(module, "_supports_onednn"), "this vLLM has another switch"
        module._supports_onednn = False


sys.meta_path[:0] = [Before("torchvision", declare_operators), WithoutOneDNN()]
