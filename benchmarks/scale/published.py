"""Published prices and limits, each with its source."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Published figures of others, each with its source."""

    # AWS, p5.48xlarge: eight H100, 3,200 Gbit/s between machines, 192 vCPU; EC2 Capacity Blocks' list, us-east-1, 2024.
    gpus_per_machine: int = 8
    network_gbit_s_per_gpu: float = 400.0
    vcpus_per_gpu: int = 24
    dollars_per_gpu_hour: float = 4.916
    # AWS, S3 Standard, us-east-1: price list, and "Optimizing Amazon S3 performance" for rates per prefix.
    dollars_per_1000_gets: float = 0.0004
    dollars_per_1000_puts: float = 0.005
    dollars_per_gb_month: float = 0.023
    gets_per_second_and_prefix: float = 5500.0


PUBLISHED = Published()
