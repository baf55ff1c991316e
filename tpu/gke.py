"""A JobSet on Google's Kubernetes: it starts every host of a slice, and all of them again when one is lost."""

import textwrap
from pathlib import Path

from tpu import scripts
from tpu.options import Gke
from tpu.plan import Command, Plan

# Exit statuses that would only come again end the job (scripts.FINAL). The script is a file of a ConfigMap, because
# Kubernetes would read $(...) in arguments as its own. Names are quoted, because YAML would read `true` as its own.
_MANIFEST = """\
apiVersion: v1
kind: ConfigMap
metadata:
  name: "{name}"
data:
  train.sh: |
{script}
---
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "{name}"
spec:
  failurePolicy:
    maxRestarts: {restarts}
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: workers
      replicas: 1
      template:
        spec:
          parallelism: {hosts}
          completions: {hosts}
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: {final}
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              serviceAccountName: "{service_account}"
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: {node}
                cloud.google.com/gke-tpu-topology: {topology}
{spot}\
              containers:
                - name: train
                  image: "{image}"
                  command: ["bash", "/launch/train.sh"]
                  resources:
                    requests:
                      google.com/tpu: {chips}
                    limits:
                      google.com/tpu: {chips}
                  volumeMounts:
                    - name: launch
                      mountPath: /launch
                    - name: runs
                      mountPath: /bucket
              volumes:
                - name: launch
                  configMap:
                    name: "{name}"
                - name: runs
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: "{bucket}"
                      mountOptions: "implicit-dirs,rename-dir-limit=100000"
"""
_SPOT = '                cloud.google.com/gke-spot: "true"\n'


def manifest(options: Gke, config: str, flags: list[str]) -> str:
    """The script, as a ConfigMap, and the JobSet that runs it on every host, as YAML."""
    script = scripts.script(
        scripts.setup(options, "tpu"), scripts.train(options, config, flags, root="/bucket/", how="exec ")
    )
    return _MANIFEST.format(
        name=options.name,
        script=textwrap.indent(script, "    ").rstrip("\n"),
        restarts=options.restarts,
        hosts=options.hosts,
        service_account=options.service_account,
        node=options.slice.generation.node,
        topology=options.slice.topology,
        spot=_SPOT * options.spot,
        image=options.image,
        chips=options.slice.chips_of_a_host,
        bucket=options.bucket,
        final=list(scripts.FINAL),
    )


def gke(options: Gke, config: str, flags: list[str], place: Path) -> Plan:
    """Applies the manifest to the cluster of kubectl's current context.

    place: the folder for the manifest, on this machine.
    """
    path = place / "jobset.yaml"
    job = f"jobset.sigs.k8s.io/jobset-name={options.name}"
    apply = Command("Start the job; it restarts by itself when a host is lost.", ("kubectl", "apply", "-f", str(path)))
    remove = ("kubectl", "delete", "jobset,configmap", options.name, "--ignore-not-found", "--cascade=foreground")
    which = (f"--selector={job}", "--container=train", f"--max-log-requests={max(5, options.hosts)}")
    follow = ("kubectl", "logs", "--follow", "--prefix", "--tail=200", *which)
    commands = {
        "start": (apply,),
        "restart": (Command("Delete the job.", remove), apply),
        "logs": (
            Command("Say where the job stands.", ("kubectl", "get", "jobset", options.name)),
            Command("Say where its hosts stand.", ("kubectl", "get", "pods", f"--selector={job}", "--output=wide")),
            Command("Follow the log.", follow),
        ),
        "delete": (Command("Delete the job; the run stays in its bucket.", remove),),
    }[options.action]
    needed = options.action in ("start", "restart")
    return Plan((), {path: manifest(options, config, flags)} if needed else {}, commands)
