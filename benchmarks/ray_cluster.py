"""A cluster of Ray of one node, on loopback addresses, that serves what a file configures.

python benchmarks/ray_cluster.py FILE FOLDER METRICS_PORT
"""

import sys

import ray
from ray.serve.scripts import cli


def main(file: str, folder: str, metrics_port: str) -> None:
    ray.init(
        namespace="serve",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 2**20,
        _temp_dir=folder,
        _metrics_export_port=int(metrics_port),
    )
    cli(["run", file])


if __name__ == "__main__":
    main(*sys.argv[1:])
