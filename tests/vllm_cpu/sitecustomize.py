"""For tests of the vLLM engine without a GPU: put this folder on PYTHONPATH.

vLLM needs torchvision, whose wheel is built for CUDA and does not load its operators beside a CPU build of torch; their schemas are enough.
It is a sitecustomize because vLLM looks at models in a process of its own.
"""

import sys
from importlib.abc import MetaPathFinder


class BeforeTorchvision(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            global library  # it lives as long as the process
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, BeforeTorchvision())
