"""The Mamba layers of STORM: over all tokens of a video, in both directions.

Axis letters: B videos of one length, L tokens, D width, E inner channels, G states, K taps, R rank.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

try:
    # pyrefly: ignore[missing-import]
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:  # plain PyTorch then
    selective_scan_fn = None

# Positions whose states exist at one time in plain PyTorch, and between which the backward pass
# keeps states.
CHUNK = 128


def selective_scan(u_BEL, delta_BEL, A_EG, B_BGL, C_BGL, D_E, delta_bias_E):
    """h = exp(delta A) h + delta B u, y = C h + D u, with delta = softplus(delta + delta_bias).

    On CUDA through mamba_ssm where it is installed. States and parameters are float32.

    Returns:
        [B, E, L] in the dtype of u.
    """
    if selective_scan_fn is not None and u_BEL.is_cuda:
        return selective_scan_fn(
            u_BEL.contiguous(), delta_BEL.contiguous(), A_EG, B_BGL.contiguous(),
            C_BGL.contiguous(), D_E, delta_bias=delta_bias_E, delta_softplus=True,
        )  # fmt: skip
    state_BEG = u_BEL.new_zeros(len(u_BEL), *A_EG.shape, dtype=torch.float32)
    ys = []
    for start in range(0, u_BEL.shape[2], CHUNK):
        part = slice(start, start + CHUNK)
        chunk = (u_BEL[..., part], delta_BEL[..., part], B_BGL[..., part], C_BGL[..., part])
        operands = (state_BEG, *chunk, A_EG, D_E, delta_bias_E)
        if torch.is_grad_enabled():
            # Only the states between chunks are kept for the backward pass, not every one.
            y, state_BEG = checkpoint(
                _scan_chunk, *operands, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y, state_BEG = _scan_chunk(*operands)
        ys.append(y)
    return torch.cat(ys, dim=2)


def _scan_chunk(state_BEG, u_BEL, delta_BEL, B_BGL, C_BGL, A_EG, D_E, delta_bias_E):
    """The scan of a few positions from a state; the result and the state after them."""
    u = u_BEL.transpose(1, 2).float()
    delta = F.softplus(delta_BEL.transpose(1, 2).float() + delta_bias_E)
    decay_BLEG = torch.exp(delta[..., None] * A_EG)
    input_BLEG = (delta * u)[..., None] * B_BGL.transpose(1, 2).float()[:, :, None]
    states = []
    for decay, new in zip(decay_BLEG.unbind(1), input_BLEG.unbind(1), strict=True):
        state_BEG = torch.addcmul(new, decay, state_BEG)
        states.append(state_BEG)
    y = torch.einsum("BLEG,BGL->BEL", torch.stack(states, 1), C_BGL.float())
    return (y + (D_E * u).transpose(1, 2)).to(u_BEL.dtype), state_BEG


# Weights are used in the call of the module that owns them: with `device_map` they may lie
# elsewhere until then.


class CausalConv(nn.Conv1d):
    """silu(convolution over each channel's last K positions), in float32."""

    def __init__(self, channels: int, taps: int):
        super().__init__(channels, channels, taps, groups=channels)

    def forward(self, input):
        weight, bias = (p.float() for p in self.parameters())
        x = F.pad(input.float(), (weight.shape[2] - 1, 0))
        return F.silu(F.conv1d(x, weight, bias, groups=self.groups)).to(input.dtype)


class StepSize(nn.Module):
    """A linear map that does not add its bias but gives it, in float32: the scan adds it."""

    def __init__(self, rank: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, rank))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, dt_BLR):
        return F.linear(dt_BLR, self.weight), self.bias.float()


class Direction(nn.Module):
    """Convolution and selective scan in one direction."""

    def __init__(self, config, width: int, *, reverse: bool):
        super().__init__()
        E, G = config.temporal_expand * width, config.temporal_state
        R = config.temporal_dt_rank or math.ceil(width / 16)
        self.reverse = reverse
        self.sizes = [R, G, G]
        self.conv1d = CausalConv(E, config.temporal_conv)
        self.x_proj = nn.Linear(E, R + 2 * G, bias=False)
        self.dt_proj = StepSize(R, E)
        self.A_log = nn.Parameter(torch.empty(E, G))
        self.D = nn.Parameter(torch.empty(E))

    def forward(self, u_BEL):
        u = self.conv1d(u_BEL.flip(-1) if self.reverse else u_BEL)
        dt_BLR, B_BLG, C_BLG = self.x_proj(u.transpose(1, 2)).split(self.sizes, dim=-1)
        delta_BLE, delta_bias_E = self.dt_proj(dt_BLR)
        y = selective_scan(
            u,
            delta_BLE.transpose(1, 2),
            -torch.exp(self.A_log.float()),
            B_BLG.transpose(1, 2),
            C_BLG.transpose(1, 2),
            self.D.float(),
            delta_bias_E,
        )
        return y.flip(-1) if self.reverse else y


class MambaLayer(GradientCheckpointingLayer):
    """x + Mixer(LayerNorm(x)); the directions are summed and gated once."""

    def __init__(self, config, width: int):
        super().__init__()
        E = config.temporal_expand * width
        self.norm = nn.LayerNorm(width, eps=config.temporal_norm_eps)
        self.in_proj = nn.Linear(width, 2 * E, bias=False)
        self.forward_direction = Direction(config, width, reverse=False)
        both = config.temporal_direction == "bidirectional"
        self.backward_direction = Direction(config, width, reverse=True) if both else None
        self.out_proj = nn.Linear(E, width, bias=False)

    def forward(self, x_BLD):
        u, z = self.in_proj(self.norm(x_BLD)).transpose(1, 2).chunk(2, dim=1)
        y = self.forward_direction(u)
        if self.backward_direction is not None:
            y = y + self.backward_direction(u)
        return x_BLD + self.out_proj((y * F.silu(z)).transpose(1, 2))


class TemporalEncoder(nn.Module):
    """All Mamba layers over videos of one length, [B, L, D]."""

    def __init__(self, config, width: int):
        super().__init__()
        self.layers = nn.ModuleList(
            [MambaLayer(config, width) for _ in range(config.temporal_layers)]
        )
        self.gradient_checkpointing = False

    def forward(self, x_BLD):
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        return x_BLD
