"""For kernels whose gradients are kernels: their own gradients are refused in clear words."""

from collections.abc import Callable

import jax


def not_differentiable(implementation: str) -> Callable[[Callable], Callable]:
    """Decorates what a kernel's `custom_vjp` rules launch, with arrays as positional arguments.

    The first derivative never differentiates them. A second one, in either mode, would end in
    an error about a primitive that the caller has never heard of; here it names the remedy.

    Args:
        implementation: the name that the message gives.

    Raises:
        NotImplementedError: when the result is used and a derivative is taken through it.
    """

    def decorate(launch: Callable) -> Callable:
        guarded = jax.custom_jvp(launch)

        @guarded.defjvp
        def refuse(primals, tangents):
            raise NotImplementedError(
                f"selective_scan with implementation={implementation!r} is differentiable once, in"
                " reverse mode: the gradient of its gradient is not. Take"
                " implementation='reference' (or 'xla') for second derivatives; both keep every"
                " state, [length, batch, channels, state]"
            )

        return guarded

    return decorate
