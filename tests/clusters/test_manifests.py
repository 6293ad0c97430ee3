"""launch/gke.yaml and the Dockerfile of its image, without a cluster and without a container runtime."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ONE_DEVICE, ROOT, SMALL_RUN

MANIFEST = yaml.safe_load((ROOT / 'launch' / 'gke.yaml').read_text(encoding='utf-8'))
DOCKERFILE = (ROOT / 'Dockerfile').read_text(encoding='utf-8')
# The fields and actions that the custom resource definition of JobSet 0.13 contains.
FIELDS = {
    'spec': {
        'coordinator', 'failurePolicy', 'managedBy', 'network', 'replicatedJobs', 'startupPolicy', 'successPolicy',
        'suspend', 'ttlSecondsAfterFinished', 'volumeClaimPolicies',
    },
    'failurePolicy': {'maxRestarts', 'restartStrategy', 'rules'},
    'rules': {'action', 'name', 'onJobFailureMessagePatterns', 'onJobFailureReasons', 'targetReplicatedJobs'},
    'replicatedJobs': {'dependsOn', 'groupName', 'name', 'replicas', 'template'},
}  # fmt: skip
ACTIONS = {
    'FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts', 'RestartJob', 'RestartJobAndIgnoreMaxRestarts',
}  # fmt: skip


def test_the_jobset_has_only_fields_that_jobset_knows():
    """kubectl would refuse the file, or the cluster would ignore a misspelt field."""
    assert (MANIFEST['apiVersion'], MANIFEST['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    spec = MANIFEST['spec']
    assert set(spec) <= FIELDS['spec']
    assert set(spec['failurePolicy']) <= FIELDS['failurePolicy']
    for rule in spec['failurePolicy']['rules']:
        assert {'action', 'name'} <= set(rule) <= FIELDS['rules']
        assert rule['action'] in ACTIONS
    for job in spec['replicatedJobs']:
        assert {'name', 'template'} <= set(job) <= FIELDS['replicatedJobs']


@pytest.mark.cluster
@pytest.mark.skipif(not importlib.util.find_spec('kubernetes_validate'), reason='not installed: kubernetes-validate')
@pytest.mark.parametrize('version', ['1.30', '1.33'])
def test_the_job_and_its_pods_follow_the_schema_of_kubernetes(version):
    """A misspelt field would be ignored: pods without TPUs, or a job that restarts after an error of the user."""
    import kubernetes_validate

    for replicated in MANIFEST['spec']['replicatedJobs']:
        job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'slice'}, **replicated['template']}
        kubernetes_validate.validate(job, version, strict=True)


def test_the_job_matches_the_slice_that_it_asks_for():
    """Pods would wait forever for a slice with another number of hosts."""
    job = MANIFEST['spec']['replicatedJobs'][0]['template']['spec']
    pod = job['template']['spec']
    rows, columns = map(int, pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x'))
    chips = pod['containers'][0]['resources']['limits']['google.com/tpu']
    assert job['parallelism'] == job['completions'] == rows * columns / chips
    assert pod['containers'][0]['name'] == job['podFailurePolicy']['rules'][0]['onExitCodes']['containerName']


@pytest.mark.cluster
def test_the_lines_of_the_dockerfile_make_an_image_that_trains(tmp_path):
    """The image could not be built, or a file of the package would be missing in it.

    The lines run in an empty folder and a new virtual environment instead of a container, with JAX for CPU.
    """
    subprocess.run([sys.executable, '-m', 'venv', tmp_path / 'python'], check=True)
    environment = os.environ | ONE_DEVICE | {'PATH': f'{tmp_path / "python/bin"}:{os.environ["PATH"]}'}
    environment.pop('PYTHONPATH', None)
    folder = tmp_path / 'root'
    folder.mkdir()
    ignored = shutil.ignore_patterns(*re.sub(r'\*\*/', '', (ROOT / '.dockerignore').read_text()).split())
    for line in DOCKERFILE.splitlines():
        match line.split(maxsplit=1):
            case ['ARG', argument]:
                assert argument == 'ACCELERATOR=cuda13'
                environment['ACCELERATOR'] = 'cpu'
            case ['WORKDIR', name]:
                folder = tmp_path / 'root' / name.strip('/')
                folder.mkdir()
            case ['COPY', '. .']:
                shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)
            case ['COPY', names]:
                *sources, target = names.split()
                for source in sources:
                    shutil.copy(ROOT / source, folder / target)
            case ['RUN', command]:
                subprocess.run(command, shell=True, cwd=folder, env=environment, check=True)
            case ['CMD', command]:
                help_text = subprocess.check_output(json.loads(command), cwd=folder, env=environment, text=True)
                assert '--workdir' in help_text
            case ['FROM', image]:
                assert re.fullmatch(r'python:3\.\d+-slim', image)
            case _:
                assert not line or line.startswith('#'), line
    container = MANIFEST['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers'][0]
    run = [*container['command'], *SMALL_RUN, '--config.steps=6', f'--workdir={tmp_path / "run"}']
    output = subprocess.check_output(run, cwd=folder, env=environment, text=True)
    assert 'finished: top-1' in output
