"""Writes the rules of deploy/prometheus as a resource of the Prometheus operator.

`python deploy/k8s/prometheusrule.py > deploy/k8s/components/monitoring/prometheusrule.yaml` after
every change there.
"""

import sys
from pathlib import Path

import yaml

RULES = Path(__file__).parent.parent / "prometheus/rules.yml"

if __name__ == "__main__":
    name = "psim-gateway"
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": name}},
        "spec": yaml.safe_load(RULES.read_text()),
    }
    sys.stdout.write("# Made by deploy/k8s/prometheusrule.py from deploy/prometheus/rules.yml.\n")
    yaml.safe_dump(resource, sys.stdout, sort_keys=False, width=100)
