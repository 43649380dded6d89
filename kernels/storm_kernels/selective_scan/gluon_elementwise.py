"""Device functions of the GPU scan's backward: what is done once for a channel and step."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from storm_kernels.selective_scan.gluon_lanes import (
    LN2,
    exp_minus_abs,
    keep,
    sigmoid,
    softplus,
    softplus_slope,
)


@gluon.jit
def step_operands(
    us, deltas, given, zs, bias, valid,
    SOFTPLUS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_Z: gl.constexpr, MASKED: gl.constexpr,
    K: gl.constexpr,
):  # fmt: skip
    """What the states need of u, delta, dy and z, K tensors [rows, lanes] each.

    Args:
        given: the gradient of y.
        bias: [rows, lanes].
        valid: bit k for step k; the steps without are not part of any sequence (MASKED).

    Returns:
        dts: step sizes; xs: dt u; dys: the gradient of y before the gate.
        slopes: the derivatives of dt. factors: what y before the gate is multiplied by in dz.
    """
    dts = ()
    xs = ()
    dys = ()
    slopes = ()
    factors = ()
    for k in gl.static_range(0, K):
        delta_k = deltas[k]
        if HAS_BIAS:
            delta_k = delta_k + bias
        dt = delta_k
        slope = dt * 0 + 1.0
        if SOFTPLUS:
            e = exp_minus_abs(delta_k)
            dt = softplus(delta_k, e)
            slope = softplus_slope(delta_k, e)
        dts = dts + (dt,)
        slopes = slopes + (slope,)
        gated = given[k]
        factor = gated
        if HAS_Z:
            s = sigmoid(zs[k])
            gated = given[k] * (zs[k] * s)
            factor = given[k] * (s * (1.0 + zs[k] * (1.0 - s)))
        dys = dys + (gated,)
        factors = factors + (factor,)
    if MASKED:
        dts = keep(dts, valid, K)
    for k in gl.static_range(0, K):
        xs = xs + (dts[k] * us[k],)
    return dts, xs, dys, slopes, factors


@gluon.jit
def step_gradients(
    dxs, exponents, ys, dts, us, dys, slopes, factors, D, valid, zero,
    SOFTPLUS: gl.constexpr, HAS_D: gl.constexpr, HAS_Z: gl.constexpr, MASKED: gl.constexpr,
    RESTARTS: gl.constexpr, K: gl.constexpr, ROWS: gl.constexpr, LANES: gl.constexpr,
):  # fmt: skip
    """The rest of the chain rule, given the sums over the states.

    Args:
        dxs, exponents, ys: the gradients of dt u and of dt A2, and y before skip and gate: K
            tensors [warps, channels, lanes] each, as are those that `step_operands` gave.
        D, zero: [warps, channels, lanes].

    Returns:
        dus, ddeltas, dzs: K tensors [rows, lanes] each; no dzs without z.
        dD, dbias: sums over a lane's steps, [warps, channels, lanes].
    """
    dus = ()
    ddeltas = ()
    dzs = ()
    dD = zero
    dbias = zero
    for k in gl.static_range(0, K):
        du = dxs[k] * dts[k]
        ddelta = dxs[k] * us[k] + exponents[k] * LN2
        if SOFTPLUS:
            ddelta = ddelta * slopes[k]
        if MASKED:
            ddelta = gl.where((valid & (1 << k)) != 0, ddelta, 0.0)
        if HAS_D:
            du = D * dys[k] + du
            dD = dys[k] * us[k] + dD
        dus = dus + (gl.reshape(du, [ROWS, LANES]),)
        ddeltas = ddeltas + (gl.reshape(ddelta, [ROWS, LANES]),)
        dbias = dbias + ddelta
        if HAS_Z:
            y = ys[k]
            if HAS_D:
                y = D * us[k] + y
            dz = factors[k] * y
            if RESTARTS:  # an infinite state may pass through padding
                dz = gl.where((valid & (1 << k)) != 0, dz, 0.0)
            dzs = dzs + (gl.reshape(dz, [ROWS, LANES]),)
    return dus, ddeltas, dzs, dD, dbias
