"""What one accelerator chip offers: memory, arithmetic, links to others."""

from dataclasses import dataclass

_GiB = 1024**3


@dataclass(frozen=True)
class Chip:
    """One kind of chip; rates are peaks, per chip and second.

    Attributes:
      name: as `--topology` names it.
      device_kinds: how JAX's `device_kind` of this chip begins.
      hbm_bytes: memory of a chip.
      hbm_bandwidth: bytes.
      peak_flops: dense bfloat16 FLOPs.
      link_bandwidth: bytes that one link carries in one direction: ICI between neighbours of a
        torus, or all of a GPU's NVLinks together.
      torus: dimensions of the ICI torus, each with two links a chip; 0: a switch joins the GPUs of
        a host, all at full rate.
      wrap_multiple: a torus dimension closes to a ring if its size is a multiple of this; 0: never.
      network_bandwidth: bytes that a chip's share of the network beyond (DCN, InfiniBand) carries
        in one direction.
      cores: TensorCores or SMs of a chip. One JAX device is one chip, in all of these.
      host: chips of one host.
      pod: chips of the largest TPU slice; 0: no limit, hosts are joined by the network.
    """

    name: str
    device_kinds: tuple[str, ...]
    hbm_bytes: int
    hbm_bandwidth: float
    peak_flops: float
    link_bandwidth: float
    torus: int
    wrap_multiple: int
    network_bandwidth: float
    cores: int
    host: int
    pod: int

    @property
    def is_gpu(self) -> bool:
        return self.torus == 0


CHIPS = (
    # docs.cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1200 GB/s, 2 cores, 3D torus where
    # sizes are multiples of 4, 4096 chips. Links, 6 of 50 GB/s each way: Jouppi et al. 2023 (arXiv
    # 2304.01433), table 4. The network is not stated: v5e's 25 Gbit/s a chip is taken.
    Chip(
        name="v4", device_kinds=("TPU v4",), hbm_bytes=32 * _GiB, hbm_bandwidth=1200e9,
        peak_flops=275e12, link_bandwidth=50e9, torus=3, wrap_multiple=4,
        network_bandwidth=25e9 / 8, cores=2, host=4, pod=4096,
    ),
    # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s, 4 ports with 400 GB/s in
    # both directions together, 6.4 Tbit/s of network for the 256 chips of a pod, 1 core.
    Chip(
        name="v5e", device_kinds=("TPU v5 lite", "TPU v5e"), hbm_bytes=16 * _GiB,
        hbm_bandwidth=819e9, peak_flops=197e12, link_bandwidth=50e9, torus=2, wrap_multiple=16,
        network_bandwidth=6.4e12 / 256 / 8, cores=1, host=8, pod=256,
    ),
    # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB, 2765 GB/s, 1200 GB/s of ICI in both
    # directions together (6 links of a 3D torus), 50 Gbit/s of network a chip, 2 cores,
    # jobs of up to 6144 chips.
    Chip(
        name="v5p", device_kinds=("TPU v5p", "TPU v5"), hbm_bytes=95 * _GiB, hbm_bandwidth=2765e9,
        peak_flops=459e12, link_bandwidth=100e9, torus=3, wrap_multiple=4,
        network_bandwidth=50e9 / 8, cores=2, host=4, pod=6144,
    ),
    # docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1638 GB/s, 4 ports with 800 GB/s in
    # both directions together, 25.6 Tbit/s of network for the 256 chips of a pod, 1 core.
    Chip(
        name="v6e", device_kinds=("TPU v6 lite", "TPU v6"), hbm_bytes=32 * _GiB,
        hbm_bandwidth=1638e9, peak_flops=918e12, link_bandwidth=100e9, torus=2, wrap_multiple=16,
        network_bandwidth=25.6e12 / 256 / 8, cores=1, host=8, pod=256,
    ),
    # NVIDIA's data sheets of A100 SXM4 80GB, H100 SXM5 and H200 SXM: dense bf16, memory, NVLink
    # (half of the sum of both directions), SMs. Network: a DGX system's port of each GPU, 200
    # (A100) or 400 Gbit/s.
    Chip(
        name="a100", device_kinds=("NVIDIA A100",), hbm_bytes=80 * 10**9, hbm_bandwidth=2039e9,
        peak_flops=312e12, link_bandwidth=300e9, torus=0, wrap_multiple=0,
        network_bandwidth=200e9 / 8, cores=108, host=8, pod=0,
    ),
    Chip(
        name="h100", device_kinds=("NVIDIA H100",), hbm_bytes=80 * 10**9, hbm_bandwidth=3350e9,
        peak_flops=989e12, link_bandwidth=450e9, torus=0, wrap_multiple=0,
        network_bandwidth=400e9 / 8, cores=132, host=8, pod=0,
    ),
    Chip(
        name="h200", device_kinds=("NVIDIA H200",), hbm_bytes=141 * 10**9, hbm_bandwidth=4800e9,
        peak_flops=989e12, link_bandwidth=450e9, torus=0, wrap_multiple=0,
        network_bandwidth=400e9 / 8, cores=132, host=8, pod=0,
    ),
)  # fmt: skip


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, or None: not in the table."""
    for chip in CHIPS:
        if device_kind.startswith(chip.device_kinds):
            return chip
    return None


def chip_named(name: str) -> Chip | None:
    """The chip that `--topology` calls `name`, or None: not in the table."""
    return next((chip for chip in CHIPS if chip.name == name), None)
