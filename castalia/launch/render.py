"""Scripts that start a run on many machines: torchrun on each of them, which meet at the first one.

The first machine keeps the store that the others join. Where a process dies, all start again from the last checkpoint,
up to `restarts` times.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from castalia.launch.hosts import Host
from castalia.parallel.launcher import SHUTDOWN_TIMEOUT, SHUTDOWN_TIMEOUT_S

PATIENCE = f"{SHUTDOWN_TIMEOUT}={SHUTDOWN_TIMEOUT_S}"  # of torchrun with processes that were told to stop
SIGNAL_BEFORE_END_S = 300  # Slurm's own signal comes 30 s before it kills: no time to end a step and write it


@dataclass(frozen=True)
class LaunchJob:
    name: str
    arguments: Sequence[str]  # of `castalia`: train, configs, overrides
    nodes: int
    gpus: int  # of each node
    layout: str  # in words
    hosts: Sequence[Host] = ()
    restarts: int = 3
    port: int = 29500

    @property
    def about(self) -> str:
        ranks = sum(host.slots for host in self.hosts) or self.nodes * self.gpus
        return f"{ranks} ranks on {self.nodes} {'node' if self.nodes == 1 else 'nodes'}: {self.layout}"

    def torchrun(self, gpus: int) -> list[str]:
        """What is the same on all nodes."""
        size = ["--nnodes", str(self.nodes), "--nproc-per-node", str(gpus), "--max-restarts", str(self.restarts)]
        return [*size, "--rdzv-backend", "c10d"]

    @property
    def program(self) -> list[str]:
        return ["-m", "castalia", *self.arguments]


def slurm(job: LaunchJob) -> str:
    """For sbatch."""
    nodelist = [f"#SBATCH --nodelist={','.join(host.name for host in job.hosts)}"] if job.hosts else []
    head = [
        "#!/bin/bash",
        f"# {job.about}",
        f"#SBATCH --job-name={job.name}",
        f"#SBATCH --nodes={job.nodes}",
        *nodelist,
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={job.gpus}",
        "#SBATCH --exclusive",
        "#SBATCH --requeue",
        f"#SBATCH --signal=TERM@{SIGNAL_BEFORE_END_S}",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=%x-%j.log",
        "# Add what your cluster wants: --partition, --account, --time.",
        "set -euo pipefail",
        "# Submit from the environment that castalia is installed in; the job inherits it.",
        'read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        f"export first {PATIENCE}",
    ]
    # The inner shell runs on each node, where SLURM_NODEID tells which one it is.
    join = f'--rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:{job.port}" --rdzv-conf "is_host=$is_host"'
    inner = [
        '  is_host=$([ "$SLURM_NODEID" = 0 ] && echo true || echo false)',
        f"  exec torchrun {shlex.join(job.torchrun(job.gpus))} \\",
        f"    {join} \\",
        '    "$@"',
    ]
    return "\n".join([*head, "srun bash -c '", *inner, f"' castalia {shlex.join(job.program)}", ""])


def torchrun(job: LaunchJob) -> str:
    """A line for each host, all started from here."""
    if len(job.hosts) <= 1:
        command = ["--standalone", "--nproc-per-node", str(job.gpus), "--max-restarts", str(job.restarts)]
        return f"#!/bin/bash\n# {job.about}\nexport {PATIENCE}\nexec torchrun {shlex.join([*command, *job.program])}\n"
    lines = [
        "#!/bin/bash",
        f"# {job.about}",
        "# Start it in a folder that all hosts share, in the environment that castalia is installed in. Or paste each",
        "# host's line into a shell there. Another run at the same time needs another --rdzv-id and another port.",
        "set -eu",
        f'here=$(printf \'cd %q && exec env {PATIENCE} %q\' "$PWD" "$(command -v torchrun)")',
    ]
    endpoint = f"{job.hosts[0].name}:{job.port}"
    for i, host in enumerate(job.hosts):
        join = ["--rdzv-id", job.name, "--rdzv-endpoint", endpoint, "--rdzv-conf", f"is_host={str(i == 0).lower()}"]
        words = shlex.join([*job.torchrun(host.slots), *join, *job.program])
        lines.append(f'ssh {shlex.quote(host.name)} "$here" {shlex.quote(words)} &')
    return "\n".join([*lines, 'for host in $(jobs -p); do wait "$host"; done', ""])


def k8s(job: LaunchJob, image: str) -> str:
    """A Service that gives pods their names, and an indexed Job with a pod for each node."""
    # JSON strings are YAML strings, whatever they hold.
    name = kubernetes_name(job.name)
    script = (
        'is_host=$([ "$JOB_COMPLETION_INDEX" = 0 ] && echo true || echo false); '
        f'exec torchrun {shlex.join(job.torchrun(job.gpus))} --rdzv-id "$JOB_UID" '
        f'--rdzv-endpoint {name}-0.{name}:{job.port} --rdzv-conf "is_host=$is_host" "$@"'
    )
    words = "".join(f"\n            - {_yaml(word)}" for word in ["bash", "-c", script, "castalia", *job.program])
    return f"""\
# {job.about}
# Set the image, and mount the volumes that the config's paths lie on.
apiVersion: v1
kind: Service
metadata:
  name: {name}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    app: {name}
  ports:
    - port: {job.port}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
spec:
  completionMode: Indexed
  completions: {job.nodes}
  parallelism: {job.nodes}
  backoffLimit: {job.restarts * job.nodes}
  template:
    metadata:
      labels:
        app: {name}
    spec:
      subdomain: {name}
      restartPolicy: OnFailure
      terminationGracePeriodSeconds: {SHUTDOWN_TIMEOUT_S + 30}
      containers:
        - name: castalia
          image: {_yaml(image)}
          command:{words}
          env:
            - name: {SHUTDOWN_TIMEOUT}
              value: "{SHUTDOWN_TIMEOUT_S}"
            - name: JOB_UID
              valueFrom:
                fieldRef:
                  fieldPath: metadata.labels['batch.kubernetes.io/controller-uid']
          resources:
            limits:
              nvidia.com/gpu: {job.gpus}
          volumeMounts:
            - name: shared-memory
              mountPath: /dev/shm
      volumes:
        - name: shared-memory
          emptyDir:
            medium: Memory
"""


def kubernetes_name(text: str) -> str:
    """Small letters, digits and dashes, as a host name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "castalia"


def _yaml(text: str) -> str:
    return json.dumps(text)
