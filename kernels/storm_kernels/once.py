"""For kernels whose gradients are kernels: their own gradients are refused in clear words."""

from collections.abc import Callable

import jax


def not_differentiable(call: str, remedy: str) -> Callable[[Callable], Callable]:
    """Decorates what a kernel's `custom_vjp` rules launch, with arrays as positional arguments.

    The first derivative never differentiates them. A second one, in either mode, would end in
    an error about a primitive that the caller has never heard of; here it names the remedy.

    Args:
        call: what the message says is differentiable once.
      remedy: what it says to take for second derivatives.

    Raises:
        NotImplementedError: when the result is used and a derivative is taken through it.
    """

    def decorate(launch: Callable) -> Callable:
        guarded = jax.custom_jvp(launch)

        @guarded.defjvp
        def refuse(primals, tangents):
            raise NotImplementedError(
                f"{call} is differentiable once, in reverse mode: the gradient of its gradient is"
                f" not. Take {remedy} for second derivatives"
            )

        return guarded

    return decorate
