"""Runs train.py or embed.py on a GPU that is only pretended, and counts where its host would have to wait:

    python tests/pretended_gpu.py train.py --stage mntp --output DIR ...

Tensors on the device "gpu" are shapes without numbers; mixing them with the CPU's raises, as on a real one. The last line
printed is JSON: the functions of the package that waited (for a number, for how many True a mask holds, for a copy), and how
often. It registers a device for the process, so it is a program of its own.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.insert(0, str(Path(__file__).parent.parent))
import embed
import train
from llm2vec_min import weights

aten = torch.ops.aten
PACKAGE = str(Path(weights.__file__).parent)


class PretendedGPU(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.fake, self.waits = FakeTensorMode(allow_non_fake_inputs=True), Counter()

    def wait(self) -> None:
        frame = sys._getframe(1)
        while not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        self.waits[frame.f_code.co_qualname] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        on_gpu = [x for x in leaves if isinstance(x, FakeTensor)]
        if not on_gpu and not any(getattr(x, "type", "") == "gpu" for x in leaves):
            return func(*args, **kwargs)  # the CPU's own work is real
        if func is aten._local_scalar_dense.default:  # item(), float(), if
            self.wait()
            return 0
        if on_gpu and str(kwargs.get("device")) == "cpu":
            self.wait()
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        masked = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masked or func is aten.nonzero.default:
            self.wait()
            raise NotImplementedError(f"{func}: how many are True only the device knows")
        with self.fake:
            # what the CPU holds becomes a shape of the CPU, which may not meet one of the device
            args, kwargs = tree_map_only(
                torch.Tensor, lambda x: x if isinstance(x, FakeTensor) else self.fake.from_tensor(x), (args, kwargs)
            )
            return func(*args, **kwargs)


def main(script: str, argv: list[str]) -> dict:
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # checkpoint() asks
    backend_registration._setup_privateuseone_for_python_backend("gpu", backend_module=module)
    torch._C._set_only_lift_cpu_tensors(True)
    synchronized = []
    torch.accelerator.synchronize = synchronized.append
    opened, load = weights._open, nn.Module.load_state_dict
    weights._open = lambda path, device="cpu": opened(path)  # safetensors does not know "gpu"
    nn.Module.load_state_dict = lambda self, state, **how: load(self, {k: v.to("gpu") for k, v in state.items()}, **how)
    with PretendedGPU() as gpu:
        {"train.py": train, "embed.py": embed}[script].main([*argv, "--device", "gpu"])
    return dict(gpu.waits) | ({"synchronize": len(synchronized)} if synchronized else {})


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])))
