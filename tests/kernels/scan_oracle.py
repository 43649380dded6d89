"""The selective scan and its gradients in NumPy, float64, worked out by hand.

The formulas are those of mamba_ssm's kernels, with initial and final state, segments and
direction added. Nothing here comes from JAX or from the package.
"""

import numpy as np

POSITIONS = ("u", "delta", "z", "B", "C")


def oracle(case, dy=None, dh=None, *, delta_softplus=True, reverse=False):
    """Values, and gradients if the cotangents are given.

    Args:
        case: operands as `selective_scan` takes them in layout "bld", "segment_ids" among them.
        dy: the gradient with respect to y, [batch, length, channels].
        dh: that with respect to the final state, [batch, channels, state].

    Returns:
        y, the final state, and a dict of gradients, empty without dy.
    """
    x = {k: np.asarray(v, np.float64) for k, v in case.items() if k != "segment_ids"}
    grouped = x["B"].ndim == 4
    if not grouped:
        x["B"], x["C"] = x["B"][:, :, None], x["C"][:, :, None]
    batch, length, channels = x["u"].shape
    groups, states = x["B"].shape[2:]
    A, D, bias = x["A"], x.get("D", np.zeros(channels)), x.get("delta_bias", np.zeros(channels))
    valid, restart = _marks(case.get("segment_ids"), batch, length, reverse)
    for name in POSITIONS:  # whatever stands at padding is not read
        if name in x:
            mask = valid.reshape(valid.shape + (1,) * (x[name].ndim - 2))
            x[name] = np.where(mask, x[name], 0)
    z = x.get("z")
    order = list(range(length))[:: -1 if reverse else 1]

    raw = x["delta"] + bias
    low = np.minimum(raw, 20)
    dt = np.where(raw > 20, raw, np.log1p(np.exp(low))) if delta_softplus else raw
    dt = np.where(valid[..., None], dt, 0)

    def wide(x_BKG):  # every channel's own row of B or C
        return np.repeat(x_BKG, channels // groups, axis=1)

    def clear(h, t):
        return np.where(restart[:, t, None, None], 0, h)

    h = x.get("initial_state", np.zeros((batch, channels, states)))
    before, ungated = {}, np.zeros(x["u"].shape)
    for t in order:
        before[t] = clear(h, t)
        h = np.exp(dt[:, t, :, None] * A) * before[t]
        h = h + (dt[:, t] * x["u"][:, t])[..., None] * wide(x["B"][:, t])
        ungated[:, t] = (h * wide(x["C"][:, t])).sum(-1) + D * x["u"][:, t]
    silu = 1 if z is None else z / (1 + np.exp(-z))
    y = np.where(valid[..., None], ungated * silu, 0)
    if dy is None:
        return y, h, {}

    dy = np.where(valid[..., None], np.asarray(dy, np.float64), 0)
    inner = dy * silu
    grads = {k: np.zeros(x[k].shape) for k in (*POSITIONS, "A", "D", "delta_bias") if k in x}
    if z is not None:
        sigmoid = 1 / (1 + np.exp(-z))
        grads["z"] = dy * ungated * sigmoid * (1 + z * (1 - sigmoid))
    if "D" in x:
        grads["D"] = (inner * x["u"]).sum((0, 1))
    ddt = np.zeros(dt.shape)

    def by_group(x_BEG):
        return x_BEG.reshape(batch, groups, -1, states).sum(2)

    g = np.asarray(dh, np.float64)
    for t in reversed(order):
        decay = np.exp(dt[:, t, :, None] * A)
        drive = (dt[:, t] * x["u"][:, t])[..., None]
        state = decay * before[t] + drive * wide(x["B"][:, t])
        g = g + inner[:, t, :, None] * wide(x["C"][:, t])
        grads["C"][:, t] = by_group(state * inner[:, t, :, None])
        grads["B"][:, t] = by_group(g * drive)
        through_B = (g * wide(x["B"][:, t])).sum(-1)
        s = g * decay * before[t]
        grads["A"] += (s * dt[:, t, :, None]).sum(0)
        ddt[:, t] = (s * A).sum(-1) + x["u"][:, t] * through_B
        grads["u"][:, t] = dt[:, t] * through_B + D * inner[:, t]
        g = clear(g * decay, t)
    slope = np.where(raw > 20, 1, 1 / (1 + np.exp(-low))) if delta_softplus else 1
    grads["delta"] = np.where(valid[..., None], ddt * slope, 0)
    if "delta_bias" in x:
        grads["delta_bias"] = grads["delta"].sum((0, 1))
    if "initial_state" in x:
        grads["initial_state"] = g
    if not grouped:
        grads["B"], grads["C"] = grads["B"][:, :, 0], grads["C"][:, :, 0]
    return y, h, grads


def _marks(ids, batch, length, reverse):
    """Which positions count, and at which the state restarts, one by one."""
    valid = np.ones((batch, length), bool)
    restart = np.zeros((batch, length), bool)
    if ids is None:
        return valid, restart
    for b, row in enumerate(np.asarray(ids)):
        seen = None
        for t in range(length)[:: -1 if reverse else 1]:
            valid[b, t] = row[t] >= 0
            if valid[b, t]:
                restart[b, t] = seen is not None and seen != row[t]
                seen = row[t]
    return valid, restart
