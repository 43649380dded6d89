"""The referee of two results in float32: what transformers computes in float64 throughout."""

import torch
import torch.overrides


class Float64(torch.overrides.TorchFunctionMode):
    """float64 also where transformers computes in float32 whatever the weights are: norms, softmax.

    Around calls of a model that went through `double()`: the referee of two results in float32.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()}
        return func(*args, **kwargs)
